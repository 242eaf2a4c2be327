"""D11 and the validity rules of DICE: which responses and prompts go, and under which name they are counted."""

import pytest

from prefloop.errors import InputError
from prefloop.pairs.filters import keep_finished, keep_scored
from prefloop.records import Group, Prompt, Response
from prefloop.run import Stage
from tests.pairs.builders import group


def answers(*responses: Response) -> Group:
    return Group(prompt=Prompt.of("?", id="p"), responses=responses)


def test_lengths_are_strictly_between_the_bounds_in_code_points_of_the_stripped_text() -> None:
    texts = [" \n" + "é" * n + "  " for n in (3, 4, 9, 10)]
    stage = Stage.detached()
    [kept] = keep_finished(
        [answers(*(Response(text=text) for text in texts))], min_chars=3, max_chars=10, min_valid=2, stage=stage
    )
    assert [response.length_chars for response in kept.responses] == [4, 9]
    assert stage.counts == {
        "responses dropped: too short": 1,
        "responses dropped: too long": 1,
        "responses kept": 2,
        "prompts kept": 1,
    }


def test_the_default_bounds_are_those_of_the_released_dice_code() -> None:
    texts = ["x" * n for n in (3, 4, 6699, 6700)]
    [kept] = keep_finished([answers(*(Response(text=text) for text in texts))])
    assert [response.length_chars for response in kept.responses] == [4, 6699]


def test_an_answer_that_hit_the_token_limit_is_dropped_as_unfinished_before_its_length_counts() -> None:
    stage = Stage.detached()
    group = answers(
        Response(text="x", finish_reason="length"),
        Response(text="stopped", finish_reason="stop"),
        Response(text="from a file", finish_reason="given"),
    )
    [kept] = keep_finished([group], stage=stage)
    assert [response.text for response in kept.responses] == ["stopped", "from a file"]
    assert stage.counts["responses dropped: unfinished"] == 1
    assert "responses dropped: too short" not in stage.counts


def test_d11_responses_without_a_finite_score_are_dropped_and_counted_with_their_reason() -> None:
    stage = Stage.detached()
    scored = answers(
        Response(text="first", score=1.0),
        Response(text="none"),
        Response(text="failed", failure="judge unreadable"),
        Response(text="nan", score=float("nan")),
        Response(text="infinite", score=float("-inf")),
        Response(text="last", score=0.0),
    )
    [kept] = keep_scored([scored], stage=stage)
    assert [response.text for response in kept.responses] == ["first", "last"]
    assert stage.counts == {
        "responses dropped: no score": 3,
        "responses dropped: no score (judge unreadable)": 1,
        "responses kept": 2,
        "prompts kept": 1,
    }


@pytest.mark.parametrize("keep", [keep_finished, keep_scored])
def test_d11_prompts_with_too_few_valid_responses_are_dropped_whole_and_every_response_is_accounted_for(keep) -> None:
    invalid = Response(text="cut off", finish_reason="length")
    valid = [Response(text=f"fine {k}", score=float(k)) for k in range(8)]
    groups = [
        Group(prompt=Prompt.of("?", id="eight"), responses=(invalid, *valid)),
        Group(prompt=Prompt.of("?", id="seven"), responses=(*valid[:7], invalid)),
    ]
    stage = Stage.detached()
    kept = keep(groups, min_valid=8, stage=stage)
    assert [(g.prompt.id, len(g.responses)) for g in kept] == [("eight", 8)]
    assert stage.counts["prompts dropped: fewer than 8 valid responses"] == 1
    assert stage.counts["responses dropped: with their prompt"] == 7
    assert stage.counts["prompts kept"] == 1
    assert sum(n for reason, n in stage.counts.items() if reason.startswith("responses")) == 17


def test_keep_finished_spares_scoring_but_does_not_ask_for_scores() -> None:
    unscored = [answers(Response(text="one answer"), Response(text="two answers"))]
    assert keep_finished(unscored) == unscored


def test_kept_groups_pass_unchanged_and_without_counts_of_drops() -> None:
    groups = [group([1.0, 2.0], [5, 6])]
    stage = Stage.detached()
    assert keep_scored(keep_finished(groups), stage=stage) == groups
    assert stage.counts == {"responses kept": 2, "prompts kept": 1}


def test_bounds_that_no_answer_can_satisfy_are_refused() -> None:
    with pytest.raises(InputError, match="min_chars = 5, max_chars = 6: no length lies strictly between"):
        keep_finished([], min_chars=5, max_chars=6)
    with pytest.raises(InputError, match="min_valid = 0: should be at least 1"):
        keep_scored([], min_valid=0)
