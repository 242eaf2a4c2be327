"""`report.html`: one or several runs as one self-contained page. `page_of` says what is on it, `page.html` where.

All that a run holds, above all text of models, is escaped by the template, or is JSON that a script turns into text
nodes. The page's content policy allows its own script and style sheet by their hashes, and nothing else.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from prefloop.atomic import write_atomically
from prefloop.evaluate.figures import Figures, Report, figures_of, percent
from prefloop.report.charts import Chart, draw, key, number
from prefloop.report.costs import costs
from prefloop.report.curves import charts
from prefloop.report.readings import Reading, judge_counts, read, slot_share
from prefloop.report.samples import embedded, samples
from prefloop.report.story import Story
from prefloop.report.table import ALPHAS, WIN_RATES, alphas, alphas_meaning, cells, meanings, win_rates

FOLDER = Path(__file__).parent
REPORT = "report.html"

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table: `head`, and rows as long. `text`: how many columns from the left hold words; the others hold figures."""

    head: Row
    rows: list[Row]
    text: int = 1


@dataclass(frozen=True)
class RunPart:
    """What a page says of one run. evaluation: (title, table) of what `prefloop eval` measured."""

    name: str
    summary: str
    readings: list[Reading]
    evaluation: list[tuple[str, Table]]
    figures: Table
    win_rates: Table
    alphas: Table
    alphas_meaning: str
    judge: list[Row]
    costs: Table
    counts: Table
    measured: Table
    stages: Table
    facts: list[Row]


@dataclass(frozen=True)
class Page:
    """All that is on a page. `final`: the last models of several runs side by side; `read`: whether patterns were
    looked for, which are those of training; `options`: (name, a value a run,
    whether they differ).
    """

    title: str
    runs: list[RunPart]
    final: Table | None
    meanings: list[Row]
    charts: list[tuple[str, list[Chart]]]
    read: bool
    options: list[tuple[str, list[str], bool]]
    samples: dict[str, Any]


def write_page(stories: Sequence[Story], path: Path) -> Path:
    """Write the page of these runs, whole or not at all; returns its path."""
    write_atomically(path, render(page_of(stories)).encode("utf-8", "replace"))
    return path


def page_of(stories: Sequence[Story]) -> Page:
    """What is on the page of one run, or of several side by side."""
    several = len(stories) > 1
    trained = [story for story in stories if story.rounds and not story.evaluation]
    last = cells([story.rounds[-1] for story in trained])
    return Page(
        title=f"{len(stories)} runs side by side" if several else f"{stories[0].recipe}: {stories[0].name}",
        runs=[_part(story) for story in stories],
        final=Table(("", *(story.name for story in trained)), [tuple(row) for row in last])
        if several and last
        else None,
        meanings=[*meanings([row for story in stories for row in cells(story.rounds)])],
        charts=charts(stories),
        read=not all(story.evaluation for story in stories),
        options=_options(stories),
        samples=samples(stories),
    )


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        page=page,
        draw=draw,
        key=key,
        data=Markup(embedded(page.samples)),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'",
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _part(story: Story) -> RunPart:
    figures = [tuple(row) for row in cells(story.rounds)]
    return RunPart(
        name=story.name,
        summary=_summary(story),
        readings=read(story),
        evaluation=[(found.title, Table(found.head, found.rows)) for found in _evaluation(story)],
        figures=Table(("", *(round.label for round in story.rounds)), figures),
        win_rates=Table(WIN_RATES, [tuple(row) for row in win_rates(story)], text=0),
        alphas=Table(ALPHAS, [tuple(row) for row in alphas(story)] if story.tried else []),
        alphas_meaning=alphas_meaning(story),
        judge=_judge(story),
        costs=_costs(story),
        counts=_by_round(story, "counts"),
        measured=_by_round(story, "figures"),
        stages=Table(("stage", "result", "sha256", "size", "seconds", "share"), _stages(story), text=3),
        facts=_facts(story),
    )


def _evaluation(story: Story) -> list[Figures]:
    return figures_of(story.evaluation) if story.evaluation else []


def _summary(story: Story) -> str:
    """One sentence: what was done to which model, and what came out."""
    if story.evaluation:
        return _summary_of_evaluation(story.evaluation, story.seconds)
    source = next(
        (story.config[name] for name in ("data", "pairs", "prompts") if story.config.get(name)), "no data named"
    )
    rounds = [round for round in story.rounds if round.training]
    config = story.config
    said = [
        f"{story.recipe} on {config.get('policy') or config.get('base')} with {source}, "
        f"{_plural(len(rounds), 'round')} of training"
    ]
    if story.alpha is not None:
        said.append(f"alpha = {story.alpha:g} of {len(story.tried)} tried")
    confirmed = [round.candidate.rate for round in story.rounds if round.candidate and round.candidate.rate]
    if confirmed:
        said.append("judged {:.2f} [{:.2f}, {:.2f}] on held-out prompts".format(*confirmed[-1]))
    first, last = (next((r.checkup for r in order if r.checkup), None) for order in (story.rounds, story.rounds[::-1]))
    if last and last.accuracy:
        said.append("held-out accuracy {:.2f} [{:.2f}, {:.2f}]".format(*last.accuracy))
    ranked = next((r.ranking for r in story.rounds[::-1] if r.ranking), None)
    if ranked:
        said.append("pairs ranked right {:.2f} [{:.2f}, {:.2f}]".format(*ranked.overall.accuracy))
    evaluations = [row for round in story.rounds for row in round.evaluations]
    win_rates = [r.win_rate for r in story.rounds if r.win_rate]
    win_rates += [found["against_start"]["rate"] for _, found in evaluations if found["against_start"]["rate"]]
    if win_rates:
        said.append("win rate {:.2f} [{:.2f}, {:.2f}]".format(*win_rates[-1]))
    if first and last and first.length_chars and last.length_chars:
        said.append(f"answers {first.length_chars[0]:.0f} to {last.length_chars[0]:.0f} characters")
    if first and last and first.reward and last.reward:
        said.append(f"reward {first.reward[0]:.2f} to {last.reward[0]:.2f}")
    if last and last.kl_per_token:
        said.append(f"drift {last.kl_per_token[0]:.3f} nats a token")
    return "; ".join([*said, _duration(story.seconds)]) + "."


