"""The output head: log-probabilities of given tokens without ever holding [tokens x vocabulary] logits.

    log p(y | h) = z_y - log sum_v exp z_v,        z = f(h W^T + b),  f = scale, then softcap * tanh(. / softcap)

Logits exist in tiles of at most `TILE` elements, in the forward pass and again in the backward pass, which computes
them a second time. So memory grows with tokens + vocabulary, not with their product.

Legend: T tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefloop.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TILE = {"cpu": 2**22, "cuda": 2**26}
"""Logits of a tile. On a CPU its float32 logits (16 MB) stay in the last-level cache and in reused memory."""

TOKENS = 1024
"""Most tokens of a tile; the rest of it is vocabulary, so that the weights are read once per 1,024 tokens."""


def token_logps(
    model: "PreTrainedModel", hidden: Tensor, targets: Tensor, *, entropy: bool = False, collision: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log p(target) [T] of the model's output head on hidden [T, D], float32, differentiable; and, when asked, of the
    whole distribution the entropy [T] in nats and log sum_v p(v)^2 [T] (not differentiable).

    Matrix products run in autocast's dtype where that is on, else in the weights'; everything else is float32.
    Raises InputError for a head that is not a plain linear layer (an adapter on it, for example).
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise InputError(
            f"the output head of this model is a {type(head).__name__}, expected a plain torch.nn.Linear; "
            "leave the head out of the layers that get adapters or quantisation"
        )
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    # Cohere multiplies the logits, Granite divides them; `choose_path` finds out models that do what is not named here.
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    with torch.autocast(kind, enabled=False):
        logps, entropies, collisions = _HeadLogps.apply(
            hidden.to(dtype), head.weight, head.bias, targets, float(scale), softcap, entropy, collision
        )
    return logps, entropies if entropy else None, collisions if collision else None


def _tiles(tokens: int, vocabulary: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of tokens and of vocabulary that cover the logits; all of one token slice before the next."""
    rows = max(1, min(tokens, TOKENS))
    columns = max(1, TILE.get(device.type, TILE["cuda"]) // rows)
    for start in range(0, tokens, rows):
        for first in range(0, vocabulary, columns):
            yield slice(start, start + rows), slice(first, first + columns)


def _float32_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with a float32 result: a sum over vocabulary tiles of results rounded to bfloat16 drifts.

    Where the hardware multiplies `dtype` into float32, in `dtype`; else in float32.
    """
    if a.is_cuda and dtype != torch.float32:
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    return a.float() @ b.float()


class _HeadLogps(torch.autograd.Function):
    """hidden [T, D], weight [V, D], bias [V] or None, targets [T] -> log-probabilities, entropies, collisions, [T]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        entropy: bool,
        collision: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.scale, ctx.softcap = scale, softcap
        log_total = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        mean_logit, target_logits = torch.zeros_like(log_total), torch.zeros_like(log_total)
        log_squares = torch.full_like(log_total, -torch.inf)
        for rows, columns in _tiles(len(hidden), len(weight), hidden.device):
            logits = _logits(hidden[rows], weight[columns], None if bias is None else bias[columns], scale, softcap)
            tile_total = logits.logsumexp(1)
            before, after = log_total[rows], torch.logaddexp(log_total[rows], tile_total)
            if entropy:
                tile_mean = (logits.sub(tile_total[:, None]).exp_() * logits).sum(1)
                mean_logit[rows] = mean_logit[rows] * (before - after).exp() + tile_mean * (tile_total - after).exp()
            if collision:
                log_squares[rows] = torch.logaddexp(log_squares[rows], (2.0 * logits).logsumexp(1))
            log_total[rows] = after
            # From the same tile, so that its rounding is also the total's: log p of a sure token stays at most 0.
            place, inside = _places(targets[rows], columns, len(weight))
            target_logits[rows] += (logits.gather(1, place) * inside)[:, 0]
        ctx.save_for_backward(hidden, weight, bias, targets, log_total)
        entropies, collisions = log_total - mean_logit, log_squares - 2.0 * log_total
        ctx.mark_non_differentiable(entropies, collisions)
        return target_logits - log_total, entropies, collisions

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        hidden, weight, bias, targets, log_total = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        # The first token tile writes every row: no pass of zeros over a vocabulary-sized gradient.
        new = torch.empty_like if len(hidden) else torch.zeros_like
        grad_weight = new(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and needs_bias else None
        for rows, columns in _tiles(len(hidden), len(weight), hidden.device):
            tile_bias = None if bias is None else bias[columns]
            logits = _logits(hidden[rows], weight[columns], tile_bias, ctx.scale, ctx.softcap)
            inner = _inner_gradient(logits, ctx.scale, ctx.softcap)
            share = logits.sub_(log_total[rows, None]).exp_().mul_(-grad[rows, None])
            # The target's part before any rounding: of a sure token, 1 - p is what is left of two large numbers.
            place, inside = _places(targets[rows], columns, len(weight))
            share.scatter_add_(1, place, grad[rows, None] * inside)
            share = share.mul_(inner) if isinstance(inner, Tensor) or inner != 1.0 else share
            if needs_hidden:
                grad_hidden[rows] += _float32_product(share, weight[columns], hidden.dtype)
            if grad_weight is not None:
                product = share.to(hidden.dtype).T @ hidden[rows]
                if rows.start:
                    grad_weight[columns] += product
                else:
                    grad_weight[columns] = product
            if grad_bias is not None:
                grad_bias[columns] += share.sum(0)
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None, None, None


def _places(targets: Tensor, columns: slice, vocabulary: int) -> tuple[Tensor, Tensor]:
    """[T, 1] column of each target in the tile (any, where it is in another tile), and whether it is in this one."""
    place = targets[:, None] - columns.start
    width = min(columns.stop, vocabulary) - columns.start
    return place.clamp(0, width - 1), (place >= 0) & (place < width)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """[T, V] float32 logits of a tile."""
    return _finish((hidden @ weight.to(hidden.dtype).T).float(), bias, scale, softcap)


def _finish(products: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    if bias is not None:
        products = products + bias.float()
    if scale != 1.0:
        products = products * scale
    return softcap * torch.tanh(products / softcap) if softcap else products


def _inner_gradient(logits: Tensor, scale: float, softcap: float | None) -> Tensor | float:
    """d logit / d (h w + b): the scale, and 1 - tanh^2 where the logits are capped."""
    return scale * (1.0 - (logits / softcap).square()) if softcap else scale
