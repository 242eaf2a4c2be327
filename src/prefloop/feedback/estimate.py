"""What judging will take, before anything is asked: calls, tokens and money."""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from prefloop.feedback.annotator import Annotator, Comparison, members
from prefloop.feedback.meter import Prices
from prefloop.records import Record

CHARS_PER_TOKEN = 4
"""Of English text, roughly, where the judge's tokenizer is not here."""


class Estimate(Record):
    """What one annotator would need for a list of comparisons.

    questions: what it is to answer, both orders and every vote counted. cached: those that are answered already.
    too_long: orders that do not fit the judge's context, which are not asked.
    tokens_in, tokens_out: of the others; tokens_out is the most that they may have. exact: whether the tokens were
    counted, not guessed from characters. money: None where the price is unknown.
    """

    annotator: str
    questions: int
    cached: int
    too_long: int = 0
    tokens_in: int
    tokens_out: int
    exact: bool
    money: float | None

    @property
    def calls(self) -> int:
        return self.questions - self.cached

    def times(self, factor: float) -> "Estimate":
        """For `factor` times as many comparisons of the same kind."""

        def scaled(n: int) -> int:
            return math.ceil(n * factor)

        return self.model_copy(
            update={
                "questions": scaled(self.questions),
                "cached": scaled(self.cached),
                "too_long": scaled(self.too_long),
                "tokens_in": scaled(self.tokens_in),
                "tokens_out": scaled(self.tokens_out),
                "money": None if self.money is None else self.money * factor,
                "exact": False,
            }
        )

    def render(self) -> str:
        """`api:small: 80 calls (20 of 100 questions are in the cache), about 24000 + at most 1280 tokens, ...`."""
        money = "money unknown (no price)" if self.money is None else f"money {self.money:.4g}"
        parts = [
            f"{self.calls} calls ({self.cached} of {self.questions} questions are in the cache)",
            *(f"{n} too long for it" for n in [self.too_long] if n),
            f"{'' if self.exact else 'about '}{self.tokens_in} + at most {self.tokens_out} tokens",
            money if self.exact or self.money is None else f"about {money}",
        ]
        guessed = "" if self.exact else f"; tokens in are guessed, at {CHARS_PER_TOKEN} characters a token"
        return f"{self.annotator}: {', '.join(parts)}{guessed}"


@runtime_checkable
class Estimates(Protocol):
    """An annotator whose answers cost something."""

    def estimate(self, comparisons: Sequence[Comparison], prices: Prices) -> Estimate: ...


def estimate(annotator: Annotator, comparisons: Sequence[Comparison], prices: Prices | None = None) -> list[Estimate]:
    """For every LLM judge in an annotator, alone or in a vote; nothing is asked. Others need no calls."""
    different = [comparison for comparison in comparisons if not comparison.identical]
    return [
        member.estimate(different, prices or Prices()) for member in members(annotator) if isinstance(member, Estimates)
    ]


def guessed_tokens(text: str) -> int:
    """Tokens of a text whose tokenizer is not here."""
    return -(-len(text) // CHARS_PER_TOKEN)
