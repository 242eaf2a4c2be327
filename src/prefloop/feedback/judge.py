"""A language model that runs here as a judge (OAIF §2.2; Lee et al. 2023, RLAIF).

The instruction is one message of the user in the model's own chat template. The assistant's turn is opened with the
stub of the answer. Nothing is sampled: with l_1 and l_2 the log-probabilities of the two labels after the stub,

    q(a, b) = exp(l_1) / (exp(l_1) + exp(l_2)) = sigmoid(l_1 - l_2)        with a shown first

and both orders are averaged. The labels' ids are those at which the real continuations, stub and label, part.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

from prefloop.data.chat import PLAIN_HEADINGS, SENTINEL, ChatFormat, special_ids
from prefloop.errors import BudgetReached, InputError
from prefloop.feedback.annotator import Comparison, Judgement, abstention, ask_different, in_both_orders, sigmoid
from prefloop.feedback.answers import LabelMass, in_comparisons
from prefloop.feedback.cache import JudgementCache
from prefloop.feedback.estimate import Estimate
from prefloop.feedback.instructions import Instruction, load_instruction
from prefloop.feedback.meter import Meter, Prices, Reservation
from prefloop.models import (
    ModelRef,
    choose_device,
    choose_sampling_dtype,
    context_of,
    load_model,
    load_tokenizer,
    resolve,
)
from prefloop.progress import Advance, ignore
from prefloop.records import Prompt
from prefloop.run import Stage
from prefloop.train.config import Compute
from prefloop.train.packing import TokenGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUESTIONS_AT_ONCE = 256
"""After so many, the answers are kept: a judge that is killed asks no more than these again."""
Ids = tuple[int, ...]


class LocalJudge:
    """Judges by the probabilities of two labels. `mass`: what it has put on them so far.

    A question that is too long for the model is an abstention. The model is loaded when the first question is not in
    the cache. Raises InputError when the labels cannot be told apart by one token.
    """

    def __init__(
        self,
        ref: ModelRef,
        instruction: Instruction,
        *,
        compute: Compute,
        cache: JudgementCache,
        meter: Meter,
        stage: Stage | None = None,
    ) -> None:

        # Nothing is trained here: the precision is that of sampling, twice as fast on many machines.
        dtype = choose_sampling_dtype(choose_device(compute.device), compute.sampling_dtype)
        self.ref, self.instruction, self.compute = ref, instruction, compute.replace(dtype=dtype)
        self.cache, self.meter, self.stage = cache, meter, stage or Stage.detached()
        self.chat = ChatFormat(load_tokenizer(ref))
        self.context = context_of(ref)
        self.stub_ids, labels = label_ids(self.chat, instruction)
        self.responses = ((labels[0],), (labels[1],))
        self.name = f"judge:{ref.name}"
        self.identity = f"judge:{ref.fingerprint} {instruction.hash} {dtype}"
        self.mass = LabelMass(instruction.labels)
        self._warned = False

    @cached_property
    def model(self) -> "PreTrainedModel":
        return load_model(self.ref, device=choose_device(self.compute.device)).requires_grad_(False)

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        def ask(different: Sequence[Comparison]) -> list[Judgement]:
            def first_slots(orders: Sequence[Comparison]) -> list[Judgement]:
                groups = [self._group(order) for order in orders]
                asked = {group for group in groups if isinstance(group, TokenGroup)}
                found = self._logps(asked, in_comparisons(advance, len(different), len(asked)))
                return [abstention(g) if isinstance(g, str) else self._judgement(*found[g]) for g in groups]

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
        """What these comparisons would take; no model is loaded."""
        groups = [self._group(order) for comparison in comparisons for order in (comparison, comparison.swapped)]
        asked = {self._key(group): group for group in groups if isinstance(group, TokenGroup)}
        kept = self.cache.get(list(asked))
        return Estimate(
            annotator=self.name,
            questions=len(asked),
            cached=len(kept),
            too_long=sum(isinstance(group, str) for group in groups),
            tokens_in=sum(len(group.prompt_ids) for key, group in asked.items() if key not in kept),
            tokens_out=len(asked) - len(kept),
            exact=True,
            money=0.0,
        )

    def _group(self, order: Comparison) -> TokenGroup | str:
        """The question's ids up to the label and the two labels, or why it cannot be asked."""
        ids = (*message_ids(self.chat, self.instruction.render(order)), *self.stub_ids)
        if self.context is not None and len(ids) > self.context:
            return f"longer than the judge's context of {self.context} tokens"
        return TokenGroup(ids, self.responses)

    def _judgement(self, first: float, second: float) -> Judgement:
        self.mass.add(math.exp(first) + math.exp(second))
        return Judgement(p=self.instruction.p_first(sigmoid(first - second)))

    def _key(self, group: TokenGroup) -> str:
        return self.cache.key(self.identity, group.prompt_ids, group.responses)

    def _logps(self, groups: set[TokenGroup], advance: Advance) -> dict[TokenGroup, list[float]]:
        """The log-probabilities of both labels, from the cache or the model."""
        # Each once and sorted: an answer depends neither on the order of the questions nor on what was asked before a
        # kill, because whole chunks are kept.
        ordered = sorted(groups, key=lambda group: (len(group.prompt_ids), group.prompt_ids))
        found: dict[TokenGroup, list[float]] = {}
        for start in range(0, len(ordered), QUESTIONS_AT_ONCE):
            chunk = {self._key(group): group for group in ordered[start : start + QUESTIONS_AT_ONCE]}
            kept = {key: value["logps"] for key, value in self.cache.get(list(chunk)).items()}
            self.meter.add_hits(self.name, len(kept))
            if len(kept) < len(chunk):
                kept |= self._ask(chunk, [key for key in chunk if key not in kept])
            found.update({group: kept[key] for key, group in chunk.items()})
            advance(len(chunk))
        return found

    def _ask(self, chunk: dict[str, TokenGroup], missing: Sequence[str]) -> dict[str, list[float]]:
        """The model's answers to the `missing` questions of a chunk, kept. Raises BudgetReached after those that the
        budget allows.

        The whole chunk goes through the model: its numbers depend, in their last digits, on what is computed together,
        and must not on what was answered before a stop.
        """
        held, over = self._reserve([chunk[key] for key in missing])
        keys = missing[: len(held)]
        logps = dict(zip(chunk, self._forward(list(chunk.values())), strict=True)) if keys else {}
        kept = self.cache.put({key: {"logps": logps[key]} for key in keys})
        answers = {key: kept[key]["logps"] if key in kept else logps[key] for key in keys}
        tokens = sum(len(chunk[key].prompt_ids) for key in keys)
        if held:
            self.meter.add(self.name, len(held), tokens, len(held), None, Reservation(len(held), 0.0))
        if over:
            raise over
        return answers

    def _reserve(self, groups: Sequence[TokenGroup]) -> tuple[list[Reservation], BudgetReached | None]:
        """The budget of as many questions as it allows, and what it says to the next one."""
        held: list[Reservation] = []
        try:
            for group in groups:
                held.append(self.meter.reserve(None, tokens_in=len(group.prompt_ids), tokens_out=1))
        except BudgetReached as over:
            return held, over
        return held, None

    def _forward(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        from prefloop.train.checks import check_finite
        from prefloop.train.reference import model_pass

        sums = model_pass(
            groups, self.model, self.name, compute=self.compute, part="labels", stage=Stage.detached()
        ).sums
        check_finite(sums, ["a judge's question"] * len(sums), self.name)
        return sums


def load_local_judge(
    model: str,
    *,
    instruction: str,
    compute: Compute,
    cache: JudgementCache,
    meter: Meter,
    stage: Stage | None = None,
) -> LocalJudge:
    """The judge that a model (any name that `resolve` takes) is under an instruction (a packaged name or a file)."""
    loaded = load_instruction(instruction)
    return LocalJudge(resolve(model), loaded, compute=compute, cache=cache, meter=meter, stage=stage)


def label_ids(chat: ChatFormat, instruction: Instruction) -> tuple[Ids, tuple[int, int]]:
    """The ids that begin the answer, and the two that follow them: where "stub 1" and "stub 2" part.

    The stub alone may be written otherwise: in many tokenizers its last space belongs to the label.
    Raises InputError when a label is more than one token there, or nothing tells the two apart.
    """
    first, second = (chat.response_ids(instruction.stub + label, finished=False) for label in instruction.labels)
    shared = next((i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), None)
    fix = f"choose other labels or another stub in instruction {instruction.name}, such as 1 and 2"
    if shared is None:
        same = " and ".join(map(repr, instruction.labels))
        raise InputError(f"labels {same} begin with the same token after {instruction.stub!r}; {fix}")
    for label, ids in zip(instruction.labels, (first, second), strict=True):
        if len(ids) != shared + 1:
            raise InputError(
                f"label {label!r} is {len(ids) - shared} tokens after {instruction.stub!r}, expected 1; {fix}"
            )
    return tuple(first[:shared]), (first[shared], second[shared])


def message_ids(chat: ChatFormat, text: str) -> Ids:
    """The ids of a message of the user and of the opening of the assistant's turn.

    Special tokens that the message spells out stay text, so that nothing in it can close its turn or open another.
    """
    tokenizer = chat.tokenizer
    if not any(str(tokenizer.convert_ids_to_tokens(id)) in text for id in special_ids(tokenizer)):
        return tuple(chat.prompt_ids(Prompt.of(text)))
    if chat.has_template:
        messages = [{"role": "user", "content": SENTINEL}]
        rendered = cast(str, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        before, _, after = rendered.partition(SENTINEL)
    else:
        before, after = PLAIN_HEADINGS["user"], "\n\n" + PLAIN_HEADINGS["assistant"]
    inside = [
        *tokenizer.encode(before, add_special_tokens=False),
        *chat.response_ids(text, finished=False),
        *tokenizer.encode(after, add_special_tokens=False),
    ]
    # One BOS at the start or none, as `prompt_ids` has it, whatever template and plain form write.
    while inside[:1] == [chat.bos_token_id]:
        inside = inside[1:]
    begins_with_bos = chat.prompt_ids(Prompt.of(SENTINEL))[:1] == [chat.bos_token_id]
    return (*([chat.bos_token_id] if begins_with_bos and chat.bos_token_id is not None else []), *inside)
