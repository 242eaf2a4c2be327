"""PPO's arithmetic: closed forms, the identities of the first minibatch, and the optimum that other methods share."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from tests.sample.engines import stopping_folder
from torch import Tensor

from prefloop.errors import CheckFailed
from prefloop.models import ModelRef, load_model
from prefloop.records import Prompt, Response
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.learner import Learner
from prefloop.train.logprobs import rows
from prefloop.train.losses import PairLogps
from prefloop.train.losses.pairwise import dpo
from prefloop.train.ppo import (
    PolicyObjective,
    Rollout,
    ValueObjective,
    adapted,
    advantages,
    explained_variance,
    policy_loss,
    token_rewards,
    value_loss,
    with_advantages,
)
from prefloop.train.scalar import shared_bytes

Objective = Callable[[Tensor], Tensor]
COMPUTE = Compute(device="cpu", dtype="float32")
TRAIN = Train(steps=4, batch_size=4, learning_rate=1e-3, warmup_steps=0)


def rollout(
    score: float, logps: list[float], reference: list[float], values: list[float], penalty: float = 0.0
) -> Rollout:
    response = Response(text="", token_ids=tuple(range(5, 5 + len(logps))), finish_reason="length")
    return Rollout(
        prompt=Prompt.of("Q"),
        response=response,
        score=score,
        penalty=penalty,
        logps=tuple(logps),
        reference_logps=tuple(reference),
        values=tuple(values),
    )


ROLLOUTS = [
    rollout(2.0, [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.5], [0.3, 0.1, -0.2]),
    rollout(-1.0, [-0.2, -0.3], [-0.1, -0.5], [0.0, 0.4], penalty=0.5),
]


def test_the_reward_of_a_token_is_the_price_of_drift_and_the_score_at_the_last() -> None:
    assert token_rewards(ROLLOUTS[0], beta=0.1).tolist() == pytest.approx([-0.05, 0.1, 2.0])
    assert token_rewards(ROLLOUTS[1], beta=0.1).tolist() == pytest.approx([0.01, -1.0 - 0.5 - 0.02])
    assert ROLLOUTS[0].kl == pytest.approx(-0.5)
    # With the reference as the policy the shaped reward is the score.
    same = replace(ROLLOUTS[0], reference_logps=ROLLOUTS[0].logps)
    assert token_rewards(same, beta=5.0).tolist() == [0.0, 0.0, 2.0]


def test_advantages_without_values_are_the_rewards_to_go() -> None:
    rewards = np.array([0.5, -1.0, 2.0, 0.25])
    found = advantages(rewards, np.zeros(4), gamma=1.0, lam=1.0)
    assert found.tolist() == pytest.approx([1.75, 1.25, 2.25, 0.25])


def test_advantages_are_the_discounted_sum_of_errors() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=6), rng.normal(size=6)
    errors = rewards + 0.9 * np.append(values[1:], 0.0) - values
    expected = [sum((0.9 * 0.8) ** k * errors[t + k] for k in range(6 - t)) for t in range(6)]
    assert advantages(rewards, values, gamma=0.9, lam=0.8).tolist() == pytest.approx(expected)
    # lambda = 1: return to go less the value, whatever the values are.
    to_go = [sum(0.9**k * rewards[t + k] for k in range(6 - t)) - values[t] for t in range(6)]
    assert advantages(rewards, values, gamma=0.9, lam=1.0).tolist() == pytest.approx(to_go)


def test_whitening_is_over_all_tokens_and_leaves_the_returns() -> None:
    options = {"beta": 0.1, "gamma": 1.0, "lam": 0.95}
    raw, white = (with_advantages(ROLLOUTS, whiten=whiten, **options) for whiten in (False, True))
    every = np.concatenate([r.advantages for r in white])
    assert every.mean() == pytest.approx(0.0, abs=1e-12) and every.std() == pytest.approx(1.0, abs=1e-6)
    assert [r.returns for r in raw] == [r.returns for r in white]
    for r in raw:
        assert r.returns == pytest.approx(np.add(r.advantages, r.values))
    assert np.argsort(every).tolist() == np.argsort(np.concatenate([r.advantages for r in raw])).tolist()


def test_the_clipped_policy_loss() -> None:
    old, up, down = torch.zeros(3), torch.ones(3), -torch.ones(3)
    at = torch.tensor([0.5, 1.0, 1.5]).log()
    assert policy_loss(at, old, up, clip=0.2).tolist() == pytest.approx([-0.5, -1.0, -1.2])
    assert policy_loss(at, old, down, clip=0.2).tolist() == pytest.approx([0.8, 1.0, 1.5])
    # What the clip has stopped has no gradient; what would come back has.
    moving = at.clone().requires_grad_()
    policy_loss(moving, old, up, clip=0.2).sum().backward()
    assert moving.grad is not None and moving.grad.tolist() == pytest.approx([-0.5, -1.0, 0.0])


def test_the_clipped_value_loss() -> None:
    values, old, returns = torch.tensor([0.1, 0.5, 0.5, -0.5]), torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 1.0])
    expected = [0.5 * 0.9**2, 0.5 * 0.8**2, 0.5 * 0.5**2, 0.5 * 1.5**2]
    assert value_loss(values, old, returns, clip=0.2).tolist() == pytest.approx(expected)


def test_beta_follows_the_divergence() -> None:
    assert adapted(0.1, 6.0, target=6.0, horizon=100, answers=10) == pytest.approx(0.1)
    assert adapted(0.1, 60.0, target=6.0, horizon=100, answers=10) == pytest.approx(0.102)
    assert adapted(0.1, 0.0, target=6.0, horizon=100, answers=10) == pytest.approx(0.098)
    assert adapted(0.1, 6.6, target=6.0, horizon=100, answers=10) == pytest.approx(0.101)


def test_explained_variance() -> None:
    perfect = replace(ROLLOUTS[0], returns=ROLLOUTS[0].values)
    constant = replace(ROLLOUTS[0], values=(2.0, 2.0, 2.0), returns=(0.0, 1.0, 2.0))
    assert explained_variance([perfect]) == pytest.approx(1.0) and explained_variance([constant]) == 0.0
    assert explained_variance([replace(constant, returns=(1.0, 1.0, 1.0))]) is None


@pytest.fixture(scope="module")
def start() -> ModelRef:
    return stopping_folder()


def sampled(start: ModelRef, config: Train = TRAIN) -> tuple[Learner[Rollout], Learner[Rollout], list[Rollout]]:
    """Both learners and rollouts as the recipe makes them, of different lengths."""
    policy = Learner(start, [], objective=PolicyObjective(), config=config, compute=COMPUTE, seed=0)
    values = Learner(start, [], objective=ValueObjective(), config=config, compute=COMPUTE, seed=0)
    plain = [
        replace(r, prompt=Prompt.of(f"Question {i}?", id=f"p{i}"))
        for i, r in enumerate([*ROLLOUTS, rollout(0.5, [0.0] * 6, [0.0] * 6, [0.0] * 6)])
    ]
    logps, value = policy.tokens(plain), values.tokens(plain)
    known = [
        replace(r, logps=tuple(a), reference_logps=tuple(np.subtract(a, 0.1)), values=tuple(v))
        for r, a, v in zip(plain, logps, value, strict=True)
    ]
    return policy, values, with_advantages(known, beta=0.1, gamma=1.0, lam=0.95, whiten=False)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_first_minibatch(start: ModelRef, rank: int) -> None:
    """kappa is 1: nothing is clipped, the loss is minus the mean advantage, and new values begin at 0."""
    policy, values, rollouts = sampled(start, TRAIN.replace(lora=Lora(rank=rank)))
    assert [len(r.logps) for r in rollouts] == [3, 2, 6] and all(set(r.values) == {0.0} for r in rollouts)
    row = policy.step(rollouts, 0)
    assert row["loss"] == pytest.approx(-np.concatenate([r.advantages for r in rollouts]).mean(), abs=1e-5)
    assert row["clip_fraction"] == 0.0 and row["approx_kl"] == pytest.approx(0.0, abs=1e-9) and row["entropy"] > 0.1
    assert values.step(rollouts, 0)["loss"] == pytest.approx(
        0.5 * np.square(np.concatenate([r.returns for r in rollouts])).mean()
    )
    # Then both learn: the surrogate falls, the values approach the returns.
    later = [(policy.step(rollouts, step), values.step(rollouts, step)) for step in (1, 2, 3)]
    assert later[-1][0]["loss"] < row["loss"] and later[-1][1]["loss"] < later[0][1]["loss"]
    assert not policy.unmoved and not values.unmoved


def test_the_tokens_are_those_of_one_forward_an_answer(start: ModelRef) -> None:
    policy, _, rollouts = sampled(start)
    for r in rollouts:
        prompt = policy.chat.prompt_ids(r.prompt)
        ids = torch.tensor([[*prompt, *(r.response.token_ids or ())]])
        with torch.no_grad():
            logps = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert list(r.logps) == pytest.approx(logps.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist(), abs=1e-5)


def test_a_policy_that_is_not_the_one_that_sampled_stops_the_run(start: ModelRef) -> None:
    policy, _, rollouts = sampled(start)
    other = [replace(r, logps=tuple(np.subtract(r.logps, 0.1))) for r in rollouts]
    with pytest.raises(CheckFailed, match=r"log pi of a token differs by 0\.1000 nats \(at most 0\.001 expected\)"):
        policy.step(other, 0)


def test_a_small_token_budget_changes_neither_tokens_nor_gradients(start: ModelRef) -> None:
    """Rows are filled by length: what is read must come back in the order of the answers."""
    whole, _, rollouts = sampled(start)
    tight = COMPUTE.replace(tokens_per_forward=40)
    policy = Learner(start, [], objective=PolicyObjective(), config=TRAIN, compute=tight, seed=0)
    cut = rows(policy.tokenise(rollouts), 40)
    assert len(cut) > 1 and [i for row in cut for i in row] != [0, 1, 2]
    assert [len(found) for found in policy.tokens(rollouts)] == [3, 2, 6]
    for found, expected in zip(policy.tokens(rollouts), whole.tokens(rollouts), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    ours, theirs = policy.step(rollouts, 0), whole.step(rollouts, 0)
    assert ours == pytest.approx(theirs, abs=1e-5)
    for (name, found), (_, expected) in zip(policy.trained, whole.trained, strict=True):
        assert found.grad is not None and expected.grad is not None
        assert torch.allclose(found.grad, expected.grad, rtol=1e-3, atol=1e-5), name
    policy.free_gradients()
    assert all(weight.grad is None for _, weight in policy.trained)


def test_what_is_no_number_names_its_model(start: ModelRef) -> None:
    policy, values, rollouts = sampled(start)
    broken = load_model(start)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
        values.model.score.weight.fill_(float("nan"))
    with pytest.raises(CheckFailed, match=r"log-probability \[nan\] of a response to prompt 'p0' under pi_SFT is not"):
        policy.tokens(rollouts, broken, name="pi_SFT")
    with pytest.raises(CheckFailed, match=r"value \[nan\] of a response to prompt 'p0' under the model in training"):
        values.tokens(rollouts)


def test_values_over_an_adapted_policy_hold_its_base_once(start: ModelRef) -> None:
    """A language model and a classifier: the same frozen trunk is one in memory, and both learn as they would alone."""
    config = TRAIN.replace(lora=Lora(rank=2))
    policy, alone, rollouts = sampled(start, config)
    values = Learner(start, [], objective=ValueObjective(base=policy.model), config=config, compute=COMPUTE, seed=0)
    trunk = values.model.base_model.model.model
    frozen = sum(weight.numel() * 4 for weight in trunk.parameters() if not weight.requires_grad)
    assert shared_bytes(values.model, policy.model) == frozen > 50_000
    assert shared_bytes(alone.model, policy.model) == 0
    known = [weight.clone() for weight in trunk.parameters() if not weight.requires_grad]
    for step in range(3):
        policy.step(rollouts, step)
        assert values.step(rollouts, step) == alone.step(rollouts, step)
    after = [weight for weight in trunk.parameters() if not weight.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(known, after, strict=True))


REWARD = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
BETA = 0.7
OPTIMUM = (REFERENCE * (REWARD / BETA).exp()) / (REFERENCE * (REWARD / BETA).exp()).sum()


def ppo_objective(logits: Tensor, beta: float = BETA) -> Tensor:
    """The expected loss of the first minibatch of an answer of one token: pi_old is pi, enumerated."""
    logps = logits.log_softmax(0)
    old = logps.detach()
    advantage = REWARD - beta * (old - REFERENCE.log())
    return (old.exp() * policy_loss(logps, old, advantage, clip=0.2)).sum()


def rwr_objective(logits: Tensor) -> Tensor:
    """Reward-weighted likelihood of answers of the reference, tau = beta, enumerated."""
    return -(REFERENCE * (REWARD / BETA).exp() * logits.log_softmax(0)).sum()


def dpo_objective(logits: Tensor) -> Tensor:
    """DPO with exact Bradley-Terry labels on all pairs."""
    logps, known = logits.log_softmax(0), REFERENCE.log()
    a, b = torch.tensor(list(permutations(range(4), 2))).T
    pairs = PairLogps(logps[a], logps[b], known[a], known[b])
    return dpo(pairs, beta=BETA, p=torch.sigmoid(REWARD[a] - REWARD[b])).sum()


def minimised(objective: Objective, start: Tensor, rate: float, steps: int) -> Tensor:
    logits = start.clone().requires_grad_()
    for _ in range(steps):
        [gradient] = torch.autograd.grad(objective(logits), logits)
        with torch.no_grad():
            logits -= rate * gradient
    return logits.detach().softmax(0)


@pytest.mark.parametrize(
    ("objective", "rate", "steps"), [(ppo_objective, 2.0, 1000), (rwr_objective, 0.5, 400), (dpo_objective, 1.0, 200)]
)
def test_three_methods_have_one_optimum(objective: Objective, rate: float, steps: int) -> None:
    found = minimised(objective, REFERENCE.log(), rate, steps)
    assert found.tolist() == pytest.approx(OPTIMUM.tolist(), abs=1e-6)
    assert float((OPTIMUM - REFERENCE).abs().max()) > 0.3


def test_a_high_price_of_drift_keeps_the_reference() -> None:
    found = minimised(lambda logits: ppo_objective(logits, beta=1e6), REFERENCE.log(), 1e-6, 100)
    assert found.tolist() == pytest.approx(REFERENCE.tolist(), abs=1e-5)
    # And brings back a policy that has left it.
    away = minimised(lambda logits: ppo_objective(logits, beta=1e6), torch.zeros(4, dtype=torch.float64), 1e-6, 400)
    assert away.tolist() == pytest.approx(REFERENCE.tolist(), abs=1e-5)


def test_the_tabular_optimum_beats_its_neighbours() -> None:
    """E[r] - beta KL is largest at the optimum: log Z times beta."""

    def value(p: Tensor) -> float:
        return float((p * (REWARD - BETA * (p / REFERENCE).log())).sum())

    best = BETA * math.log(float((REFERENCE * (REWARD / BETA).exp()).sum()))
    assert value(OPTIMUM) == pytest.approx(best)
    assert value(REFERENCE) < best
