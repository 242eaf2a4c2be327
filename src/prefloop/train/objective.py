"""What a training round minimises, item by item, and what it checks about them before the first update.

An item is a record with a prompt and one or several responses to it (`prefloop.records`). `Learner` turns items into
token ids, computes the log-probabilities of their responses and asks the objective for losses:

    PairObjective         pairs, a loss of `prefloop.train.losses`
    SupervisedObjective   demonstrations, -weight log pi(y|x)

The optimiser step is on sum(losses) / size over the whole batch, however memory cuts it.

Legend: B items, in the order of the batch. Metrics are [B] too, without gradient, and are logged as means over items.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from prefloop.data.chat import ChatFormat
from prefloop.fingerprints import fingerprint
from prefloop.models import ModelRef, load_model
from prefloop.records import Demonstration, Item, Pair
from prefloop.train.checks import check_pairs, check_tokens, check_zero_margin
from prefloop.train.logprobs import Path, ResponseLogps, response_logps
from prefloop.train.losses import PairLogps, pair_metrics
from prefloop.train.packing import TokenGroup
from prefloop.train.reference import token_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

I = TypeVar("I", bound=Item)  # noqa: E741
Loss = Callable[..., Tensor]


class Objective(ABC, Generic[I]):
    """A loss on items of one kind. Stateless: what it returns is a function of its arguments."""

    kind: ClassVar[str]
    """What the items are, in messages."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Equal for equal objectives: the objective's share in a stage's fingerprint."""

    @property
    def coupled(self) -> bool:
        """Whether the loss of an item depends on the batch's other items. Then a batch that memory cuts takes two
        forward passes.
        """
        return False

    @abstractmethod
    def check(self, items: Sequence[I], groups: Sequence[TokenGroup], chat: ChatFormat) -> None:
        """Raises CheckFailed for token ids that are not as they should be."""

    @abstractmethod
    def losses(self, items: Sequence[I], logps: ResponseLogps) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [B] and metrics. `logps`: of all responses of all items, end to end."""

    def size(self, items: Sequence[I], groups: Sequence[TokenGroup]) -> int:
        """What the sum of a batch's losses is divided by."""
        return len(items)

    @property
    def first_steps(self) -> int:
        """Steps after which every weight should have had a gradient. A LoRA's A has none while its B is zero."""
        return 2

    def load(self, policy: ModelRef, device: str) -> "PreTrainedModel":
        """The model to train: the language model in a folder, float32."""
        return load_model(policy, device=device)

    def group(self, chat: ChatFormat, item: I) -> TokenGroup:
        """The token ids of an item."""
        return token_group(chat, item.prompt, item.responses)

    def read(self, model: "PreTrainedModel", groups: Sequence[TokenGroup], *, path: Path, dtype: str) -> ResponseLogps:
        """What the loss is made of, differentiable: a log-probability a token. A model without a vocabulary gives
        numbers of its own in their place (`prefloop.train.scalar`).
        """
        return response_logps(model, groups, path=path, dtype=dtype)

    def before_first_update(self, items: Sequence[I], logps: ResponseLogps, *, policy: str, dtype: str) -> None:
        """Raises CheckFailed where the first log-probabilities are not as they should be.

        `policy` is the fingerprint of the start model, `dtype` that of its matrix products.
        """


@dataclass(frozen=True)
class PairObjective(Objective[Pair]):
    """A pairwise loss on pairs with reference log-probabilities; `beta` scales the margin that is logged."""

    loss: Loss
    beta: float

    kind: ClassVar = "pairs"

    @property
    def identity(self) -> str:
        return f"{fingerprint(self.loss)} {self.beta!r}"

    def check(self, items: Sequence[Pair], groups: Sequence[TokenGroup], chat: ChatFormat) -> None:
        check_pairs(items, groups, chat)

    def losses(self, items: Sequence[Pair], logps: ResponseLogps) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.pair_logps(items, logps)
        device = logps.sums.device
        p = torch.tensor([pair.p for pair in items], device=device)
        weight = torch.tensor([pair.weight for pair in items], device=device)
        return self.loss(found, p=p, weight=weight), pair_metrics(found, beta=self.beta)._asdict()

    def before_first_update(self, items: Sequence[Pair], logps: ResponseLogps, *, policy: str, dtype: str) -> None:
        check_zero_margin(self.pair_logps(items, logps), items, policy=policy, dtype=dtype)

    @staticmethod
    def pair_logps(items: Sequence[Pair], logps: ResponseLogps) -> PairLogps:
        """The log-probabilities as losses take them."""
        known = [pair.reference_logps for pair in items]
        reference = torch.tensor(known, dtype=torch.float32, device=logps.sums.device)
        return PairLogps(logps.sums[0::2], logps.sums[1::2], reference[:, 0], reference[:, 1])


@dataclass(frozen=True)
class SupervisedObjective(Objective[Demonstration]):
    """Supervised fine-tuning: -weight log pi(y|x), over response tokens alone, the end token included.

    `normalise` is what the batch's sum is divided by: its number of response tokens (`token`: every token counts the
    same, the field's convention) or of demonstrations (`sequence`: the likelihood of the data, long answers count
    more). Weights change the sum only: with weights of mean 1 the scale stays.
    """

    normalise: Literal["token", "sequence"] = "token"

    kind: ClassVar = "demonstrations"

    @property
    def identity(self) -> str:
        return f"supervised, {self.normalise}"

    def check(self, items: Sequence[Demonstration], groups: Sequence[TokenGroup], chat: ChatFormat) -> None:
        check_tokens(items, groups, chat, names=("response",))

    def losses(self, items: Sequence[Demonstration], logps: ResponseLogps) -> tuple[Tensor, dict[str, Tensor]]:
        weight = torch.tensor([item.weight for item in items], device=logps.sums.device)
        nll = -logps.sums
        metrics = {"nll": nll.detach(), "tokens": logps.counts}
        return weight * nll, metrics

    def size(self, items: Sequence[Demonstration], groups: Sequence[TokenGroup]) -> int:
        return len(items) if self.normalise == "sequence" else sum(group.predicted for group in groups)
