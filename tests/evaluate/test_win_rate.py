"""Win rates: closed forms, a simulation of how often the intervals hold the truth, and what is counted apart."""

import numpy as np
import pytest
from scipy.stats import binom

from prefloop.evaluate.win_rate import bootstrap_interval, head_to_head, prompts_needed, sign_test, win_rate
from prefloop.feedback.annotator import Comparison, Judgement, abstention, average
from prefloop.records import Prompt, Response


def judged(*ps: float | None) -> list[Judgement]:
    return [abstention("no answer") if p is None else Judgement(p=p) for p in ps]


def simulated(rng: np.random.Generator, runs: int, n: int, *, wins: float, follows: float) -> tuple[np.ndarray, ...]:
    """P(first slot) [runs, n] with our answer first and second, of a judge that in a share `follows` of its answers
    only looks at the slot, and prefers the first.
    """
    better = rng.random((runs, n)) < wins
    first = np.where(rng.random((runs, n)) < follows, 1.0, better)
    second = np.where(rng.random((runs, n)) < follows, 1.0, ~better)
    return first, second


@pytest.mark.parametrize(("wins", "n"), [(0.5, 120), (0.7, 200), (0.9, 200)])
def test_the_interval_holds_the_truth_95_times_in_100(wins: float, n: int) -> None:
    follows, runs = 0.3, 1000
    first, second = simulated(np.random.default_rng(int(100 * wins)), runs, n, wins=wins, follows=follows)
    truth = follows * 0.5 + (1 - follows) * wins  # the slot counts for both sides alike

    def coverage(p: np.ndarray) -> float:
        low, high = bootstrap_interval(p, seed=1)
        return float(((low <= truth) & (truth <= high)).mean())

    assert 0.93 <= coverage((first + 1 - second) / 2) <= 0.97
    assert coverage(first) < 0.5  # one order alone is as far off as the judge follows the slot


def test_the_simulation_judges_as_annotators_do() -> None:
    first, second = simulated(np.random.default_rng(0), 1, 50, wins=0.6, follows=0.4)
    both = [average(Judgement(p=q), Judgement(p=r)).p for q, r in zip(first[0], second[0], strict=True)]
    assert both == ((first + 1 - second) / 2)[0].tolist()


def test_a_bootstrap_interval_is_about_196_standard_errors_wide() -> None:
    values = np.random.default_rng(5).random(400)
    low, high = bootstrap_interval(values, seed=2, draws=5_000)
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error)
    again = bootstrap_interval(np.stack([values, 1 - values]), seed=2, draws=5_000)
    assert again[0][0] == pytest.approx(low) and again[1][1] == pytest.approx(1 - low)


def test_winning_every_time_is_not_certainty() -> None:
    low, high = bootstrap_interval(np.array([[1.0] * 10, [0.0] * 10, [0.5] * 10]), seed=0)
    assert low == pytest.approx([0.7225, 0.0, 0.2366], abs=1e-4)
    assert high == pytest.approx([1.0, 0.2775, 0.7634], abs=1e-4)


def test_no_number_of_prompts_is_named_where_none_can_be_known() -> None:
    assert prompts_needed(np.array([1.0, 1.0, 1.0])) is None  # how they would spread is not known
    assert prompts_needed(np.array([0.1, 0.9, 0.3, 0.7])) is None  # one half, but for rounding
    assert prompts_needed(np.array([0.7])) is None


def test_the_sign_test_is_exact() -> None:
    assert sign_test(8, 2) == pytest.approx(2 * binom.cdf(2, 10, 0.5))
    assert sign_test(2, 8) == sign_test(8, 2)
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 0) is None


def test_prompts_needed_tell_the_difference_four_times_in_five() -> None:
    rng = np.random.default_rng(7)
    n = prompts_needed((np.arange(1000) < 560).astype(float))
    assert n is not None
    samples = (rng.random((2000, n)) < 0.56).astype(float)
    low, _ = bootstrap_interval(samples, seed=3, draws=500)
    assert (low > 0.5).mean() == pytest.approx(0.8, abs=0.04)
    assert prompts_needed(np.array([0.0, 1.0])) is None
    assert prompts_needed(np.array([1.0])) is None


def test_ties_and_abstentions_are_apart() -> None:
    found = win_rate(judged(1.0, 0.8, 0.5, 0.5, 0.2, None))
    assert (found.judged, found.wins, found.losses, found.ties, found.abstained) == (5, 2, 1, 2, 1)
    assert found.rate and found.rate[0] == pytest.approx(0.6)
    assert found.sign_test == 1.0
    nothing = win_rate(judged(None, None))
    assert (nothing.rate, nothing.judged, nothing.abstained, nothing.sign_test) == (None, 0, 2, None)


def test_head_to_head_by_category() -> None:
    def question(i: int, category: str | None) -> Comparison:
        ours, theirs = Response(text="x" * (10 + i)), Response(text="y" * 10)
        return Comparison(Prompt.of(f"{category} {i}", category=category), ours, theirs)

    questions = [question(i, "code" if i < 4 else "maths") for i in range(10)]
    judgements = judged(1, 1, 0, 0, 0, 0, 0, 0, 0.5, None)
    found = head_to_head(questions, judgements, seed=0)
    assert list(found.categories) == ["maths", "code"]
    rates = {name: part.rate[0] for name, part in found.categories.items() if part.rate}
    assert rates == pytest.approx({"maths": 0.1, "code": 0.5})
    assert found.overall.rate and found.overall.rate[0] == pytest.approx(2.5 / 9)
    assert found.length_chars == (14.0, 10.0)  # of the nine that were judged
    assert found.abstentions == {"no answer": 1}
    assert found.length_controlled and found.length_controlled[1] < found.length_controlled[0]
    assert head_to_head([question(1, None)], judged(1), seed=0).categories == {}
    assert head_to_head([question(1, None)], judged(None), seed=0).length_controlled is None
