"""A loss on single answers that were called good or bad. Legend: B answers; log-probabilities summed over tokens."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.train.losses.logps import Soft


class AnswerLogps(NamedTuple):
    """Of B answers to their prompts, and of B answers that belong to other prompts; under policy and reference."""

    policy: Float[Tensor, " B"]
    reference: Float[Tensor, " B"]
    policy_mismatched: Float[Tensor, " B"]
    reference_mismatched: Float[Tensor, " B"]

    @property
    def ratio(self) -> Tensor:
        """log pi/pi_ref of the answers [B]."""
        return self.policy - self.reference

    @property
    def kl(self) -> Tensor:
        """max(0, mean log pi/pi_ref of the mismatched answers), without gradient: the batch's estimate of the KL."""
        return (self.policy_mismatched - self.reference_mismatched).detach().mean().clamp(min=0)


def kto(
    logps: AnswerLogps,
    *,
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
    p: Soft = 1.0,
    weight: Soft = 1.0,
) -> Float[Tensor, " B"]:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, Eq. 7 and 8; beta 0.1, both weights 1).

        good: desirable (1 - sigmoid(beta (rho - z)))        bad: undesirable (1 - sigmoid(beta (z - rho)))

    z = `AnswerLogps.kl`, of the whole batch. `p` is P(the answer is good). Keep desirable times the number of good
    answers between 1 and 4/3 of undesirable times the number of bad ones.
    """
    margin = beta * (logps.ratio - logps.kl)
    good, bad = desirable * torch.sigmoid(-margin), undesirable * torch.sigmoid(margin)
    return weight * (p * good + (1.0 - p) * bad)
