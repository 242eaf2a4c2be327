"""How good a judge is, before it is trusted or paid: its preferences against gold labels (`prefloop judge check`).

Which answer of a gold pair is shown as `a` follows from its content, so one that always answers a is right half the
time. In both orders: an answer "follows the slot" when it names the same slot, first or second, after the two answers
have changed places; it cannot be about the answers.
"""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prefloop.data.mapping import OnBadRow, load_pairs
from prefloop.errors import InputError
from prefloop.evaluate.reward_accuracy import accuracy, wilson_interval
from prefloop.feedback.annotator import Annotator, Comparison, Judgement
from prefloop.feedback.answers import LabelMass
from prefloop.feedback.estimate import Estimate, estimate
from prefloop.feedback.meter import Meter, Tally, described
from prefloop.feedback.stage import ask
from prefloop.records import Pair, Record
from prefloop.run import Stage

Interval = tuple[float, float, float]


class JudgeReport(Record):
    """What `check_judge` found. Intervals are [value, low, high] at 95 %; None where nothing can be said.

    agreement: share of judged pairs whose gold answer is preferred; ties count one half.
    same_slot: of the pairs decided in both orders, the share that follows the slot; first_slot, second_slot: pairs
    that follow each; consistent: pairs that do not.
    prefers_longer: of the decisions between answers of different length (characters), the share for the longer one;
    gold_longer: the same of the gold labels. length_correlation: of p - 1/2 with the relative difference in length,
    in [-1, 1] (through the origin, because which answer is called a is arbitrary).
    label_mass: mean probability on both labels; low_mass: share of questions below 1/2.
    usage: calls, tokens, money and faults by annotator. seconds: of the whole check.
    """

    annotator: str
    gold: str
    pairs: int
    judged: int
    ties: int
    abstained: dict[str, int]
    agreement: Interval | None
    same_slot: Interval | None
    consistent: int
    first_slot: int
    second_slot: int
    prefers_longer: Interval | None
    gold_longer: Interval | None
    length_correlation: float | None
    label_mass: float | None
    low_mass: float | None
    usage: dict[str, dict[str, Any]]
    seconds: float

    def render(self) -> Table:
        """A table for a terminal."""
        table = Table(
            title=f"{self.annotator} on {self.gold}", title_justify="left", box=SIMPLE_HEAD, show_header=False
        )
        table.add_column()
        table.add_column(overflow="fold")
        for name, value in self.rows():
            table.add_row(name, value)
        return table

    def rows(self) -> list[tuple[str, str]]:
        """Figures and their values, as text."""
        both = self.consistent + self.first_slot + self.second_slot
        slots = f"{self.first_slot} the first, {self.second_slot} the second, of {both}"
        rows = [
            ("pairs", f"{self.judged} of {self.pairs} judged"),
            ("abstained", ", ".join(f"{n} {reason}" for reason, n in self.abstained.items()) or "0"),
            ("ties", str(self.ties)),
            ("agrees with gold", _percent(self.agreement)),
            ("follows the slot", f"{_percent(self.same_slot)} ({slots})" if both else "shows no slots"),
            ("prefers the longer", f"{_percent(self.prefers_longer)}; gold: {_percent(self.gold_longer)}"),
            ("correlation with length", "-" if self.length_correlation is None else f"{self.length_correlation:+.2f}"),
        ]
        if self.label_mass is not None:
            low = f"below one half on {100 * (self.low_mass or 0):.1f} % of questions"
            rows.append(("probability on the labels", f"mean {self.label_mass:.3g}, {low}"))
        rows += [("used", described({name: Tally.from_json(tally)})) for name, tally in self.usage.items()]
        return [*rows, ("seconds", f"{self.seconds:.1f}")]


