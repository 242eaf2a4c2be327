"""The table of a run: a column per model, the same figures in the terminal, the report and the model card."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from prefloop.evaluate.candidate import Candidate
from prefloop.evaluate.checkup import Checkup
from prefloop.evaluate.figures import interval
from prefloop.report.story import Round, Story


def _interval(value: tuple[float, float, float] | None) -> str:
    return interval(value, "{:.2f}")


def _number(value: float | None, pattern: str = "{:+.1f}") -> str:
    return "-" if value is None else pattern.format(value)


def _at_equal_length(evaluation: dict[str, Any]) -> str:
    """Not in runs of versions that did not compute it."""
    return _interval(evaluation.get("at_equal_length"))


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
        "share of held-out pairs that the implicit reward ranks as labelled, with its 95 % interval: beta (log pi - "
        "log pi_start), or what the loss takes in its place (means over tokens; no reference)",
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
        lambda r: _interval(r.evaluations[-1][1]["against_start"]["rate"] if r.evaluations else r.win_rate),
    ),
    (
        "at equal length",
        "this win rate if its answers were as long as the start's (docs/evaluation.md)",
        lambda r: _at_equal_length(r.evaluations[-1][1]) if r.evaluations else "-",
    ),
]  # fmt: skip


def cells(rounds: Sequence[Round]) -> list[list[str]]:
    """One row per figure that any of the models has: its name, and its value for every model."""
    rows = [[name, *(read(round) for round in rounds)] for name, _, read in FIGURES]
    return [row for row in rows if any(value != "-" for value in row[1:])]


def meanings(rows: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """What the figures of these rows mean: (name, meaning)."""
    shown = {row[0] for row in rows}
    return [(name, meaning) for name, meaning, _ in FIGURES if name in shown]


def markdown_table(story: Story) -> str:
    """The table in Markdown, with what each figure means below it."""
    lines = ["| | " + " | ".join(round.label for round in story.rounds) + " |", "|---|" + "---:|" * len(story.rounds)]
    rows = cells(story.rounds)
    if not rows:
        return "No model was looked at."
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    legend = [f"- **{name}**: {meaning}" for name, meaning in meanings(rows)]
    return "\n".join([*lines, "", *legend])


WIN_RATES = (
    "step",
    "against the start, evaluator",
    "at equal length",
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
            _at_equal_length(found),
            _rate(found["against_start_by_the_annotator"]),
            _rate(found["against_previous"]),
            f"{found['length_chars'][0]:.0f}",
            f"{found['log_ratio_per_token'][0]:.4f}",
        ]
        for round in story.rounds
        for step, found in round.evaluations
    ]


ALPHAS = ("alpha", "judged", "tokens", "finished", "repeated", "pairs of words", "perplexity", "guard")
"""Headings of `alphas`; `alphas_meaning` says what they are."""


def alphas(story: Story) -> list[list[str]]:
    """What ExPO tried, a row each, the chosen one marked; and the outcome on held-out prompts."""
    rows = [
        [f"{one.alpha:g}{' (chosen)' if one.alpha == story.alpha else ''}", *_of_candidate(one)] for one in story.tried
    ]
    confirmed = [(round.label, round.candidate) for round in story.rounds if round.candidate]
    return rows + [[f"{one.alpha:g} ({label}), held out", *_of_candidate(one)] for label, one in confirmed]


def alphas_meaning(story: Story) -> str:
    """What the columns of `alphas` are."""
    annotator = story.config.get("annotator")
    judged = f"share of prompts on which {annotator} prefers the answer to that of alpha = 0"
    if not annotator:
        judged = f"mean score by {story.config.get('scorer')}"
    return (
        f"judged: {judged}, with its 95 % interval; tokens of an answer; share of finished answers; repeated: share "
        "of runs of four words that an answer has had before; share of different pairs of words; perplexity of the "
        "answers under the aligned model; guard: why an alpha was refused. alpha = 0 is the aligned model, alpha = -1 "
        "its base. The same seeds at every alpha."
    )


def _of_candidate(one: Candidate) -> list[str]:
    if not (one.answers and one.length_tokens and one.perplexity and one.repetition):
        return ["-"] * (len(ALPHAS) - 2) + [one.refused or ""]
    return [
        _interval(one.rate),
        f"{one.length_tokens[0]:.1f}",
        _number(one.finished, "{:.2f}"),
        f"{one.repetition[0]:.3f}",
        _number(one.distinct_2, "{:.3f}"),
        f"{one.perplexity[0]:.2f}",
        one.refused or "",
    ]


def _rate(found: dict[str, Any]) -> str:
    if found["rate"] is None:
        return f"none ({found['abstained']} abstained)"
    abstained = f", {found['abstained']} abstained" if found["abstained"] else ""
    return _interval(found["rate"]) + abstained


def terminal_tables(story: Story) -> list[Table]:
    """The tables for a terminal: of the models, and of what ExPO tried."""
    title = f"{story.recipe}: {story.path}"
    rows = cells(story.rounds)
    found = [_terminal(title, ("", *(round.label for round in story.rounds)), rows)] if rows else []
    return [*found, _terminal("search over alpha", ALPHAS, alphas(story))] if story.tried else found


def _terminal(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
