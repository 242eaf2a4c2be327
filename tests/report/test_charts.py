"""Charts as data and as drawn: where a point lies, what a tick says, that text stays text."""

import re
from xml.etree import ElementTree

import pytest

from prefloop.report.charts import Chart, Series, draw, key, number, thinned, ticks_between


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 0.93, [0, 0.2, 0.4, 0.6, 0.8]),
        (-0.03, 0.03, [-0.02, 0, 0.02]),
        (17, 4000, [1000, 2000, 3000, 4000]),
        (-140, 33, [-100, -50, 0]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_numbers_inside_the_axis(low: float, high: float, ticks: list[float]) -> None:
    assert ticks_between(low, high) == pytest.approx(ticks)


def test_a_number_has_three_digits_and_no_more() -> None:
    assert [number(x) for x in (0, 0.30000000000000004, 1234.5, -2.0, 0.0007304, 1e-7)] == [
        "0", "0.3", "1234", "-2", "0.00073", "1e-07",
    ]  # fmt: skip


def test_long_curves_become_means_of_neighbours() -> None:
    points = [(float(i), float(i % 2)) for i in range(1, 4001)]
    thin = thinned(points, most=100)
    assert len(thin) == 100
    assert thin[0] == (20.5, 0.5) and thin[-1] == (3980.5, 0.5)
    # Every point counts once, so the mean stays what it is.
    assert sum(y for _, y in thin) / 100 == pytest.approx(0.5)
    assert thinned(points[:100], most=100) == points[:100]


def circles(chart: Chart) -> list[tuple[float, float]]:
    svg = ElementTree.fromstring(draw(chart))
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter("circle")]


def test_points_lie_where_their_numbers_say() -> None:
    series = Series("a", [(0, 0), (5, 10), (10, 5)], dots=True)
    (x0, y0), (x1, y1), (x2, y2) = circles(Chart("t", "x", "y", "c", [series]))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert 20 < x0 < 40 and 330 < x2 < 350  # from the y axis to the right margin of 10
    assert y0 - y2 == pytest.approx((y0 - y1) / 2, abs=0.11)  # upwards is smaller
    assert y1 < y2 < y0


def test_whiskers_reach_from_low_to_high_and_stay_inside() -> None:
    series = Series("", [(0, 0.5), (1, 0.7)], [(0.2, 0.8), (0.6, 0.9)], dots=True)
    svg = draw(Chart("t", "x", "y", "c", [series], ticks=("start", "round-1"), level=0.5))
    whiskers = re.findall(r'whisker" d="M([\d.]+) ([\d.]+)V([\d.]+)"', svg)
    (x0, low0, high0), (_, low1, high1) = ([float(v) for v in w] for w in whiskers)
    dots = circles(Chart("t", "x", "y", "c", [series], ticks=("start", "round-1"), level=0.5))
    assert x0 == dots[0][0] and dots[0][1] == pytest.approx((low0 + high0) / 2, abs=0.11)
    assert low0 - high0 == pytest.approx(2 * (low1 - high1), abs=0.2)
    assert all(0 <= y <= 214 for y in (low0, high0, low1, high1))
    level = re.search(r'class="level" d="M[\d.]+ ([\d.]+)H', svg)
    assert level and float(level[1]) == pytest.approx(dots[0][1], abs=0.11)
    assert ">start<" in svg and ">round-1<" in svg


def test_a_single_point_and_a_flat_line_can_be_drawn() -> None:
    assert len(circles(Chart("t", "x", "y", "c", [Series("a", [(3, 2)])]))) == 1
    svg = draw(Chart("t", "x", "y", "c", [Series("a", [(0, 1), (1, 1)])]))
    assert "nan" not in svg and "inf" not in svg


def test_steps_hold_a_value_until_the_next_point() -> None:
    series = Series("a", [(0, 1), (1, 0), (2, 0.5)], line="steps")
    (path,) = re.findall(r'class="line" d="([^"]+)"', draw(Chart("t", "x", "y", "c", [series])))
    assert re.fullmatch(r"M[\d.]+ [\d.]+(H[\d.]+V[\d.]+){2}", path)


def test_text_in_a_chart_stays_text() -> None:
    bad = '"><script>alert(1)</script>'
    series = Series(bad, [(0, 1)], notes=[bad], dots=True)
    svg = draw(Chart(bad, bad, bad, bad, [series], ticks=(bad,)))
    assert "<script" not in svg and svg.count("&lt;script&gt;") == 7
    ElementTree.fromstring(svg)


def test_a_legend_shows_what_its_line_looks_like() -> None:
    assert 'class="line dashed"' in key(Series("a", [], line="dashed")) and "circle" not in key(Series("a", []))
    assert "path" not in key(Series("a", [], line="none", dots=True))
    series = [Series("a", [(0, 1)]), Series("b", [(0, 1)]), Series("b, dashed", [(0, 1)], legend=False)]
    assert [s.name for s in Chart("t", "x", "y", "c", series).legend] == ["a", "b"]
    assert Chart("t", "x", "y", "c", series[:1]).legend == []
