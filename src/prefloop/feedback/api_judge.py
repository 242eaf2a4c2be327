"""A language model behind an OpenAI-compatible server as a judge.

Both orders are asked. `q` of an order is the probability of the first label against the second, from the likeliest
first tokens of the answer; where the server does not give their log-probabilities, or the answer begins otherwise, it
is the answer itself, 1 or 0; with `votes`, the share of the first label among so many answers drawn at `temperature`.

An answer that says nothing clear is asked for again, `tries` times in all, and is then an abstention. Every answer is
kept as it came, under its whole request, before the next is asked for: what was answered once is never paid again.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Event
from typing import Any, NamedTuple

from prefloop.errors import InputError
from prefloop.feedback.annotator import Comparison, Judgement, abstention, ask_different, in_both_orders
from prefloop.feedback.answers import LabelMass, Said, by_probability, by_text, in_comparisons
from prefloop.feedback.cache import JudgementCache
from prefloop.feedback.chat_server import (
    ChatCompletion,
    ChatServer,
    Message,
    NoLogprobs,
    Patience,
    Refused,
    Stopped,
    TopLogprob,
    Usage,
)
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
LEAST_LOGPROB = -9999.0
"""What servers write for minus infinity, which JSON has not."""
ROUNDING = 1e-3
"""How far above 0 a log-probability may be."""
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
        """What a judge needs of an answer."""
        if not completion.choices:
            return cls(fault="empty choices")
        choice = completion.choices[0]
        if choice.finish_reason == "content_filter":
            return cls(fault="refused by the server's content filter", final=True)
        message = choice.message or Message()
        if message.refusal:
            return cls(fault="the judge refused to answer", final=True)
        tokens = (choice.logprobs.content if choice.logprobs else None) or []
        first = next((token for token in tokens if token.token.strip()), None)
        top = _likeliest(first.top_logprobs or []) if first else None
        if not message.content and not top:
            return cls(fault="empty answer")
        return cls(text=message.content or "", top=top)

    def redacted(self, redact: Callable[[str], str]) -> "Answer":
        """Without the key, should a server have put it into its answer."""
        top = None if self.top is None else {redact(token): logp for token, logp in self.top.items()}
        return self.model_copy(update={"text": redact(self.text), "top": top})

    def said(self, instruction: Instruction) -> Said:
        """What it says of the two labels; a label in the text counts where the first token is none."""
        if self.fault:
            return Said(None, reason=self.fault)
        voted = by_text(self.text, instruction.labels, instruction.stub)
        if self.top is None:
            return voted
        likely = by_probability(self.top, instruction.labels, least=LEAST_MASS)
        return likely if likely.q is not None else voted._replace(mass=likely.mass)


def _likeliest(listed: Sequence[TopLogprob]) -> dict[str, float] | None:
    """Log-probabilities by token, the likelier one where a token is listed twice; None when they are none."""
    if not listed or not all(one.logprob <= ROUNDING for one in listed):
        return None
    return {one.token: max(one.logprob, LEAST_LOGPROB) for one in sorted(listed, key=lambda one: one.logprob)}


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
        self._warned = self._without_logprobs = False

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        def ask(different: Sequence[Comparison]) -> list[Judgement]:
            def first_slots(orders: Sequence[Comparison]) -> list[Judgement]:
                texts = [self._text(order) for order in orders]
                questions = list(dict.fromkeys(Question(text, vote) for text in texts for vote in self._votes))
                said = self._ask(questions, in_comparisons(advance, len(different), len(questions)))
                return [self._judgement([said[Question(text, vote)] for vote in self._votes]) for text in texts]

            return in_both_orders(first_slots, different)

        try:
            judgements = ask_different(ask, comparisons, advance)
        finally:
            self.meter.keep()
        if self.mass.is_tiny and not self._warned:
            self._warned = True
            self.stage.note(self.mass.warning(self.name))
        return judgements

    def estimate(self, comparisons: Sequence[Comparison], prices: Prices) -> Estimate:
        """What these comparisons would take, if every first answer is clear; nothing is asked."""
        texts = [self._text(order) for comparison in comparisons for order in (comparison, comparison.swapped)]
        questions = list(dict.fromkeys(Question(text, vote) for text in texts for vote in self._votes))
        kept = self._kept(questions)
        open_ones = [question for question in questions if self._known(question, kept) is None]
        tokens_in = sum(guessed_tokens(question.text) for question in open_ones)
        tokens_out = len(open_ones) * MAX_TOKENS
        return Estimate(
            annotator=self.name,
            questions=len(questions),
            cached=len(questions) - len(open_ones),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            exact=False,
            money=prices.cost(self.model, tokens_in, tokens_out),
        )

    @property
    def _votes(self) -> range:
        return range(max(1, self.decoding.votes))

    def _text(self, order: Comparison) -> str:
        """The message: a chat server opens the assistant's turn by itself, so the stub ends the user's."""
        return f"{self.instruction.render(order)}\n\n{self.instruction.stub}".strip()

    def _key(self, question: Question, attempt: int) -> str:
        """By vote and attempt too: a request may be told to have no seed, which tells them apart."""
        body = self.decoding.body(question.text, question.vote, attempt)
        return self.cache.key("api", self.model, body, question.vote, attempt)

    def _kept(self, questions: Sequence[Question]) -> dict[str, Answer]:
        """Earlier answers to these questions by key, all attempts."""
        keys = [self._key(question, attempt) for question in questions for attempt in range(self.decoding.tries)]
        return {key: Answer.model_validate(value) for key, value in self.cache.get(keys).items()}

    def _known(self, question: Question, kept: Mapping[str, Answer]) -> Said | None:
        """What earlier answers say; None when another is to be asked for."""
        try:
            return self._settled(lambda attempt: kept[self._key(question, attempt)])
        except KeyError:
            return None

    def _settled(self, answer_to: Callable[[int], Answer], attempt: int = 0) -> Said:
        """What the first clear answer says; the last one when none of `tries` is clear."""
        answer = answer_to(attempt)
        said = answer.said(self.instruction)
        if said.q is not None or answer.final or attempt + 1 == self.decoding.tries:
            return said
        return self._settled(answer_to, attempt + 1)

    def _ask(self, questions: Sequence[Question], advance: Advance) -> dict[Question, Said]:
        """What is said to every question, by earlier answers or by new ones, `concurrency` at once.

        On an error the questions that are open at that moment are waited for, because they are paid for, and no other
        is begun.
        """
        kept = self._kept(questions)
        self.meter.add_hits(self.name, len(kept))
        found = {question: said for question in questions if (said := self._known(question, kept)) is not None}
        advance(len(found))
        stop = Event()
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="prefloop-judge") as pool:
            open_ones = {
                pool.submit(self._settle, question, kept, stop): question
                for question in questions
                if question not in found
            }
            try:
                for future in as_completed(open_ones):
                    if not isinstance(future.exception(), Stopped):  # what stopped it is in another future
                        found[open_ones[future]] = future.result()
                        advance(1)
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return found

    def _settle(self, question: Question, kept: Mapping[str, Answer], stop: Event) -> Said:
        """What is said to a question; an error stops the other questions before this thread takes the next."""
        try:
            return self._settled(
                lambda attempt: kept.get(self._key(question, attempt)) or self._send(question, attempt, stop)
            )
        except BaseException:
            stop.set()
            raise

    def _send(self, question: Question, attempt: int, stop: Event) -> Answer:
        """One answer of the server, counted and kept. What the server does not take costs nothing and is not kept."""
        if stop.is_set():
            raise Stopped
        body = self.decoding.body(question.text, question.vote, attempt)
        held = self.meter.reserve(self.model, tokens_in=guessed_tokens(question.text), tokens_out=MAX_TOKENS)
        try:
            completion = self._complete(body, stop)
        except Refused as refusal:
            self.meter.release(held)
            answer = Answer(fault=str(refusal), final=True)
        except BaseException:
            self.meter.release(held)
            raise
        else:
            usage = completion.usage or Usage()
            self.meter.add(self.name, 1, usage.prompt_tokens, usage.completion_tokens, self.model, held)
            answer = Answer.of(completion).redacted(self.server.redacted)
            key = self._key(question, attempt)
            kept = self.cache.put({key: answer.model_dump(mode="json", exclude_none=True)})
            answer = Answer.model_validate(kept.get(key, answer))
        self._count_fault(answer)
        return answer

    def _complete(self, body: dict[str, Any], stop: Event) -> ChatCompletion:
        """The server's answer, without log-probabilities where it refuses to give them."""
        if not self._without_logprobs:
            try:
                return self.server.complete(body, stop)
            except NoLogprobs as refusal:
                if not self._without_logprobs:
                    self._without_logprobs = True
                    self.stage.note(f"{self.name} gives no log-probabilities ({refusal}): its answers are votes")
        fields = {name: value for name, value in body.items() if name not in ("logprobs", "top_logprobs")}
        return self.server.complete(fields, stop)

    def _count_fault(self, answer: Answer) -> None:
        reason = answer.said(self.instruction).reason
        if reason:
            self.meter.add_fault(self.name, f"malformed: {reason}" if not answer.final else reason)
        elif answer.top is None and not self.decoding.votes:
            self.meter.add_fault(self.name, "without log-probabilities")

    def _judgement(self, said: Sequence[Said]) -> Judgement:
        """Of all votes on one order: the mean of those that are clear, if they are more than half."""
        for mass in (one.mass for one in said if one.mass is not None):
            self.mass.add(mass)
        clear = [one.q for one in said if one.q is not None]
        if 2 * len(clear) <= len(said):
            [(reason, _)] = Counter(one.reason for one in said if one.reason).most_common(1)
            return abstention(reason)
        return Judgement(p=self.instruction.p_first(sum(clear) / len(clear)))


def load_api_judge(
    model: str,
    *,
    instruction: str,
    base_url: str,
    api_key_env: str = "OPENAI_API_KEY",
    cache: JudgementCache,
    meter: Meter,
    concurrency: int = 16,
    patience: Patience | None = None,
    decoding: Decoding | None = None,
    stage: Stage | None = None,
) -> ApiJudge:
    """The judge that a server's model is under an instruction (a packaged name or a file). Nothing is sent yet.

    Raises InputError for what cannot be used, and where the package openai is missing.
    """
    name = f"api:{model}"
    server = ChatServer(
        base_url,
        model,
        api_key_env=api_key_env,
        patience=patience or Patience(),
        on_fault=lambda kind: meter.add_fault(name, kind),
    )
    return ApiJudge(
        server,
        load_instruction(instruction),
        decoding=decoding or Decoding(),
        concurrency=concurrency,
        cache=cache,
        meter=meter,
        stage=stage,
    )
