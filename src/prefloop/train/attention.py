"""Shared-prefix attention: a prompt is computed once and its responses branch from it.

A row holds groups end to end, `[prompt 1][branch 1.1][branch 1.2][prompt 2][branch 2.1]...`. A prompt token attends to
its own prompt so far; a branch token to its whole prompt and to its own branch so far. Attention across groups or
branches is never computed: on a CPU there is one call per prompt and per branch, on CUDA one compiled FlexAttention
call with a block mask.

The function is registered with transformers' public attention registry, so every decoder-only family with plain causal
attention gains it. The model's forward hands extra keyword arguments through to it: that is how it learns the layout.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from prefloop.train.packing import TokenGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "prefloop_shared_prefix"


@dataclass
class Layout:
    """Where prompts and branches lie in one row, and which positions predict which response token.

    input_ids, position_ids: [1, S]. Positions restart after the prompt for every branch.
    predictors, targets: [T]; the hidden state at `predictors[i]` predicts token `targets[i]`; responses lie end to end.
    counts: [R] predicted tokens of each response. segments: per group, prompt length (0 for an empty prompt) and branch
    lengths (no zeros).
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    counts: Tensor
    segments: list[tuple[int, list[int]]]
    _masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)
    _block_mask: BlockMask | None = None

    @classmethod
    def of(cls, groups: Sequence[TokenGroup], device: torch.device | str = "cpu") -> "Layout":
        """The row of these groups, in this order."""
        ids: list[int] = []
        positions: list[int] = []
        predictors: list[int] = []
        targets: list[int] = []
        counts: list[int] = []
        segments: list[tuple[int, list[int]]] = []
        for group in groups:
            prompt_length = len(group.prompt_ids)
            ids += group.prompt_ids
            positions += range(prompt_length)
            # An empty prompt predicts nothing: its responses count from their second token on.
            last_of_prompt = [len(ids) - 1] if prompt_length else []
            branches = []
            for response in group.responses:
                predictors += [*last_of_prompt, *range(len(ids), len(ids) + len(response) - 1)]
                targets += response if prompt_length else response[1:]
                counts.append(len(response) if prompt_length else len(response) - 1)
                ids += response[:-1]
                positions += range(prompt_length, prompt_length + len(response) - 1)
                if len(response) > 1:
                    branches.append(len(response) - 1)
            segments.append((prompt_length, branches))

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        return cls(
            input_ids=tensor(ids)[None],
            position_ids=tensor(positions)[None],
            predictors=tensor(predictors),
            targets=tensor(targets),
            counts=tensor(counts),
            segments=segments,
        )

    def mask(self, branch: int, prompt: int, like: Tensor) -> Tensor:
        """[branch, prompt + branch] additive mask: all of the prompt, causal within the branch. Made once per shape."""
        key = (branch, prompt, like.dtype)
        if key not in self._masks:
            allowed = torch.ones(branch, prompt + branch, dtype=torch.bool, device=like.device).tril(prompt)
            mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(~allowed, float("-inf"))
        return self._masks[key]

    def block_mask(self) -> BlockMask:
        """The whole row's rule for FlexAttention: own group, not later, and the prompt or the own branch. Made once."""
        if self._block_mask is None:
            groups: list[int] = []
            branches: list[int] = []
            for group, (prompt, lengths) in enumerate(self.segments):
                for branch, length in enumerate((prompt, *lengths)):
                    groups += [group] * length
                    branches += [branch] * length
            device = self.input_ids.device
            group_of = torch.tensor(groups, device=device)
            branch_of = torch.tensor(branches, device=device)

            def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                own = (branch_of[key] == 0) | (branch_of[key] == branch_of[query])
                return (group_of[query] == group_of[key]) & own & (query >= key)

            size = len(groups)
            self._block_mask = create_block_mask(visible, None, None, size, size, device=str(device))
        return self._block_mask


# Compiled models call it as it is: its calls follow the groups of the row, and each row has others.
@torch.compiler.disable
def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over one row. query [1, H, S, D], key and value [1, H_kv, S, D] -> [1, S, H, D].

    Raises RuntimeError for what it does not know how to compute; `choose_path` then takes the padded path.
    """
    if layout is None:
        raise RuntimeError("this model does not hand extra keyword arguments to its attention")
    if more.get("s_aux") is not None:
        raise RuntimeError("this model's attention has sink logits")
    if query.is_cuda:
        attended = flex_attend(query, key, value, layout, scaling=scaling, softcap=softcap, attend=_compiled_flex())
    else:
        # In float32: the CPU's kernels of bfloat16 attention are slower than those of float32, twice so backward.
        with torch.autocast(query.device.type, enabled=False):
            attended = _attend(query.float(), key.float(), value.float(), layout, scaling, softcap).to(query.dtype)
    return attended.transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, softcap: float | None
) -> Tensor:
    """One call per prompt and per branch."""
    sizes = [size for prompt, branches in layout.segments for size in (prompt, *branches)]
    # One split (not many slices): its backward is one concatenation instead of a row-sized zero tensor for each piece.
    queries, keys, values = (iter(tensor.split(sizes, dim=2)) for tensor in (query, key, value))
    pieces = []
    for prompt, branches in layout.segments:
        prompt_query, prompt_key, prompt_value = next(queries), next(keys), next(values)
        if prompt:
            mask = None if softcap is None else layout.mask(prompt, 0, query)
            pieces.append(_piece(prompt_query, prompt_key, prompt_value, mask, scaling, softcap))
        for branch in branches:
            pieces.append(
                _piece(
                    next(queries),
                    torch.cat([prompt_key, next(keys)], dim=2),
                    torch.cat([prompt_value, next(values)], dim=2),
                    layout.mask(branch, prompt, query),
                    scaling,
                    softcap,
                )
            )
    return torch.cat(pieces, dim=2)


def _piece(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """softmax(cap(scaling q k^T) + mask) v; without a mask, causal."""
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = grouped @ key[:, :, None].transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ value[:, :, None]).flatten(1, 2)


def flex_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    attend: Callable[..., Any] = flex_attention,
) -> Tensor:
    """The same by one FlexAttention call: blocks of queries and keys that share no group and branch are skipped."""

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap) if softcap else score

    return attend(
        query, key, value, score_mod=cap if softcap else None, block_mask=layout.block_mask(), scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


AttentionInterface.register(NAME, shared_prefix_attention)
# No mask is built: the layout says everything. Without this entry transformers would make an [S, S] one.
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextmanager
def shared_prefix(model: "PreTrainedModel") -> Iterator[None]:
    """Inside, the model's layers attend as their `layout` keyword says; outside, as before."""
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise RuntimeError("this model's attention cannot be exchanged")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
