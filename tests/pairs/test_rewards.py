"""Standardised rewards, filters and weights: the invariants of offline alignment (dossier 7.5)."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from prefloop.errors import InputError
from prefloop.pairs.filters import keep_above, keep_best
from prefloop.pairs.rewards import (
    demonstrations,
    effective_sample_size,
    reward_scale,
    scores_of,
    standardise,
    weighted,
    weights,
)
from prefloop.records import Demonstration, Group, Prompt, Response
from prefloop.run import Stage
from prefloop.train.logprobs import ResponseLogps
from prefloop.train.objective import SupervisedObjective

NORMAL = np.random.default_rng(0).normal(size=(200, 5))


def groups_of(table) -> list[Group]:
    """A prompt a row, an answer a number; the text says where it stands."""
    return [
        Group(
            prompt=Prompt.of(f"q{i}"),
            responses=tuple(Response(text=f"{i},{j}", score=float(score)) for j, score in enumerate(row)),
        )
        for i, row in enumerate(table)
    ]


def texts(groups: list[Group]) -> list[str]:
    return [response.text for group in groups for response in group.responses]


def test_standardised_rewards_have_mean_0_and_standard_deviation_1() -> None:
    groups = groups_of(1e6 + 250.0 * NORMAL)
    scale = reward_scale(groups, reward="mine")
    found = np.array(scores_of(standardise(groups, scale)))
    assert abs(found.mean()) < 1e-6 and abs(found.std(ddof=1) - 1) < 1e-6
    assert (scale.n, scale.reward) == (1000, "mine")
    # Later rewards are measured with the statistics of the training data, not with their own.
    assert scale.standardised(scale.mean + 3 * scale.std) == pytest.approx(3, abs=1e-9)


@pytest.mark.parametrize("value", [0.1, -3.0, 0.0, 1e300])
@pytest.mark.parametrize("n", [1, 3, 1000])
def test_equal_rewards_are_standardised_to_exactly_0(value: float, n: int) -> None:
    scale = reward_scale(groups_of([[value]] * n), reward="mine")
    assert scale.std == 0.0 and scale.standardised(value) == 0.0


def test_without_any_reward_there_is_nothing_to_standardise() -> None:
    with pytest.raises(InputError, match="there are no rewards"):
        reward_scale([Group(prompt=Prompt.of("q"), responses=(Response(text="a"),))], reward="mine")


def test_filtering_keeps_fewer_the_higher_the_threshold() -> None:
    groups = groups_of(NORMAL)
    thresholds = [-math.inf, -1.0, 0.0, 0.5, 1.0, math.inf]
    kept = [set(texts(keep_above(groups, threshold=c))) for c in thresholds]
    assert all(more > fewer for more, fewer in pairwise(kept))
    assert kept[0] == set(texts(groups)) and not kept[-1]
    assert kept[2] == {f"{i},{j}" for i, j in np.argwhere(NORMAL > 0)}
    # A reward that equals the threshold is not above it.
    assert texts(keep_above(groups_of([[0.0, 1.0]]), threshold=0.0)) == ["0,1"]


def test_filtering_does_not_depend_on_the_order_and_is_measured() -> None:
    groups = groups_of(NORMAL)
    stage = Stage.detached()
    kept = keep_above(groups, threshold=0.0, stage=stage)
    assert set(texts(keep_above(groups[::-1], threshold=0.0))) == set(texts(kept))
    assert stage.figures == {"share kept": (NORMAL > 0).mean()}
    assert stage.counts["responses dropped: reward at most 0"] == (NORMAL <= 0).sum()


def test_best_of_n_takes_the_first_of_equal_ones_and_all_where_n_is_1() -> None:
    assert texts(keep_best(groups_of([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0], [5.0]]))) == ["0,1", "1,0", "2,0"]
    alone = groups_of(NORMAL[:, :1])
    assert demonstrations(keep_best(alone)) == demonstrations(alone)


def test_equal_rewards_or_an_infinite_temperature_give_weights_of_exactly_1() -> None:
    assert weights([0.3] * 7, temperature=0.1, clip=20).tolist() == [1.0] * 7
    assert weights(NORMAL[0], temperature=math.inf, clip=20).tolist() == [1.0] * 5
    assert weighted(groups_of([[2.0], [2.0]]), temperature=1.0, clip=20.0) == demonstrations(groups_of([[2.0], [2.0]]))


def test_a_low_temperature_leaves_the_best_alone() -> None:
    found = weights([0.0, 1.0, 3.0, 3.0], temperature=1e-3)
    assert found.tolist() == [0.0, 0.0, 2.0, 2.0]


def test_weights_have_mean_1_do_not_see_a_constant_and_never_overflow() -> None:
    rewards = NORMAL.ravel()
    found = weights(rewards, temperature=0.5)
    assert found.mean() == pytest.approx(1, abs=1e-12)
    assert weights(rewards + 1e5, temperature=0.5) == pytest.approx(found, rel=1e-9)
    assert found[1] / found[0] == pytest.approx(math.exp((rewards[1] - rewards[0]) / 0.5), rel=1e-9)
    assert np.isfinite(weights([1e6, 0.0], temperature=1e-3)).all()


def test_a_clip_bounds_the_weight_before_the_mean_is_taken() -> None:
    stage = Stage.detached()
    items = weighted(groups_of([[0.0, 1.0, 4.0, 9.0]]), temperature=1.0, clip=20.0, stage=stage)
    plain = np.array([1.0, math.e, 20.0, 20.0])
    assert [item.weight for item in items] == pytest.approx(plain / plain.mean(), rel=1e-12)
    assert stage.counts["weights clipped"] == 2
    assert stage.figures["effective sample size"] == pytest.approx(plain.sum() ** 2 / (plain**2).sum(), rel=1e-12)


def test_the_effective_sample_size_of_normal_rewards_is_that_of_the_dossier() -> None:
    """About 0.43 N at N = 1000 and temperature 1, by theory e^-1 for N to infinity."""
    shares = [
        effective_sample_size(weights(np.random.default_rng(seed).normal(size=1000), temperature=1.0)) / 1000
        for seed in range(50)
    ]
    assert np.mean(shares) == pytest.approx(0.39, abs=0.02) and max(shares) > 0.43
    many = weights(np.random.default_rng(0).normal(size=1_000_000), temperature=1.0)
    assert effective_sample_size(many) / 1e6 == pytest.approx(math.exp(-1), abs=0.02)
    assert effective_sample_size(weights([1.0] * 8, temperature=1.0)) == 8
    assert effective_sample_size(weights([0.0, 9.0], temperature=1e-3)) == 1


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_the_optimum_is_that_of_reinforcement_learning_under_a_kl_penalty(tau: float) -> None:
    """One prompt, four answers drawn from mu = pi_ref: weighted regression ends at mu exp(r / tau) / Z, tau = beta."""
    counts, rewards = np.array([10, 20, 30, 40]), np.array([1.3, -0.4, 0.2, 0.9])
    answers = np.repeat(np.arange(4), counts)
    found = weights(rewards[answers], temperature=tau)
    items = [
        Demonstration(prompt=Prompt.of("q"), response=Response(text=str(a)), weight=w)
        for a, w in zip(answers, found, strict=True)
    ]
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    ones = torch.ones(len(items), dtype=torch.long)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logps = ResponseLogps.of(logits.log_softmax(0)[torch.as_tensor(answers)], ones)
        loss = SupervisedObjective("sequence").losses(items, logps)[0].sum() / len(items)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = counts / 100 * np.exp(rewards / tau)
    assert logits.softmax(0).tolist() == pytest.approx(expected / expected.sum(), abs=1e-6)
