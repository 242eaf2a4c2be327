"""Annotators as scorers: a score agrees with the preference, and what only compares gives win probabilities."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefloop.feedback.annotator import Annotator, sigmoid
from prefloop.feedback.rule import RuleAnnotator, load_rule
from prefloop.feedback.scorer import ScoresResponses, score_by, scores_alone
from prefloop.records import Group, Prompt, Response
from prefloop.run import Stage
from tests.feedback.annotators import ANNOTATORS, COMPARISONS

SCALES: dict[str, Callable[[float], float]] = {
    "rule": lambda d: 0.5 if d == 0 else float(d > 0),
    "soft rule": lambda d: sigmoid(d / 0.5),
    "reward model": sigmoid,
    "implicit reward": sigmoid,
}
"""Of annotators that score one response: the preference that a difference of scores means."""


@pytest.fixture
def annotator(request: pytest.FixtureRequest, tmp_path: Path) -> Annotator:
    return ANNOTATORS[request.param](tmp_path)


@pytest.mark.parametrize(("annotator", "name"), [(name, name) for name in ANNOTATORS], indirect=["annotator"])
def test_scores_agree_with_preferences(annotator: Annotator, name: str) -> None:
    assert scores_alone(annotator) == (name in SCALES)
    groups = [Group(prompt=prompt, responses=(a, b)) for prompt, a, b in COMPARISONS]
    scored = [[response.score for response in group.responses] for group in score_by(groups, annotator)]
    judged = [judgement.p for judgement in annotator.judge(COMPARISONS)]
    for (a, b), p in zip(scored, judged, strict=True):
        assert a is not None and b is not None and p is not None
        # Of two answers, what only compares gives the preference itself.
        assert p == pytest.approx(SCALES[name](a - b) if name in SCALES else a, abs=1e-5)
        if name not in SCALES:
            assert a + b == 1.0


def test_a_score_depends_on_its_own_answer_alone(tmp_path: Path) -> None:
    for name in ("reward model", "implicit reward"):
        annotator = ANNOTATORS[name](tmp_path)
        assert isinstance(annotator, ScoresResponses)
        answers = [(prompt, response) for prompt, a, b in COMPARISONS for response in (a, b)]
        together = annotator.score(answers)
        assert annotator.score(answers[::-1]) == together[::-1]
        assert [annotator.score([answer])[0] for answer in answers] == pytest.approx(together, abs=1e-5)


def longer_wins(prompt: Prompt, a: Response, b: Response) -> float | None:
    """Has no opinion on answers to a prompt that ends with a dot."""
    if prompt.messages[-1].content.endswith("."):
        return None
    return 0.5 if a.length_chars == b.length_chars else float(a.length_chars > b.length_chars)


def test_the_win_probability_is_the_mean_over_the_other_answers() -> None:
    def group(prompt: str, *texts: str) -> Group:
        return Group(prompt=Prompt.of(prompt), responses=tuple(Response(text=text) for text in texts))

    stage = Stage.detached()
    groups = [group("a?", "x", "xxx", "xx", "yy"), group("b?", "alone"), group("c.", "x", "xx")]
    scored = score_by(groups, RuleAnnotator(longer_wins, "longer"), stage=stage)
    assert [response.score for response in scored[0].responses] == pytest.approx([0, 1, 0.5, 0.5])
    assert [response.score for response in scored[1].responses + scored[2].responses] == [None] * 3
    assert scored[1].responses[0].failure == "the annotator only compares two answers, and the prompt has no other"
    assert [response.failure for response in scored[2].responses] == ["the rule gave no answer"] * 2
    assert stage.counts["answers scored"] == 4
    assert sum(n for reason, n in stage.counts.items() if reason.startswith("answers without a score")) == 3


def test_a_rule_without_an_answer_gives_no_score() -> None:
    scored = score_by([Group(prompt=Prompt.of("Hi"), responses=(Response(text="x"),))], load_rule("format"))
    assert (scored[0].responses[0].score, scored[0].responses[0].failure) == (None, "the rule gave no answer")
