"""Intervals over seeds."""

from collections.abc import Sequence

import numpy as np

# Two-sided 97.5 % points of Student's t, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: Sequence[float]) -> list[float]:
    """[mean, low, high]: 95 % by Student's t over seeds."""
    half = T[len(values) - 1] * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    mean = float(np.mean(values))
    return [round(mean, 4), round(mean - half, 4), round(mean + half, 4)]
