"""Losses without a reference: none is run for them. Conventions are those of `prefloop.train.losses.pairwise`.

sum log pi: over response tokens; mean log pi: divided by their number |y|.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.train.losses.logps import PairLogps, Soft
from prefloop.train.losses.pairwise import either, logistic


def simpo(
    logps: PairLogps, *, beta: float = 2.0, gamma: float = 1.0, p: Soft = 1.0, weight: Soft = 1.0
) -> Float[Tensor, " B"]:
    """SimPO (Meng et al. 2024, Eq. 6; beta 2.0, gamma 1.0: their Llama-3 base): means over tokens and a target margin.

    loss = -log sigmoid(beta mean log pi(y_w) - beta mean log pi(y_l) - gamma)
    """

    def hard(logps: PairLogps) -> Tensor:
        return logistic(beta * (logps.policy_chosen - logps.policy_rejected) - gamma)

    return weight * either(hard, logps.per_token, p)


def orpo(logps: PairLogps, *, odds: float = 0.1, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """ORPO (Hong et al. 2024, Eq. 6 and 7; lambda 0.1): imitation of chosen, and an odds ratio.

        P = exp(mean log pi),   loss = -mean log pi(y_w) - odds log sigmoid(log P_w/(1 - P_w) - log P_l/(1 - P_l))

    `odds` is the paper's lambda, which TRL calls beta.
    """

    def hard(logps: PairLogps) -> Tensor:
        ratio = _log_odds(logps.policy_chosen) - _log_odds(logps.policy_rejected)
        return -logps.policy_chosen - odds * logsigmoid(ratio)

    return weight * either(hard, logps.per_token, p)


def _log_odds(logp: Tensor) -> Tensor:
    """log p - log(1 - p), from log p <= 0. A sure answer counts as 1 - 1e-7: its odds are infinite."""
    below = logp.clamp(max=-1e-7)
    # Two forms of log(1 - e^x), each where it is exact; the other one's input is moved away, lest its gradient be NaN.
    near = below > -math.log(2.0)
    log_rest = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, below, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, below))),
    )
    return below - log_rest


def cpo(
    logps: PairLogps, *, beta: float = 0.1, alpha: float = 1.0, p: Soft = 1.0, weight: Soft = 1.0
) -> Float[Tensor, " B"]:
    """Contrastive preference optimisation (Xu et al. 2024, Eq. 5; beta 0.1, alpha 1), sums over tokens.

    loss = -log sigmoid(beta (log pi(y_w) - log pi(y_l))) - alpha log pi(y_w)
    """

    def hard(logps: PairLogps) -> Tensor:
        return logistic(beta * (logps.policy_chosen - logps.policy_rejected)) - alpha * logps.policy_chosen

    return weight * either(hard, logps, p)


def slic_hf(
    logps: PairLogps, *, delta: float = 1.0, nll: float = 0.1, p: Soft = 1.0, weight: Soft = 1.0
) -> Float[Tensor, " B"]:
    """SLiC-HF (Zhao et al. 2023), with its likelihood term on the chosen answer; sums over tokens.

        loss = max(0, delta - log pi(y_w) + log pi(y_l)) - nll log pi(y_w)

    `nll` is the paper's lambda. Both defaults are ours: the paper's were not seen.
    """

    def hard(logps: PairLogps) -> Tensor:
        distance = logps.policy_chosen - logps.policy_rejected
        return (delta - distance).clamp(min=0) - nll * logps.policy_chosen

    return weight * either(hard, logps, p)


def nll_sum(logps: PairLogps, *, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """-log pi(y_w), summed over tokens: a likelihood term to add to another loss."""
    return weight * either(_nll, logps, p)


def nll_mean(logps: PairLogps, *, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """-log pi(y_w) a token, each answer by its own length: the term of RPO and of IRPO (Pang et al. 2024, Eq. 1)."""
    return weight * either(_nll, logps.per_token, p)


def _nll(logps: PairLogps) -> Tensor:
    return -logps.policy_chosen
