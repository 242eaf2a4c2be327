"""How often one model's answers are preferred over another's, with an interval. Abstentions are apart, ties are 1/2."""

from collections.abc import Sequence

from prefloop.evaluate.reward_accuracy import mean_interval
from prefloop.feedback.annotator import Annotator, Comparison, Judgement
from prefloop.records import Group, Record


class WinRate(Record):
    """`rate`: mean P(a is preferred) over the comparisons that were judged, [value, low, high] at 95 %."""

    rate: tuple[float, float, float] | None = None
    judged: int
    ties: int
    abstained: int


def win_rate(judgements: Sequence[Judgement]) -> WinRate:
    """Of the first response of each comparison. Identical answers are judged ties (1/2) by every annotator."""
    known = [judgement.p for judgement in judgements if judgement.p is not None]
    return WinRate(
        rate=mean_interval(known) if known else None,
        judged=len(known),
        ties=known.count(0.5),
        abstained=len(judgements) - len(known),
    )


def compare_answers(ours: Sequence[Group], theirs: Sequence[Group], annotator: Annotator) -> WinRate:
    """The win rate of `ours`: the first response of each group against the first of the other's group."""
    return win_rate(annotator.judge(comparisons_of(ours, theirs)))


def comparisons_of(ours: Sequence[Group], theirs: Sequence[Group]) -> list[Comparison]:
    return [Comparison(a.prompt, a.responses[0], b.responses[0]) for a, b in zip(ours, theirs, strict=True)]
