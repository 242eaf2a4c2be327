"""From rows to figures: frontiers of reward over KL divergence, and what holds at one KL, with intervals over seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from statistics import fmean
from typing import Any

import numpy as np

from intervals import interval

Row = Mapping[str, Any]

KL = 0.5
"""Nats an answer at which methods are compared: nearly all rows get there."""
COSTS = {"tokens_trained": 1.0, "tokens_sampled": 2.6, "tokens_scored": 0.4}
"""Seconds a token, relative to a token that is trained on, as `--measure` found them (docs/comparison.md)."""
MIDDLE = 1
"""The strength whose costs are shown."""


def middle_of(rows: Sequence[Row]) -> Row:
    """That of the middle strength; the last where it was not run."""
    return next((row for row in rows if row["strength"] == MIDDLE), rows[-1])


CALLS, TOKENS, PLAIN = "equal calls", "equal tokens", "plain"
"""Two comparisons, and their case; the other comparisons are named by theirs."""


def cost(row: Row) -> float:
    """Tokens, weighted by what they cost, in tokens trained on."""
    return sum(weight * row.get(name, 0) for name, weight in COSTS.items())


@dataclass(frozen=True)
class Runs:
    """The rows of a method by seed, each seed's by strength, and the start model of each seed."""

    rows: Mapping[int, Sequence[Row]]
    start: Mapping[int, Row]

    @classmethod
    def of(cls, rows: Sequence[Row], start: Mapping[int, Row]) -> "Runs":
        seeds = sorted({row["seed"] for row in rows})
        return cls({seed: sorted((row for row in rows if row["seed"] == seed), key=lambda row: row["strength"])
                    for seed in seeds}, start)  # fmt: skip

    def at_kl(self, seed: int, name: str = "reward", kl: float = KL) -> float | None:
        """`name` where the seed's frontier crosses `kl`; None where it does not get there."""
        return at(kl, [(row["kl"], row[name]) for row in (self.start[seed], *self.rows[seed])])

    def best(self, seed: int) -> float:
        """The highest true reward of all strengths."""
        return max(row["reward"] for row in self.rows[seed])

    def middle(self, seed: int, name: str) -> float:
        """At the middle strength; `name` may be "cost"."""
        row = middle_of(self.rows[seed])
        return cost(row) if name == "cost" else row.get(name, 0)

    def all(self, figure: Callable[[int], float | None]) -> list[float | None]:
        """A figure of every seed."""
        return [figure(seed) for seed in self.rows]


def at(kl: float, points: Sequence[tuple[float, float]]) -> float | None:
    """The value at `kl`, between points of (KL, value) by straight lines over the square root of the KL divergence, in
    which reward rises nearly straight (Gao et al. 2022); None beyond the farthest point.

    >>> at(1.0, [(0.0, 0.0), (4.0, 2.0)]), at(5.0, [(0.0, 0.0), (4.0, 2.0)])
    (1.0, None)
    """
    roots = sorted((sqrt(max(0.0, x)), value) for x, value in points)
    for (x0, y0), (x1, y1) in pairwise(roots):
        if x0 <= sqrt(kl) <= x1:
            return y0 + (y1 - y0) * (sqrt(kl) - x0) / (x1 - x0 or 1.0)
    return None


def over_seeds(values: Sequence[float | None]) -> list[float] | None:
    """[mean, low, high] of those that are there, at 95 %; None where fewer than two are."""
    known = [value for value in values if value is not None]
    return interval(known) if len(known) > 1 else None


def summary(runs: Runs) -> dict[str, Any]:
    """The figures of a method."""
    return {
        "seeds": len(runs.rows),
        "true_reward_at_kl": over_seeds(runs.all(runs.at_kl)),
        "reached": sum(value is not None for value in runs.all(runs.at_kl)),
        "best_true_reward": over_seeds(runs.all(runs.best)),
        "win_rate_at_kl": over_seeds(runs.all(lambda seed: runs.at_kl(seed, "win_rate"))),
        "words_at_kl": over_seeds(runs.all(lambda seed: runs.at_kl(seed, "words"))),
        "kl": [round(fmean(rows[i]["kl"] for rows in runs.rows.values()), 3) for i in range(_strengths(runs))],
        "true_reward": [
            over_seeds([rows[i]["reward"] for rows in runs.rows.values()]) for i in range(_strengths(runs))
        ],
        **{
            name: round(fmean(runs.middle(seed, name) for seed in runs.rows))
            for name in ("label_calls", "tokens_sampled", "tokens_trained", "tokens_scored", "cost")
        },
        "seconds": round(fmean(runs.middle(seed, "seconds") for seed in runs.rows), 1),
    }


def _strengths(runs: Runs) -> int:
    return min(len(rows) for rows in runs.rows.values())


def paired(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """Differences of the seeds in which both are there."""
    return [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]


def curve(runs: Runs, points: int = 40) -> tuple[list[float], list[list[float]]]:
    """KL divergences, and the mean reward with its interval there, as far as every seed goes."""
    farthest = min(max(row["kl"] for row in rows) for rows in runs.rows.values())
    grid = [float(x) ** 2 for x in np.linspace(0.0, sqrt(max(farthest, 0.0)), points)]
    found = [over_seeds([at(x, [(row["kl"], row["reward"]) for row in (runs.start[seed], *rows)])
                         for seed, rows in runs.rows.items()]) for x in grid]  # fmt: skip
    kept = [(x, value) for x, value in zip(grid, found, strict=True) if value]
    return [x for x, _ in kept], [value for _, value in kept]
