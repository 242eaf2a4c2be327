"""The data: what a source holds, and how long its rows are in the model's tokens."""

from collections.abc import Sequence
from typing import Literal, Self, TypeVar

import numpy as np

from prefloop.data.chat import ChatFormat
from prefloop.data.mapping import Loaded, OnBadRow, are_pairs, load_pairs, load_rows, pairs_of_rows, prompts_of_rows
from prefloop.records import Pair, Prompt, Record
from prefloop.train.packing import TokenGroup
from prefloop.train.reference import token_group

MOST_ROWS = 2000
"""Rows that are tokenised: enough for percentiles, and no wait on a large file."""

T = TypeVar("T")


class Percentiles(Record):
    """Of some token counts; a percentile is one of them."""

    median: int
    p90: int
    p99: int
    max: int

    @classmethod
    def of(cls, counts: Sequence[int]) -> Self:
        median, p90, p99 = (int(np.percentile(counts, q, method="higher")) for q in (50, 90, 99))
        return cls(median=median, p90=p90, p99=p99, max=max(counts))


class DataFacts(Record):
    """What was read. Token counts are those of the `measured` rows, spread evenly over all `rows`.

    row_tokens: prompt and longer response; None for prompts, which have none. over_context: measured rows longer than
    the model's context; without_room: those of them whose prompt alone leaves no room for an answer.
    """

    source: str
    kind: Literal["pairs", "prompts"]
    mapping: str
    rows: int
    skipped: int
    measured: int
    prompt_tokens: Percentiles
    row_tokens: Percentiles | None = None
    over_context: int
    without_room: int


def read_data(source: str, *, split: str | None, on_bad_row: OnBadRow) -> Loaded[Pair] | Loaded[Prompt]:
    """Pairs or prompts, whichever the source holds. Raises InputError as `load_pairs` and `load_prompts` do."""
    rows = load_rows(source, split, seed_file="pairs")
    return (pairs_of_rows if are_pairs(rows) else prompts_of_rows)(rows, on_bad_row=on_bad_row)


def evenly(items: Sequence[T], n: int) -> list[T]:
    """At most `n` items, evenly spaced from the first on.

    >>> evenly("abcdefg", 3)
    ['a', 'c', 'e']
    """
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def token_groups(records: Sequence[Pair | Prompt], chat: ChatFormat) -> list[TokenGroup]:
    """A group of two responses for every record; for a bare prompt, a packaged pair's answers stand in."""
    pairs = [record for record in records if isinstance(record, Pair)]
    if not pairs:
        seed = load_pairs("seed").records
        prompts = [record for record in records if isinstance(record, Prompt)]
        pairs = [seed[i % len(seed)].model_copy(update={"prompt": prompt}) for i, prompt in enumerate(prompts)]
    return [token_group(chat, pair.prompt, (chat.own_ids(pair.chosen), chat.own_ids(pair.rejected))) for pair in pairs]


def look_at_data(loaded: Loaded[Pair] | Loaded[Prompt], groups: Sequence[TokenGroup], context: int | None) -> DataFacts:
    """The facts of a source, from the groups of its measured rows. `context` in tokens; None has no end."""
    kind = "pairs" if isinstance(loaded.records[0], Pair) else "prompts"
    prompts = [len(group.prompt_ids) for group in groups]
    # A bare prompt's row is the prompt and the first token of an answer.
    lengths = [longest(group) if kind == "pairs" else len(group.prompt_ids) + 1 for group in groups]
    return DataFacts(
        source=loaded.source,
        kind=kind,
        mapping=loaded.mapping.describe(),
        rows=len(loaded.records),
        skipped=len(loaded.bad_rows),
        measured=len(groups),
        prompt_tokens=Percentiles.of(prompts),
        row_tokens=Percentiles.of(lengths) if kind == "pairs" else None,
        over_context=sum(context is not None and length > context for length in lengths),
        without_room=sum(context is not None and length + 1 > context for length in prompts),
    )


def longest(group: TokenGroup) -> int:
    """Tokens of the prompt and the longest response."""
    return len(group.prompt_ids) + max(len(response) for response in group.responses)
