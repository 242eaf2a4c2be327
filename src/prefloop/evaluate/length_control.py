"""Win rates at equal length: the logistic regression of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475, Section 3).

Judges prefer longer answers. For one model against a baseline, on instruction i:

    logit P(the model's answer is preferred) = theta + phi tanh(length difference_i / std) + psi difficulty_i

    length-controlled win rate = mean over i of sigmoid(theta + psi difficulty_i)        the length term at zero

theta is the model's strength, phi what the judge gives for length, and psi how far the model follows the difficulty of
the instructions. The standard deviation is that of the model's own length differences, which are not centred.

All three are found at the maximum of the posterior under normal priors (scipy's trust-region Newton method; the
problem is convex). Answers that are all shorter than the baseline's say next to nothing about phi: the likelihood
alone would send it anywhere, and theta with it. The published fit adds the judgements of a longer and a shorter version
of the baseline, at one fifth of the weight; here the prior of phi stands for them.

Several models that answered the same instructions share the difficulties and the mean of phi (`learn_shared`). For own
prompts and one model there is no difficulty, and the mean of phi is 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefloop.evaluate.reward_accuracy import Z
from prefloop.seeds import generator

Floats = NDArray[np.float64]

STRENGTH_SD = 5.0
"""Prior of theta, in logits: finite where a model wins, or loses, every time."""

LENGTH_SD = 0.3
"""Spread of phi among models that share a judge: about what the published 0.2 x 805 judgements of the baseline's own
variants would know, 1 / sqrt(161 * E[tanh^2 p (1 - p)])."""

UNKNOWN_LENGTH_SD = 0.5
"""Spread of phi around 0 where nothing is known of the judge and of the difficulties, whose credit phi would take
(docs/evaluation.md)."""

SLOPE_SD = 0.2
"""Spread of psi around 1; difficulties are in the unit in which 1 is the mean slope."""

DIFFICULTY_SD = 2.0
"""Spread of the difficulties, in logits."""


class Shared(NamedTuple):
    """What models that are judged by one judge on the same instructions have in common.

    difficulty [N]: logits by which a model's chance changes on each instruction, higher is easier for the model.
    length: mean of phi.
    """

    difficulty: Floats
    length: float


class Fit(NamedTuple):
    """The coefficients of one model; `slope` is psi, 0 where there is no difficulty."""

    strength: float
    length: float
    slope: float

    def rate(self, difficulty: Floats | None = None) -> float:
        """The length-controlled win rate, in [0, 1]; `difficulty` [N] of the instructions that it is the mean over."""
        return float(np.mean(_sigmoid(self.strength + self.slope * (0.0 if difficulty is None else difficulty))))


def length_term(ours: Sequence[float] | Floats, theirs: Sequence[float] | Floats) -> Floats:
    """[N] tanh of the length difference in its own standard deviations; its sign where it is everywhere the same.

    >>> length_term([3, 5, 7], [4, 4, 4]).round(3).tolist()
    [-0.462, 0.462, 0.905]
    """
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    spread = float(np.std(difference, ddof=1)) if len(difference) > 1 else 0.0
    return np.tanh(difference / spread) if spread > 0 else np.sign(difference)


def fit(p: Floats, length: Floats, *, shared: Shared | None = None, weight: Floats | None = None) -> Fit:
    """The coefficients of one model.

    p [N]: P(the model's answer is preferred). length [N]: `length_term`. weight [N]: of each instruction, 1 unless
    given. `shared` has a difficulty for each of the N; without it there is none, and phi is pulled to 0. Raises
    ValueError when p is not in [0, 1].
    """
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError("p must be in [0, 1]; leave out what was not judged")
    columns = [np.ones_like(length), length, *([] if shared is None else [shared.difficulty])]
    features = np.stack(columns, axis=1)
    mean = np.array(_prior(shared))[: len(columns)]
    found = posterior_maximum(
        features, p, np.ones_like(p) if weight is None else weight, mean, _sds(shared)[: len(columns)]
    )
    return Fit(*found, *(0.0,) * (3 - len(columns)))


def length_controlled(p: Floats, length: Floats, *, seed: int, draws: int = 200) -> tuple[float, float, float]:
    """The length-controlled win rate of one model on own prompts, without difficulties: [value, low, high] at 95 %.

    The wider, at each end, of two intervals: of the prompts resampled, and of theta given the curvature of the
    posterior. The second also holds what no resampling shows: where one side wins every time, and where all answers are
    longer, what length alone is worth.
    """
    found = fit(p, length)
    counts = generator(seed, "length controlled").multinomial(len(p), np.full(len(p), 1 / len(p)), size=draws)
    drawn = [fit(p, length, weight=count.astype(float)).rate() for count in counts]
    features = np.stack([np.ones_like(length), length], axis=1)
    likely = _sigmoid(features @ np.array(found[:2]))
    precision = (features.T * (likely * (1 - likely))) @ features + np.diag(1 / np.square(_sds(None)[:2]))
    half = Z * float(np.linalg.inv(precision)[0, 0]) ** 0.5
    low, high = np.quantile(drawn, [0.025, 0.975])
    return (
        found.rate(),
        min(float(low), float(_sigmoid(found.strength - half))),
        max(float(high), float(_sigmoid(found.strength + half))),
    )


def learn_shared(p: Floats, length: Floats) -> Shared:
    """The difficulties and the mean of phi at the maximum of the posterior of everything about M models together.

    p [M, N]: as in `fit`, NaN where not judged. length [M, N]: `length_term`, anything where not judged. The baseline
    itself must not be among the models: it has no length difference and wins half of the time by definition.
    """
    from scipy.optimize import minimize

    models, instructions = p.shape
    judged = ~np.isnan(p)
    p, length = np.where(judged, p, 0.5), np.where(judged, length, 0.0)
    cuts = np.cumsum([models, models, models, 1])

    def negative_log_posterior(x: Floats) -> tuple[float, Floats]:
        strength, phi, slope, phi_mean, difficulty = np.split(x, cuts)
        logits = strength[:, None] + phi[:, None] * length + slope[:, None] * difficulty
        residual = judged * (_sigmoid(logits) - p)
        away = [
            strength / STRENGTH_SD,
            (phi - phi_mean) / LENGTH_SD,
            (slope - 1) / SLOPE_SD,
            difficulty / DIFFICULTY_SD,
        ]
        value = np.sum(judged * (np.logaddexp(0, logits) - p * logits)) + sum(np.sum(a**2) for a in away) / 2
        gradient = [
            residual.sum(axis=1) + away[0] / STRENGTH_SD,
            (residual * length).sum(axis=1) + away[1] / LENGTH_SD,
            residual @ difficulty + away[2] / SLOPE_SD,
            [-away[1].sum() / LENGTH_SD],
            slope @ residual + away[3] / DIFFICULTY_SD,
        ]
        return float(value), np.concatenate(gradient)

    start = np.concatenate([np.zeros(2 * models), np.ones(models), np.zeros(1 + instructions)])
    found = minimize(
        negative_log_posterior, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-12}
    )
    *_, phi_mean, difficulty = np.split(found.x, cuts)
    return Shared(difficulty, float(phi_mean[0]))


def _prior(shared: Shared | None) -> Fit:
    return Fit(0.0, shared.length if shared else 0.0, 1.0)


def _sds(shared: Shared | None) -> tuple[float, float, float]:
    return STRENGTH_SD, LENGTH_SD if shared else UNKNOWN_LENGTH_SD, SLOPE_SD


def posterior_maximum(features: Floats, p: Floats, weight: Floats, mean: Floats, sd: Sequence[float]) -> Floats:
    """Coefficients [C] of a logistic regression at the maximum of the posterior, with Gaussian priors.

    features [N, C]; p [N] in [0, 1] and its weight [N]; prior mean [C] and standard deviations [C].
    """
    from scipy.optimize import minimize

    precision = 1 / np.square(sd)

    def negative_log_posterior(x: Floats) -> tuple[float, Floats]:
        logits, away = features @ x, x - mean
        value = weight @ (np.logaddexp(0, logits) - p * logits) + precision @ away**2 / 2
        return float(value), features.T @ (weight * (_sigmoid(logits) - p)) + precision * away

    def hessian(x: Floats) -> Floats:
        likely = _sigmoid(features @ x)
        return (features.T * (weight * likely * (1 - likely))) @ features + np.diag(precision)

    return minimize(negative_log_posterior, mean, jac=True, hess=hessian, method="trust-exact").x


def _sigmoid(x: Floats | float) -> Floats:
    return np.exp(-np.logaddexp(0, -np.asarray(x)))
