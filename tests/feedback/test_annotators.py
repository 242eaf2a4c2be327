"""What the `Annotator` docstring promises, on every annotator in the table; and the arithmetic of both orders."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.feedback.annotator import Annotator, Comparison, Judgement, abstention, average, in_both_orders, sigmoid
from prefloop.feedback.rule import RuleAnnotator
from prefloop.feedback.stage import annotate
from tests.feedback.annotators import ANNOTATORS, COMPARISONS, SAME_TEXT, likes_the_first_slot

probabilities = st.floats(0, 1)


@pytest.fixture(scope="module", params=list(ANNOTATORS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def annotator(name: str, tmp_path_factory: pytest.TempPathFactory) -> Annotator:
    return ANNOTATORS[name](tmp_path_factory.mktemp("annotator"))


def decided(judgements: list[Judgement]) -> list[float]:
    return [judgement.p for judgement in judgements if judgement.p is not None]


def test_it_judges_and_not_always_for_the_same_slot(annotator: Annotator) -> None:
    ps = decided(annotator.judge(COMPARISONS))
    assert len(ps) == len(COMPARISONS)
    assert min(ps) < 0.5 < max(ps)


def test_swapped_answers_flip_the_judgement_and_nothing_else(annotator: Annotator) -> None:
    straight = annotator.judge(COMPARISONS)
    swapped = annotator.judge([comparison.swapped for comparison in COMPARISONS])
    assert swapped == [judgement.swapped for judgement in straight]
    assert [p + q for p, q in zip(decided(straight), decided(swapped), strict=True)] == [1.0] * len(COMPARISONS)


def test_swapped_answers_make_the_same_pairs(annotator: Annotator) -> None:
    pairs = annotate(COMPARISONS, annotator, labels="soft")
    assert len(pairs) >= 3
    assert annotate([comparison.swapped for comparison in COMPARISONS], annotator, labels="soft") == pairs


def test_the_order_of_comparisons_does_not_matter(annotator: Annotator) -> None:
    asked = [*COMPARISONS, SAME_TEXT, COMPARISONS[0], COMPARISONS[1].swapped]
    answers = annotator.judge(asked)
    order = random.Random(0).sample(range(len(asked)), len(asked))
    assert annotator.judge([asked[i] for i in order]) == [answers[i] for i in order]


def test_a_judgement_depends_on_its_own_comparison_alone(annotator: Annotator) -> None:
    together = decided(annotator.judge(COMPARISONS))
    alone = [p for comparison in COMPARISONS for p in decided(annotator.judge([comparison]))]
    assert alone == pytest.approx(together, abs=1e-6)


def test_o8_the_same_text_twice_is_a_tie(annotator: Annotator) -> None:
    assert [j.p for j in annotator.judge([SAME_TEXT, SAME_TEXT.swapped])] == [0.5, 0.5]


def test_every_comparison_is_reported_once(annotator: Annotator) -> None:
    finished: list[int] = []
    annotator.judge([*COMPARISONS, SAME_TEXT], advance=lambda n=1: finished.append(n))
    assert sum(finished) == 6


def test_no_comparisons_no_judgements(annotator: Annotator) -> None:
    assert annotator.judge([]) == []


def test_identities_are_equal_exactly_when_the_judgements_are(
    name: str, annotator: Annotator, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert ANNOTATORS[name](tmp_path_factory.mktemp("again")).identity == annotator.identity
    others = [ANNOTATORS[other](tmp_path_factory.mktemp("other")) for other in ANNOTATORS if other != name]
    assert annotator.identity not in [other.identity for other in others]


@given(probabilities, probabilities)
def test_o4_both_orders_sum_to_exactly_one(q_ab: float, q_ba: float) -> None:
    ab, ba = Judgement(p=q_ab), Judgement(p=q_ba)
    p, q = average(ab, ba).p, average(ba, ab).p
    assert p is not None and q is not None
    assert p + q == 1.0 and p == 1.0 - q
    assert p == pytest.approx((q_ab + 1 - q_ba) / 2)


@given(probabilities)
def test_o5_what_only_looks_at_the_slot_has_exactly_one_half(bias: float) -> None:
    def ask(orders: list[Comparison]) -> list[Judgement]:
        return [Judgement(p=bias) for _ in orders]

    judgements = in_both_orders(ask, COMPARISONS)
    assert [judgement.p for judgement in judgements] == [0.5] * len(COMPARISONS)
    assert {(judgement.q_ab, judgement.q_ba) for judgement in judgements} == {(bias, bias)}


def test_o5_as_a_rule_it_makes_no_pair() -> None:
    slot = RuleAnnotator(likes_the_first_slot, "slot")
    assert {judgement.p for judgement in slot.judge(COMPARISONS)} == {0.5}
    assert annotate(COMPARISONS, slot) == []


def test_o6_the_worked_case() -> None:
    assert average(Judgement(p=0.70), Judgement(p=0.60)) == Judgement(p=0.55, q_ab=0.70, q_ba=0.60)


def test_an_abstention_of_one_order_is_one_of_the_pair() -> None:
    answered = Judgement(p=0.7)
    assert average(answered, abstention("no")) == Judgement(reason="no", q_ab=0.7)
    assert average(abstention("no"), answered) == Judgement(reason="no", q_ba=0.7)
    both = average(abstention("unclear"), abstention("no"))
    assert both == average(abstention("no"), abstention("unclear")) == abstention("no")


def test_a_judgement_has_p_or_a_reason() -> None:
    for fields in ({}, {"p": 0.5, "reason": "no"}):
        with pytest.raises(ValueError, match="either p or the reason"):
            Judgement.model_validate(fields)


@given(st.floats(-800, 800))
def test_sigmoids_of_both_signs_sum_to_exactly_one(x: float) -> None:
    assert sigmoid(x) + sigmoid(-x) == 1.0
    assert sigmoid(abs(x)) >= 0.5
