"""Candidates among which alpha is chosen: their figures, and what the guard refuses."""

import math
from typing import Any

import pytest

from prefloop.evaluate.candidate import Candidate, Guard, candidate, refusal
from prefloop.evaluate.win_rate import WinRate
from prefloop.feedback.annotator import Judgement
from prefloop.records import Group, Prompt, Response


def group(i: int, text: str, finish_reason: Any = "stop", score: float | None = None) -> Group:
    ids = tuple(range(len(text.split())))
    response = Response(text=text, token_ids=ids, finish_reason=finish_reason, score=score)
    return Group(prompt=Prompt.of(f"{i}?", id=f"p{i}"), responses=(response,))


ANSWERS = [group(0, "a b c d a b c d"), group(1, "one two", "length")]


def test_the_figures_are_those_of_the_answers() -> None:
    found = candidate(0.5, ANSWERS, [[-4.0], [-1.0]], [Judgement(p=1.0), Judgement(p=0.5)])
    assert (found.alpha, found.answers, found.finished, found.judged) == (0.5, 2, 0.5, 2)
    assert found.length_tokens and found.perplexity and found.repetition and found.rate and found.length_chars
    assert found.length_tokens[0] == 5.0 and found.length_chars[0] == 11.0
    assert found.perplexity[0] == pytest.approx(math.exp(5 / 10))  # five nats on ten tokens
    assert found.repetition[0] == pytest.approx(0.1)  # one of five runs of four, and none of none
    assert found.distinct_1 == pytest.approx(6 / 10) and found.distinct_2 == pytest.approx(5 / 8)
    assert found.rate[0] == 0.75


def test_scores_count_by_their_mean_and_missing_ones_not_at_all() -> None:
    scored = [group(0, "a", score=2.0), group(1, "b", score=4.0), group(2, "c")]
    found = candidate(1.0, scored, [[-1.0]] * 3, scored)
    assert found.preferred is None and found.judged == 2
    assert found.rate and found.rate[0] == 3.0


def figures(**changes: Any) -> Candidate:
    known = {
        "alpha": 1.0,
        "answers": 10,
        "preferred": WinRate(rate=(0.9, 0.8, 1.0), judged=10, wins=9, losses=1, ties=0, abstained=0),
        "length_tokens": (100.0, 90.0, 110.0),
        "finished": 0.9,
        "repetition": (0.05, 0.0, 0.1),
        "distinct_2": 0.8,
        "perplexity": (2.0, 1.8, 2.2),
    }
    return Candidate.model_validate({**known, **changes})


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, None),
        ({"length_tokens": (200.0, 0, 0)}, None),
        ({"length_tokens": (201.0, 0, 0)}, "answers are 2.01 times as long"),
        ({"length_tokens": (49.0, 0, 0)}, "answers are 0.49 times as long"),
        ({"finished": 0.71}, None),
        ({"finished": 0.69}, "0.69 of the answers finish, 0.90 at alpha = 0"),
        ({"repetition": (0.14, 0, 0)}, None),
        ({"repetition": (0.16, 0, 0)}, "0.16 of runs of four words are repeated, 0.05 at alpha = 0"),
        ({"distinct_2": 0.41}, None),
        ({"distinct_2": 0.39}, "0.39 of pairs of words are different, 0.80 at alpha = 0"),
        ({"perplexity": (4.0, 0, 0)}, None),
        ({"perplexity": (4.1, 0, 0)}, "perplexity under the aligned model is 2.05 times as high"),
        (
            {"preferred": WinRate(rate=(1.0, 0.4, 1.0), judged=4, wins=4, ties=0, abstained=6)},
            "only 4 of 10 answers were judged",
        ),
    ],
)
def test_the_guard_refuses_what_is_beyond_each_limit(changes: dict[str, Any], refused: str | None) -> None:
    assert refusal(figures(**changes), figures(alpha=0.0), Guard()) == refused


def test_a_candidate_without_answers_keeps_its_reason() -> None:
    assert refusal(Candidate(alpha=9.0, answers=0, refused="broken"), figures(alpha=0.0), Guard()) == "broken"
