"""Sampling from a transformers model in this process: our own decode loop over the model's public forward.

A prompt goes through the model once and its cache is repeated for its answers; finished answers leave the batch.

Legend: N answers of a batch, R of them still in the cache, S padded prompt length, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from prefloop.data.chat import ChatFormat, check_prompt_length
from prefloop.errors import EngineError, InputError
from prefloop.models import context_length
from prefloop.records import FinishReason, Group, Prompt, Response
from prefloop.sample.draw import draw
from prefloop.sample.engine import Advance, check_request, ignore, shards, uniforms
from prefloop.sample.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAVE = 0.25
"""Finished answers leave the batch when they are this fraction of it: leaving copies the cache."""

BATCHABLE = {DynamicLayer, DynamicSlidingWindowLayer}
"""Cache layers whose rows can be padded on the left, repeated and selected."""


@dataclass
class _Answer:
    """One answer while it is being sampled."""

    prompt: Prompt
    k: int
    token_ids: list[int] = field(default_factory=list)
    logp: float = 0.0
    finish_reason: FinishReason = "length"

    @property
    def is_open(self) -> bool:
        return self.finish_reason == "length"


class TransformersEngine:
    """An `Engine` over a causal language model in this process.

    `batch_size`: answers that are decoded at once. The same batches are formed from the same prompts, always.
    """

    def __init__(self, model: "PreTrainedModel", chat: ChatFormat, *, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size = {batch_size}: expected at least 1 answer at once")
        others = {type(layer) for layer in DynamicCache(config=model.config).layers} - BATCHABLE
        if others:
            raise InputError(
                f"{type(model).__name__} keeps a state that padding would change "
                f"({', '.join(sorted(kind.__name__ for kind in others))}); use a model with attention layers only"
            )
        self.model = model
        self.chat = chat
        self.batch_size = batch_size

    def prompt_lengths(self, prompts: Sequence[Prompt], *, sampling: Sampling) -> list[int]:
        return [len(ids) for ids in self._prompt_ids(prompts, sampling)]

    def sample(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seed: int, advance: Advance = ignore
    ) -> list[Group]:
        check_request(prompts, k)
        if self.model.training:
            raise InputError("the model is in training mode, so dropout would change the answers; call model.eval()")
        prompt_ids = self._prompt_ids(prompts, sampling)
        responses: dict[str, list[Response]] = {prompt.id: [] for prompt in prompts}
        for shard in shards([len(ids) for ids in prompt_ids], k, self.batch_size):
            for start in range(0, k, self.batch_size):
                part = range(start, min(k, start + self.batch_size))
                answers = [_Answer(prompts[i], number) for i in shard for number in part]
                self._decode([prompt_ids[i] for i in shard], answers, sampling, seed, advance)
                for answer in answers:
                    responses[answer.prompt.id].append(self._response(answer))
        return [Group(prompt=prompt, responses=tuple(responses[prompt.id])) for prompt in prompts]

    def _prompt_ids(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
        context = context_length(self.model)
        prompt_ids = [self.chat.prompt_ids(prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            check_prompt_length(ids, sampling.max_new_tokens, context, prompt)
        return prompt_ids

    def _response(self, answer: _Answer) -> Response:
        return Response(
            text=self.chat.decode(answer.token_ids),
            token_ids=tuple(answer.token_ids),
            finish_reason=answer.finish_reason,
            sampling_logp=answer.logp,
        )

    @torch.inference_mode()
    def _decode(
        self, prompt_ids: list[list[int]], answers: list[_Answer], sampling: Sampling, seed: int, advance: Advance
    ) -> None:
        """Complete `answers`, which are in the order of the prompts, equally many for each."""
        device, limit = self.model.device, sampling.max_new_tokens
        numbers = _to_device(np.stack([uniforms(seed, a.prompt.id, a.k, limit) for a in answers]), device)
        input_ids, keep_mask, positions = _left_padded(prompt_ids, limit, device)
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(input_ids, keep_mask[:, : input_ids.shape[1]], positions, cache)

        repeats = len(answers) // len(prompt_ids)
        cache.batch_repeat_interleave(repeats)
        logits, keep_mask = logits.repeat_interleave(repeats, 0), keep_mask.repeat_interleave(repeats, 0)
        positions = positions[:, -1:].repeat_interleave(repeats, 0)
        rows = answers
        for step in range(limit):
            tokens, logps = draw(logits, numbers[:, step], sampling)
            for answer, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
                if answer.is_open:
                    self._append(answer, token, logp, advance)
            still_open = [row for row, answer in enumerate(rows) if answer.is_open]
            if not still_open or step + 1 == limit:
                break
            if len(still_open) <= (1 - LEAVE) * len(rows):
                index = torch.tensor(still_open, device=device)
                cache.batch_select_indices(index)
                tokens, keep_mask, positions, numbers = (x[index] for x in (tokens, keep_mask, positions, numbers))
                rows = [rows[row] for row in still_open]
            positions = positions + 1
            seen = keep_mask[:, : input_ids.shape[1] + step + 1]
            logits = self._forward(tokens[:, None], seen, positions, cache)
        advance(sum(answer.is_open for answer in answers))

    def _append(self, answer: _Answer, token: int, logp: float, advance: Advance) -> None:
        if not math.isfinite(logp):
            raise EngineError(
                f"the model's logits for token {len(answer.token_ids)} of answer {answer.k} to prompt "
                f"{answer.prompt.id!r} are not finite; its weights are damaged or overflow in {self.model.dtype} "
                "(try float32)"
            )
        answer.token_ids.append(token)
        answer.logp += logp
        if token in self.chat.stop_token_ids:
            answer.finish_reason = "stop"
            advance(1)

    def _forward(self, input_ids: Tensor, keep_mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [R, V] after the last token of every row; the cache grows by `input_ids`."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=keep_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def _left_padded(prompt_ids: list[list[int]], limit: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [N, S], a mask [N, S + limit] that is 1 on real tokens and on answers to come, positions [N, S]."""
    width = max(len(ids) for ids in prompt_ids)
    padding = torch.tensor([width - len(ids) for ids in prompt_ids])[:, None]
    # Id 0 is a token of every vocabulary; padding is masked, so which one does not matter.
    input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompt_ids])
    columns = torch.arange(width + limit)[None]
    positions = (columns[:, :width] - padding).clamp(min=0)
    return input_ids.to(device), (columns >= padding).long().to(device), positions.to(device)


def _to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Uniform numbers in float64, or in float32 (still below 1) on MPS, which has no float64."""
    if device.type != "mps":
        return torch.from_numpy(numbers).to(device)
    below_one = 1 - torch.finfo(torch.float32).eps / 2
    return torch.from_numpy(numbers).float().clamp(max=below_one).to(device)
