"""What a reward model minimises: Bradley-Terry on the rewards of two whole conversations.

The conversations are those that `prefloop.feedback.reward_model` scores: written by the model's own chat template,
answer and end of turn included.

Legend: B pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed, InputError
from prefloop.feedback.reward_model import conversation_ids
from prefloop.models import ModelRef
from prefloop.records import Pair
from prefloop.train.logprobs import Path, ResponseLogps
from prefloop.train.objective import Objective
from prefloop.train.packing import TokenGroup
from prefloop.train.scalar import conversations_group, last_values, load_scalar_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def bradley_terry(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    *,
    margin: float | Float[Tensor, " B"] = 0.0,
    centre: float = 0.0,
    p: float | Float[Tensor, " B"] = 1.0,
    weight: float | Float[Tensor, " B"] = 1.0,
) -> Float[Tensor, " B"]:
    """The loss of a reward model (Ouyang et al. 2022, Eq. 1), margin as in Llama 2 (Touvron et al. 2023, Eq. 2).

        d = r_w - r_l - margin        loss = -p log sigmoid(d) - (1 - p) log sigmoid(-d) + centre (r_w + r_l)^2

    `p` is P(chosen is preferred), `weight` multiplies the pair's loss. Preferences say nothing of where rewards lie;
    `centre` (Eisenstein et al. 2023) pulls the two of a pair to opposite values. The optimum of d is logit(p).

    >>> import torch
    >>> zero = torch.zeros(1)
    >>> round(bradley_terry(zero, zero, centre=0.01).item(), 6)
    0.693147
    """
    d = chosen - rejected - margin
    likelihood = -p * logsigmoid(d) - (1.0 - p) * logsigmoid(-d)
    return weight * (likelihood + centre * (chosen + rejected) ** 2)


@dataclass(frozen=True)
class RewardObjective(Objective[Pair]):
    """`bradley_terry` on a sequence classifier made from a causal language model.

    margin: of a pair, for every point that its chosen response's score is above the other's; 0: none, and no scores
    are needed. head_std, seed: of a new head (`load_scalar_model`).
    """

    centre: float = 0.01
    margin: float = 0.0
    head_std: float = 0.0
    seed: int = 0

    kind: ClassVar = "pairs"
    reads: ClassVar = "reward"

    @property
    def identity(self) -> str:
        return f"bradley-terry {self}"

    @property
    def first_steps(self) -> int:
        # A new head of zeros gives the trunk no gradient in the first step; nor then a LoRA's B its A in the second.
        return 3 if self.head_std == 0 else 2

    def load(self, policy: ModelRef, device: str) -> "PreTrainedModel":
        return load_scalar_model(policy, head_std=self.head_std, seed=self.seed, device=device)

    def group(self, chat: ChatFormat, item: Pair) -> TokenGroup:
        return conversation_group(chat, item)

    def check(self, items: Sequence[Pair], groups: Sequence[TokenGroup], chat: ChatFormat) -> None:
        for pair, group in zip(items, groups, strict=True):
            if group.responses[0] == group.responses[1]:
                raise CheckFailed(
                    f"both conversations of the pair of prompt {pair.prompt.id!r} are the same to the reward model; "
                    "expected two different answers: leave this pair out"
                )

    def read(self, model: "PreTrainedModel", groups: Sequence[TokenGroup], *, path: Path, dtype: str) -> ResponseLogps:
        rewards = last_values(model, groups, path=path, dtype=dtype)
        return ResponseLogps.of(rewards, torch.ones(len(rewards), dtype=torch.long, device=rewards.device))

    def losses(self, items: Sequence[Pair], logps: ResponseLogps) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = logps.sums[0::2], logps.sums[1::2]
        p, weight, margin = (
            torch.tensor(values, dtype=torch.float32, device=chosen.device)
            for values in ([i.p for i in items], [i.weight for i in items], [margin_of(i, self.margin) for i in items])
        )
        losses = bradley_terry(chosen, rejected, margin=margin, centre=self.centre, p=p, weight=weight)
        difference = (chosen - rejected).detach()
        return losses, {
            "margin": difference,
            "correct": (difference > 0).float() + 0.5 * (difference == 0).float(),
            "chosen_reward": chosen.detach(),
            "rejected_reward": rejected.detach(),
        }

    def before_first_update(self, items: Sequence[Pair], logps: ResponseLogps, *, policy: str, dtype: str) -> None:
        """A head of zeros gives every conversation the reward 0, so that the loss begins at ln 2 (without margins)."""
        worst = float(logps.sums.detach().abs().max())
        if self.head_std == 0 and worst > 0:
            raise CheckFailed(
                f"before the first update a reward is {worst:.4g} away from 0, and with a new head of zeros all should "
                "be 0: the start model is a reward model already; start from the language model that it was made from"
            )


def margin_of(pair: Pair, margin: float) -> float:
    """What the difference of rewards should exceed: `margin` a point of the scores' difference. Raises InputError for a
    pair without scores.
    """
    if not margin:
        return 0.0
    chosen, rejected = pair.scores
    if chosen is None or rejected is None:
        raise InputError(
            f"margin = {margin:g}: the pair of prompt {pair.prompt.id!r} has no scores; "
            "give pairs with scores, or leave --margin out"
        )
    return margin * (chosen - rejected)


def conversation_group(chat: ChatFormat, pair: Pair) -> TokenGroup:
    """The whole conversations of a pair, chosen first, as the reward model sees them."""
    ids = [conversation_ids(chat, pair.prompt, response.text.strip()) for response in pair.responses]
    return conversations_group(ids, cast(int | None, chat.tokenizer.pad_token_id))
