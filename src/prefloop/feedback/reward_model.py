"""A reward model as annotator: any transformers sequence classifier with one output, higher is better.

    p(a > b) = sigmoid(r(x, a) - r(x, b))

(Bradley-Terry, the model that such rewards are trained by.) r is the logit of the whole conversation, written by the
reward model's own chat template, answer and end of turn included, the same for an answer that was cut at its limit.
Nothing of a conversation is ever cut off.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import jinja2
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification

from prefloop.data.chat import SENTINEL, ChatFormat, special_ids
from prefloop.errors import FeedbackError, InputError
from prefloop.feedback.annotator import Comparison, Judgement, abstention, ask_different, sigmoid
from prefloop.models import ModelRef, _one_line, _quiet_transformers, choose_device, context_length, load_tokenizer
from prefloop.progress import Advance, ignore
from prefloop.records import Prompt, Response
from prefloop.train.config import Compute
from prefloop.train.logprobs import autocast, rows
from prefloop.train.packing import TokenGroup
from prefloop.train.reference import choose_dtype
from prefloop.train.scalar import InFloat32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        # Encoders whose positions begin at an offset take fewer tokens than their configuration says.
        limits = (context_length(self.model), self.chat.tokenizer.model_max_length)
        self.context = min(limit for limit in limits if limit)
        self.name = f"reward-model:{ref.name}"
        self.identity = f"reward-model:{ref.fingerprint} {self.dtype}"

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        def ask(different: Sequence[Comparison]) -> list[Judgement]:
            encoded = [(self._encode(prompt, a), self._encode(prompt, b)) for prompt, a, b in different]
            whole = [(a, b) for a, b in encoded if not isinstance(a, str) and not isinstance(b, str)]
            rewards = self.rewards([ids for two in whole for ids in two])
            advance(len(different))
            return [_judged(a, b, rewards) for a, b in encoded]

        return ask_different(ask, comparisons, advance)

    def score(self, answers: Sequence[tuple[Prompt, Response]]) -> list[float | str]:
        """The reward of every answer, or why there is none."""
        encoded = [self._encode(prompt, response) for prompt, response in answers]
        rewards = self.rewards([ids for ids in encoded if not isinstance(ids, str)])
        return [ids if isinstance(ids, str) else rewards[ids] for ids in encoded]

    def rewards(self, conversations: Sequence[Ids]) -> dict[Ids, float]:
        """The reward of every conversation (token ids). Raises FeedbackError when one is not a number."""
        # Each once and sorted: a reward depends neither on the order of the questions nor on the slot of an answer.
        unique = sorted(set(conversations))
        groups = [TokenGroup((), (ids,)) for ids in unique]
        # A decoder finds the end of a row by its padding token; a model without one takes one row at a time.
        budget = self.tokens_per_forward if _pad_id(self.model) is not None else 1
        found: dict[Ids, float] = {}
        for batch in rows(groups, budget, path="padded"):
            some = [unique[i] for i in batch]
            found.update(zip(some, self._forward(some), strict=True))
        return found

    @torch.no_grad()
    def _forward(self, batch: Sequence[Ids]) -> list[float]:
        width, pad = max(map(len, batch)), _pad_id(self.model) or 0
        input_ids = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in batch])
        device = self.model.device
        with autocast(device, self.dtype):
            logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
        if not torch.isfinite(logits).all():
            raise FeedbackError(f"{self.name} gave a reward that is not finite; its weights are probably damaged")
        return logits.float().squeeze(-1).tolist()

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


def load_reward_model(ref: ModelRef, *, device: str = "cpu") -> "PreTrainedModel":
    """The sequence classifier in a folder, float32, for evaluation; its head stays so under autocast.

    Raises InputError when it is no reward model.
    """
    expected = "expected a reward model: a sequence classifier with one output (num_labels 1)"
    try:
        config = AutoConfig.from_pretrained(ref.path, local_files_only=True)
        if config.num_labels != 1:
            made_for = ", ".join(config.architectures or ["an unknown architecture"])
            raise InputError(f"model {ref.name} ({made_for}) has {config.num_labels} labels; {expected}")
        with _quiet_transformers():
            loaded, info = AutoModelForSequenceClassification.from_pretrained(
                ref.path, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"model {ref.name} cannot be loaded from {ref.path}: {_one_line(error)}; {expected}") from None
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise InputError(f"model {ref.name} has no weights for {missing}, its scores would be random; {expected}")
    model: Any = loaded.to(torch.device(device)).eval().requires_grad_(False)
    heads = [(name, layer) for name, layer in model.named_modules() if getattr(layer, "out_features", None) == 1]
    for name, layer in heads:
        model.set_submodule(name, InFloat32(layer))
    return model


def _pad_id(model: "PreTrainedModel") -> int | None:
    return cast(int | None, getattr(model.config.get_text_config(), "pad_token_id", None))
