"""The length-controlled regression against an independent optimiser, its symmetries, and models of known truth."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import bernoulli, norm

from prefloop.evaluate.length_control import (
    Fit,
    Floats,
    Shared,
    fit,
    learn_shared,
    length_controlled,
    length_term,
)


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def world(models: int, n: int, seed: int = 0) -> tuple[Floats, Floats, Floats, Floats]:
    """Judgements [M, N], length terms [M, N], difficulties [N] and the true length-controlled rates [M]."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0, 1.5, n)
    theta, phi = rng.normal(-1, 1, models), rng.normal(1.8, 0.2, models)
    # Where the task is easy, the answers of the models are longer beside the baseline's, as in the real data.
    ours = 1000 + 300 * difficulty + rng.normal(0, 400, (models, n)) + rng.normal(-600, 300, (models, 1))
    length = np.stack([length_term(row, np.full(n, 1000.0)) for row in ours])
    p = sigmoid(theta[:, None] + phi[:, None] * length + difficulty)
    return (rng.random((models, n)) < p).astype(float), length, difficulty, sigmoid(theta[:, None] + difficulty).mean(1)


def test_the_length_term_is_tanh_of_differences_in_their_own_deviation() -> None:
    ours, theirs = [10.0, 30.0, 20.0], [10.0, 10.0, 30.0]
    spread = np.std([0.0, 20.0, -10.0], ddof=1)
    assert length_term(ours, theirs) == pytest.approx(np.tanh(np.array([0.0, 20.0, -10.0]) / spread))
    # The limit of ever smaller spreads: answers that are all as much longer say nothing of equal length.
    assert length_term([5.0, 5.0], [4.0, 4.0]).tolist() == [1.0, 1.0]
    assert length_term([5.0], [8.0]).tolist() == [-1.0]
    assert length_term([5.0, 4.0], [5.0, 4.0]).tolist() == [0.0, 0.0]


def test_a_fit_is_the_maximum_of_the_posterior_that_is_documented() -> None:
    p, length, difficulty, _ = world(1, 120)
    soft = 0.1 + 0.8 * p[0]
    found = fit(soft, length[0], shared=Shared(difficulty, 1.7))

    def posterior(x: Floats) -> float:
        likely = sigmoid(x[0] + x[1] * length[0] + x[2] * difficulty)
        expected = soft * bernoulli.logpmf(1, likely) + (1 - soft) * bernoulli.logpmf(0, likely)
        return -expected.sum() - norm.logpdf(x, [0, 1.7, 1], [5, 0.3, 0.2]).sum()

    options = {"xatol": 1e-8, "fatol": 1e-12, "maxiter": 5000}
    reference = minimize(posterior, np.array([0.0, 1.7, 1.0]), method="Nelder-Mead", options=options).x
    assert np.array(found) == pytest.approx(reference, abs=1e-4)
    assert found.rate(difficulty) == pytest.approx(sigmoid(reference[0] + reference[2] * difficulty).mean(), abs=1e-5)


def test_weights_are_repetitions() -> None:
    p, length, _, _ = world(1, 50)
    twice = np.r_[np.arange(50), np.arange(25)]
    weight = np.where(np.arange(50) < 25, 2.0, 1.0)
    assert fit(p[0], length[0], weight=weight) == pytest.approx(fit(p[0][twice], length[0][twice]), abs=1e-5)


def test_the_other_side_has_the_other_rate() -> None:
    p, length, _, _ = world(1, 200)
    assert fit(1 - p[0], -length[0]).rate() == pytest.approx(1 - fit(p[0], length[0]).rate(), abs=1e-6)


def test_a_judge_that_sees_only_length_leaves_an_even_rate() -> None:
    rng = np.random.default_rng(3)
    length = length_term(rng.normal(300, 200, 4000), np.zeros(4000))
    p = (rng.random(4000) < sigmoid(1.5 * length)).astype(float)
    assert p.mean() > 0.65
    assert fit(p, length).rate() == pytest.approx(0.5, abs=0.05)


