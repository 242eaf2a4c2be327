"""How often the implicit reward ranks held-out pairs as their labels do, with intervals."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
"""Standard errors either side of the mean that a 95 % interval takes in."""


def wilson_interval(successes: float, n: int, *, z: float = Z) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927): usable at small n and near 0 and 1, unlike p +- 1.96 se.

    >>> tuple(round(bound, 4) for bound in wilson_interval(8, 10))
    (0.4902, 0.9433)
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], *, z: float = Z) -> tuple[float, float, float]:
    """Mean and normal-theory 95 % interval; the interval is the mean itself when there is one value."""
    array = np.asarray(values, dtype=float)
    half = z * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    return float(array.mean()), float(array.mean() - half), float(array.mean() + half)


def accuracy(margins: Sequence[float]) -> tuple[float, float, float]:
    """Share of positive margins, ties counting one half, with its Wilson interval."""
    correct = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)
    low, high = wilson_interval(correct, len(margins))
    return correct / len(margins), low, high
