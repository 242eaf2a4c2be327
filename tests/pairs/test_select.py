"""Selection: D3, D10, D11, D13, D14, and what a pair carries to the training round."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.errors import CheckFailed, InputError
from prefloop.pairs.length import fixed_coefficient
from prefloop.pairs.select import best_vs_worst, check_score_spread, debias_length
from prefloop.records import Group, Prompt, Response
from prefloop.run import Stage
from tests.pairs.builders import group, groups_of, length_biased, with_scores

scores_or_none = st.lists(st.none() | st.floats(-100, 100), min_size=2, max_size=8).filter(
    lambda scores: sum(score is not None for score in scores) >= 2
)


def texts(groups: list[Group]) -> list[tuple[str, str]]:
    return [(pair.chosen.text, pair.rejected.text) for pair in best_vs_worst(groups)]


def test_the_pair_is_the_highest_against_the_lowest_score_and_says_where_it_is_from() -> None:
    stage = Stage.detached()
    [made] = best_vs_worst([group([0.5, -1.0, 3.0, 2.0], [4, 5, 6, 7])], stage=stage)
    assert (made.chosen.text, made.rejected.text) == ("c" * 6, "b" * 5)
    assert (made.chosen_score, made.rejected_score) == (3.0, -1.0)
    assert (made.prompt.id, made.source, made.p, made.weight) == ("p", "generated", 1.0, 1.0)
    assert stage.counts == {"pairs made": 1}
    assert best_vs_worst([group([0.0, 1.0], [4, 5])], source="offline")[0].source == "offline"


def test_of_equal_scores_the_first_wins_and_the_first_loses() -> None:
    assert texts([group([1.0, 2.0, 2.0, 1.0], [1, 2, 3, 4])]) == [("bb", "a")]


@settings(max_examples=100, deadline=None)
@given(st.lists(scores_or_none, min_size=1, max_size=4), st.floats(0, 2))
def test_d10_the_penalised_score_of_the_chosen_is_never_below_that_of_the_rejected(rows, alpha: float) -> None:
    groups = groups_of([(scores, [3 * k + 1 for k in range(len(scores))]) for scores in rows])
    by_prompt = {g.prompt.id: g for g in groups}
    for pair in best_vs_worst(debias_length(groups, fixed_coefficient(groups, alpha))):
        responses = [r for r in by_prompt[pair.prompt.id].responses if r.score is not None]
        penalised = [r.score - alpha * r.length_chars for r in responses if r.score is not None]
        assert pair.chosen_score == pair.chosen.score == max(penalised)
        assert pair.rejected_score == pair.rejected.score == min(penalised)


def test_d11_missing_scores_are_never_selected() -> None:
    groups = groups_of([([None, 2.0, math.nan, 1.0], [1, 2, 3, 4]), ([math.inf, 0.0, 5.0, -math.inf], [1, 2, 3, 4])])
    assert texts(groups) == [("bb", "dddd"), ("ccc", "bb")]
    assert texts(debias_length(groups, fixed_coefficient(groups, 0.125))) == [("bb", "dddd"), ("ccc", "bb")]


def test_the_penalty_is_alpha_times_length_and_leaves_all_else_as_it_was() -> None:
    groups = [group([4.0, None], [8, 2])]
    scored = groups_of([([4.0, 1.0], [8, 2])])
    [after] = debias_length(groups, fixed_coefficient(scored, 0.25))
    assert [response.score for response in after.responses] == [2.0, None]
    unscored = with_scores([after], lambda *_: None)
    assert unscored == with_scores(groups, lambda *_: None)


def test_a_penalty_can_turn_the_pair_around() -> None:
    groups = [group([4.0, 2.0], [30, 10])]
    assert texts(debias_length(groups, fixed_coefficient(groups, 0.05))) == [("a" * 30, "b" * 10)]
    assert texts(debias_length(groups, fixed_coefficient(groups, 0.15))) == [("b" * 10, "a" * 30)]


def test_d14_the_score_of_b_over_a_makes_the_same_pairs_the_other_way_round() -> None:
    groups = length_biased(50, 6, seed=1)
    negated = with_scores(groups, lambda _, score: -score)
    assert texts(negated) == [(rejected, chosen) for chosen, rejected in texts(groups)]


@pytest.mark.parametrize(
    ("best", "worst"),
    [
        (Response(text="same", token_ids=(1, 2), score=2.0), Response(text="differs", token_ids=(1, 2), score=1.0)),
        (Response(text="same", token_ids=(1, 2), score=2.0), Response(text=" same\n", token_ids=(3,), score=1.0)),
        (Response(text="same", score=2.0), Response(text="same ", score=1.0)),
    ],
)
def test_a_prompt_whose_best_and_worst_are_the_same_answer_makes_no_pair(best: Response, worst: Response) -> None:
    same = Group(prompt=Prompt.of("?", id="same"), responses=(best, worst))
    stage = Stage.detached()
    made = best_vs_worst([same, group([1.0, 0.0], [2, 3])], stage=stage)
    assert [pair.prompt.id for pair in made] == ["p"]
    assert stage.counts == {"prompts dropped: best and worst are the same answer": 1, "pairs made": 1}


def test_answers_without_token_ids_that_differ_in_text_are_not_the_same() -> None:
    different = Group(
        prompt=Prompt.of("?"), responses=(Response(text="yes", score=1.0), Response(text="no", score=0.0))
    )
    assert texts([different]) == [("yes", "no")]


def test_a_prompt_whose_scores_are_all_equal_prefers_nothing_and_makes_no_pair() -> None:
    stage = Stage.detached()
    assert best_vs_worst([group([1.0, 1.0], [2, 3])], stage=stage) == []
    assert stage.counts["prompts dropped: best and worst are the same answer"] == 1


def test_the_log_probabilities_of_the_scorer_are_the_references_of_training() -> None:
    logps = {"a": -10.0, "b": -20.0, "c": -30.0}
    responses = [
        Response(text=name, score=score, policy_logp=logps[name], reference_logp=-1.0)
        for name, score in [("a", 0.0), ("b", 2.0), ("c", -2.0)]
    ]
    groups = [Group(prompt=Prompt.of("?"), responses=tuple(responses))]
    [made] = best_vs_worst(groups, reference="sha256:abc")
    assert (made.reference_logps, made.reference) == ((-20.0, -30.0), "sha256:abc")


def test_without_log_probabilities_a_pair_names_no_reference() -> None:
    half = (Response(text="yes", score=1.0, policy_logp=-1.0), Response(text="no", score=0.0))
    [made] = best_vs_worst([Group(prompt=Prompt.of("?"), responses=half)], reference="sha256:abc")
    assert (made.reference_logps, made.reference) == (None, None)


def test_no_groups_make_no_pairs_but_a_group_with_one_score_is_refused() -> None:
    assert best_vs_worst([]) == []
    with pytest.raises(InputError, match="prompt 'p': scored responses 1, but a comparison takes 2"):
        best_vs_worst([group([1.0, None], [2, 3])])


def test_d13_scores_of_a_model_against_itself_stop_the_run() -> None:
    zeros = groups_of([([0.0, 0.0, 0.0], [3, 4, 5]), ([0.0, 0.0], [3, 4])])
    with pytest.raises(CheckFailed, match=r"each of 2 prompts all score the same \(largest spread 0, .*the same model"):
        check_score_spread(zeros)
    noise = with_scores(zeros, lambda i, _: 7.0 * i)
    noise.append(group([3.0, 3.00009], [3, 4]))
    with pytest.raises(CheckFailed, match="largest spread 9e-05"):
        check_score_spread(noise)


def test_d13_one_prompt_with_a_real_difference_is_enough() -> None:
    check_score_spread(groups_of([([0.0, 0.0], [3, 4]), ([1.0, None, 1.001], [3, 4, 5])]))


def test_d13_differences_between_prompts_are_no_spread() -> None:
    with pytest.raises(CheckFailed):
        check_score_spread(groups_of([([5.0, 5.0], [3, 4]), ([-5.0, -5.0], [3, 4])]))
