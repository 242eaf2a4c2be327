"""Pairwise losses: pair log-probabilities in, one value per pair out. No reduction, no metrics, no logging.

Legend: B pairs. All log-probabilities are summed over response tokens, in nats.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairLogps(NamedTuple):
    """Summed response log-probabilities of B pairs under the policy (differentiable) and under the reference."""

    policy_chosen: Float[Tensor, " B"]
    policy_rejected: Float[Tensor, " B"]
    reference_chosen: Float[Tensor, " B"]
    reference_rejected: Float[Tensor, " B"]

    @property
    def h(self) -> Float[Tensor, " B"]:
        """log pi/pi_ref (chosen) - log pi/pi_ref (rejected): zero when the policy is its reference."""
        return (self.policy_chosen - self.reference_chosen) - (self.policy_rejected - self.reference_rejected)


def dpo(
    logps: PairLogps,
    *,
    beta: float = 0.1,
    p: float | Float[Tensor, " B"] = 1.0,
    weight: float | Float[Tensor, " B"] = 1.0,
) -> Float[Tensor, " B"]:
    """Direct preference optimisation (Rafailov et al. 2023, Eq. 7), with soft labels (cDPO) where `p` < 1.

        loss = -p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h)

    `p` is P(chosen is preferred), `weight` multiplies the pair's loss. ln 2 at h = 0; slope there -beta (p - 1/2).

    >>> import torch
    >>> zero = torch.zeros(1)
    >>> round(dpo(PairLogps(zero, zero, zero, zero)).item(), 6)
    0.693147
    """
    margin = beta * logps.h
    return weight * (-p * logsigmoid(margin) - (1.0 - p) * logsigmoid(-margin))


def ipo(
    logps: PairLogps,
    *,
    beta: float = 1.0,
    p: float | Float[Tensor, " B"] = 1.0,
    weight: float | Float[Tensor, " B"] = 1.0,
) -> Float[Tensor, " B"]:
    """Identity preference optimisation (Azar et al. 2024, Eq. 17; OAIF Eq. 2), on log-probabilities summed over tokens.

        loss = p (h - 1 / (2 beta))^2 + (1 - p) (h + 1 / (2 beta))^2

    `beta` is the paper's tau: h is pulled to 1 / (2 beta) and not beyond. 1 / (4 beta^2) at h = 0; slope -1 / beta
    times (2 p - 1). OAIF uses 1.0.
    """
    h, target = logps.h, 1.0 / (2.0 * beta)
    return weight * (p * (h - target) ** 2 + (1.0 - p) * (h + target) ** 2)


def slic(
    logps: PairLogps,
    *,
    beta: float = 0.002,
    p: float | Float[Tensor, " B"] = 1.0,
    weight: float | Float[Tensor, " B"] = 1.0,
) -> Float[Tensor, " B"]:
    """The hinge of SLiC (Zhao et al. 2023) on the log-ratio, without its likelihood term (OAIF Eq. 3).

        loss = p max(0, 1 - beta h) + (1 - p) max(0, 1 + beta h)

    1 at h = 0, slope -beta (2 p - 1) there. It stops at h = 1 / beta: 500 nats with OAIF's 0.002.
    """
    margin = beta * logps.h
    return weight * (p * (1.0 - margin).clamp(min=0) + (1.0 - p) * (1.0 + margin).clamp(min=0))


class PairLoss(NamedTuple):
    """A pairwise loss with the beta of its paper; the betas of two losses are different knobs."""

    function: Callable[..., Tensor]
    beta: float


LOSSES = {"dpo": PairLoss(dpo, 0.1), "ipo": PairLoss(ipo, 1.0), "slic": PairLoss(slic, 0.002)}
"""Losses by the name that `--loss` takes."""


class PairMetrics(NamedTuple):
    """Per-pair quantities that every pairwise loss reports; see `pair_metrics`."""

    margin: Float[Tensor, " B"]
    correct: Float[Tensor, " B"]
    chosen_change: Float[Tensor, " B"]
    rejected_change: Float[Tensor, " B"]


def pair_metrics(logps: PairLogps, *, beta: float) -> PairMetrics:
    """Implicit-reward margin beta h; 1 where h > 0 and 1/2 where h = 0; change of both log-probabilities."""
    h = logps.h.detach()
    return PairMetrics(
        margin=beta * h,
        correct=(h > 0).float() + 0.5 * (h == 0).float(),
        chosen_change=(logps.policy_chosen - logps.reference_chosen).detach(),
        rejected_change=(logps.policy_rejected - logps.reference_rejected).detach(),
    )
