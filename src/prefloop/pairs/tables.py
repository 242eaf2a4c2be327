"""Groups as arrays, and the one rule by which a best and a worst response are chosen.

Legend: N prompts, K responses (of the largest group).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Literal

import numpy as np

from prefloop.errors import InputError, did_you_mean
from prefloop.records import Group, Response

LengthUnit = Literal["chars", "tokens"]

_LENGTH_OF: dict[str, Callable[[Response], int]] = {
    "chars": attrgetter("length_chars"),
    "tokens": attrgetter("length_tokens"),
}


def length_of(unit: LengthUnit) -> Callable[[Response], int]:
    """The length |y| of a response: "chars" are code points of the stripped text, "tokens" include the end token."""
    if unit not in _LENGTH_OF:
        raise InputError(f"length unit {unit!r}: expected 'chars' or 'tokens'.{did_you_mean(unit, list(_LENGTH_OF))}")
    return _LENGTH_OF[unit]


def has_score(response: Response) -> bool:
    """Whether a response has a finite score; one without can be neither best nor worst."""
    return response.score is not None and math.isfinite(response.score)


def score_table(groups: Sequence[Group]) -> np.ndarray:
    """Scores [N, K] as float64, NaN where there is no finite score or no k-th response.

    Raises InputError when there are no groups, or when one has fewer than the two scores that a comparison takes.
    """
    if not groups:
        raise InputError("no groups to compare: every prompt was dropped before; loosen the filters or sample more")
    table = _table(groups, (response.score for group in groups for response in group.responses))
    table[~np.isfinite(table)] = np.nan
    counts = np.count_nonzero(~np.isnan(table), axis=1)
    fewest = int(counts.argmin())
    if counts[fewest] < 2:
        raise InputError(
            f"prompt {groups[fewest].prompt.id!r}: scored responses {counts[fewest]}, but a comparison takes 2; "
            "sample more per prompt, or drop such prompts with keep_scored(groups, min_valid=2)"
        )
    return table


def length_table(groups: Sequence[Group], unit: LengthUnit) -> np.ndarray:
    """Lengths [N, K] as float64, which holds them exactly; NaN where `score_table` has NaN."""
    length = length_of(unit)
    values = (length(r) if has_score(r) else None for group in groups for r in group.responses)
    return _table(groups, values)


def best_and_worst(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices [N] of the highest and of the lowest score in every row of [N, K]; of equal ones the first.

    NaN is never chosen; a row of NaN alone is an error.
    """
    return np.nanargmax(scores, axis=1), np.nanargmin(scores, axis=1)


def _table(groups: Sequence[Group], values: Iterable[float | None]) -> np.ndarray:
    sizes = np.array([len(group.responses) for group in groups])
    table = np.full((len(groups), sizes.max()), np.nan)
    table[np.arange(sizes.max()) < sizes[:, None]] = np.array(list(values), dtype=float)
    return table
