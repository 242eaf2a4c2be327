"""What a training round minimises, item by item, and what it checks about them before the first update.

An item is a record with a prompt and one or several responses to it (`prefloop.records`). `Learner` turns items into
token ids, computes the log-probabilities of their responses and asks the objective for losses:

    PairObjective         pairs, a loss of `prefloop.train.losses`
    AnswerObjective       answers called good or bad, KTO
    SupervisedObjective   demonstrations, -weight log pi(y|x)

The optimiser step is on sum(losses) / size over the whole batch, however memory cuts it.

Legend: B items, in the order of the batch. Metrics are [B] too, without gradient, and are logged as means over items.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from prefloop.data.chat import ChatFormat
from prefloop.errors import InputError
from prefloop.models import ModelRef, load_model
from prefloop.records import Answer, Demonstration, Item, Pair
from prefloop.train.checks import check_pairs, check_tokens, check_zero_ratios
from prefloop.train.logprobs import Path, ResponseLogps, response_logps
from prefloop.train.losses import AnswerLogps, ChosenLoss, PairLogps, pair_metrics
from prefloop.train.packing import TokenGroup
from prefloop.train.reference import token_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

I = TypeVar("I", bound=Item)  # noqa: E741


class Objective(ABC, Generic[I]):
    """A loss on items of one kind. Stateless: what it returns is a function of its arguments."""

    kind: ClassVar[str]
    """What the items are, in messages."""
    reads: ClassVar[str] = "log-probability"
    """What the model says of a token, in messages."""

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

    @property
    def collision(self) -> bool:
        """Whether `losses` needs log sum_v pi(v)^2 of every token (`ResponseLogps.collision`)."""
        return False

    @property
    def referenced(self) -> bool:
        """Whether items need `reference_logps`."""
        return False

    @property
    def prefixes(self) -> bool:
        """Whether pairs need `reference_prefix_logps`."""
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
        return response_logps(model, groups, path=path, dtype=dtype, collision=self.collision)

    def tokens(self, model: "PreTrainedModel", groups: Sequence[TokenGroup], *, path: Path, dtype: str) -> Tensor:
        """[T] what the model says of every response token, and nothing that only a loss needs."""
        return self.read(model, groups, path=path, dtype=dtype).tokens

    def before_first_update(self, items: Sequence[I], logps: ResponseLogps, *, policy: str, dtype: str) -> None:
        """Raises CheckFailed where the first log-probabilities are not as they should be.

        `policy` is the fingerprint of the start model, `dtype` that of its matrix products.
        """


@dataclass(frozen=True)
class LossObjective(Objective[I]):
    """A loss of the table (`parse_loss`) on items of one kind."""

    loss: ChosenLoss

    @property
    def identity(self) -> str:
        return str(self.loss)

    @property
    def coupled(self) -> bool:
        return self.loss.coupled


@dataclass(frozen=True)
class PairObjective(LossObjective[Pair]):
    """A pairwise loss (`parse_loss`) on pairs that carry what it needs; the learner computes nothing else."""

    kind: ClassVar = "pairs"

    @property
    def collision(self) -> bool:
        return "collision" in self.loss.needs

    @property
    def referenced(self) -> bool:
        return "reference" in self.loss.needs

    @property
    def prefixes(self) -> bool:
        return "tail" in self.loss.needs

    def check(self, items: Sequence[Pair], groups: Sequence[TokenGroup], chat: ChatFormat) -> None:
        check_pairs(items, groups, chat)
        check_labels(items, self.loss)

    def losses(self, items: Sequence[Pair], logps: ResponseLogps) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.pair_logps(items, logps)
        p, weight = labels(items, logps.sums.device)
        metrics = pair_metrics(found, beta=self.loss.beta or 1.0, per_token=self.loss.per_token)
        return self.loss(found, p=p, weight=weight), metrics

    def before_first_update(self, items: Sequence[Pair], logps: ResponseLogps, *, policy: str, dtype: str) -> None:
        if self.referenced:
            check_reference(items, logps, policy=policy, dtype=dtype)

    def pair_logps(self, items: Sequence[Pair], logps: ResponseLogps) -> PairLogps:
        """The log-probabilities as the loss takes them, and what else it needs."""
        needs, device = self.loss.needs, logps.sums.device
        found = PairLogps(logps.sums[0::2], logps.sums[1::2], chosen_tokens=logps.counts[0::2],
                          rejected_tokens=logps.counts[1::2])  # fmt: skip
        if "reference" in needs:
            reference = _columns([pair.reference_logps for pair in items], device)
            found = found._replace(reference_chosen=reference[:, 0], reference_rejected=reference[:, 1])
            if "tail" in needs:
                tails = reference - _columns([pair.reference_prefix_logps for pair in items], device)
                shorter = logps.counts.reshape(-1, 2).amin(1).repeat_interleave(2)
                beyond = logps.positions >= shorter.repeat_interleave(logps.counts)
                own = logps.summed(torch.where(beyond, logps.tokens, 0.0))
                found = found._replace(tail=PairLogps(own[0::2], own[1::2], tails[:, 0], tails[:, 1]))
        if logps.collision is not None:
            collision = logps.summed(logps.collision)
            found = found._replace(chosen_collision=collision[0::2], rejected_collision=collision[1::2])
        if "gap" in needs:
            scores = _columns([pair.scores for pair in items], device)
            found = found._replace(gap=scores[:, 0] - scores[:, 1])
        if "reference_sample" in needs:
            sides = [pair.reference_sample == "chosen" for pair in items]
            found = found._replace(chosen_is_reference_sample=torch.tensor(sides, device=device))
        return found


def check_reference(items: Sequence[Pair] | Sequence[Answer], logps: ResponseLogps, *, policy: str, dtype: str) -> None:
    """Before the first update the policy is its reference (D1), if that is the model the items were given theirs by."""
    reference = _columns([item.reference_logps for item in items], logps.sums.device)
    check_zero_ratios(logps.sums.reshape(-1, 2), reference, items, policy=policy, dtype=dtype)


def labels(items: Sequence[Pair] | Sequence[Answer], device: torch.device) -> tuple[Tensor, Tensor]:
    """`p` and `weight` of all items, [B]."""
    p = torch.tensor([item.p for item in items], device=device)
    return p, torch.tensor([item.weight for item in items], device=device)


def _columns(rows: Sequence[Any], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device=device)


def check_labels(pairs: Sequence[Pair], loss: ChosenLoss) -> None:
    """Raises InputError for the first pair that has a label which the loss does not take, or lacks one it needs."""
    for pair in pairs:
        where = f"the pair of prompt {pair.prompt.id!r}"
        if loss.no_p and pair.p != 1.0:
            raise InputError(f"{where} has p = {pair.p}, and the loss takes no soft labels: {loss.no_p}")
        if loss.no_weight and pair.weight != 1.0:
            raise InputError(f"{where} has weight = {pair.weight}, and the loss takes no weights: {loss.no_weight}")
        if "gap" in loss.needs and None in pair.scores:
            raise InputError(
                f"{where} has no scores, which the loss {loss} needs; give chosen_score and rejected_score"
            )
        if "reference_sample" in loss.needs and pair.reference_sample is None:
            raise InputError(f"{where} has no reference_sample (chosen or rejected), which the loss {loss} needs")


@dataclass(frozen=True)
class AnswerObjective(LossObjective[Answer]):
    """A loss of single answers (KTO), each with a mismatched one beside it (`prefloop.pairs.answers`)."""

    kind: ClassVar = "answers"

    @property
    def referenced(self) -> bool:
        return True

    def check(self, items: Sequence[Answer], groups: Sequence[TokenGroup], chat: ChatFormat) -> None:
        check_tokens(items, groups, chat, names=("response", "mismatched response"))

    def losses(self, items: Sequence[Answer], logps: ResponseLogps) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.answer_logps(items, logps)
        p, weight = labels(items, logps.sums.device)
        good, change = (p > 0.5).float(), found.ratio.detach()
        bad = 1.0 - good
        metrics = {
            "kl": found.kl.expand(len(items)),
            "correct": torch.where(change == found.kl, 0.5, ((change > found.kl).float() == good).float()),
            "good": good,
            # Their means over the batch are those over its good and over its bad answers.
            "good_change": good * change * len(items) / good.sum().clamp(min=1.0),
            "bad_change": bad * change * len(items) / bad.sum().clamp(min=1.0),
        }
        return self.loss(found, p=p, weight=weight), metrics

    def before_first_update(self, items: Sequence[Answer], logps: ResponseLogps, *, policy: str, dtype: str) -> None:
        check_reference(items, logps, policy=policy, dtype=dtype)

    @staticmethod
    def answer_logps(items: Sequence[Answer], logps: ResponseLogps) -> AnswerLogps:
        """The log-probabilities as the loss takes them."""
        reference = _columns([item.reference_logps for item in items], logps.sums.device)
        return AnswerLogps(logps.sums[0::2], reference[:, 0], logps.sums[1::2], reference[:, 1])


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
