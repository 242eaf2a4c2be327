"""The length coefficient of DICE, found exactly.

With winner y_w = argmax_k s_k - alpha |y_k| and loser y_l = argmin_k of the same, DICE (Chen et al. 2024, Eq. 6) takes

    alpha* = argmin_alpha | f(alpha) |,    f(alpha) = mean over prompts of |y_w| - |y_l|

where its released code walks a grid. There is no need for one. For one prompt the winner as a function of alpha
is the upper envelope of the K lines s_k - alpha |y_k|, and the loser the lower envelope, so f is a step function that
only falls, with its jumps at the envelopes' breakpoints. All of them together are few enough to sort.

Legend: N prompts, K responses, M steps of f.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np

from prefloop.errors import InputError
from prefloop.pairs.tables import LengthUnit, best_and_worst, length_table, score_table
from prefloop.records import Group, Record

CURVE_POINTS = 200


class LengthCoefficient(Record):
    """alpha of the length-regularised reward s - alpha |y| (DICE Eq. 5), with what it does to the pairs.

    alpha is in units of the scores that it was found on, per `unit` of length. The implicit reward is stored as the
    raw log-ratio, in nats; DICE's Eq. 5 multiplies it by beta, and alpha with it: see `with_beta`.

    gap, mean_abs_gap: mean over prompts of |y_w| - |y_l| at alpha, and of its absolute value; gap_at_zero: at alpha 0.
    score_length_correlation: Pearson's r of penalised score and length, both as differences from their prompt's mean,
    since only differences within a prompt decide; None when one of them does not vary.
    curve: (breakpoint, mean gap from there to the next one), thinned to at most 200 points, the last included.
    """

    alpha: float
    unit: LengthUnit = "chars"
    beta_inside: bool = False
    gap_at_zero: float
    gap: float
    mean_abs_gap: float
    score_length_correlation_at_zero: float | None = None
    score_length_correlation: float | None = None
    n_prompts: int
    curve: tuple[tuple[float, float], ...] = ()

    def with_beta(self, beta: float) -> Self:
        """The same coefficient for scores multiplied by `beta`: the paper's alpha. The pairs are the same ones."""
        if self.beta_inside:
            raise InputError(f"alpha = {self.alpha} already has beta inside; convert the one that was searched for")
        if not beta > 0:
            raise InputError(f"beta = {beta}: should be positive, such as DPO's 0.1")
        curve = tuple((alpha * beta, gap) for alpha, gap in self.curve)
        return self.model_copy(update={"alpha": self.alpha * beta, "curve": curve, "beta_inside": True})


def length_coefficient(groups: Sequence[Group], *, unit: LengthUnit = "chars") -> LengthCoefficient:
    """alpha* >= 0 with the least |f(alpha)|; of equally good ones the smallest. Exact, in O(N K log N K).

    It lies in the middle of its step, so that no tie is left to rounding, and the figures are those of the pairs
    that are really selected there. Responses without a score take no part. Raises InputError for a prompt with fewer
    than two scores.

    >>> from prefloop.records import Prompt, Response
    >>> responses = [Response(text="x" * n, score=s) for n, s in [(10, 0.0), (20, 1.0), (30, 2.5)]]
    >>> found = length_coefficient([Group(prompt=Prompt.of("Why?"), responses=tuple(responses))])
    >>> round(found.alpha, 4), found.gap_at_zero, found.gap, found.curve
    (0.1125, 20.0, 10.0, ((0.0, 20.0), (0.1, 10.0), (0.125, -10.0), (0.15, -20.0)))
    """
    scores, lengths = score_table(groups), length_table(groups, unit)
    starts, gaps = gap_steps(scores, lengths)
    return _figures(scores, lengths, _least_gap(scores, lengths, starts, gaps), unit, starts, gaps)


def fixed_coefficient(groups: Sequence[Group], alpha: float, *, unit: LengthUnit = "chars") -> LengthCoefficient:
    """The same figures for a given `alpha`, such as 0 for the ablation without length regularisation."""
    if not 0 <= alpha < float("inf"):
        raise InputError(f"alpha = {alpha}: should be a number of at least 0 (0 switches the penalty off)")
    scores, lengths = score_table(groups), length_table(groups, unit)
    return _figures(scores, lengths, alpha, unit, *gap_steps(scores, lengths))


