"""Pairwise losses: pair log-probabilities in, one value per pair out. No reduction, no metrics, no logging.

Legend: B pairs. All log-probabilities are summed over response tokens, in nats.
"""

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
