"""The arithmetic of PPO (Schulman et al. 2017, arXiv 1707.06347) on sampled answers, token by token.

A state is a prompt and the answer so far, an action the next token. With pi_old the policy that sampled, V_old the
values then, r the reward of the whole answer and T its last token:

    R_t = -beta (log pi_old,t - log pi_ref,t) + 1[t = T] r                      (`token_rewards`)
    delta_t = R_t + gamma V_t+1 - V_t,   A_t = sum_k (gamma lambda)^k delta_t+k,   G_t = A_t + V_t      (`advantages`)
    kappa_t = pi / pi_old,   L_pi = -min(kappa_t A_t, clip(kappa_t, 1 - eps, 1 + eps) A_t)        (`policy_loss`)
    L_V = 1/2 max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2)                            (`value_loss`)

Both losses are means over the tokens of a minibatch. Policy and value model share no weight, so each has an optimiser
of its own and no coefficient weighs one loss against the other.

Legend: B answers, T tokens of all of them, end to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed
from prefloop.models import ModelRef
from prefloop.records import Prompt, Response
from prefloop.train.checks import check_tokens
from prefloop.train.learner import Learner
from prefloop.train.logprobs import Path, ResponseLogps, response_logps
from prefloop.train.objective import Objective
from prefloop.train.online import OnlineLearner
from prefloop.train.packing import TokenGroup
from prefloop.train.scalar import load_scalar_model, response_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Values = tuple[float, ...]
"""One number a token."""


@dataclass(frozen=True)
class Rollout:
    """An answer with all that was known when it was sampled; what has a value a token is as long as the answer.

    score: as the annotator gives it; the reward r is the score less the penalty. logps, reference_logps: log pi_old and
    log pi_ref of its tokens. values: V_old of the state before each. advantages, returns: A (whitened, where that is
    asked for) and G.
    """

    prompt: Prompt
    response: Response
    score: float
    penalty: float = 0.0
    logps: Values = ()
    reference_logps: Values = ()
    values: Values = ()
    advantages: Values = ()
    returns: Values = ()

    @property
    def responses(self) -> tuple[Response]:
        """The answer alone."""
        return (self.response,)

    @property
    def kl(self) -> float:
        """sum_t log pi_old - log pi_ref: its mean over answers estimates KL(pi_old || pi_ref), in nats an answer."""
        return float(np.sum(np.subtract(self.logps, self.reference_logps)))


def token_rewards(rollout: Rollout, *, beta: float) -> Float[np.ndarray, " T"]:
    """R_t: the price of leaving the reference, token by token, and the reward of the whole at the last."""
    rewards = -beta * np.subtract(rollout.logps, rollout.reference_logps)
    rewards[-1] += rollout.score - rollout.penalty
    return rewards


def advantages(
    rewards: Float[np.ndarray, " T"], values: Float[np.ndarray, " T"], *, gamma: float, lam: float
) -> Float[np.ndarray, " T"]:
    """A_t of one answer by generalised advantage estimation (Schulman et al. 2016, Eq. 16); V is 0 after its end.

    >>> advantages(np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.5, 0.5]), gamma=1.0, lam=0.0)
    array([0. , 0. , 0.5])
    """
    found = np.zeros(len(rewards))
    following, value = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * value - values[t] + gamma * lam * following
        found[t], value = following, values[t]
    return found


def with_advantages(
    rollouts: Sequence[Rollout], *, beta: float, gamma: float, lam: float, whiten: bool
) -> list[Rollout]:
    """The rollouts with advantages and returns. `whiten`: advantages of mean 0 and standard deviation 1 over all
    tokens of all answers; the returns are those of the advantages as they were.
    """
    raw = [advantages(token_rewards(r, beta=beta), np.array(r.values), gamma=gamma, lam=lam) for r in rollouts]
    every = np.concatenate(raw)
    mean, scale = (every.mean(), every.std() + 1e-8) if whiten else (0.0, 1.0)
    return [
        replace(
            rollout, advantages=tuple(((own - mean) / scale).tolist()), returns=tuple((own + rollout.values).tolist())
        )
        for rollout, own in zip(rollouts, raw, strict=True)
    ]


def adapted(beta: float, kl: float, *, target: float, horizon: int, answers: int) -> float:
    """beta of the next step (Ziegler et al. 2019, section 2.2): higher where the KL divergence was above its target.

    >>> round(adapted(0.1, 12.0, target=6.0, horizon=1000, answers=100), 6)
    0.102
    """
    return beta * (1.0 + float(np.clip(kl / target - 1.0, -0.2, 0.2)) * answers / horizon)


def explained_variance(rollouts: Sequence[Rollout]) -> float | None:
    """1 - Var(G - V_old) / Var(G) over tokens: 1 for perfect values, 0 for constant ones; None where G is constant."""
    returns, values = (np.concatenate([getattr(r, name) for r in rollouts]) for name in ("returns", "values"))
    variance = float(returns.var())
    return 1.0 - float((returns - values).var()) / variance if variance > 0 else None


def policy_loss(
    logps: Float[Tensor, " T"], old: Float[Tensor, " T"], advantage: Float[Tensor, " T"], *, clip: float
) -> Float[Tensor, " T"]:
    """L_pi of every token: -A at kappa = 1, whatever `clip` is."""
    ratio = (logps - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)


def value_loss(
    values: Float[Tensor, " T"], old: Float[Tensor, " T"], returns: Float[Tensor, " T"], *, clip: float
) -> Float[Tensor, " T"]:
    """L_V of every token: a value that has left V_old by more than `clip` gains nothing by going on."""
    clipped = torch.clamp(values, old - clip, old + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


class _OnRollouts(Objective[Rollout]):
    """What both objectives share: their items, and that the loss is a mean over tokens."""

    kind: ClassVar = "rollouts"

    def check(self, items: Sequence[Rollout], groups: Sequence[TokenGroup], chat: ChatFormat) -> None:
        check_tokens(items, groups, chat, names=("response",))

    def size(self, items: Sequence[Rollout], groups: Sequence[TokenGroup]) -> int:
        return sum(group.predicted for group in groups)


@dataclass(frozen=True)
class PolicyObjective(_OnRollouts):
    """`policy_loss`. Metrics, each a mean over an answer's tokens: entropy, in nats; clip_fraction, share of tokens
    whose kappa is out of [1 - clip, 1 + clip]; approx_kl, of pi_old and pi by (kappa - 1) - log kappa (Schulman's k3).
    """

    clip: float = 0.2

    @property
    def identity(self) -> str:
        return f"ppo policy {self}"

    def read(self, model: "PreTrainedModel", groups: Sequence[TokenGroup], *, path: Path, dtype: str) -> ResponseLogps:
        return response_logps(model, groups, path=path, dtype=dtype, entropy=True)

    def tokens(self, model: "PreTrainedModel", groups: Sequence[TokenGroup], *, path: Path, dtype: str) -> Tensor:
        return response_logps(model, groups, path=path, dtype=dtype).tokens

    def losses(self, items: Sequence[Rollout], logps: ResponseLogps) -> tuple[Tensor, dict[str, Tensor]]:
        old, advantage = _tokens(items, "logps", logps.tokens), _tokens(items, "advantages", logps.tokens)
        losses = policy_loss(logps.tokens, old, advantage, clip=self.clip)
        difference = (logps.tokens - old).detach()
        ratio = difference.exp()
        assert logps.entropy is not None
        return _by_answer(losses, logps.counts), {
            "entropy": _by_answer(logps.entropy, logps.counts) / logps.counts,
            "clip_fraction": _by_answer(((ratio - 1.0).abs() > self.clip).float(), logps.counts) / logps.counts,
            "approx_kl": _by_answer(ratio - 1.0 - difference, logps.counts) / logps.counts,
        }

    def before_first_update(self, items: Sequence[Rollout], logps: ResponseLogps, *, policy: str, dtype: str) -> None:
        """kappa is 1 as long as nothing was learned."""
        gap = float((logps.tokens.detach() - _tokens(items, "logps", logps.tokens)).abs().max())
        allowed = 1e-3 if dtype == "float32" else 0.5
        if gap > allowed:
            raise CheckFailed(
                f"before the first update the policy should equal the one that was sampled from, but log pi of a token "
                f"differs by {gap:.4f} nats (at most {allowed} expected); try --compute.dtype float32"
            )


@dataclass(frozen=True)
class ValueObjective(_OnRollouts):
    """`value_loss` on a model with a scalar head, which begins as zero where the start model has none.

    value_clip_fraction: share of an answer's tokens whose value has left V_old by more than `clip`. base: a model in
    memory whose frozen weights are used where they are the same (`load_scalar_model`).
    """

    clip: float = 0.2
    base: "PreTrainedModel | None" = field(default=None, repr=False, compare=False)

    reads: ClassVar = "value"

    @property
    def identity(self) -> str:
        return f"ppo values {self}"

    @property
    def first_steps(self) -> int:
        # A head of zeros gives the trunk no gradient in the first step; nor then a LoRA's B its A in the second.
        return 3

    def load(self, policy: ModelRef, device: str) -> "PreTrainedModel":
        return load_scalar_model(policy, base=self.base, device=device)

    def read(self, model: "PreTrainedModel", groups: Sequence[TokenGroup], *, path: Path, dtype: str) -> ResponseLogps:
        return response_values(model, groups, path=path, dtype=dtype)

    def losses(self, items: Sequence[Rollout], logps: ResponseLogps) -> tuple[Tensor, dict[str, Tensor]]:
        old, returns = _tokens(items, "values", logps.tokens), _tokens(items, "returns", logps.tokens)
        losses = value_loss(logps.tokens, old, returns, clip=self.clip)
        clipped = ((logps.tokens - old).abs() > self.clip).float()
        return _by_answer(losses, logps.counts), {
            "value_clip_fraction": _by_answer(clipped, logps.counts) / logps.counts
        }


def _tokens(items: Sequence[Rollout], name: str, like: Tensor) -> Tensor:
    """[T] what the rollouts know of every token, on the device of `like`."""
    known = [value for item in items for value in getattr(item, name)]
    return torch.tensor(known, dtype=torch.float32, device=like.device)


def _by_answer(tokens: Tensor, counts: Tensor) -> Tensor:
    """[T] -> [B] sums."""
    return ResponseLogps.of(tokens, counts).sums


class ActorCritic(OnlineLearner):
    """The policy, which is sampled from, its start as the reference, and the value model beside it, in one checkpoint:
    none is ever newer than the other.
    """

    def __init__(self, policy: Learner[Rollout], values: Learner[Rollout]) -> None:
        super().__init__(policy)
        self.values = values

    def state(self) -> dict[str, Any]:
        trained = {name: weight.detach() for name, weight in self.values.trained}
        return {"values": trained, "optimizer": self.values.optimizer.state_dict()}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        for name, weight in self.values.trained:
            weight.copy_(state["values"][name])
        self.values.optimizer.load_state_dict(state["optimizer"])
