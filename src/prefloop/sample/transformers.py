"""Sampling from a transformers model in this process: our own decode loop over the model's public forward.

The batch is kept full: answers wait in a queue, and one joins as soon as another has ended. A prompt goes through the
model once and all of its answers share it (`prefloop.sample.cache`).

Legend: R rows (running answers), V vocabulary.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from prefloop.data.chat import ChatFormat
from prefloop.errors import EngineError, InputError
from prefloop.models import context_length
from prefloop.progress import Advance, ignore
from prefloop.records import FinishReason, Group, Prompt, Response
from prefloop.sample.cache import RunningBatch, SharedPrompts, forward, prefill
from prefloop.sample.draw import draw
from prefloop.sample.engine import check_request, checked_prompt_ids, ends, uniforms
from prefloop.sample.sampling import Sampling
from prefloop.train.memory import reused_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 2e-3
"""Nats a token, on average, that log-probabilities of sampled ids may be from the trainer's, for a float32 model: the
order of sums differs (seen with SmolLM2-135M: 7e-6)."""

HALF_TOLERANCE = 0.08
"""The same for a model in half precision: its weights and products are rounded (seen: 0.03 in bfloat16)."""

HALF = {torch.bfloat16, torch.float16}

AGREEMENT, HALF_AGREEMENT = 1e-3, 0.25
"""Largest difference of logits, relative to their spread, at which `can_share` says yes; in half precision the second.
Seen with SmolLM2-135M: 3e-5 and 0.08 when all is well, 0.55 and more when rows miss their prompt or a token of theirs.
"""

LEAVE = 0.25
"""Finished answers leave `RepeatedPrompts` when they are this fraction of its rows: leaving copies the cache."""

BATCHABLE = {DynamicLayer, DynamicSlidingWindowLayer}
"""Cache layers whose rows can be padded on the left, repeated and selected."""


@dataclass
class _Answer:
    """One answer while it is being sampled. `prompt` is its place in the request, `uniforms` one number a token."""

    prompt: int
    k: int
    uniforms: np.ndarray
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    is_open: bool = True


class TransformersEngine:
    """An `Engine` over a causal language model in this process.

    `batch_size`: answers that are decoded at once.
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
        self.chat = chat
        self.batch_size = batch_size
        self.tolerance: float | None = HALF_TOLERANCE if model.dtype in HALF else TOLERANCE
        self._model: PreTrainedModel | None = model
        self._can_share: bool | None = None

    @property
    def model(self) -> "PreTrainedModel":
        """The model. Raises EngineError when the engine is closed."""
        if self._model is None:
            raise EngineError("this engine was closed and its model given back; make a new one to sample again")
        return self._model

    def close(self) -> None:
        self._model = None

    def prompt_lengths(self, prompts: Sequence[Prompt], *, sampling: Sampling) -> list[int]:
        return [len(ids) for ids in self._prompt_ids(prompts, sampling)]

    def _prompt_ids(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
        return checked_prompt_ids(self.chat, prompts, sampling, context_length(self.model))

    @torch.inference_mode()
    @reused_memory()
    def sample(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seed: int, advance: Advance = ignore
    ) -> list[Group]:
        check_request(prompts, k)
        if self.model.training:
            raise InputError("the model is in training mode, so dropout would change the answers; call model.eval()")
        prompt_ids = self._prompt_ids(prompts, sampling)
        if not prompts:
            return []
        answers = [
            [_Answer(i, number, uniforms(seed, prompt.id, number, sampling.max_new_tokens)) for number in range(k)]
            for i, prompt in enumerate(prompts)
        ]
        # Longest first: prompts that are held together are of similar length, and buffers have their size at once.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompt_ids[i]), i))
        waiting = deque(answer for i in order for answer in answers[i])
        batch = self._batch(prompt_ids, capacity=min(self.batch_size, len(waiting)), limit=sampling.max_new_tokens)
        self._decode(batch, waiting, prompts, sampling, advance)
        return [
            Group(prompt=prompt, responses=tuple(self._response(answer) for answer in of_prompt))
            for prompt, of_prompt in zip(prompts, answers, strict=True)
        ]

    def _batch(self, prompt_ids: Sequence[Sequence[int]], *, capacity: int, limit: int) -> RunningBatch:
        if self._can_share is None:
            self._can_share = can_share(self.model, min(prompt_ids, key=len))
        if self._can_share:
            return SharedPrompts(self.model, prompt_ids, capacity=capacity, limit=limit)
        return RepeatedPrompts(self.model, prompt_ids, capacity=capacity)

    def _decode(
        self,
        batch: RunningBatch,
        waiting: deque[_Answer],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        advance: Advance,
    ) -> None:
        """Complete the answers that are waiting."""
        rows: list[_Answer] = []
        logits: list[Tensor] = []
        while rows or waiting:
            joining = [waiting.popleft() for _ in range(min(batch.room, len(waiting)))]
            if joining:
                rows += joining
                logits.append(batch.join([answer.prompt for answer in joining]))
            tokens, logps = draw(torch.cat(logits), self._numbers(rows), sampling)
            for answer, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
                if answer.is_open:
                    self._append(answer, token, logp, prompts[answer.prompt], sampling)
                    if not answer.is_open:
                        advance(1)
            order = batch.keep([row for row, answer in enumerate(rows) if answer.is_open])
            rows = [rows[row] for row in order]
            logits = [batch.step(tokens[torch.tensor(order, device=tokens.device)])] if rows else []

    def _numbers(self, rows: Sequence[_Answer]) -> Tensor:
        """[R] uniform numbers, in float64, for the next tokens; in float32 (still below 1) on MPS, which lacks it."""
        # A row that has finished and not left has no number for its next token; what it draws is not looked at.
        numbers = torch.tensor(
            [answer.uniforms[min(len(answer.token_ids), len(answer.uniforms) - 1)] for answer in rows],
            dtype=torch.float64,
        )
        if self.model.device.type != "mps":
            return numbers.to(self.model.device)
        below_one = 1 - torch.finfo(torch.float32).eps / 2
        return numbers.float().clamp(max=below_one).to(self.model.device)

    def _append(self, answer: _Answer, token: int, logp: float, prompt: Prompt, sampling: Sampling) -> None:
        if not math.isfinite(logp):
            raise EngineError(
                f"the model's logits for token {len(answer.token_ids)} of answer {answer.k} to prompt "
                f"{prompt.id!r} are not finite; its weights are damaged or overflow in {self.model.dtype} "
                "(try float32)"
            )
        answer.token_ids.append(token)
        answer.logps.append(round(logp, 6))
        if ends(self.chat, answer.token_ids, sampling):
            answer.finish_reason = "stop"
        answer.is_open = answer.finish_reason == "length" and len(answer.token_ids) < sampling.max_new_tokens

    def _response(self, answer: _Answer) -> Response:
        return Response(
            text=self.chat.decode(answer.token_ids),
            token_ids=tuple(answer.token_ids),
            finish_reason=answer.finish_reason,
            sampling_logps=tuple(answer.logps),
        )


class RepeatedPrompts:
    """A `RunningBatch` over transformers' DynamicCache, with a copy of its prompt in every row.

    For models that `can_share` says no to: with windows, or attention that cannot be exchanged. Answers start together,
    when all of the last ones have left.
    """

    def __init__(self, model: "PreTrainedModel", prompt_ids: Sequence[Sequence[int]], *, capacity: int) -> None:
        self._model = model
        self._prompt_ids = prompt_ids
        self._capacity = capacity
        self._begin()

    def _begin(self) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._keep_mask = torch.zeros(0, 0, dtype=torch.long, device=self._model.device)
        self._positions = self._keep_mask

    @property
    def room(self) -> int:
        return 0 if len(self._keep_mask) else self._capacity

    def join(self, prompts: Sequence[int]) -> Tensor:
        distinct = list(dict.fromkeys(prompts))
        logits, keep_mask, positions = prefill(self._model, [self._prompt_ids[i] for i in distinct], self._cache)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=logits.device)
        self._cache.batch_select_indices(rows)
        self._keep_mask, self._positions = keep_mask[rows], positions[rows, -1:]
        return logits[rows]

    def keep(self, rows: Sequence[int]) -> list[int]:
        if not rows:
            self._begin()
        elif len(rows) > (1 - LEAVE) * len(self._keep_mask):
            return list(range(len(self._keep_mask)))
        else:
            index = torch.tensor(rows, device=self._keep_mask.device)
            self._cache.batch_select_indices(index)
            self._keep_mask, self._positions = self._keep_mask[index], self._positions[index]
        return list(rows)

    def step(self, tokens: Tensor) -> Tensor:
        self._positions = self._positions + 1
        self._keep_mask = torch.cat([self._keep_mask, torch.ones_like(self._positions)], dim=1)
        return forward(self._model, tokens[:, None], self._positions, self._cache, attention_mask=self._keep_mask)


