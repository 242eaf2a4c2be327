"""SAIL's surrogate loss: autograd's gradient of it is the score-function gradient of an objective whose own samples
depend on the parameters.

    maximise J = E_x E_z [F(z)],   z = (y_w, y_l) ~ P(z|x),   F = log sigmoid(beta h)
    grad J = E[grad F] + c E[F grad log P(z|x)]               c = 1 is exact, c = 0 drops the second term (DPO)

    route   answers        label              log P(z|x)
    plain   data           data               constant
    dp      data           policy             log sigmoid(beta h)
    pp      two of policy  policy             log pi(y_w) + log pi(y_l) + log sigmoid(beta h)
    pr      two of policy  annotator          log pi(y_w) + log pi(y_l)

A policy's label is drawn from sigmoid(beta h) here, where h is known: no label is ever older than the weights.

Legend: B pairs; log-probabilities are summed over response tokens, in nats; F is never positive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from prefloop.data.chat import ChatFormat
from prefloop.records import Pair
from prefloop.train.checks import check_pairs
from prefloop.train.logprobs import ResponseLogps
from prefloop.train.losses import PairLogps, pair_metrics
from prefloop.train.losses.pairwise import dpo
from prefloop.train.objective import Objective, check_reference
from prefloop.train.packing import TokenGroup

Route = Literal["plain", "dp", "pp", "pr"]
ResponseTerm = Literal["theory", "theory-baseline", "released"]
POLICY_LABELS = ("dp", "pp")
OWN_ANSWERS = ("pp", "pr")


class RoutedPair(Pair):
    """A pair and where it comes from. On the routes dp and pp the order of its answers is no label: `u`, uniform in
    [0, 1), draws one. `baseline` is subtracted from F in the response term.
    """

    route: Route = "plain"
    u: float = 0.0
    baseline: float = 0.0

    @classmethod
    def of(cls, pair: Pair, route: Route, *, u: float, baseline: float) -> "RoutedPair":
        """A label drawn by the policy replaces the pair's own, a soft one too."""
        p = 1.0 if route in POLICY_LABELS else pair.p
        return cls(**{**dict(pair), "p": p, "route": route, "u": u, "baseline": baseline})


def sail(
    logps: PairLogps,
    *,
    coefficient: float,
    policy_label: Tensor,
    own_answers: Tensor,
    beta: float = 0.1,
    response_term: ResponseTerm = "theory",
    baseline: float | Tensor = 0.0,
    batch: int = 1,
    p: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
) -> Tensor:
    """The surrogate [B] of pairs whose label is in their order: `policy_label` and `own_answers` [B], 1 or 0, say what
    the policy has drawn.

        loss = -F - c/2 F^2 [policy_label] - c sg[F - b] (log pi(y_w) + log pi(y_l)) [own_answers]

    F^2 / 2 has the gradient of sg[F] F. b is `baseline` with "theory-baseline" and 0 with "theory": any constant leaves
    the expectation as it is, because E[grad log P] = 0, and -ln 2 leaves nothing of the term at h = 0.
    "released" is what the published code adds instead, per answer -c sg[F / log pi(y)] log pi(y), and not divided by
    the number of pairs in the `batch`: it raises the likelihood of both answers where the theory lowers it.
    """
    nll = dpo(logps, beta=beta, p=p)  # -F
    chosen, rejected = logps.policy_chosen, logps.policy_rejected
    if response_term == "released":
        towards = [-(nll.detach() / answer.detach()) * answer for answer in (chosen, rejected)]
        response = -batch * (towards[0] + towards[1])
    else:
        response = (nll.detach() + (baseline if response_term == "theory-baseline" else 0.0)) * (chosen + rejected)
    return weight * (nll - policy_label * (0.5 * coefficient) * nll**2 + own_answers * coefficient * response)


def sign_change(coefficient: float, *, beta: float) -> float:
    """The h below which the gradient of a pair with a policy's label turns round: where F < -1/c, because

        d loss / dh = -beta sigmoid(-beta h) (1 + c F)

    >>> round(sign_change(0.2, beta=1.0), 3), round(sign_change(0.3, beta=1.0), 2)
    (-4.993, -3.3)
    """
    inverse = torch.tensor(1.0 / coefficient, dtype=torch.float64)
    return -float(torch.log(torch.expm1(inverse))) / beta


@dataclass(frozen=True)
class SailObjective(Objective[RoutedPair]):
    """`sail` on routed pairs with reference log-probabilities; `batch_size` is for the released response term.

    Metrics count only what they are about, and say of how many: accuracy, margin and changes are of pairs whose label
    is from outside (`labelled`), before a policy's label turns any round; `log_sigmoid` is of the policy's own answers
    (`own_answers`).
    """

    beta: float
    coefficient: float
    response_term: ResponseTerm
    batch_size: int

    kind: ClassVar = "pairs"

    @property
    def identity(self) -> str:
        return f"sail {self.beta!r} {self.coefficient!r} {self.response_term} {self.batch_size}"

    @property
    def referenced(self) -> bool:
        return True

    def check(self, items: Sequence[RoutedPair], groups: Sequence[TokenGroup], chat: ChatFormat) -> None:
        check_pairs(items, groups, chat)

    def losses(self, items: Sequence[RoutedPair], logps: ResponseLogps) -> tuple[Tensor, dict[str, Tensor]]:
        found = _pair_logps(items, logps)

        def column(values: Sequence[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=logps.sums.device)

        policy_label = column([item.route in POLICY_LABELS for item in items])
        own_answers = column([item.route in OWN_ANSWERS for item in items])
        accepted = torch.sigmoid(self.beta * found.h.detach())
        flipped = (policy_label > 0) & (column([item.u for item in items]) >= accepted)
        labelled = exchanged(found, flipped)
        losses = sail(
            labelled,
            coefficient=self.coefficient,
            policy_label=policy_label,
            own_answers=own_answers,
            beta=self.beta,
            response_term=self.response_term,
            baseline=column([item.baseline for item in items]),
            batch=self.batch_size,
            p=column([item.p for item in items]),
            weight=column([item.weight for item in items]),
        )
        outside = column([item.route != "pp" for item in items])
        metrics = {name: value * outside for name, value in pair_metrics(found, beta=self.beta).items()}
        preference = dpo(labelled, beta=self.beta).detach()
        turned = (preference * self.coefficient > 1).float() * policy_label
        return losses, {
            **metrics,
            "labelled": outside,
            "preference_loss": preference,
            "own_answers": own_answers,
            "log_sigmoid": -preference * own_answers,
            "flipped": flipped.float(),
            "sign_changed": turned,
        }

    def before_first_update(
        self, items: Sequence[RoutedPair], logps: ResponseLogps, *, policy: str, dtype: str
    ) -> None:
        check_reference(items, logps, policy=policy, dtype=dtype)


def _pair_logps(items: Sequence[Pair], logps: ResponseLogps) -> PairLogps:
    reference = torch.tensor([item.reference_logps for item in items], dtype=torch.float32, device=logps.sums.device)
    return PairLogps(logps.sums[0::2], logps.sums[1::2], reference[:, 0], reference[:, 1])


def exchanged(logps: PairLogps, where: Tensor) -> PairLogps:
    """The pairs with chosen and rejected exchanged `where` [B] is true."""
    chosen, rejected = logps.reference_chosen, logps.reference_rejected
    assert chosen is not None and rejected is not None
    return PairLogps(
        torch.where(where, logps.policy_rejected, logps.policy_chosen),
        torch.where(where, logps.policy_chosen, logps.policy_rejected),
        torch.where(where, rejected, chosen),
        torch.where(where, chosen, rejected),
    )
