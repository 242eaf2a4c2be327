"""The annotator contract: two responses to one prompt in, P(the first is preferred) or an abstention with a reason out.

What asks a person, an LLM, a reward model or a rule looks the same from here on. An annotator that shows one response
first (an LLM judge) is asked in both orders, and the two answers are averaged (OAIF, dossier 2.2):

    p(a > b) = (q(a, b) + 1 - q(b, a)) / 2

so a judge that only looks at the slot gives exactly 1/2 to every pair. Nothing turns a tie or an abstention into a
label: `Judgement.p` is None for an abstention, 1/2 for a tie, and both are counted where pairs are made.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from pydantic import Field, model_validator

from prefloop.progress import Advance, ignore
from prefloop.records import Prompt, Record, Response


class Comparison(NamedTuple):
    """One question: which of two responses to a prompt is preferred?"""

    prompt: Prompt
    a: Response
    b: Response

    @property
    def swapped(self) -> "Comparison":
        return Comparison(self.prompt, self.b, self.a)

    @property
    def identical(self) -> bool:
        """Whether both are the same answer; such a question is a tie unasked."""
        return self.a.same_as(self.b)


class Judgement(Record):
    """The answer to a `Comparison`: `p` = P(a is preferred over b) in [0, 1], 1/2 for a tie; or no answer and why.

    `q_ab` and `q_ba` are what an annotator with slots said: P(the first slot is preferred) with a first and with b
    first.
    """

    p: float | None = Field(default=None, ge=0.0, le=1.0, allow_inf_nan=False)
    reason: str | None = Field(default=None, description="why there is no p")
    q_ab: float | None = Field(default=None, ge=0.0, le=1.0)
    q_ba: float | None = Field(default=None, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _either_or(self) -> "Judgement":
        if (self.p is None) == (self.reason is None):
            raise ValueError("a judgement has either p or the reason why there is none")
        return self

    @property
    def swapped(self) -> "Judgement":
        """The judgement of the swapped comparison."""
        p = None if self.p is None else 1.0 - self.p
        return self.model_copy(update={"p": p, "q_ab": self.q_ba, "q_ba": self.q_ab})

    @property
    def slot(self) -> Literal["consistent", "first_slot", "second_slot"] | None:
        """What the answers to both orders follow: a slot, or the answers ("consistent"). None unless both decide."""
        if self.q_ab is None or self.q_ba is None or 0.5 in (self.q_ab, self.q_ba):
            return None
        ab, ba = self.q_ab > 0.5, self.q_ba > 0.5
        return "consistent" if ab != ba else "first_slot" if ab else "second_slot"


def abstention(reason: str) -> Judgement:
    return Judgement(reason=reason)


class Annotator(Protocol):
    """Judges comparisons. `tests/feedback/test_annotators.py` checks on every one:

    * one judgement per comparison, in order; each depends on its own comparison and on nothing else in the list;
    * p(a, b) + p(b, a) = 1; two responses with the same text have p = 1/2;
    * what cannot be judged is an abstention with a reason, never a made-up number. Only what every further question
      would meet too is raised: bad options (InputError), a budget that is used up (BudgetReached), an annotator that
      is gone for good (FeedbackError).

    `name` is for people; `identity` is a string that is equal exactly when the judgements are (model, its weights or
    version, instruction, decoding), so that kept judgements can be told apart.
    """

    name: str
    identity: str

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        """`advance` is called with the number of comparisons that have just been judged."""
        ...


Ask = Callable[[Sequence[Comparison]], Sequence[Judgement]]
"""One judgement per comparison, in order."""

Slots = Ask
"""Judgements of an annotator that shows `a` first: `p` is P(the first slot is preferred)."""


def in_both_orders(ask: Slots, comparisons: Sequence[Comparison]) -> list[Judgement]:
    """Both orders asked in one call, answers averaged; an abstention of either order is one of the pair."""
    answers = ask([order for comparison in comparisons for order in (comparison, comparison.swapped)])
    return [average(first, second) for first, second in zip(answers[::2], answers[1::2], strict=True)]


def average(ab: Judgement, ba: Judgement) -> Judgement:
    """p(a > b) from P(first slot) with a first (`ab`) and with b first (`ba`).

    >>> average(Judgement(p=0.70), Judgement(p=0.60)).p
    0.55
    """
    if ab.p is None or ba.p is None:
        # Of two reasons the one that swapping does not change.
        return Judgement(reason=min(answer.reason for answer in (ab, ba) if answer.reason), q_ab=ab.p, q_ba=ba.p)
    return Judgement(p=around_half((ab.p - ba.p) / 2), q_ab=ab.p, q_ba=ba.p)


def ask_different(ask: Ask, comparisons: Sequence[Comparison], advance: Advance = ignore) -> list[Judgement]:
    """The judgements of `ask`, which sees only the comparisons of two different answers; identical ones are ties."""
    different = [comparison for comparison in comparisons if not comparison.identical]
    advance(len(comparisons) - len(different))
    answers = iter(ask(different))
    return [Judgement(p=0.5) if comparison.identical else next(answers) for comparison in comparisons]


def around_half(half: float) -> float:
    """1/2 + `half`, rounded so that the p of a pair and that of the swapped pair (-half) sum to exactly 1.

    The one above 1/2 is rounded; 1 minus it is exact.
    """
    return 0.5 + half if half >= 0 else 1.0 - (0.5 - half)


def members(annotator: Annotator) -> Sequence[Annotator]:
    """The annotators that vote in this one; itself where it is none of several."""
    return getattr(annotator, "members", (annotator,))


def sigmoid(x: float) -> float:
    """The Bradley-Terry probability of a score difference, without overflow.

    >>> sigmoid(0.0), sigmoid(1e9), sigmoid(-1e9)
    (0.5, 1.0, 0.0)
    """
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    return 1.0 - 1.0 / (1.0 + math.exp(x))
