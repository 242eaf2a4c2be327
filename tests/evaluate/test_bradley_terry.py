"""Bradley-Terry scores: the closed form of two models with ties, models that are known, and what cannot be compared."""

from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit, logit

from prefloop.evaluate.bradley_terry import bradley_terry, scores
from prefloop.evaluate.win_rate import bootstrap_interval

TWO = [(0, 1)]


def test_two_models_with_ties_have_the_logit_of_their_win_rate_between_them() -> None:
    # 60 won, 30 lost, 10 tied: a tie is half a win of each.
    found = bradley_terry(TWO, np.array([0.65]), np.array([100.0]), 2)
    assert found.sum() == pytest.approx(0, abs=1e-6)
    assert found[0] - found[1] == pytest.approx(logit(0.65), abs=1e-3)
    # Exactly, with a prior of N(0, 5^2) on both scores: n (p - sigmoid(d)) = d / 50.
    for n, p in ((100, 0.65), (4, 0.8125), (3, 1.0)):
        exact = brentq(lambda d, n=n, p=p: n * (p - expit(d)) - d / 50, -20, 20)
        found = bradley_terry(TWO, np.array([p]), np.array([float(n)]), 2)
        assert found[0] - found[1] == pytest.approx(exact, abs=1e-4)


def test_scores_of_models_that_follow_the_model_are_found() -> None:
    truth = np.array([1.2, 0.1, -0.3, -1.0])
    pairs = list(combinations(range(4), 2))
    p = np.array([expit(truth[i] - truth[j]) for i, j in pairs])
    assert bradley_terry(pairs, p, np.full(6, 1e6), 4) == pytest.approx(truth - truth.mean(), abs=1e-4)
    # Also where some two have never met, in any order of the models of a pair.
    met = [(1, 0), (1, 2), (3, 2)]
    p = np.array([expit(truth[i] - truth[j]) for i, j in met])
    assert bradley_terry(met, p, np.full(3, 1e6), 4) == pytest.approx(truth - truth.mean(), abs=1e-4)


def test_the_interval_of_two_models_is_that_of_their_win_rate() -> None:
    values = np.random.default_rng(0).choice([0.0, 0.5, 1.0], p=[0.25, 0.15, 0.6], size=400)
    found = scores(TWO, values[:, None], np.ones((400, 1)), 2, seed=0)
    assert found
    low, high = bootstrap_interval(values, seed=0)
    expected = [logit(rate) / 2 for rate in (values.mean(), low, high)]
    assert found[0] == pytest.approx(expected, abs=0.02)
    assert found[1] == pytest.approx([-expected[0], -expected[2], -expected[1]], abs=0.02)


def test_winning_every_time_is_not_certainty() -> None:
    found = scores(TWO, np.ones((6, 1)), np.ones((6, 1)), 2, seed=0, draws=20)
    assert found
    value, low, _ = found[0]
    # By hand: the difference d has precision 6 q (1 - q) + 1 / 50 at its maximum, and a score is half of it.
    q = expit(2 * value)
    assert low == pytest.approx(value - 1.959964 / 2 / (6 * q * (1 - q) + 1 / 50) ** 0.5, abs=1e-3)


def test_models_that_votes_do_not_connect_have_no_scores() -> None:
    pairs = list(combinations(range(4), 2))
    judged = np.zeros((3, 6))
    judged[:, pairs.index((0, 1))] = 1
    judged[:, pairs.index((2, 3))] = 1
    assert scores(pairs, judged / 2, judged, 4, seed=0) is None
    judged[0, pairs.index((1, 2))] = 1
    found = scores(pairs, judged / 2, judged, 4, seed=0, draws=20)
    assert found and [score[0] for score in found] == pytest.approx([0] * 4, abs=1e-6)
