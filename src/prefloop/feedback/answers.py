"""What an answer of an LLM judge says: the probability of a label at the first token, or a vote read from its text.

Nothing is guessed: an answer that says neither clearly has a reason in place of a number.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from prefloop.progress import Advance

LOW_MASS = 0.5
"""A question on which both labels together are less likely than this counts as one of low mass."""
TINY_MASS = 0.1
"""A mean mass below this is said loudly: such a judge hardly answers with a label at all."""
WRAPPED = r"[\s\"'`*()\[\].]*"
"""What may stand around a label that is alone: quotes, emphasis, brackets, a full stop."""


class Said(NamedTuple):
    """`q`: the probability of the first label against the second; None with the `reason`. `mass`: of both labels
    together, where it is known.
    """

    q: float | None
    mass: float | None = None
    reason: str | None = None


@dataclass
class LabelMass:
    """How much probability a judge has put on the two labels, over the questions that showed it."""

    labels: tuple[str, str]
    n: int = 0
    low: int = 0
    total: float = field(default=0.0, repr=False)

    def add(self, mass: float) -> None:
        self.n += 1
        self.low += mass < LOW_MASS
        self.total += mass

    @property
    def mean(self) -> float | None:
        return self.total / self.n if self.n else None

    @property
    def share_low(self) -> float | None:
        """The share of questions below LOW_MASS."""
        return self.low / self.n if self.n else None

    @property
    def is_tiny(self) -> bool:
        return self.mean is not None and self.mean < TINY_MASS

    def describe(self) -> str:
        """`mean probability 0.982 on '1' and '2' together, below 0.5 on 0 of 40 questions`."""
        if self.mean is None:
            return "no label probabilities seen"
        first, second = self.labels
        return (
            f"mean probability {self.mean:.3g} on {first!r} and {second!r} together, below {LOW_MASS} on {self.low} "
            f"of {self.n} questions"
        )

    def warning(self, name: str) -> str:
        return (
            f"warning: {name} hardly answers with a label: {self.describe()}; its preferences are read from what is "
            "left over, so check them against gold labels, change the instruction, or take another judge"
        )


def by_probability(top: Mapping[str, float], labels: tuple[str, str], *, least: float) -> Said:
    """From the log-probabilities of the likeliest first tokens: a label counts in all its spellings ("1", " 1").

    A label that is not among them counts as 0. `least`: the mass below which that says too little.

    >>> by_probability({"1": math.log(0.5), " 1": math.log(0.25), "2": math.log(0.25)}, ("1", "2"), least=0.1).q
    0.75
    """
    first, second = (
        math.fsum(math.exp(logp) for token, logp in top.items() if spelled(token) == label) for label in labels
    )
    mass = min(1.0, first + second)
    if mass < least or mass == 0:
        return Said(None, mass, "the first token of the answer is no label")
    return Said(first / (first + second), mass)


def spelled(token: str) -> str:
    """A token as a word: without the marks for a space before it, or the space itself."""
    return token.replace("\u2581", " ").replace("\u0120", " ").strip()


def by_text(text: str, labels: tuple[str, str], stub: str) -> Said:
    """A vote: the label alone, a JSON object with one value that is a label, or a last line of stub and label.

    >>> [by_text(text, ("1", "2"), "Preferred: ").q for text in ("2.", '{"answer": 1}', "Hm.\\nPreferred: 1", "1 or 2")]
    [0.0, 1.0, 1.0, None]
    """
    answer = text.strip().removeprefix("```json").strip("`\n ")
    found = _alone(answer, labels) or _in_json(answer, labels) or _in_lines(answer, labels, stub.strip())
    return Said(None, reason="the answer is not a label") if found is None else Said(float(found == labels[0]))


def _alone(text: str, labels: Sequence[str]) -> str | None:
    return next((label for label in labels if re.fullmatch(WRAPPED + re.escape(label) + WRAPPED, text)), None)


def _in_json(text: str, labels: Sequence[str]) -> str | None:
    try:
        data = json.loads(text)
    except ValueError:
        return None
    values = [str(value) for value in data.values()] if isinstance(data, dict) else []
    return values[0] if len(values) == 1 and values[0] in labels else None


def _in_lines(text: str, labels: Sequence[str], stub: str) -> str | None:
    """The label on the last line, if every line that begins with the stub says the same."""
    lines = text.splitlines()
    if not stub or not lines or not lines[-1].strip().startswith(stub):
        return None
    said = {_alone(line.strip().removeprefix(stub), labels) for line in lines if line.strip().startswith(stub)}
    return said.pop() if len(said) == 1 else None


def in_comparisons(advance: Advance, comparisons: int, questions: int) -> Advance:
    """Progress in questions, reported to `advance` in comparisons. Without questions, all are reported at once."""
    done = 0
    if not questions:
        advance(comparisons)

    def step(n: int = 1, /) -> None:
        nonlocal done
        before, done = done, done + n
        total = questions or 1  # without any, there is nothing left to report
        advance(done * comparisons // total - before * comparisons // total)

    return step
