"""Pairs split by how far apart a reward model sees their two answers (MPO).

    delta = r(chosen) - r(rejected)        easy: delta > threshold std(delta)        hard: all others

A reward model's scale is its own, so the threshold is in standard deviations of delta over the pairs. Adding a number
to all rewards of a prompt changes nothing, multiplying all rewards by one changes nothing.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from prefloop.errors import CheckFailed
from prefloop.records import Pair, Record
from prefloop.run import Stage

Margin = Literal["signed", "abs"]


class Split(Record):
    """Where pairs are parted. With "abs" a contradicted label can be easy."""

    cut: float = Field(description="easy pairs have a larger delta, in the units of the rewards")
    std: float = Field(description="of delta; 1 where all are the same")
    margin: Margin
    easy: int
    hard: int

    @property
    def threshold(self) -> float:
        """The cut in units of `std`."""
        return self.cut / self.std

    def is_easy(self, pair: Pair) -> bool:
        return _size(_delta(pair), self.margin) > self.cut


def find_split(
    pairs: Sequence[Pair], *, threshold: float | None, easy: float, margin: Margin, stage: Stage | None = None
) -> Split:
    """Stage: the split at `threshold`, in standard deviations, or, where it is None, at the one that leaves about a
    share `easy` of the pairs above it; 0 leaves none there and 1 all. Raises CheckFailed where there are no pairs.
    """
    stage = stage or Stage.detached()
    if not pairs:
        raise CheckFailed("no pair has a score for both answers; the counts of the stage before say why there are none")
    deltas = np.array([_delta(pair) for pair in pairs])
    std = float(deltas.std()) or 1.0
    if threshold is not None:
        cut = threshold * std
    else:
        sizes = np.array([_size(delta, margin) for delta in deltas])
        cut = float(np.quantile(sizes, 1.0 - easy) if easy < 1 else np.nextafter(sizes.min(), -np.inf))
    split = Split(cut=cut, std=std, margin=margin, easy=0, hard=0)
    n = sum(split.is_easy(pair) for pair in pairs)
    stage.count("easy pairs", n)
    stage.count("hard pairs", len(pairs) - n)
    stage.count("pairs whose label the scores contradict", int((deltas < 0).sum()))
    stage.figure("threshold, in standard deviations of the margin", split.threshold)
    return split.model_copy(update={"easy": n, "hard": len(pairs) - n})


def _delta(pair: Pair) -> float:
    assert pair.chosen_score is not None and pair.rejected_score is not None
    return pair.chosen_score - pair.rejected_score


def _size(delta: float, margin: Margin) -> float:
    return abs(delta) if margin == "abs" else delta
