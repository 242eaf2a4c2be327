"""The implicit reward, and scores from a user's own function."""

import math
from pathlib import Path

import pytest

from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed, InputError
from prefloop.feedback.implicit_reward import implicit_reward
from prefloop.feedback.scorer import load_function, score_with
from prefloop.models import ModelRef, load_tokenizer
from prefloop.pairs.select import check_score_spread
from prefloop.records import Group, Prompt, Response
from prefloop.train.config import Compute
from tests.tiny import save_tiny_model

COMPUTE = Compute(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRef, ModelRef]:
    folder = tmp_path_factory.mktemp("models")
    return ModelRef.of(save_tiny_model(folder / "a", seed=1)), ModelRef.of(save_tiny_model(folder / "b", seed=2))


@pytest.fixture(scope="module")
def groups(two: tuple[ModelRef, ModelRef]) -> list[Group]:
    chat = ChatFormat(load_tokenizer(two[0]))
    return [
        Group(
            prompt=Prompt.of(f"Say something, {i}."),
            responses=tuple(chat.with_token_ids(Response(text=text)) for text in ("one", "two, maybe", "three")),
        )
        for i in range(3)
    ]


def scores(groups: list[Group]) -> list[list[float]]:
    return [[response.score or 0.0 for response in group.responses] for group in groups]


def test_d14_swapping_the_models_turns_every_sign(two: tuple[ModelRef, ModelRef], groups: list[Group]) -> None:
    a, b = two
    forward = scores(implicit_reward(groups, a, b, compute=COMPUTE))
    backward = scores(implicit_reward(groups, b, a, compute=COMPUTE))
    assert any(abs(value) > 1 for row in forward for value in row)
    for row, other in zip(forward, backward, strict=True):
        assert row == pytest.approx([-value for value in other], abs=1e-9)


def test_d13_equal_models_score_exactly_zero_and_the_run_stops(
    two: tuple[ModelRef, ModelRef], groups: list[Group]
) -> None:
    scored = implicit_reward(groups, two[0], two[0], compute=COMPUTE)
    assert {value for row in scores(scored) for value in row} == {0.0}
    with pytest.raises(CheckFailed):
        check_score_spread(scored)


def test_token_ids_and_text_pass_through_untouched(two: tuple[ModelRef, ModelRef], groups: list[Group]) -> None:
    for before, after in zip(groups, implicit_reward(groups, *two, compute=COMPUTE), strict=True):
        assert [r.token_ids for r in before.responses] == [r.token_ids for r in after.responses]
        for response in after.responses:
            assert response.policy_logp is not None and response.reference_logp is not None
            assert response.score == response.policy_logp - response.reference_logp


def length(groups: list[Group]) -> list[list[float | None]]:
    return [[float(len(response.text)) for response in group.responses] for group in groups]


def test_a_function_is_found_by_name_and_used(groups: list[Group]) -> None:
    scored = score_with(groups, load_function("tests.feedback.test_feedback:length"))
    assert scores(scored) == [[3.0, 10.0, 5.0]] * 3


def test_none_and_nan_become_failures_with_a_reason(groups: list[Group]) -> None:
    scored = score_with(groups[:1], lambda groups: [[None, math.nan, 2.0]])
    assert [(r.score, r.failure is not None) for r in scored[0].responses] == [(None, True), (None, True), (2.0, False)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("judge", "expected 'implicit_reward' or 'module:function'"),
        ("no_such_module:judge", "module 'no_such_module' cannot be imported"),
        ("math:no_such_function", "module 'math' has no function 'no_such_function'"),
        ("math:pi", "module 'math' has no function 'pi'"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_function(name)


def test_a_function_of_the_wrong_shape_is_refused(groups: list[Group]) -> None:
    with pytest.raises(InputError, match="1 rows for 3 prompts"):
        score_with(groups, lambda groups: [[1.0, 2.0, 3.0]])
    with pytest.raises(InputError, match="2 scores for the 3 responses to prompt"):
        score_with(groups, lambda groups: [[1.0, 2.0]] * 3)


def test_scores_need_no_prompt_to_be_scored_first(two: tuple[ModelRef, ModelRef], tmp_path: Path) -> None:
    assert implicit_reward([], *two, compute=COMPUTE) == []
