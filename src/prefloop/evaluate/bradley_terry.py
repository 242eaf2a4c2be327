"""Scores of several models from comparisons of two (Bradley and Terry 1952).

    P(i is preferred over j) = sigmoid(s_i - s_j),   s_i ~ N(0, 5^2)

A tie is half a win of each. The scores sum to 0. The prior is wide: it moves a score of plenty of comparisons by less
than a hundredth, and keeps the score of a model that has won every time finite.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefloop.evaluate.length_control import STRENGTH_SD, posterior_maximum
from prefloop.evaluate.reward_accuracy import Z
from prefloop.seeds import generator

Floats = NDArray[np.float64]
DRAWS = 300


def bradley_terry(pairs: Sequence[tuple[int, int]], p: Floats, weight: Floats, models: int) -> Floats:
    """Scores [M] in logits. pairs: P times (i, j); p [P]: share of preferences for i; weight [P]: of how many."""
    return posterior_maximum(_who(pairs, models), p, weight, np.zeros(models), (STRENGTH_SD,) * models)


def _who(pairs: Sequence[tuple[int, int]], models: int) -> Floats:
    """[P, M] 1 for the first model of a pair, -1 for the second."""
    features = np.zeros((len(pairs), models))
    for row, (i, j) in zip(features, pairs, strict=True):
        row[i], row[j] = 1.0, -1.0
    return features


def _spread(pairs: Sequence[tuple[int, int]], found: Floats, weight: Floats, models: int) -> Floats:
    """[M] standard deviations of the scores, which sum to 0, by the curvature of the posterior."""
    features = _who(pairs, models)
    likely = 1 / (1 + np.exp(-features @ found))
    precision = (features.T * (weight * likely * (1 - likely))) @ features + np.eye(models) / STRENGTH_SD**2
    centred = np.eye(models) - 1 / models
    return np.sqrt(np.diag(centred @ np.linalg.inv(precision) @ centred))


def scores(
    pairs: Sequence[tuple[int, int]], wins: Floats, judged: Floats, models: int, *, seed: int, draws: int = DRAWS
) -> list[tuple[float, float, float]] | None:
    """Score of each model in logits, [value, low, high] at 95 %: the wider, at each end, of prompts resampled and of
    the curvature of the posterior, which stays wide where all prompts are judged alike.

    wins, judged [X, P]: of prompt x, preferences for i of pair p with ties as halves, and how many. None where the
    judgements leave two models unconnected: their scores could not be compared.
    """
    if not _connected(pairs, judged.sum(axis=0), models):
        return None

    def fit(counts: Floats) -> Floats:
        n = counts @ judged
        return bradley_terry(pairs, np.divide(counts @ wins, n, out=np.full(len(pairs), 0.5), where=n > 0), n, models)

    prompts = len(judged)
    drawn = generator(seed, "bradley-terry").multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
    value = fit(np.ones(prompts))
    low, high = np.quantile([fit(counts.astype(float)) for counts in drawn], [0.025, 0.975], axis=0)
    half = Z * _spread(pairs, value, judged.sum(axis=0), models)
    low, high = np.minimum(low, value - half), np.maximum(high, value + half)
    return [(float(v), float(a), float(b)) for v, a, b in zip(value, low, high, strict=True)]


def _connected(pairs: Sequence[tuple[int, int]], judged: Floats, models: int) -> bool:
    group = list(range(models))
    for (i, j), n in zip(pairs, judged, strict=True):
        if n:
            group = [group[i] if g == group[j] else g for g in group]
    return len(set(group)) == 1
