"""A reward model as annotator: any transformers sequence classifier with one output, higher is better.

    p(a > b) = sigmoid(r(x, a) - r(x, b))

(Bradley-Terry, the model that such rewards are trained by.) r is the logit of the whole conversation, written by the
reward model's own chat template, answer and end of turn included, the same for an answer that was cut at its limit.
Nothing of a conversation is ever cut off. What all conversations of a prompt begin with goes through a causal model
once.
"""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any, Literal

import jinja2
import torch

from prefloop.data.chat import SENTINEL, ChatFormat, special_ids
from prefloop.errors import FeedbackError, InputError
from prefloop.feedback.annotator import Comparison, Judgement, abstention, ask_different, sigmoid
from prefloop.models import ModelRef, choose_device, context_length, load_tokenizer
from prefloop.progress import Advance, ignore
from prefloop.records import Prompt, Response
from prefloop.train.config import Compute
from prefloop.train.logprobs import Path, autocast, known_path, rows
from prefloop.train.packing import TokenGroup, split
from prefloop.train.reference import choose_dtype
from prefloop.train.scalar import conversations_group, last_values, load_reward_model, pad_id_of, reads_last_token

Ids = tuple[int, ...]


class RewardModel:
    """Judges by the difference of two rewards.

    A conversation that is too long for the model, or that its template does not take, is an abstention. Raises
    InputError when the model has no classifier head with one output.
    """

    judges: Literal["response", "pair"] = "response"

    def __init__(self, ref: ModelRef, *, compute: Compute) -> None:
        self.model = load_reward_model(ref, device=choose_device(compute.device))
        self.chat = ChatFormat(load_tokenizer(ref))
        self.dtype = choose_dtype(compute, self.model.device.type)
        self.tokens_per_forward = compute.tokens_per_forward
        self.reads_last_token = reads_last_token(self.model)
        # Encoders whose positions begin at an offset take fewer tokens than their configuration says.
        limits = (context_length(self.model), self.chat.tokenizer.model_max_length)
        self.context = min(limit for limit in limits if limit)
        self.name = f"reward-model:{ref.name}"
        self.identity = f"reward-model:{ref.fingerprint} {self.dtype}"

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        def ask(different: Sequence[Comparison]) -> list[Judgement]:
            encoded = [(prompt, self._encode(prompt, a), self._encode(prompt, b)) for prompt, a, b in different]
            whole = [(prompt, a, b) for prompt, a, b in encoded if not isinstance(a, str) and not isinstance(b, str)]
            rewards = self.rewards([(prompt, ids) for prompt, *two in whole for ids in two])
            advance(len(different))
            return [_judged(a, b, rewards) for _, a, b in encoded]

        return ask_different(ask, comparisons, advance)

    def score(self, answers: Sequence[tuple[Prompt, Response]]) -> list[float | str]:
        """The reward of every answer, or why there is none."""
        encoded = [(prompt, self._encode(prompt, response)) for prompt, response in answers]
        rewards = self.rewards([(prompt, ids) for prompt, ids in encoded if not isinstance(ids, str)])
        return [ids if isinstance(ids, str) else rewards[ids] for _, ids in encoded]

    def rewards(self, conversations: Sequence[tuple[Prompt, Ids]]) -> dict[Ids, float]:
        """The reward of every conversation (its prompt, and the ids of all of it), by its ids.

        What the conversations of a prompt begin with goes through the model once, where the model is proven to take
        that. Raises FeedbackError when a reward is not a number.
        """
        by_prompt: dict[Any, set[Ids]] = {}
        for prompt, ids in conversations:
            by_prompt.setdefault(prompt.messages, set()).add(ids)
        if not by_prompt:
            return {}
        # Each once and sorted: a reward depends neither on the order of the questions nor on the slot of an answer.
        together = sorted(sorted(own) for own in by_prompt.values())
        unique = [ids for own in together for ids in own]
        pad_id = pad_id_of(self.model)
        groups = [conversations_group(own, pad_id) for own in together]
        path = known_path(self.model, groups)[0] if self.reads_last_token else "padded"
        if path == "shared":
            pieces = [piece for _, piece in split(groups, self.tokens_per_forward, shared=True)]
            budget = self.tokens_per_forward
        else:
            pieces = [TokenGroup((), (ids,)) for ids in unique]
            # A decoder finds the end of a row by its padding token; a model without one takes one row at a time.
            budget = self.tokens_per_forward if pad_id is not None else 1
        found: dict[int, list[float]] = {}
        for row in rows(pieces, budget, path=path):
            some = [pieces[i] for i in row]
            values = iter(self._forward(some, path))
            found.update({i: list(islice(values, len(pieces[i].responses))) for i in row})
        return dict(zip(unique, chain.from_iterable(found[i] for i in range(len(pieces))), strict=True))

    @torch.no_grad()
    def _forward(self, pieces: Sequence[TokenGroup], path: Path) -> list[float]:
        if path == "shared":
            rewards = last_values(self.model, pieces, dtype=self.dtype)
        else:
            rewards = self._plain([ids for piece in pieces for ids in piece.responses])
        if not torch.isfinite(rewards).all():
            raise FeedbackError(f"{self.name} gave a reward that is not finite; its weights are probably damaged")
        return rewards.tolist()

    def _plain(self, conversations: Sequence[Ids]) -> torch.Tensor:
        """The classifier's own forward over whole conversations, one a row."""
        width, pad = max(map(len, conversations)), pad_id_of(self.model) or 0
        input_ids = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in conversations])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in conversations])
        device = self.model.device
        with autocast(device, self.dtype):
            logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
        return logits.float().squeeze(-1)

    def _encode(self, prompt: Prompt, response: Response) -> Ids | str:
        """The ids of the whole conversation, or why there are none."""
        try:
            ids = conversation_ids(self.chat, prompt, response.text.strip())
        except (InputError, jinja2.TemplateError):
            return "the reward model's chat template does not take the conversation"
        if len(ids) > self.context:
            return f"longer than the reward model's context of {self.context} tokens"
        return ids