def can_share(model: "PreTrainedModel", prompt_ids: Sequence[int]) -> bool:
    """Whether `SharedPrompts` gives this model's own numbers: tried on answers to a prompt that join, leave and move.

    Layers that forget (sliding windows) are not tried: a short trial would not show it.
    """
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False
    # A real prompt and the model's own tokens: on made-up ones rounding to bfloat16 alone moves logits beyond measure.
    whole, half = list(prompt_ids), list(prompt_ids[: -(-len(prompt_ids) // 2)])
    batch = SharedPrompts(model, [whole, half], capacity=3, limit=2)
    try:
        first = batch.join([0, 0, 1]).topk(3).indices.diagonal()
        logits = batch.step(first)
        order = batch.keep([1, 2])
        second = torch.cat([logits[order], batch.join([1])]).argmax(dim=1)
        found = batch.step(second).float()
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    a, b = first.tolist(), second.tolist()
    rows = [
        torch.tensor([ids], device=model.device) for ids in ([*half, a[2], b[0]], [*whole, a[1], b[1]], [*half, b[2]])
    ]
    expected = torch.stack([model(input_ids=ids, use_cache=False).logits[0, -1] for ids in rows]).float()
    spread = expected - expected.mean(dim=1, keepdim=True)
    agreement = HALF_AGREEMENT if model.dtype in HALF else AGREEMENT
    return float((found - expected).norm() / spread.norm()) <= agreement
