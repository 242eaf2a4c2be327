"""The rows of a running batch and what they remember: a prompt's keys and values once, an answer's own in place.

An answer attends to its prompt and to itself: two products (all answers to a prompt are one matrix of queries) under
one softmax. New tokens are written into buffers, and answers join whenever others have left. Prompts are computed with
the model's own attention, the steps after them with ours, through transformers' cache and attention interfaces.

Legend: R rows (running answers), P prompts held, M most rows of one prompt, G key heads, Q query heads per key head,
D head size, S prompt columns, T own columns, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "prefloop_shared_prompts"

TILE = 16
"""Columns are used in multiples of this: matrix kernels are made for a shape, so shapes should change seldom."""

PREFILL = 2048
"""Prompt tokens, padding counted, that go through the model at once: more saves no time and takes memory."""


class RunningBatch(Protocol):
    """Answers that are decoded together. A prompt is named by its place in the list that the batch was made with."""

    @property
    def room(self) -> int:
        """How many answers may join now."""
        ...

    def join(self, prompts: Sequence[int]) -> Tensor:
        """Append a row for each of `prompts`; the logits [rows, V] of their first tokens."""
        ...

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Let go of all but `rows`, ascending. The rows that are left, in their new order; others may be among them."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append `tokens` [R], one to every row; the logits [R, V] of the next ones."""
        ...


class SharedPrompts:
    """A `RunningBatch` of at most `capacity` rows of at most `limit` own tokens, in which every prompt is held once.

    Answers join in the order of their prompts.
    """

    def __init__(
        self, model: "PreTrainedModel", prompt_ids: Sequence[Sequence[int]], *, capacity: int, limit: int
    ) -> None:
        self._model = model
        self._prompt_ids = prompt_ids
        self._capacity = capacity
        self._limit = limit
        self._owners: list[int] = []  # the prompt of each row
        self._lengths: list[int] = []  # own tokens of each row in the cache
        self._slots: list[int | None] = []  # the prompt in each slot of the layers
        self._first_logits: dict[int, Tensor] = {}  # of the prompts in the slots
        self._layers: list[SharedPromptLayer] = []
        self._seating: Seating | None = None  # None when the rows have changed

    @property
    def room(self) -> int:
        return self._capacity - len(self._owners)

    def join(self, prompts: Sequence[int]) -> Tensor:
        # In prompt order: a prompt that has no rows and does not join here has had all of its answers.
        wanted = {*self._owners, *prompts}
        self._slots = [prompt if prompt in wanted else None for prompt in self._slots]
        self._first_logits = {prompt: logits for prompt, logits in self._first_logits.items() if prompt in wanted}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._first_logits]
        while new:
            size = max(1, PREFILL // max(len(self._prompt_ids[prompt]) for prompt in new))
            self._hold(new[:size])
            new = new[size:]
        self._owners += prompts
        self._lengths += [0] * len(prompts)
        self._seating = None
        return torch.stack([self._first_logits[prompt] for prompt in prompts])

    def _hold(self, prompts: Sequence[int]) -> None:
        """Compute prompts and put them into free slots."""
        ids = [self._prompt_ids[prompt] for prompt in prompts]
        computed = DynamicCache(config=self._model.config)
        logits, _, _ = prefill(self._model, ids, computed)
        self._first_logits.update(zip(prompts, logits.unbind(), strict=True))
        layers: list[Any] = [*computed.layers]
        states: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in layers]
        if not self._layers:
            self._layers = [SharedPromptLayer(keys, values, self._capacity, self._limit) for keys, values in states]
        for row, prompt in enumerate(prompts):
            if None not in self._slots:
                self._slots.append(None)
            slot = self._slots.index(None)
            self._slots[slot] = prompt
            for layer, (keys, values) in zip(self._layers, states, strict=True):
                layer.hold(slot, keys[row, :, -len(ids[row]) :], values[row, :, -len(ids[row]) :])

    def keep(self, rows: Sequence[int]) -> list[int]:
        # The last rows move to the places of those that leave, so that little is copied.
        left = len(rows)
        holes = sorted(set(range(left)).difference(rows))
        moved = [row for row in rows if row >= left]
        if holes:
            width = max(self._lengths[row] for row in moved)
            for layer in self._layers:
                layer.move(moved, holes, width)
        if left < len(self._owners):
            self._seating = None
        moves = dict(zip(holes, moved, strict=True))
        order = [moves.get(row, row) for row in range(left)]
        self._owners = [self._owners[row] for row in order]
        self._lengths = [self._lengths[row] for row in order]
        return order

    def step(self, tokens: Tensor) -> Tensor:
        if self._seating is None:
            slots = [self._slots.index(prompt) for prompt in self._owners]
            prompt_lengths = [len(self._prompt_ids[prompt]) for prompt in self._owners]
            self._seating = Seating.of(slots, prompt_lengths, self._model)
        self._seating.advance(self._lengths)
        for layer in self._layers:
            layer.seating = self._seating
        positions = (self._seating.prompt_lengths + self._seating.lengths)[:, None]
        with _exchanged_attention(self._model):
            logits = forward(
                self._model, tokens[:, None], positions, Cache(layers=[*self._layers]), prompt_layers=self._layers
            )
        self._lengths = [length + 1 for length in self._lengths]
        return logits