def gap_steps(scores: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f for alpha > 0: the alphas [M] at which its steps start, ascending from 0, and its value [M] on each.

    Scores and lengths are [N, K], NaN where a response is missing.
    """
    best, best_alphas, best_jumps = _upper_envelope(scores, lengths)
    # The lowest of the lines s - alpha L is the highest of the lines (-s) - alpha (-L).
    worst, worst_alphas, worst_jumps = _upper_envelope(-scores, -lengths)
    alphas = np.concatenate([best_alphas, worst_alphas])
    jumps = np.concatenate([best_jumps, worst_jumps])
    order = np.argsort(alphas)
    starts = np.concatenate([[0.0], alphas[order]])
    totals = best + worst + np.concatenate([[0.0], np.cumsum(jumps[order])])
    last_of_equal = np.append(starts[1:] > starts[:-1], True)
    return starts[last_of_equal], totals[last_of_equal] / len(scores)


def _upper_envelope(scores: np.ndarray, lengths: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The lengths along the upper envelopes, alpha >= 0, of N sets of lines s - alpha L.

    Returns the sum over prompts of the highest line's L at alpha = 0, and for all prompts together the breakpoints and
    the (negative) changes of L there. Of lines that are level at a breakpoint, or at 0, it does not matter which one is
    followed: the shorter one overtakes at the same alpha. Sums of whole numbers are exact in float64.
    """
    every, highest = np.arange(len(scores)), np.nanargmax(scores, axis=1)
    score, length = scores[every, highest], lengths[every, highest]
    start = float(length.sum())
    alphas, jumps = [np.empty(0)], [np.empty(0)]
    while len(scores):
        # Only a shorter response can overtake the present one, and the first to do so does (NaN < x is False).
        crossings = np.full_like(scores, np.inf)
        shorter = lengths < length[:, None]
        np.divide(score[:, None] - scores, length[:, None] - lengths, out=crossings, where=shorter)
        overtaken = np.flatnonzero(np.isfinite(crossings.min(axis=1)))
        scores, lengths, crossings = scores[overtaken], lengths[overtaken], crossings[overtaken]
        every, following = np.arange(len(overtaken)), crossings.argmin(axis=1)
        alphas.append(crossings[every, following])
        jumps.append(lengths[every, following] - length[overtaken])
        score, length = scores[every, following], lengths[every, following]
    return start, np.concatenate(alphas), np.concatenate(jumps)


def _least_gap(scores: np.ndarray, lengths: np.ndarray, starts: np.ndarray, gaps: np.ndarray) -> float:
    """The smallest alpha with the least |f|: 0, or the middle of a step.

    The last step, which has no end, need not be looked at: there every winner is its prompt's shortest response and
    every loser the longest, so |f| is as large as it can be and alpha = 0 is at least as good.
    """
    ends = starts[1:]
    # In a step narrower than this, rounding decides the winners: s - alpha |y| is off by some ulps of |s| + alpha |y|.
    too_narrow = 16 * np.finfo(float).eps * (np.nanmax(np.abs(scores)) + ends * np.nanmax(lengths))
    usable = ends - starts[:-1] > too_narrow
    alphas = np.concatenate([[0.0], (starts[:-1] + ends) / 2])
    absolute = np.concatenate([[abs(_gaps(scores, lengths, 0.0).mean())], np.where(usable, np.abs(gaps[:-1]), np.inf)])
    return float(alphas[absolute.argmin()])


def _figures(
    scores: np.ndarray, lengths: np.ndarray, alpha: float, unit: LengthUnit, starts: np.ndarray, gaps: np.ndarray
) -> LengthCoefficient:
    selected = _gaps(scores, lengths, alpha)
    return LengthCoefficient(
        alpha=alpha,
        unit=unit,
        gap_at_zero=float(_gaps(scores, lengths, 0.0).mean()),
        gap=float(selected.mean()),
        mean_abs_gap=float(np.abs(selected).mean()),
        score_length_correlation_at_zero=_correlation(scores, lengths),
        score_length_correlation=_correlation(scores - alpha * lengths, lengths),
        n_prompts=len(scores),
        curve=_thinned(starts, gaps, alpha),
    )


def _gaps(scores: np.ndarray, lengths: np.ndarray, alpha: float) -> np.ndarray:
    """|y_w| - |y_l| of every prompt [N] at `alpha`."""
    best, worst = best_and_worst(scores - alpha * lengths)
    rows = np.arange(len(scores))
    return lengths[rows, best] - lengths[rows, worst]


def _correlation(scores: np.ndarray, lengths: np.ndarray) -> float | None:
    """Pearson's r over all responses of the differences from the prompt's mean; None when one side is constant."""
    if not (_varies(scores) and _varies(lengths)):
        return None
    s = scores - np.nanmean(scores, axis=1, keepdims=True)
    n = lengths - np.nanmean(lengths, axis=1, keepdims=True)
    s /= np.nanmax(np.abs(s))  # r has no scale, and squares of very small scores would be 0
    return float(np.nansum(s * n) / np.sqrt(np.nansum(s * s) * np.nansum(n * n)))


def _varies(table: np.ndarray) -> bool:
    return bool((np.nanmax(table, axis=1) > np.nanmin(table, axis=1)).any())


def _thinned(starts: np.ndarray, gaps: np.ndarray, alpha: float) -> tuple[tuple[float, float], ...]:
    """At most CURVE_POINTS steps: the first, the last, the one that `alpha` is on, and others evenly by rank."""
    around_alpha = max(int(np.searchsorted(starts, alpha, side="right")) - 1, 0)
    evenly = np.linspace(0, len(starts) - 1, CURVE_POINTS - 1).round().astype(int)
    chosen = np.union1d(evenly, [around_alpha])
    return tuple((float(starts[i]), float(gaps[i])) for i in chosen)
