"""Votes: means, weights, quorum, and how far members agree."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.errors import BudgetReached, InputError
from prefloop.feedback.annotator import Comparison, Judgement, abstention
from prefloop.feedback.votes import Agreement, Votes
from prefloop.progress import Advance, ignore
from tests.feedback.annotators import COMPARISONS


class Says:
    """An annotator with a list of answers; None is an abstention."""

    def __init__(self, *ps: float | None, name: str = "says") -> None:
        self.ps, self.name, self.identity = ps, name, f"says {ps}"

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        advance(len(comparisons))
        return [abstention("no idea") if p is None else Judgement(p=p) for p in self.ps[: len(comparisons)]]


class Poor:
    name = identity = "poor"

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        raise BudgetReached("no money")


def ps(votes: Votes, n: int) -> list[float | None]:
    return [judgement.p for judgement in votes.judge(COMPARISONS[:n])]


def test_the_mean_of_those_that_answer() -> None:
    votes = Votes([Says(1.0, 1.0, 0.5), Says(0.0, None, 0.9), Says(0.7, None, 0.5)])
    assert ps(votes, 3) == pytest.approx([(1.0 + 0.0 + 0.7) / 3, 1.0, (0.5 + 0.9 + 0.5) / 3])


def test_weights_count_among_those_that_answer() -> None:
    votes = Votes([Says(1.0, 1.0), Says(0.0, None), Says(0.5, 0.0)], weights=(2, 1, 1))
    assert ps(votes, 2) == pytest.approx([(2 + 0 + 0.5) / 4, 2 / 3])


def test_fewer_answers_than_the_quorum_are_an_abstention() -> None:
    members = [Says(1.0, 1.0, None), Says(0.0, None, None), Says(1.0, None, None)]
    judged = Votes(members, quorum=2).judge(COMPARISONS[:3])
    assert [judgement.p for judgement in judged] == [pytest.approx(2 / 3), None, None]
    assert {j.reason for j in judged[1:]} == {"fewer than 2 of 3 annotators answered"}
    assert ps(Votes(members), 3)[1:] == [1.0, None]


def test_votes_that_cancel_are_a_tie() -> None:
    assert ps(Votes([Says(1.0), Says(0.0)]), 1) == [0.5]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 100)), min_size=1, max_size=5))
def test_swapped_votes_sum_to_exactly_one(cast: list[tuple[float, float]]) -> None:
    straight = [max(p, 1 - p) if p > 0.5 else 1 - max(p, 1 - p) for p, _ in cast]  # p and 1 - p are both exact
    weights = [weight for _, weight in cast]
    [p] = ps(Votes([Says(p) for p in straight], weights=weights), 1)
    [q] = ps(Votes([Says(1 - p) for p in straight], weights=weights), 1)
    assert p is not None and q is not None and p + q == 1.0
    assert min(straight) - 1e-12 <= p <= max(straight) + 1e-12


def test_agreement_is_counted_where_both_have_judged() -> None:
    votes = Votes([Says(1.0, 0.9, 0.2, None, 0.5, name="x"), Says(0.6, 0.1, 0.0, 1.0, 0.5, name="y")])
    votes.judge(COMPARISONS)
    [agreement] = votes.agreements
    assert (agreement.n, agreement.same, agreement.share) == (4, 3, 0.75)
    chance = 0.75 * 0.75 / 2 + 0.25 * 0.25
    assert agreement.kappa == pytest.approx((0.75 - chance) / (1 - chance))
    assert agreement.describe() == "x and y: 3 of 4 the same, kappa 0.62"


def test_kappa_of_annotators_that_never_tie() -> None:
    for answers, kappa in (((1, 0, 1, 0), 1.0), ((0, 1, 0, 1), -1.0), ((1, 0, 0, 1), 0.0)):
        votes = Votes([Says(1, 0, 1, 0), Says(*answers)])
        votes.judge(COMPARISONS[:4])
        assert votes.agreements[0].kappa == kappa


def test_agreement_does_not_depend_on_which_answer_is_called_a() -> None:
    first, second = (0.9, 0.8, 0.7, 0.5, 0.6), (0.7, 0.2, 0.9, 0.9, 0.5)
    straight, swapped = (
        Votes([Says(*first), Says(*second)]),
        Votes([Says(0.1, 0.2, 0.7, 0.5, 0.4), Says(0.3, 0.8, 0.9, 0.9, 0.5)]),
    )
    straight.judge(COMPARISONS)
    swapped.judge(COMPARISONS)
    assert straight.agreements == swapped.agreements


def test_agreements_are_of_every_two_and_add_up() -> None:
    votes = Votes([Says(1.0, name="x"), Says(1.0, name="y"), Says(0.0, name="z")])
    for _ in range(3):
        votes.judge(COMPARISONS[:1])
    assert [(a.first, a.second, a.n, a.same) for a in votes.agreements] == [
        ("x", "y", 3, 3),
        ("x", "z", 3, 0),
        ("y", "z", 3, 0),
    ]


def test_of_nothing_there_is_no_agreement() -> None:
    nothing, ties = Agreement("x", "y"), Agreement("x", "y")
    ties.add(Judgement(p=0.5), Judgement(p=0.5))
    assert (nothing.share, nothing.kappa) == (None, None)
    assert (ties.share, ties.kappa) == (1.0, None)
    assert ties.describe() == "x and y: 1 of 1 the same, kappa none"


def test_a_budget_that_is_used_up_stops_the_vote() -> None:
    with pytest.raises(BudgetReached):
        Votes([Says(1.0), Poor()]).judge(COMPARISONS[:1])


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), (1, 0), (1, -1), (1, float("inf"))])
def test_weights_that_do_not_fit_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="expected 2 numbers over 0, one per annotator"):
        Votes([Says(1.0), Says(0.0)], weights=weights)


@pytest.mark.parametrize("quorum", [0, 3])
def test_a_quorum_that_does_not_fit_is_refused(quorum: int) -> None:
    with pytest.raises(InputError, match=f"quorum = {quorum}: expected 1 to 2"):
        Votes([Says(1.0), Says(0.0)], quorum=quorum)
