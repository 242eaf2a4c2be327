"""Scores of single responses by annotators: the same numbers that their preferences are made of."""

from pathlib import Path

import pytest

from prefloop.errors import InputError
from prefloop.feedback.annotator import sigmoid
from prefloop.feedback.scorer import require_scores, score_by
from prefloop.records import Group, Prompt, Response
from tests.feedback.annotators import ANNOTATORS, COMPARISONS

GROUPS = [Group(prompt=prompt, responses=(a, b)) for prompt, a, b in COMPARISONS]


@pytest.mark.parametrize(("name", "scale"), [("soft rule", 0.5), ("reward model", 1.0), ("implicit reward", 1.0)])
def test_a_preference_is_the_sigmoid_of_the_scores_difference(name: str, scale: float, tmp_path: Path) -> None:
    annotator = require_scores(ANNOTATORS[name](tmp_path), why="")
    scored = score_by(GROUPS, annotator)
    judged = annotator.judge(COMPARISONS)
    for group, judgement in zip(scored, judged, strict=True):
        a, b = (response.score or 0.0 for response in group.responses)
        assert judgement.p == pytest.approx(sigmoid((a - b) / scale), abs=1e-5)


@pytest.mark.parametrize("name", ["reward model", "implicit reward"])
def test_what_cannot_be_scored_has_no_score_and_the_others_keep_theirs(name: str, tmp_path: Path) -> None:
    annotator = require_scores(ANNOTATORS[name](tmp_path), why="")
    prompt, a, _ = COMPARISONS[0]
    three = Group(prompt=prompt, responses=(a, Response(text="x" * 1100), a))
    [[first, none, last]] = annotator.scores([three])
    [[alone]] = annotator.scores([Group(prompt=prompt, responses=(a,))])
    assert none is None and first == last == pytest.approx(alone)
    assert annotator.scores([]) == []
    [scored] = score_by([three], annotator)
    assert scored.responses[1].failure == "the scorer gave none"


@pytest.mark.parametrize("name", ["pair rule", "file", "votes"])
def test_who_only_compares_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only says which of two answers is preferred; because"):
        require_scores(ANNOTATORS[name](tmp_path), why="because")


def test_a_rule_scores_with_its_function(tmp_path: Path) -> None:
    rule = require_scores(ANNOTATORS["rule"](tmp_path), why="")
    assert rule.scores([Group(prompt=Prompt.of("?"), responses=(Response(text="abc"), Response(text="")))]) == [[-3, 0]]
