"""What an evaluation found: the record behind `eval.json`, and its figures as rows for the terminal and the page."""

from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from prefloop.evaluate.drift import Drift
from prefloop.evaluate.implicit_pairs import ImplicitPairs
from prefloop.evaluate.win_rate import HeadToHead, WinRate
from prefloop.records import Record

FIGURES = "eval.json"
COMPARED = "compared.jsonl"
"""What was judged: a group a prompt, of our answer and theirs."""


class Report(Record):
    """What `eval.json` holds; a part that was not asked for is left out."""

    policy: str
    against: str | None = None
    annotator: str | None = None
    prompts: int | None = None
    win_rate: HeadToHead | None = None
    implicit_reward: ImplicitPairs | None = None
    drift: Drift | None = None


class Figures(NamedTuple):
    """One table: rows as long as `head`; the first column names what a row is about."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def figures_of(report: Report) -> list[Figures]:
    """The tables of what was measured."""
    found = []
    if report.win_rate:
        found.append(_win_rate(report, report.win_rate))
    if report.implicit_reward:
        found.append(_implicit_reward(report.implicit_reward))
    if report.drift:
        found.append(_drift(report.drift))
    return found


def table_of(figures: Figures) -> Table:
    """What the terminal shows."""
    table = Table(title=escape(figures.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(figures.head):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in figures.rows:
        table.add_row(*map(escape, row))
    return table


def _win_rate(report: Report, found: HeadToHead) -> Figures:
    parts: list[tuple[str, WinRate]] = [("all", found.overall), *found.categories.items()]
    rows = [
        (
            name,
            percent(part.rate),
            f"{part.wins}-{part.losses}-{part.ties}",
            "-" if part.sign_test is None else f"{part.sign_test:.2g}",
            str(part.prompts_needed or "-"),
        )
        for name, part in parts
    ]
    rows.append(("at equal length", percent(found.length_controlled), "", "", ""))
    rows.append(("abstained", f"{found.overall.abstained} of {report.prompts}", "", "", ""))
    if found.slots:
        followed = found.slots.get("first_slot", 0) + found.slots.get("second_slot", 0)
        rows.append(("judge followed the slot", f"{followed} of {sum(found.slots.values())}", "", "", ""))
    if found.length_chars:
        rows.append(("characters", "{:.0f} and {:.0f}".format(*found.length_chars), "", "", ""))
    title = f"{report.policy} against {report.against}, judged by {report.annotator}"
    return Figures(title, ("", "win rate, %", "won-lost-tied", "sign test", "needed"), rows)


def _implicit_reward(found: ImplicitPairs) -> Figures:
    rows = [
        (name, str(part.pairs), percent(part.accuracy), interval(part.margin))
        for name, part in [("all", found.overall), *found.categories.items()]
    ]
    rows += [(f"RewardBench {name}", "", f"{100 * score:.1f}", "") for name, score in (found.rewardbench or {}).items()]
    rows.append(("calibration error", "", f"{100 * found.calibration_error:.1f}", f"Brier score {found.brier:.3f}"))
    rows.append(("chosen, change a token", "", "", interval(found.chosen_change)))
    rows.append(("rejected, change a token", "", "", interval(found.rejected_change)))
    return Figures(f"implicit reward, beta = {found.beta:g}", ("", "pairs", "accuracy, %", "margin"), rows)


def _drift(found: Drift) -> Figures:
    entropy = (
        [] if found.reference_entropy is None else [("entropy of the reference", f"{found.reference_entropy:.3f}")]
    )
    rows = [
        ("KL a token, nats", interval(found.kl_per_token)),
        ("entropy a token, nats", interval(found.entropy)),
        *entropy,
        ("tokens", interval(found.length_tokens, "{:.1f}")),
        ("finished, %", f"{100 * found.finished:.1f}"),
        ("repeated, %", percent(found.repetition)),
        ("distinct words, pairs of words", f"{found.distinct_1:.3f}, {found.distinct_2:.3f}"),
    ]
    return Figures("drift, on own answers", ("", "value"), rows)


def interval(value: tuple[float, float, float] | None, pattern: str = "{:.3f}") -> str:
    return "-" if value is None else f"{pattern} [{pattern}, {pattern}]".format(*value)


def percent(value: tuple[float, float, float] | None) -> str:
    return interval(None if value is None else (100 * value[0], 100 * value[1], 100 * value[2]), "{:.1f}")
