"""A language model behind an OpenAI-compatible server as a judge.

Both orders are asked. `q` of an order is the probability of the first label against the second, from the likeliest
first tokens of the answer; where the server does not give their log-probabilities, or the answer begins otherwise, it
is the answer itself, 1 or 0; with `votes`, the share of the first label among so many answers drawn at `temperature`.

An answer that says nothing clear is asked for again, `tries` times in all, and is then an abstention. Every answer is
kept as it came, under its whole request, before the next is asked for: what was answered once is never paid again.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Event
from typing import Any, NamedTuple

from prefloop.errors import InputError
from prefloop.feedback.annotator import Comparison, Judgement, abstention, ask_different, in_both_orders
from prefloop.feedback.answers import LabelMass, Said, by_probability, by_text, in_comparisons
from prefloop.feedback.cache import JudgementCache
from prefloop.feedback.chat_server import ChatCompletion, ChatServer, Patience, Refused, Stopped
from prefloop.feedback.estimate import Estimate, guessed_tokens
from prefloop.feedback.instructions import Instruction, load_instruction
from prefloop.feedback.meter import Meter, Prices
from prefloop.progress import Advance, ignore
from prefloop.records import Record
from prefloop.run import Stage

MAX_TOKENS = 16
"""Of an answer: a label, also in JSON or on a line of its own."""
TOP = 20
"""Likeliest tokens that are asked for; the protocol's limit."""
LEAST_MASS = 0.1
"""Of the labels among them. A label that is missing is then far less likely than the one that is there."""


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn and read. votes 0: label probabilities, at temperature 0; n: n answers at `temperature`.

    tries: answers to one question before it is an abstention. extra: further fields of every request; None leaves a
    field out.
    """

    votes: int = 0
    temperature: float = 1.0
    tries: int = 3
    extra: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.votes < 0 or self.tries < 1 or self.temperature < 0:
            raise InputError(
                f"votes = {self.votes}, tries = {self.tries}, temperature = {self.temperature}: expected votes and "
                "temperature of at least 0 and tries of at least 1"
            )

    def body(self, text: str, vote: int, attempt: int) -> dict[str, Any]:
        """The request, without the model. Each vote and each attempt has a seed of its own."""
        fields = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": MAX_TOKENS,
            "temperature": self.temperature if self.votes else 0.0,
            "seed": vote * self.tries + attempt,
            **({} if self.votes else {"logprobs": True, "top_logprobs": TOP}),
            **(self.extra or {}),
        }
        return {name: value for name, value in fields.items() if value is not None}


class Answer(Record):
    """One answer as it came, which is what the cache keeps. `top`: the likeliest first tokens and their logs.

    `final`: there is no use in asking again; `fault`: why nothing can be read from it.
    """

    text: str = ""
    top: dict[str, float] | None = None
    fault: str | None = None
    final: bool = False

    @classmethod
    def of(cls, completion: ChatCompletion) -> "Answer":
        if not completion.choices:
            return cls(fault="empty choices")
        choice = completion.choices[0]
        if choice.finish_reason == "content_filter":
            return cls(fault="refused by the server's content filter", final=True)
        if choice.message.refusal:
            return cls(fault="the judge refused to answer", final=True)
        tokens = (choice.logprobs.content if choice.logprobs else None) or []
        first = next((token for token in tokens if token.token.strip()), None)
        top = {top.token: top.logprob for top in first.top_logprobs} if first and first.top_logprobs else None
        if not choice.message.content and not top:
            return cls(fault="empty answer")
        return cls(text=choice.message.content or "", top=top)

    def said(self, instruction: Instruction) -> Said:
        """What it says of the two labels; a label in the text counts where the first token is none."""
        if self.fault:
            return Said(None, reason=self.fault)
        voted = by_text(self.text, instruction.labels, instruction.stub)
        if self.top is None:
            return voted
        likely = by_probability(self.top, instruction.labels, least=LEAST_MASS)
        return likely if likely.q is not None else voted._replace(mass=likely.mass)


class Question(NamedTuple):
    """One answer that is wanted: to a text, and which of its votes."""

    text: str
    vote: int


class ApiJudge:
    """Judges by asking a server. `mass`: the probability that it has put on the two labels so far."""

    def __init__(
        self,
        server: ChatServer,
        instruction: Instruction,
        *,
        decoding: Decoding,
        concurrency: int,
        cache: JudgementCache,
        meter: Meter,
        stage: Stage | None = None,
    ) -> None:
        self.server, self.instruction, self.decoding, self.concurrency = server, instruction, decoding, concurrency
        self.cache, self.meter, self.stage = cache, meter, stage or Stage.detached()
        self.model = server.model
        self.name = f"api:{self.model}"
        self.identity = f"api:{self.model} {instruction.hash} {decoding}"
        self.mass = LabelMass(instruction.labels)
        self._warned = False

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        def ask(different: Sequence[Comparison]) -> list[Judgement]:
            def first_slots(orders: Sequence[Comparison]) -> list[Judgement]:
                texts = [self._text(order) for order in orders]
                votes = range(max(1, self.decoding.votes))
                questions = list(dict.fromkeys(Question(text, vote) for text in texts for vote in votes))
                said = self._ask(questions, in_comparisons(advance, len(different), len(questions)))
                return [self._judgement([said[Question(text, vote)] for vote in votes]) for text in texts]

            return in_both_orders(first_slots, different)

        judgements = ask_different(ask, comparisons, advance)
        if self.mass.is_tiny and not self._warned:
            self._warned = True
            self.stage.note(self.mass.warning(self.name))
        return judgements
