"""The implicit reward as annotator: the scoring stage's numbers, and what it refuses."""

from pathlib import Path

import pytest

from prefloop.errors import InputError
from prefloop.feedback.annotator import Comparison, sigmoid
from prefloop.feedback.implicit_reward import ImplicitReward, implicit_reward
from prefloop.models import ModelRef
from prefloop.records import Group, Prompt, Response
from tests.feedback.annotators import COMPARISONS, COMPUTE
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRef, ModelRef]:
    folder = tmp_path_factory.mktemp("models")
    return ModelRef.of(save_tiny_model(folder / "a", seed=1)), ModelRef.of(save_tiny_model(folder / "b", seed=2))


@pytest.mark.parametrize("beta", [0.1, 0.01])
def test_it_is_the_sigmoid_of_beta_times_the_difference_of_scores(two: tuple[ModelRef, ModelRef], beta: float) -> None:
    groups = [Group(prompt=prompt, responses=(a, b)) for prompt, a, b in COMPARISONS]
    scores = [
        [response.score or 0.0 for response in group.responses]
        for group in implicit_reward(groups, *two, compute=COMPUTE)
    ]
    judged = ImplicitReward(*two, beta=beta, compute=COMPUTE).judge(COMPARISONS)
    expected = [sigmoid(beta * (a - b)) for a, b in scores]
    assert [judgement.p for judgement in judged] == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.01


def test_sampled_ids_are_what_is_scored(two: tuple[ModelRef, ModelRef]) -> None:
    annotator = ImplicitReward(*two, beta=0.1, compute=COMPUTE)
    prompt, a, b = COMPARISONS[0]
    ids = annotator.chat.with_token_ids(a).token_ids or ()
    cut = a.model_copy(update={"token_ids": ids[:-1]})  # the same text without the end token
    judgements = annotator.judge([Comparison(prompt, a, b), Comparison(prompt, cut, b)])
    assert judgements[0].p != judgements[1].p


def test_ids_of_another_tokenizer_are_not_read_as_words_of_this_one(two: tuple[ModelRef, ModelRef]) -> None:
    """A policy with another vocabulary sampled them: its ids may lie within this one's and say something else."""
    annotator = ImplicitReward(*two, beta=0.1, compute=COMPUTE)
    prompt, a, _ = COMPARISONS[0]
    of_text = annotator.score([(prompt, a)])
    for foreign in ((65, 66, 67), (10**6,)):
        assert annotator.score([(prompt, a.model_copy(update={"token_ids": foreign}))]) == of_text


def test_equal_models_are_refused(two: tuple[ModelRef, ModelRef]) -> None:
    with pytest.raises(InputError, match="have the same weights"):
        ImplicitReward(two[0], two[0], beta=0.1, compute=COMPUTE)


def test_swapping_the_models_flips_every_preference(two: tuple[ModelRef, ModelRef]) -> None:
    forward = ImplicitReward(*two, beta=0.1, compute=COMPUTE).judge(COMPARISONS)
    backward = ImplicitReward(*two[::-1], beta=0.1, compute=COMPUTE).judge(COMPARISONS)
    assert [j.p for j in backward] == pytest.approx([1 - (j.p or 0) for j in forward], abs=1e-6)


def test_what_cannot_be_scored_is_an_abstention(two: tuple[ModelRef, ModelRef], tmp_path: Path) -> None:
    annotator = ImplicitReward(*two, beta=0.1, compute=COMPUTE)
    long = Comparison(Prompt.of("Hi"), Response(text="x" * 1100), Response(text="y"))
    empty = Comparison(Prompt.of("Hi"), Response(text="", finish_reason="length"), Response(text="y"))
    judged = annotator.judge([long, *COMPARISONS, empty, empty.swapped])
    assert judged[0].reason == "longer than the models' context of 1024 tokens"
    assert [j.reason for j in judged[6:]] == ["an answer without tokens"] * 2
    assert all(j.p is not None for j in judged[1:6])
