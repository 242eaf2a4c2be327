"""Small charts as inline SVG: plain data in, mark-up out. Colours and fonts are the page's style sheet's (`page.css`).

A chart is drawn 360 units wide, which is about its width on a phone, so that its letters are readable there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 214
TOP, RIGHT, BOTTOM = 22, 10, 36
COLOURS = 6
"""How many series are told apart by colour; more repeat them."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line or row of dots. `intervals`: [low, high] of every point, drawn as whiskers. `notes`: what hovering says.

    line: "solid", "dashed", "dotted", "steps" (a value holds until the next point) or "none" (dots alone).
    legend: False for a series that the caption explains, and whose colour is another's.
    """

    name: str
    points: list[Point]
    intervals: list[tuple[float, float]] | None = None
    notes: list[str] | None = None
    colour: int = 0
    line: str = "solid"
    dots: bool = False
    legend: bool = True


@dataclass(frozen=True)
class Chart:
    """One chart. `caption` says what to look for. `ticks` are names of x = 0, 1, ... where x is no number.

    level: a y to compare with, such as a coin's 0.5. x_to: where the x axis ends, if not at the last point.
    """

    title: str
    x: str
    y: str
    caption: str
    series: list[Series]
    ticks: tuple[str, ...] = ()
    level: float | None = None
    x_to: float | None = None

    @property
    def legend(self) -> list[Series]:
        """The series that a legend names: none where there is one."""
        named = [series for series in self.series if series.legend]
        return named if len(named) > 1 else []


def thinned(points: Sequence[Point], most: int = 120) -> list[Point]:
    """At most `most` points: means over equal runs of neighbours, so that no spike passes for the rule.

    >>> thinned([(1, 0.0), (2, 2.0), (3, 4.0), (4, 8.0)], most=2)
    [(1.5, 1.0), (3.5, 6.0)]
    """
    if len(points) <= most:
        return list(points)
    bounds = [round(i * len(points) / most) for i in range(most + 1)]
    runs = [points[a:b] for a, b in pairwise(bounds)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def ticks_between(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], 1, 2 or 5 times a power of ten apart, at most `about`, and two at least.

    >>> ticks_between(0, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    for step in (power * factor for factor in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < about:
            # Rounded, because 3 * 0.1 would be shown with all its digits.
            return [round(i * step, 12) for i in range(first, last + 1)]
    raise AssertionError("unreachable: 20 powers of ten are wider than the range")


def number(value: float) -> str:
    """A number as a person writes it: 3 significant digits, whole ones from 100 on.

    >>> number(1234.5), number(0.03021), number(-2.0), number(0.0000312)
    ('1234', '0.0302', '-2', '3.12e-05')
    """
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def draw(chart: Chart) -> Markup:
    """The chart as an `svg` element. Every text in it is escaped."""
    xs = [x for series in chart.series for x, _ in series.points]
    ys = [y for series in chart.series for _, y in series.points]
    ys += [bound for series in chart.series for interval in series.intervals or [] for bound in interval]
    ys += [] if chart.level is None else [chart.level]
    y_low, y_high = _padded(min(ys), max(ys), 0.06)
    if chart.ticks:
        x_low, x_high = -0.5, len(chart.ticks) - 0.5
    else:
        x_low, x_high = _padded(min(xs), max(xs) if chart.x_to is None else chart.x_to, 0.02)
    y_ticks = ticks_between(y_low, y_high)
    left = 12 + 6.2 * max(len(number(tick)) for tick in y_ticks)

    def at_x(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (WIDTH - RIGHT - left)

    def at_y(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(chart, left, y_ticks, _x_ticks(chart, x_low, x_high), at_x, at_y)]
    n = len(chart.series)
    for i, series in enumerate(chart.series):
        # Side by side, where several share a name on the x axis.
        shift = (i - (n - 1) / 2) * 0.5 / n if chart.ticks and n > 1 else 0.0
        places = [(at_x(x + shift), at_y(y)) for x, y in series.points if x_low <= x <= x_high]
        parts.append(_series(series, places, at_y))
    label = f"{chart.title}. {chart.caption}"
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )


def key(series: Series) -> Markup:
    """What a series looks like, for a legend."""
    line = Markup("") if series.line == "none" else Markup('<path class="{}" d="M0 6H22"/>').format(_line_class(series))
    dot = Markup('<circle cx="11" cy="6" r="3"/>') if series.dots else Markup("")
    return Markup('<svg class="key c{}" viewBox="0 0 22 12" aria-hidden="true">{}{}</svg>').format(
        series.colour % COLOURS, line, dot
    )


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    room = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _x_ticks(chart: Chart, low: float, high: float) -> list[tuple[float, str]]:
    if chart.ticks:
        return [(float(i), name) for i, name in enumerate(chart.ticks)]
    return [(tick, number(tick)) for tick in ticks_between(low, high)]


def _axes(
    chart: Chart,
    left: float,
    y_ticks: Sequence[float],
    x_ticks: Sequence[tuple[float, str]],
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
) -> Markup:
    foot = HEIGHT - BOTTOM
    parts = [
        Markup('<text class="unit" x="0" y="11">{}</text>').format(chart.y),
        Markup('<text class="unit end" x="{}" y="{}">{}</text>').format(WIDTH - RIGHT, HEIGHT - 3, chart.x),
    ]
    for tick in y_ticks:
        y = f"{at_y(tick):.1f}"
        parts.append(Markup('<path class="grid" d="M{:.1f} {}H{}"/>').format(left, y, WIDTH - RIGHT))
        parts.append(Markup('<text class="end" x="{:.1f}" y="{}" dy="3.5">{}</text>').format(left - 6, y, number(tick)))
    for tick, name in x_ticks:
        parts.append(Markup('<text class="middle" x="{:.1f}" y="{}">{}</text>').format(at_x(tick), foot + 14, name))
    if chart.level is not None:
        y = f"{at_y(chart.level):.1f}"
        parts.append(Markup('<path class="level" d="M{:.1f} {}H{}"/>').format(left, y, WIDTH - RIGHT))
    return Markup("").join(parts)


def _series(series: Series, places: Sequence[Point], at_y: Callable[[float], float]) -> Markup:
    parts: list[Markup] = []
    for (x, _), (low, high) in zip(places, series.intervals or [], strict=False):
        parts.append(Markup('<path class="whisker" d="M{:.1f} {:.1f}V{:.1f}"/>').format(x, at_y(low), at_y(high)))
    if series.line != "none" and len(places) > 1:
        joint = "H{0:.1f}V{1:.1f}" if series.line == "steps" else "L{0:.1f} {1:.1f}"
        path = "M{:.1f} {:.1f}".format(*places[0]) + "".join(joint.format(x, y) for x, y in places[1:])
        parts.append(Markup('<path class="{}" d="{}"/>').format(_line_class(series), path))
    if series.dots or len(places) == 1:
        notes = series.notes or [f"{number(x)}: {number(y)}" for x, y in series.points]
        for (x, y), note in zip(places, notes, strict=False):
            said = escape(f"{series.name}: {note}" if series.name else note)
            parts.append(
                Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3.2"><title>{}</title></circle>').format(x, y, said)
            )
    return Markup('<g class="c{}">{}</g>').format(series.colour % COLOURS, Markup("").join(parts))


def _line_class(series: Series) -> str:
    return f"line {series.line}" if series.line in ("dashed", "dotted") else "line"
