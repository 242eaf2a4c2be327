"""Votes: several annotators judge the same comparisons, and the mean of those that answer is the p.

    p(a > b) = sum_i w_i p_i(a > b) / sum_i w_i            over the annotators i that did not abstain

Agreement of two annotators is the share of comparisons to which both give the same answer: a, b, or a tie. Cohen's
kappa corrects it for chance. Which answer is called a is arbitrary, so every comparison counts in both orders: chance
agreement is then d1 d2 / 2 + (1 - d1) (1 - d2), with d the share of an annotator's answers that are no ties, and
kappa = 2 * share - 1 where nobody ties.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from prefloop.errors import InputError
from prefloop.feedback.annotator import Annotator, Comparison, Judgement, abstention, around_half
from prefloop.progress import Advance, ignore


@dataclass
class Agreement:
    """How far two annotators agree on what both have judged: `n` comparisons, `same` answers, decisions that are no
    ties.
    """

    first: str
    second: str
    n: int = 0
    same: int = 0
    first_decided: int = 0
    second_decided: int = 0

    def add(self, first: Judgement, second: Judgement) -> None:
        """Count one comparison, if both have judged it."""
        if first.p is None or second.p is None:
            return
        one, other = _answer(first.p), _answer(second.p)
        self.n += 1
        self.same += one == other
        self.first_decided += one != 0
        self.second_decided += other != 0

    @property
    def share(self) -> float | None:
        """The share of the same answers; None before there is any."""
        return self.same / self.n if self.n else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa, in [-1, 1]; None where chance alone would always agree."""
        if self.share is None:
            return None
        d1, d2 = self.first_decided / self.n, self.second_decided / self.n
        chance = d1 * d2 / 2 + (1 - d1) * (1 - d2)
        return (self.share - chance) / (1 - chance) if chance < 1 else None

    def describe(self) -> str:
        """`rule:short and rule:long: 0 of 40 the same, kappa -1.00`."""
        kappa = "none" if self.kappa is None else f"{self.kappa:.2f}"
        return f"{self.first} and {self.second}: {self.same} of {self.n} the same, kappa {kappa}"


def _answer(p: float) -> int:
    """1 for a, -1 for b, 0 for a tie."""
    return (p > 0.5) - (p < 0.5)


class Votes:
    """Judges by the weighted mean of its members; fewer answers than `quorum` are an abstention.

    `agreements` is of all that it has judged. Raises InputError for weights or a quorum that do not fit the members.
    """

    def __init__(self, members: Sequence[Annotator], *, weights: Sequence[float] = (), quorum: int = 1) -> None:
        weights = tuple(weights) or (1.0,) * len(members)
        if len(weights) != len(members) or not all(0 < weight < math.inf for weight in weights):
            raise InputError(f"weights = {list(weights)}: expected {len(members)} numbers over 0, one per annotator")
        if not 1 <= quorum <= len(members):
            raise InputError(f"quorum = {quorum}: expected 1 to {len(members)}, the number of annotators")
        self.members, self.weights, self.quorum = tuple(members), weights, quorum
        self.name = " + ".join(member.name for member in members)
        self.identity = f"votes {[member.identity for member in members]} weights={weights} quorum={quorum}"
        self.agreements = [Agreement(one.name, other.name) for one, other in combinations(members, 2)]

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        """`advance` follows the last member, who answers when the others have."""
        *others, last = self.members
        table = [member.judge(comparisons) for member in others] + [last.judge(comparisons, advance=advance)]
        for agreement, (first, second) in zip(self.agreements, combinations(table, 2), strict=True):
            for one, other in zip(first, second, strict=True):
                agreement.add(one, other)
        return [self._combine(row) for row in zip(*table, strict=True)]

    def _combine(self, judgements: Sequence[Judgement]) -> Judgement:
        answers = [
            (weight, judgement.p - 0.5)
            for weight, judgement in zip(self.weights, judgements, strict=True)
            if judgement.p is not None
        ]
        if len(answers) < self.quorum:
            return abstention(f"fewer than {self.quorum} of {len(self.members)} annotators answered")
        total = math.fsum(weight for weight, _ in answers)
        # The mean of numbers in [-1/2, 1/2], which rounding could carry a little beyond.
        half = math.fsum(weight * half for weight, half in answers) / total
        return Judgement(p=around_half(min(0.5, max(-0.5, half))))
