"""Intervals over seeds."""

from collections.abc import Sequence

import numpy as np

# Two-sided 97.5 % points of Student's t, by degrees of freedom, from 1; beyond the last it is a little too wide.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def interval(values: Sequence[float]) -> list[float]:
    """[mean, low, high]: 95 % by Student's t over seeds."""
    n = len(values)
    half = T[min(n - 1, len(T)) - 1] * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else float("nan")
    mean = float(np.mean(values))
    return [round(mean, 4), round(mean - half, 4), round(mean + half, 4)]