def _judged(a: Ids | str, b: Ids | str, rewards: dict[Ids, float]) -> Judgement:
    reasons = [ids for ids in (a, b) if isinstance(ids, str)]
    if isinstance(a, str) or isinstance(b, str):
        return abstention(min(reasons))
    return Judgement(p=sigmoid(rewards[a] - rewards[b]))


def conversation_ids(chat: ChatFormat, prompt: Prompt, answer: str) -> Ids:
    """The ids of a prompt and its answer, as the chat template writes a conversation that ends with it.

    Special tokens that an answer spells out stay text, so that it cannot close its turn. Raises InputError or jinja2's
    TemplateError for a conversation that the template does not take.
    """
    if not chat.has_template:
        return (*chat.prompt_ids(prompt), *chat.response_ids(answer))
    tokenizer = chat.tokenizer

    def render(text: str, *, tokenize: bool) -> Any:
        messages: list[dict[str, str]] = [message.model_dump() for message in prompt.messages]
        messages.append({"role": "assistant", "content": text})
        return tokenizer.apply_chat_template(messages, tokenize=tokenize, return_dict=False)

    if not any(str(tokenizer.convert_ids_to_tokens(id)) in answer for id in special_ids(tokenizer)):
        return tuple(render(answer, tokenize=True))
    before, found, after = render(SENTINEL, tokenize=False).rpartition(SENTINEL)
    if not found:
        raise InputError("the chat template leaves the answer out; repair chat_template in the model folder")
    return (
        *tokenizer.encode(before, add_special_tokens=False),
        *chat.response_ids(answer, finished=False),
        *tokenizer.encode(after, add_special_tokens=False),
    )
