"""What pairwise losses are functions of. Legend: B pairs; log-probabilities in nats, summed over response tokens."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

Soft = float | Float[Tensor, " B"]
"""One number for all pairs, or one for each."""


class PairLogps(NamedTuple):
    """Response log-probabilities of B pairs under the policy (differentiable) and under the reference, and what else a
    loss may need. What a loss does not need is left at None; to ask for it is a ValueError.
    """

    policy_chosen: Float[Tensor, " B"]
    policy_rejected: Float[Tensor, " B"]
    reference_chosen: Float[Tensor, " B"] | None = None
    reference_rejected: Float[Tensor, " B"] | None = None
    chosen_tokens: Int[Tensor, " B"] | None = None
    rejected_tokens: Int[Tensor, " B"] | None = None
    tail: "PairLogps | None" = None
    """The same sums over the tokens that lie beyond the length of the shorter answer."""
    chosen_collision: Float[Tensor, " B"] | None = None
    """log sum_v pi(v)^2, summed over response tokens, without gradient."""
    rejected_collision: Float[Tensor, " B"] | None = None
    gap: Float[Tensor, " B"] | None = None
    """Score of chosen minus score of rejected."""
    chosen_is_reference_sample: Bool[Tensor, " B"] | None = None
    """Whether chosen, not rejected, was sampled from the reference."""

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi/pi_ref (chosen) [B]."""
        return self.policy_chosen - needed(self.reference_chosen, "reference log-probabilities")

    @property
    def rejected_ratio(self) -> Tensor:
        """log pi/pi_ref (rejected) [B]."""
        return self.policy_rejected - needed(self.reference_rejected, "reference log-probabilities")

    @property
    def h(self) -> Tensor:
        """log pi/pi_ref (chosen) - log pi/pi_ref (rejected) [B]: zero when the policy is its reference."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """|y_w| and |y_l| [B]: predicted tokens, the end token included."""
        return needed(self.chosen_tokens, "token counts"), needed(self.rejected_tokens, "token counts")

    @property
    def per_token(self) -> "PairLogps":
        """Means over each response's tokens in place of sums."""
        chosen, rejected = self.lengths
        return self._replace(
            policy_chosen=self.policy_chosen / chosen,
            policy_rejected=self.policy_rejected / rejected,
            reference_chosen=None if self.reference_chosen is None else self.reference_chosen / chosen,
            reference_rejected=None if self.reference_rejected is None else self.reference_rejected / rejected,
        )

    @property
    def swapped(self) -> "PairLogps":
        """The same pairs with the other label."""
        return PairLogps(
            self.policy_rejected,
            self.policy_chosen,
            self.reference_rejected,
            self.reference_chosen,
            self.rejected_tokens,
            self.chosen_tokens,
            None if self.tail is None else self.tail.swapped,
            self.rejected_collision,
            self.chosen_collision,
            None if self.gap is None else -self.gap,
            None if self.chosen_is_reference_sample is None else ~self.chosen_is_reference_sample,
        )


def needed(value: Tensor | None, what: str) -> Tensor:
    """`value`, or ValueError where there is none."""
    if value is None:
        raise ValueError(f"these pair log-probabilities come without {what}, which the loss needs")
    return value


def pair_metrics(logps: PairLogps, *, beta: float, per_token: bool = False) -> dict[str, Tensor]:
    """What every pairwise loss logs, [B], without gradient.

    margin: of the implicit reward, beta h, or beta (log pi(chosen) - log pi(rejected)) without a reference;
    `per_token`: of the means over tokens. correct: 1 where it is positive, 1/2 where it is zero.
    chosen_change, rejected_change: log pi - log pi_ref of the responses; without a reference chosen_logp and
    rejected_logp, log pi.
    """
    used = logps.per_token if per_token else logps
    if logps.reference_chosen is None:
        h = (used.policy_chosen - used.policy_rejected).detach()
        own = {"chosen_logp": logps.policy_chosen.detach(), "rejected_logp": logps.policy_rejected.detach()}
    else:
        h = used.h.detach()
        own = {"chosen_change": logps.chosen_ratio.detach(), "rejected_change": logps.rejected_ratio.detach()}
    return {"margin": beta * h, "correct": (h > 0).float() + 0.5 * (h == 0).float(), **own}