def check_judge(
    gold: str | Path,
    annotator: Annotator,
    *,
    meter: Meter,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
    stage: Stage | None = None,
) -> JudgeReport:
    """Ask an annotator about gold pairs (anything that `load_pairs` reads; the first `limit`) and compare.

    `meter`: the one that the annotator counts with. Raises InputError for a file without pairs, and whatever the
    annotator raises; what is answered by then is in its cache.
    """
    start = time.monotonic()
    questions = gold_questions(gold, limit, on_bad_row)
    judgements = ask([question.comparison for question in questions], annotator, stage=stage)
    mass: LabelMass | None = getattr(annotator, "mass", None)
    return JudgeReport.model_validate(
        {
            "annotator": annotator.name,
            "gold": str(gold),
            "pairs": len(questions),
            **compare(questions, judgements),
            "label_mass": mass.mean if mass else None,
            "low_mass": mass.share_low if mass else None,
            "usage": meter.summary(),
            "seconds": round(time.monotonic() - start, 3),
        }
    )


def estimate_check(
    gold: str | Path, annotator: Annotator, *, meter: Meter, limit: int | None = None, on_bad_row: OnBadRow = "error"
) -> list[Estimate]:
    """What `check_judge` would need of every LLM judge in the annotator; nothing is asked."""
    return estimate(
        annotator, [question.comparison for question in gold_questions(gold, limit, on_bad_row)], meter.prices
    )


class Question(NamedTuple):
    """A gold pair as a question: `sign` is 1 when a is the gold answer, -1 when b is."""

    comparison: Comparison
    sign: int


def gold_questions(gold: str | Path, limit: int | None = None, on_bad_row: OnBadRow = "error") -> list[Question]:
    """The questions of a file of pairs. Raises InputError when there are none."""
    pairs = load_pairs(gold, limit=limit, on_bad_row=on_bad_row).records
    if not pairs:
        raise InputError(f"{gold} has no pairs; expected rows with a prompt, a chosen and a rejected answer")
    return [_question(pair) for pair in pairs]


def _question(pair: Pair) -> Question:
    content = pair.model_dump_json(include={"prompt": {"messages"}, "chosen": {"text"}, "rejected": {"text"}})
    chosen_first = hashlib.sha256(content.encode()).digest()[0] % 2 == 0
    comparison = Comparison(pair.prompt, pair.chosen, pair.rejected)
    return Question(comparison, 1) if chosen_first else Question(comparison.swapped, -1)


def compare(questions: Sequence[Question], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """The figures of a `JudgeReport` that follow from judgements."""
    answered = zip(questions, judgements, strict=True)
    halves = [(question, judgement.p - 0.5) for question, judgement in answered if judgement.p is not None]
    slots = Counter(judgement.slot for judgement in judgements)
    both = slots["consistent"] + slots["first_slot"] + slots["second_slot"]
    longer = [(half, _length_difference(question)) for question, half in halves]
    decided = [half * difference > 0 for half, difference in longer if half and difference]
    gold = [question.sign * difference > 0 for question, _ in halves if (difference := _length_difference(question))]
    return {
        "judged": len(halves),
        "ties": sum(half == 0 for _, half in halves),
        "abstained": dict(Counter(j.reason for j in judgements if j.reason).most_common()),
        "agreement": accuracy([question.sign * half for question, half in halves]) if halves else None,
        "same_slot": _share(slots["first_slot"] + slots["second_slot"], both),
        "consistent": slots["consistent"],
        "first_slot": slots["first_slot"],
        "second_slot": slots["second_slot"],
        "prefers_longer": _share(sum(decided), len(decided)),
        "gold_longer": _share(sum(gold), len(gold)),
        "length_correlation": _cosine(longer),
    }


def _length_difference(question: Question) -> float:
    """In characters, relative to both answers together; positive when a is longer."""
    a, b = question.comparison.a.length_chars, question.comparison.b.length_chars
    return (a - b) / (a + b)


def _share(part: int, n: int) -> Interval | None:
    return (part / n, *wilson_interval(part, n)) if n else None


def _cosine(points: Sequence[tuple[float, float]]) -> float | None:
    """The correlation of x and y through the origin; None when one of them is always 0."""
    xx, yy, xy = (math.fsum(p[i] * p[j] for p in points) for i, j in ((0, 0), (1, 1), (0, 1)))
    return xy / math.sqrt(xx * yy) if xx and yy else None


def _percent(share: Interval | None) -> str:
    return "-" if share is None else "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * value for value in share))