def _summary_of_evaluation(found: Report, seconds: float) -> str:
    said = [f"evaluation of {found.policy}"]
    if found.win_rate:
        rate, even = percent(found.win_rate.overall.rate), percent(found.win_rate.length_controlled)
        said.append(f"wins {rate} % against {found.against}, judged by {found.annotator}; {even} % at equal length")
    if found.implicit_reward:
        said.append(f"ranks {percent(found.implicit_reward.overall.accuracy)} % of the held-out pairs as labelled")
    if found.drift and found.drift.kl_per_token:
        said.append(f"drift {found.drift.kl_per_token[0]:.3f} nats a token")
    return "; ".join([*said, _duration(seconds)]) + "."


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _duration(seconds: float) -> str:
    """
    >>> _duration(42.1), _duration(605), _duration(7500)
    ('42 s', '10 min 5 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _size(size: int) -> str:
    """
    >>> _size(512), _size(36428), _size(538090408)
    ('512 B', '36 kB', '538 MB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{number(size / scale)} {unit}" if size < 10 * scale else f"{size / scale:.0f} {unit}"
    return f"{size} B"


def _judge(story: Story) -> list[Row]:
    """What an annotator said and used."""
    counts = judge_counts(story)
    names = {"tie": "ties", "identical": "not asked: identical answers", "unfinished": "with a cut answer"}
    shown = ("pairs", "decided", "tie", "abstained", "identical", "unfinished")
    rows: list[Row] = [(names.get(name, name), str(counts[name])) for name in shown if name in counts]
    share = slot_share(counts)
    if share:
        slots = f"{counts['first_slot']} the first, {counts['second_slot']} the second, {counts['consistent']} neither"
        rows.append(("follows the slot", "{:.2f} [{:.2f}, {:.2f}]".format(*share) + f" ({slots})"))
    for name, used in story.usage.items():
        money = "unknown: the model has no price" if used.money is None else number(used.money)
        rows.append((name, f"{used.calls} calls, {used.cache_hits} answers from the cache"))
        rows.append(("tokens asked + answered", f"{used.tokens_in} + {used.tokens_out}"))
        rows.append(("money", money))
        rows += [(f"fault: {kind}", str(n)) for kind, n in sorted(used.faults.items())]
    return rows


def _costs(story: Story) -> Table:
    labels, rows = costs(story)
    return Table(("", *labels), [tuple(row) for row in rows])


def _by_round(story: Story, what: Literal["counts", "figures"]) -> Table:
    """What was kept and dropped, or measured on the way, a column a round."""
    labels: list[str] = []
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, entry in story.stages.items():
        label, _, part = name.rpartition("/")
        for reason, value in (entry.get(what) or {}).items():
            labels += [] if label in labels else [label]
            found.setdefault((part, reason), {})[label] = str(value) if what == "counts" else number(value)
    rows = [(*row, *(values.get(label, "") for label in labels)) for row, values in found.items()]
    return Table(("stage", "what", *labels), rows, text=2)


def _stages(story: Story) -> list[Row]:
    """Every stage: what it wrote, its hash, size and seconds; the total last."""
    rows: list[Row] = []
    total = story.seconds or 1.0
    for name, entry in story.stages.items():
        artifact = entry.get("artifact") or {}
        size = artifact.get("bytes", sum(size for size, _ in artifact.get("files", {}).values()))
        share = f"{100 * entry['seconds'] / total:.0f} %"
        written = (str(artifact.get("path", "")), str(artifact.get("sha256", ""))[:12], _size(size))
        rows.append((name, *written, f"{entry['seconds']:.1f}", share))
    return [*rows, ("all stages", "", "", "", f"{story.seconds:.1f}", "100 %")]


def _facts(story: Story) -> list[Row]:
    """What was run and from what."""
    config, environment = story.config, story.environment
    names = (
        "policy",
        "against",
        "reference",
        "base",
        "aligned",
        "data",
        "pairs",
        "prompts",
        "reward",
        "value",
        "held_out",
        "annotator",
        "evaluator",
        "scorer",
        "seed",
    )
    versions = [f"{name} {environment[name]}" for name in environment if name not in ("platform", "cpus")]
    engines = dict.fromkeys(
        f"{event['name']} on {event['device']}, {event['dtype']}"
        for event in story.events
        if event["event"] == "engine" and {"name", "device", "dtype"} <= set(event)
    )
    skipped = sum(event["event"] == "row skipped" for event in story.events)
    rows = [
        ("recipe", story.recipe),
        *((name.replace("_", " "), config.get(name)) for name in names),
        ("versions", ", ".join(versions)),
        ("machine", f"{environment.get('platform', 'unknown')}, {environment.get('cpus', '?')} CPUs"),
        ("sampled with", "; ".join(engines)),
        ("rows skipped", skipped or None),
        ("time", _duration(story.seconds)),
        ("folder", str(story.path)),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _options(stories: Sequence[Story]) -> list[tuple[str, list[str], bool]]:
    """Every option of the runs, those that differ first."""
    flat = [_flat(story.config) for story in stories]
    rows = []
    for name in dict.fromkeys(name for options in flat for name in options):
        values = [options.get(name, "") for options in flat]
        rows.append((name, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: str(value)}
    return flat