def forward(model: "PreTrainedModel", input_ids: Tensor, positions: Tensor, cache: Cache, **more: Any) -> Tensor:
    """Logits [R, V] after the last token of every row of `input_ids` [R, S]; the cache grows by them."""
    output = model(
        input_ids=input_ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1, **more
    )
    return output.logits[:, -1]


def prefill(
    model: "PreTrainedModel", prompt_ids: Sequence[Sequence[int]], cache: Cache
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill the cache with prompts, padded on the left. Logits [N, V] of their first tokens, a mask [N, S] that is 1 on
    real tokens, and positions [N, S].
    """
    width = max(len(ids) for ids in prompt_ids)
    padding = torch.tensor([width - len(ids) for ids in prompt_ids])[:, None]
    # Id 0 is a token of every vocabulary; padding is masked, so which one does not matter.
    input_ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompt_ids])
    columns = torch.arange(width)[None]
    keep_mask = (columns >= padding).long().to(model.device)
    positions = (columns - padding).clamp(min=0).to(model.device)
    logits = forward(model, input_ids.to(model.device), positions, cache, attention_mask=keep_mask)
    return logits, keep_mask, positions


@dataclass
class Seating:
    """Which rows answer which prompt, and what they may look at: the same for all layers.

    seats [P, M]: the rows of each prompt, row 0 in seats that are free. places [R]: the seat of each row, counted
    through. prompt_lengths [R] and prompt_mask [R, S]: of the prompt of each row. lengths [R]: own tokens before the
    step, which is the column that it writes. mask [R, 1, 1, S + T]: of prompt and own columns. Masks are 0 on what a
    row may see and -inf elsewhere.
    """

    seats: Tensor
    places: Tensor
    prompt_lengths: Tensor
    prompt_mask: Tensor
    lengths: Tensor = field(init=False)
    mask: Tensor = field(init=False)
    _indices: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, slots: Sequence[int], prompt_lengths: Sequence[int], model: "PreTrainedModel") -> "Seating":
        """For rows whose prompts are in these slots and have these lengths."""
        rows: list[list[int]] = [[] for _ in range(max(slots) + 1)]
        for row, slot in enumerate(slots):
            rows[slot].append(row)
        most = max(map(len, rows))
        seats = torch.tensor([of_prompt + [0] * (most - len(of_prompt)) for of_prompt in rows])
        places = torch.tensor([slot * most + rows[slot].index(row) for row, slot in enumerate(slots)])
        lengths = torch.tensor(prompt_lengths)
        mask = _mask(torch.arange(_tiled(max(prompt_lengths))) < lengths[:, None], model.dtype)
        return cls(seats.to(model.device), places.to(model.device), lengths.to(model.device), mask.to(model.device))

    def advance(self, lengths: Sequence[int]) -> None:
        """Let the rows see `lengths` own tokens and the one that is coming."""
        self.lengths = torch.tensor(lengths, device=self.places.device)
        columns = torch.arange(_tiled(max(lengths) + 1), device=self.places.device)
        own = _mask(columns <= self.lengths[:, None], self.prompt_mask.dtype)
        self.mask = torch.cat([self.prompt_mask, own], dim=1)[:, None, None]

    @property
    def columns(self) -> tuple[int, int]:
        """S and T."""
        prompt = self.prompt_mask.shape[1]
        return prompt, self.mask.shape[-1] - prompt

    def by_prompt(self, of_rows: Tensor) -> Tensor:
        """[R, G, Q, X] -> [P, G, M * Q, X], whatever X is."""
        rows, heads, queries, size = of_rows.shape
        taken = of_rows.reshape(rows * heads, queries * size).index_select(0, self._index(heads)[0])
        return taken.view(len(self.seats), heads, -1, size)

    def by_row(self, of_prompts: Tensor) -> Tensor:
        """[P, G, M * Q, X] -> [R, G, Q, X]."""
        _, heads, _, size = of_prompts.shape
        taken = of_prompts.reshape(self.seats.numel() * heads, -1).index_select(0, self._index(heads)[1])
        return taken.view(len(self.places), heads, -1, size)

    def _index(self, heads: int) -> tuple[Tensor, Tensor]:
        """Where (prompt, head, seat) is in (row, head), and (row, head) in (prompt, head, seat)."""
        if heads not in self._indices:
            head = torch.arange(heads, device=self.places.device)
            most = self.seats.shape[1]
            there = self.seats[:, None] * heads + head[:, None]
            back = ((self.places // most)[:, None] * heads + head) * most + (self.places % most)[:, None]
            self._indices[heads] = there.flatten(), back.flatten()
        return self._indices[heads]


def _tiled(columns: int) -> int:
    """The next multiple of TILE."""
    return -(-columns // TILE) * TILE


def _mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `visible`, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


class SharedPromptLayer(CacheLayerMixin):
    """Keys and values of one layer: of prompts by slot, and of the rows' own tokens.

    prompt_keys [P, G, D, S], prompt_values [P, G, S, D]; own_keys [R, G, D, T], own_values [R, G, T, D]. Keys lie as
    the product with the queries reads them: the CPU's bfloat16 product takes up to three times as long over the other
    order. Buffers are larger than what is in use. The rest is zero or was in use, so it is finite: a probability of
    zero does not hide a NaN.
    """

    def __init__(self, prompt_keys: Tensor, prompt_values: Tensor, capacity: int, limit: int) -> None:
        """`prompt_keys`, `prompt_values` [N, G, S, D]: of any prompts, for their sizes. At most `capacity` rows of
        `limit` own tokens."""
        super().__init__()
        (_, heads, _, key_size), value_size = prompt_keys.shape, prompt_values.shape[-1]
        self.prompt_keys = prompt_keys.new_zeros(0, heads, key_size, 0)
        self.prompt_values = prompt_values.new_zeros(0, heads, 0, value_size)
        self.own_keys = prompt_keys.new_zeros(capacity, heads, key_size, 0)
        self.own_values = prompt_values.new_zeros(capacity, heads, 0, value_size)
        self.most_columns = _tiled(limit)
        self.seating: Seating

    def hold(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Put a prompt, keys and values [G, S, D], into a slot."""
        slots, columns = max(len(self.prompt_keys), slot + 1), max(self.prompt_keys.shape[3], _tiled(keys.shape[1]))
        self.prompt_keys = _grown(self.prompt_keys, slots, 3, columns)
        self.prompt_values = _grown(self.prompt_values, slots, 2, columns)
        self.prompt_keys[slot, :, :, : keys.shape[1]] = keys.transpose(1, 2)
        self.prompt_values[slot, :, : values.shape[1]] = values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the token of this step, [R, G, 1, D] each; the rows' own keys [R, G, D, T] and values [R, G, T, D]."""
        lengths, (_, width), rows = self.seating.lengths, self.seating.columns, len(key_states)
        if width > self.own_keys.shape[3]:
            columns = max(width, min(2 * self.own_keys.shape[3], self.most_columns))
            self.own_keys = _grown(self.own_keys, len(self.own_keys), 3, columns)
            self.own_values = _grown(self.own_values, len(self.own_values), 2, columns)
        every = torch.arange(rows, device=lengths.device)
        self.own_keys[every, :, :, lengths] = key_states[:, :, 0]
        self.own_values[every, :, lengths] = value_states[:, :, 0]
        return self.own_keys[:rows, :, :, :width], self.own_values[:rows, :, :width]

    def move(self, sources: Sequence[int], targets: Sequence[int], width: int) -> None:
        """Write the first `width` tokens of the rows `sources` over those of the rows `targets`."""
        self.own_keys[targets, :, :, :width] = self.own_keys[sources, :, :, :width]
        self.own_values[targets, :, :width] = self.own_values[sources, :, :width]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are there from the start."""

    def get_seq_length(self) -> int:
        return self.seating.columns[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return -1


def _grown(buffer: Tensor, rows: int, dim: int, columns: int) -> Tensor:
    """`buffer` with `rows` along its first dimension and `columns` along `dim`; the same one when it has them."""
    shape = list(buffer.shape)
    shape[0], shape[dim] = rows, columns
    if shape == list(buffer.shape):
        return buffer
    grown = buffer.new_zeros(shape)
    grown[: len(buffer)].narrow(dim, 0, buffer.shape[dim]).copy_(buffer)
    return grown


def shared_prompt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    prompt_layers: Sequence[SharedPromptLayer] | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """One layer's attention of one token a row: to its prompt and to its own tokens so far.

    query [R, G * Q, 1, D], key and value as `SharedPromptLayer.update` returns them -> [R, 1, G * Q, D]. Raises
    RuntimeError for what it does not know how to compute; `can_share` then says no.
    """
    unknown = [name for name in ("s_aux", "position_bias", "sliding_window") if more.get(name) is not None]
    if prompt_layers is None or unknown:
        raise RuntimeError(
            f"{type(module).__name__}: {unknown or 'extra keyword arguments do not reach the attention'}"
        )
    index: Any = module.layer_idx
    layer = prompt_layers[index]
    seating, (prompt_width, own_width) = layer.seating, layer.seating.columns
    prompt_keys = layer.prompt_keys[: len(seating.seats), :, :, :prompt_width]
    prompt_values = layer.prompt_values[: len(seating.seats), :, :prompt_width]

    query = query * (scaling or query.shape[-1] ** -0.5)
    query = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    scores = torch.cat([seating.by_row(seating.by_prompt(query) @ prompt_keys), query @ key], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # Sums and exponentials in float32, whatever the products are in.
    shares = (scores + seating.mask).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    of_prompt, of_own = shares.split([prompt_width, own_width], dim=-1)
    attended = seating.by_row(seating.by_prompt(of_prompt) @ prompt_values) + of_own @ value
    return attended.reshape(len(query), 1, -1, value.shape[-1]), None


AttentionInterface.register(NAME, shared_prompt_attention)
# No mask is built: the seating says everything.
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextmanager
def _exchanged_attention(model: "PreTrainedModel") -> Iterator[None]:
    """Inside, the model's layers attend as `shared_prompt_attention`; outside, as before."""
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
