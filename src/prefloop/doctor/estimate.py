"""Memory and time of a training step and of scoring, from one small forward and backward pass that really ran."""

import time
from collections.abc import Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import torch

from prefloop.records import Record
from prefloop.train.head import TILE
from prefloop.train.logprobs import Path, response_logps, rows
from prefloop.train.packing import TokenGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES = 4
"""Of a weight and of its gradient: both are float32."""
ADAMW_BYTES = 8
"""Of AdamW's two float32 moments of a trained weight."""
TILES_AT_ONCE = 2
"""Float32 tiles of logits that the output head holds: the logits, and what is computed from them."""

TEMPORARY = 0.5
"""Of the activations once more: what backward computes beside them and what the allocator keeps of what it freed.
Measured on SmolLM2-135M with 1,292 tokens on a CPU: none in full training, 0.04 with LoRA, but 0.8 where glibc's
default thresholds keep LoRA's freed pieces; half is between.
"""

Mode = Literal["full", "lora"]


class Pass(NamedTuple):
    """One pass over a row: its tokens, its seconds, and the bytes that forward kept for backward."""

    tokens: int
    seconds: float
    kept: int


class Line(NamedTuple):
    """bytes = fixed + per_token * tokens, both at least 0."""

    fixed: float
    per_token: float

    @classmethod
    def through(cls, short: Pass, long: Pass) -> Self:
        """The line through two passes. What does not grow with tokens (weights cast for the products) is `fixed`."""
        per_token = max(0.0, (long.kept - short.kept) / (long.tokens - short.tokens))
        return cls(max(0.0, long.kept - per_token * long.tokens), per_token)

    def at(self, tokens: int) -> int:
        return round(self.fixed + self.per_token * tokens)


class Workload(NamedTuple):
    """What the data asks for: mean tokens of a training step and of a group, and the largest rows, in tokens."""

    step_tokens: float
    group_tokens: float
    training_row: int
    scoring_row: int

    @classmethod
    def of(cls, groups: Sequence[TokenGroup], batch_size: int, token_budget: int, path: Path) -> Self:
        """Batches in the order of `groups` (repeated when they are fewer than a batch), cut as in training."""
        enough = list(groups) if len(groups) >= batch_size else list(islice(cycle(groups), batch_size))
        steps = [
            _row_sizes(enough[start : start + batch_size], token_budget, path)
            for start in range(0, len(enough) - batch_size + 1, batch_size)
        ]
        scoring = _row_sizes(groups, token_budget, path)
        longest = max(row_tokens([group], path) for group in groups)
        return cls(
            step_tokens=sum(map(sum, steps)) / len(steps),
            group_tokens=sum(scoring) / len(groups),
            training_row=max(longest, *map(max, steps)),
            scoring_row=max(scoring),
        )


class StepEstimate(Record):
    """A training step, in bytes and seconds. `trained` weights have gradients and optimiser state.

    From activations on, figures are None when memory is too small to measure them: then the step does not fit.
    fits: against the memory that was available; None when that is not known.
    """

    mode: Mode
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int | None = None
    temporary: int | None = None
    head: int | None = None
    total: int | None = None
    fits: bool | None = None
    seconds: float | None = None

    @classmethod
    def of_weights(cls, mode: Mode, model: "PreTrainedModel") -> Self:
        """What a model's weights alone say of it, loaded or in outline: a step that cannot be tried does not fit."""
        sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
        trained = sum(size for size, is_trained in sizes if is_trained)
        return cls(
            mode=mode,
            trained=trained,
            weights=BYTES * sum(size for size, _ in sizes),
            gradients=BYTES * trained,
            optimizer=ADAMW_BYTES * trained,
            fits=False,
        )

    def measured(self, work: Workload, line: Line, long: Pass, *, head: int, available: int | None) -> Self:
        """The step on `work`: memory along the line through two passes, time at the pace of the longer one."""
        activations = line.at(work.training_row)
        temporary = round(TEMPORARY * activations)
        total = self.weights + self.gradients + self.optimizer + activations + temporary + head
        update = {
            "activations": activations,
            "temporary": temporary,
            "head": head,
            "total": total,
            "fits": fits(total, available),
            "seconds": long.seconds / long.tokens * work.step_tokens,
        }
        return self.model_copy(update=update)


class ScoreEstimate(Record):
    """A scoring pass, in bytes and seconds; `seconds` are those of 100 responses.

    activations: of one layer at a time, small beside the weights; None where no training pass could show them.
    """

    weights: int
    activations: int | None = None
    head: int
    total: int
    fits: bool | None = None
    seconds: float

    @classmethod
    def of(
        cls, weights: int, work: Workload, layer: float | None, timed: Pass, *, head: int, available: int | None
    ) -> Self:
        """From a timed pass over groups of two responses; `layer`: activation bytes of a token in one layer."""
        activations = None if layer is None else round(layer * work.scoring_row)
        total = weights + (activations or 0) + head
        return cls(
            weights=weights,
            activations=activations,
            head=head,
            total=total,
            fits=fits(total, available),
            seconds=timed.seconds / timed.tokens * work.group_tokens * 50,
        )


def row_tokens(groups: Sequence[TokenGroup], path: Path) -> int:
    """Tokens that go through the model when these groups do, padding counted."""
    if path == "shared":
        return sum(group.tokens for group in groups)
    widest = max(len(group.prompt_ids) + len(response) for group in groups for response in group.responses)
    return widest * sum(len(group.responses) for group in groups)


def _row_sizes(groups: Sequence[TokenGroup], token_budget: int, path: Path) -> list[int]:
    return [row_tokens([groups[i] for i in row], path) for row in rows(groups, token_budget, path=path)]


def typical(groups: Sequence[TokenGroup], tokens: int) -> list[TokenGroup]:
    """Groups of nearly the median size, at least two (one is repeated) and then as many as reach `tokens`."""
    median = sorted(group.tokens for group in groups)[len(groups) // 2]
    chosen: list[TokenGroup] = []
    for group in cycle(sorted(groups, key=lambda group: abs(group.tokens - median))):
        if len(chosen) >= 2 and (sum(each.tokens for each in chosen) >= tokens or len(chosen) >= len(groups)):
            return chosen
        chosen.append(group)
    raise ValueError("there should be at least one group")


def training_pass(model: "PreTrainedModel", groups: Sequence[TokenGroup], path: Path, dtype: str) -> Pass:
    """Run one forward and backward pass; the gradients are dropped."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sums = response_logps(model, groups, path=path, dtype=dtype).sums
    sums.sum().backward()
    torch.get_device_module(model.device).synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    for weight in model.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return Pass(row_tokens(groups, path), seconds, sum(kept.values()))


def scoring_pass(model: "PreTrainedModel", groups: Sequence[TokenGroup], path: Path, dtype: str) -> Pass:
    """Run one forward pass; nothing is kept."""
    start = time.perf_counter()
    with torch.inference_mode():
        response_logps(model, groups, path=path, dtype=dtype)
    torch.get_device_module(model.device).synchronize()
    return Pass(row_tokens(groups, path), time.perf_counter() - start, 0)


def head_bytes(model: "PreTrainedModel", tokens: int) -> int:
    """Bytes of the output head's tiles of logits on a row of `tokens`."""
    most = TILE.get(model.device.type, TILE["cuda"])
    return BYTES * TILES_AT_ONCE * min(most, tokens * model.config.get_text_config().vocab_size)


def fits(total: int, available: int | None) -> bool | None:
    """Whether `total` bytes fit; None when it is not known what is available."""
    return None if available is None else total <= available
