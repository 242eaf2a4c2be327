"""Weights of pairs by the gap of their scores: wDPO (OPTune, Chen et al. 2024, arXiv 2406.07657).

    loss = w(gap) (-log sigmoid(beta h)),        gap = score(chosen) - score(rejected) >= 0

    linear   w = scale gap               0 without a gap; unbounded
    sigmoid  w = sigmoid(scale gap)      1/2 without a gap, 1 at most
    none     w = 1                       plain DPO

A weight multiplies loss and gradient, so its mean acts on the learning rate, and that mean depends on the unit of the
scores. Divided by its mean over the pairs, it does not; then the `scale` of a linear weight changes nothing.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from prefloop.config import Config
from prefloop.errors import InputError
from prefloop.feedback.annotator import sigmoid
from prefloop.pairs.rewards import effective_sample_size
from prefloop.records import Pair
from prefloop.run import Stage

WeightFunction = Literal["linear", "sigmoid", "none"]


class Weights(Config):
    """How a pair's weight follows from the gap of its scores."""

    function: WeightFunction = Field(
        default="linear",
        description="w of the reward gap: linear, sigmoid, or none, which is plain DPO (paper: unseen)",
    )
    scale: float = Field(default=1.0, gt=0, description="beta2: of the gap (paper: unseen); see normalise")
    normalise: bool = Field(
        default=True, description="divide by the mean weight of the round's pairs; a linear weight then ignores scale"
    )
    clip: float | None = Field(default=None, gt=0, description="largest weight, after that; none: no limit")


def weight_of(gap: float, function: WeightFunction, scale: float) -> float:
    """w(gap), before normalisation.

    >>> [weight_of(2.0, function, 0.5) for function in ("linear", "none")], round(weight_of(0.0, "sigmoid", 0.5), 2)
    ([1.0, 1.0], 0.5)
    """
    return {"linear": scale * gap, "sigmoid": sigmoid(scale * gap), "none": 1.0}[function]


def weigh(pairs: Sequence[Pair], how: Weights, *, stage: Stage | None = None) -> list[Pair]:
    """The pairs with their weights; mean and largest weight and the effective number of pairs go into the figures.

    Raises InputError for a pair without scores, or with its chosen response below the rejected one.
    """
    stage = stage or Stage.detached()
    raw = [weight_of(gap_of(pair), how.function, how.scale) for pair in pairs]
    mean = math.fsum(raw) / len(raw) if raw else 0.0
    divisor = mean if how.normalise and mean > 0 else 1.0
    limit = math.inf if how.clip is None else how.clip
    weights = [min(weight / divisor, limit) for weight in raw]
    if weights:
        stage.figure("E[w] before normalisation", mean)
        stage.figure("E[w] in training", math.fsum(weights) / len(weights))
        stage.figure("largest w in training", max(weights))
        if any(weights):
            stage.figure("effective pairs, (sum w)^2 / sum w^2", effective_sample_size(np.array(weights)))
        stage.count("pairs weighed", len(weights))
    if how.clip is not None:
        stage.count("weights clipped", sum(weight / divisor > limit for weight in raw))
    return [pair.model_copy(update={"weight": weight}) for pair, weight in zip(pairs, weights, strict=True)]


def gap_of(pair: Pair) -> float:
    """score(chosen) - score(rejected). Raises InputError when it is not known, or below 0."""
    if pair.chosen_score is None or pair.rejected_score is None:
        raise InputError(f"the pair of prompt {pair.prompt.id!r} has no scores, so no weight; score its answers first")
    gap = pair.chosen_score - pair.rejected_score
    if not gap >= 0:
        raise InputError(
            f"the pair of prompt {pair.prompt.id!r} has a gap of {gap:g}; expected the chosen answer's score "
            f"({pair.chosen_score:g}) to be at least the rejected one's ({pair.rejected_score:g})"
        )
    return gap
