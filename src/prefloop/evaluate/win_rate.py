"""How often one model's answers are preferred over another's, and how sure that is. Abstentions are apart, ties 1/2.

One judgement a prompt, which an annotator with slots has given in both orders (`feedback/annotator.py`). The prompts
are the sample: what holds for others like them is what the intervals are about. Both sides answered the same prompts,
so a prompt's judgement is already a paired difference, and resampling prompts is the paired bootstrap.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prefloop.evaluate.length_control import length_controlled, length_term
from prefloop.evaluate.reward_accuracy import Z, wilson_interval
from prefloop.feedback.annotator import Comparison, Judgement
from prefloop.records import Group, Record
from prefloop.seeds import generator

Floats = NDArray[np.float64]
DRAWS = 2000
POWER_Z = 0.841621
"""Of 80 %: the chance with which `prompts_needed` would tell a difference as large as the one seen."""


class WinRate(Record):
    """`rate`: mean P(a is preferred) over the comparisons that were judged, [value, low, high] at 95 % (bootstrap).

    wins, losses: p above and below 1/2. sign_test: two-sided p-value that both are as likely; ties and abstentions do
    not enter. prompts_needed: see there.
    """

    rate: tuple[float, float, float] | None = None
    judged: int
    wins: int = 0
    losses: int = 0
    ties: int
    abstained: int
    sign_test: float | None = None
    prompts_needed: int | None = None


class HeadToHead(Record):
    """Everything about one side against another.

    categories: by the prompts' category, the most frequent first; none where prompts have none.
    length_controlled: win rate at equal length in characters, [value, low, high] at 95 %, without difficulties.
    length_chars: mean of our and of their answers, over the comparisons that were judged.
    slots: of the questions decided in both orders, how many follow the first slot, the second, or neither.
    abstentions: how many by reason.
    """

    overall: WinRate
    categories: dict[str, WinRate] = Field(default_factory=dict)
    length_controlled: tuple[float, float, float] | None = None
    length_chars: tuple[float, float] | None = None
    slots: dict[str, int] = Field(default_factory=dict)
    abstentions: dict[str, int] = Field(default_factory=dict)


def win_rate(judgements: Sequence[Judgement], *, seed: int = 0) -> WinRate:
    """Of the first response of each comparison. Identical answers are judged ties (1/2) by every annotator."""
    known = np.array([judgement.p for judgement in judgements if judgement.p is not None])
    wins, losses = int((known > 0.5).sum()), int((known < 0.5).sum())
    low, high = bootstrap_interval(known, seed=seed) if len(known) else (0.0, 1.0)
    return WinRate(
        rate=(float(known.mean()), float(low), float(high)) if len(known) else None,
        judged=len(known),
        wins=wins,
        losses=losses,
        ties=len(known) - wins - losses,
        abstained=len(judgements) - len(known),
        sign_test=sign_test(wins, losses),
        prompts_needed=prompts_needed(known),
    )


def head_to_head(comparisons: Sequence[Comparison], judgements: Sequence[Judgement], *, seed: int) -> HeadToHead:
    """The first responses against the second ones; `seed` is of the resampling."""
    by_category: dict[str, list[Judgement]] = {}
    for comparison, judgement in zip(comparisons, judgements, strict=True):
        by_category.setdefault(comparison.prompt.category or "none", []).append(judgement)
    judged = [(j.p, c) for c, j in zip(comparisons, judgements, strict=True) if j.p is not None]
    ours = np.array([c.a.length_chars for _, c in judged], dtype=float)
    theirs = np.array([c.b.length_chars for _, c in judged], dtype=float)
    p = np.array([p for p, _ in judged])
    ordered = sorted(by_category.items(), key=lambda item: -len(item[1]))
    return HeadToHead(
        overall=win_rate(judgements, seed=seed),
        categories={name: win_rate(part, seed=seed) for name, part in ordered} if set(by_category) != {"none"} else {},
        length_controlled=length_controlled(p, length_term(ours, theirs), seed=seed) if judged else None,
        length_chars=(float(ours.mean()), float(theirs.mean())) if judged else None,
        slots=dict(Counter(judgement.slot for judgement in judgements if judgement.slot)),
        abstentions=dict(Counter(judgement.reason for judgement in judgements if judgement.reason)),
    )


def bootstrap_interval(values: Floats, *, seed: int, draws: int = DRAWS) -> tuple[Floats, Floats]:
    """(low, high) [...]: 95 % percentile interval of the mean of `values` [..., n] in [0, 1], prompts resampled.

    Values that are all the same have no spread to resample, and get the Wilson interval of as many prompts. Several
    rows are resampled alike (Efron and Tibshirani 1993, Chapter 13).
    """
    n = values.shape[-1]
    counts = generator(seed, "bootstrap").multinomial(n, np.full(n, 1 / n), size=draws)
    low, high = np.quantile(values @ counts.T / n, [0.025, 0.975], axis=-1)
    same = (values == values[..., :1]).all(axis=-1)
    wilson = np.array([wilson_interval(n * value, n) for value in values[..., 0].flat])
    wilson = wilson.reshape(*values.shape[:-1], 2)
    return np.where(same, wilson[..., 0], low), np.where(same, wilson[..., 1], high)


def sign_test(wins: int, losses: int) -> float | None:
    """The chance of a split at least as uneven if a win were as likely as a loss: exact, two-sided; None without any.

    >>> round(sign_test(8, 2), 4)
    0.1094
    """
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else None


def prompts_needed(values: Floats) -> int | None:
    """How many prompts would tell a difference from 1/2 as large as that of `values` [n]; None where there is none.

    n = ((1.96 + 0.84) sd / (mean - 1/2))^2: the 95 % interval then leaves 1/2 out with a chance of 80 %.

    >>> prompts_needed(np.array([1.0] * 60 + [0.0] * 40))
    191
    """
    difference = abs(float(np.mean(values)) - 0.5) if len(values) > 1 else 0.0
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    # Without a difference no number is enough, and where all are the same, how they would spread is not known.
    if difference < 1e-9 or spread < 1e-9:
        return None
    return int(np.ceil(((Z + POWER_Z) * spread / difference) ** 2))


def comparisons_of(ours: Sequence[Group], theirs: Sequence[Group]) -> list[Comparison]:
    return [Comparison(a.prompt, a.responses[0], b.responses[0]) for a, b in zip(ours, theirs, strict=True)]