def test_nothing_explodes() -> None:
    n = 100
    length = np.linspace(0.9, 1.0, n)
    rare = (np.arange(n) < 3).astype(float)  # 3 % won with answers that are all longer: length or quality?
    found = fit(rare, length)
    assert abs(found.length) < 2.0 and 0.01 < found.rate() < 0.09
    assert 0.9 < fit(np.ones(n), length).rate() < 1.0
    assert fit(np.full(n, 0.5), np.zeros(n)).rate() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="leave out what was not judged"):
        fit(np.array([0.5, np.nan]), np.zeros(2))


def test_difficulties_that_other_models_share_give_the_rates_that_were_put_in() -> None:
    p, length, difficulty, truth = world(24, 400)
    shared = learn_shared(p[:20], length[:20])
    assert np.corrcoef(shared.difficulty, difficulty)[0, 1] > 0.85
    assert shared.length == pytest.approx(1.8, abs=0.2)
    own = np.array([fit(p[m], length[m], shared=shared).rate(shared.difficulty) for m in range(20, 24)])
    assert np.abs(own - truth[20:]).mean() < 0.03
    assert np.abs(p[20:].mean(axis=1) - truth[20:]).mean() > 0.1


def test_what_was_not_judged_teaches_nothing() -> None:
    p, length, _, _ = world(6, 60)
    p[2, 10:20] = np.nan
    one = learn_shared(p, length)
    length[2, 10:20] = np.nan
    other = learn_shared(p, length)
    assert other.difficulty.tolist() == one.difficulty.tolist() and other.length == one.length
    silent = learn_shared(np.vstack([p, np.full(60, np.nan)]), np.vstack([length, np.zeros(60)]))
    assert silent.difficulty == pytest.approx(one.difficulty, abs=2e-3)
    p[2, 10:20] = 1.0
    length[2, 10:20] = 0.5
    assert np.abs(learn_shared(p, length).difficulty - one.difficulty)[10:20].mean() > 0.05


def test_the_interval_of_own_prompts_knows_what_it_cannot_know() -> None:
    p, length, _, _ = world(1, 150)
    value, low, high = length_controlled(p[0], length[0], seed=1, draws=100)
    assert value == fit(p[0], length[0]).rate()
    assert low < value < high and high - low < 0.35
    assert (value, low, high) == length_controlled(p[0], length[0], seed=1, draws=100)
    # The same judgements of answers that are all longer by about as much: the win rate could all be length.
    flat = np.full(150, 0.9) + 0.01 * length[0]
    _, flat_low, flat_high = length_controlled(p[0], flat, seed=1, draws=100)
    assert flat_high - flat_low > 1.5 * (high - low)


def test_a_rate_without_difficulty_is_the_sigmoid_of_the_strength() -> None:
    assert Fit(0.0, 3.0, 0.0).rate() == 0.5
    assert Fit(np.log(3.0), 3.0, 0.0).rate() == pytest.approx(0.75)


@pytest.mark.parametrize(("n", "strength", "length"), [(20, 2.0, 0.0), (60, 0.5, 0.5), (60, -1.0, -0.5)])
def test_the_interval_at_equal_length_holds_the_truth(n: int, strength: float, length: float) -> None:
    rng, held, runs = np.random.default_rng(n), 0, 200
    for run in range(runs):
        term = length_term(rng.normal(0, 100, n), np.zeros(n))
        p = (rng.random(n) < 1 / (1 + np.exp(-strength - length * term))).astype(float)
        _, low, high = length_controlled(p, term, seed=run, draws=2)  # by the curvature: resampling only widens it
        held += low <= 1 / (1 + np.exp(-strength)) <= high
    assert 0.93 <= held / runs


def test_winning_every_time_is_not_certain_at_equal_length_either() -> None:
    _, low, high = length_controlled(np.ones(20), np.linspace(-0.9, 0.9, 20), seed=0, draws=20)
    assert low < 0.9 and high > 0.99
    # All longer by the same: length may be all there is to it.
    _, same, _ = length_controlled(np.ones(20), np.ones(20), seed=0, draws=20)
    assert same < low
