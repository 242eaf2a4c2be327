"""The table of a run: a column per model, the same figures in the terminal, the report and the model card."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prefloop.evaluate.checkup import Checkup
from prefloop.report.story import Round, Story


def _interval(value: tuple[float, float, float] | None, pattern: str = "{:.2f}") -> str:
    return "-" if value is None else f"{pattern} [{pattern}, {pattern}]".format(*value)


def _number(value: float | None, pattern: str = "{:+.1f}") -> str:
    return "-" if value is None else pattern.format(value)


def _of(round: Round, read: Callable[[Checkup], str]) -> str:
    return "-" if round.checkup is None else read(round.checkup)


FIGURES: list[tuple[str, str, Callable[[Round], str]]] = [
    ("alpha", "length coefficient, in nats per unit of length", lambda r: f"{r.length.alpha:.4g}" if r.length else "-"),
    (
        "length gap",
        "mean length of winners minus losers, at alpha = 0 and at the alpha used",
        lambda r: f"{r.length.gap_at_zero:+.1f} to {r.length.gap:+.1f} {r.length.unit}" if r.length else "-",
    ),
    (
        "held-out accuracy",
        "share of held-out pairs that beta (log pi - log pi_start) ranks as labelled, with its 95 % interval",
        lambda r: _of(r, lambda c: _interval(c.accuracy)),
    ),
    (
        "margin",
        "its mean margin, in reward units",
        lambda r: _of(r, lambda c: _number(c.margin and c.margin[0], "{:+.3f}")),
    ),
    (
        "answer length",
        "mean characters of own answers to held-out prompts",
        lambda r: _of(r, lambda c: _number(c.length_chars and c.length_chars[0], "{:.0f}")),
    ),
    (
        "finished",
        "share of these answers that ended before the limit of new tokens",
        lambda r: _of(r, lambda c: _number(c.finished, "{:.2f}")),
    ),
    ("chosen", "change of the summed log-probability of held-out chosen responses since the start model, in nats",
     lambda r: _of(r, lambda c: _number(c.chosen_change))),
    ("rejected", "the same for rejected responses", lambda r: _of(r, lambda c: _number(c.rejected_change))),
    (
        "reward",
        "mean reward of own answers to held-out prompts, with its 95 % interval, as the evaluator gives it",
        lambda r: _of(r, lambda c: _interval(c.reward)),
    ),
    (
        "answers kept",
        "share of the scored answers that the filter keeps for training",
        lambda r: _number(r.figures.get("share kept"), "{:.2f}"),
    ),
    (
        "pairs ranked right",
        "share of pairs that the reward model was not trained on whose chosen answer has the higher reward, with its "
        "95 % interval; cross-fit: every pair by the fold's model that has not seen its prompt",
        lambda r: _interval(r.ranking.overall.accuracy) if r.ranking else "-",
    ),
    (
        "reward margin",
        "mean r(chosen) - r(rejected) of these pairs",
        lambda r: _number(r.ranking.overall.margin[0], "{:+.3f}") if r.ranking else "-",
    ),
    (
        "log loss",
        "mean -log sigmoid(r(chosen) - r(rejected)) of these pairs; 0.693 knows nothing",
        lambda r: _number(r.ranking and r.ranking.log_loss, "{:.3f}"),
    ),
    (
        "calibration error",
        "how far sigmoid(|margin|), how sure it is, is from how often it is right, in ten bins",
        lambda r: _number(r.ranking and r.ranking.calibration_error, "{:.3f}"),
    ),
    (
        "Brier score",
        "mean (1 - sigmoid(margin))^2; 0.25 knows nothing",
        lambda r: _number(r.ranking and r.ranking.brier, "{:.3f}"),
    ),
    (
        "effective share",
        "effective sample size of the weights, (sum w)^2 / sum w^2, as a share of the answers",
        lambda r: _number(r.figures.get("effective share"), "{:.2f}"),
    ),
    (
        "KL / token",
        "mean log pi - log pi_start a token of own answers, in nats, as they were sampled; the start is pi(-1)",
        lambda r: _of(r, lambda c: _number(c.kl_per_token and c.kl_per_token[0], "{:.4f}")),
    ),
    (
        "win rate",
        "share of held-out prompts on which the evaluator prefers it to the start, at the last evaluation",
        lambda r: _interval(r.evaluations[-1][1]["against_start"]["rate"]) if r.evaluations else "-",
    ),
]  # fmt: skip


def cells(rounds: Sequence[Round]) -> list[list[str]]:
    """One row per figure that any of the models has: its name, and its value for every model."""
    rows = [[name, *(read(round) for round in rounds)] for name, _, read in FIGURES]
    return [row for row in rows if set(row[1:]) != {"-"}]


def meanings(rows: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """What the figures of these rows mean: (name, meaning)."""
    shown = {row[0] for row in rows}
    return [(name, meaning) for name, meaning, _ in FIGURES if name in shown]


def markdown_table(story: Story) -> str:
    """The table in Markdown, with what each figure means below it."""
    lines = ["| | " + " | ".join(round.label for round in story.rounds) + " |", "|---|" + "---:|" * len(story.rounds)]
    rows = cells(story.rounds)
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    legend = [f"- **{name}**: {meaning}" for name, meaning in meanings(rows)]
    return "\n".join([*lines, "", *legend])


WIN_RATES = (
    "step",
    "against the start, evaluator",
    "against the start, annotator",
    "against the evaluation before, evaluator",
    "characters",
    "log pi/pi(0) a token",
)


def win_rates(story: Story) -> list[list[str]]:
    """The evaluations of an online method, a row each, under the headings `WIN_RATES`."""
    return [
        [
            str(step),
            _rate(found["against_start"]),
            _rate(found["against_start_by_the_annotator"]),
            _rate(found["against_previous"]),
            f"{found['length_chars'][0]:.0f}",
            f"{found['log_ratio_per_token'][0]:.4f}",
        ]
        for round in story.rounds
        for step, found in round.evaluations
    ]


def _rate(found: dict[str, Any]) -> str:
    if found["rate"] is None:
        return f"none ({found['abstained']} abstained)"
    abstained = f", {found['abstained']} abstained" if found["abstained"] else ""
    return _interval(found["rate"]) + abstained


def terminal_table(story: Story) -> Table:
    """The table for a terminal."""
    table = Table(title=f"{story.recipe}: {story.path}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for round in story.rounds:
        table.add_column(round.label, justify="right")
    for row in cells(story.rounds):
        table.add_row(*row)
    return table
