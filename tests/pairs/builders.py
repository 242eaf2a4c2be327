"""Groups and pairs from plain numbers."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from prefloop.records import Group, Pair, Prompt, Response

Source = Literal["offline", "generated"]


def group(scores: Sequence[float | None], lengths: Sequence[int], *, id: str = "p") -> Group:
    """Response k has score k, and its length both in characters and in token ids; no two texts or ids are equal."""
    responses = tuple(
        Response(text=chr(ord("a") + k) * length, token_ids=(k,) * length, score=score)
        for k, (score, length) in enumerate(zip(scores, lengths, strict=True))
    )
    return Group(prompt=Prompt.of("?", id=id), responses=responses)


def groups_of(table: Sequence[tuple[Sequence[float | None], Sequence[int]]]) -> list[Group]:
    return [group(scores, lengths, id=f"p{i}") for i, (scores, lengths) in enumerate(table)]


def length_biased(n: int, k: int, *, seed: int, slope: float = 0.02, noise: float = 10.0) -> list[Group]:
    """A reward that pays `slope` per character, on top of normal noise: the bias that alpha is there to remove."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(50, 1500, (n, k))
    scores = slope * lengths + rng.normal(0, noise, (n, k))
    return groups_of(list(zip(scores.tolist(), lengths.tolist(), strict=True)))


def with_scores(groups: Sequence[Group], change) -> list[Group]:
    """The groups with every score replaced by change(index of the group, score)."""
    return [
        g.model_copy(
            update={"responses": tuple(r.model_copy(update={"score": change(i, r.score)}) for r in g.responses)}
        )
        for i, g in enumerate(groups)
    ]


def pair(id: str, name: str = "", *, source: Source = "offline") -> Pair:
    chosen, rejected = Response(text=f"good {id} {name}"), Response(text=f"bad {id} {name}")
    return Pair(prompt=Prompt.of("?", id=id), chosen=chosen, rejected=rejected, source=source)


def pairs_of(ids: Sequence[str] | range, *, source: Source = "offline") -> list[Pair]:
    return [pair(str(id), source=source) for id in ids]
