"""From judgements to pairs: hard and soft labels, and everything that makes none."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from prefloop.config import Config
from prefloop.errors import InputError
from prefloop.feedback.annotator import Comparison, Judgement, abstention
from prefloop.feedback.rule import load_rule
from prefloop.feedback.stage import annotate, label
from prefloop.feedback.votes import Votes
from prefloop.progress import Advance, ignore
from prefloop.records import Group, Pair, Prompt, Response
from prefloop.run import Run, Stage

COMPARISONS = [
    Comparison(
        Prompt.of(f"Question {i}?"),
        Response(text=f"first {i}", token_ids=(1, i, 9), finish_reason="stop", sampling_logps=(-0.5, -1.0, -0.1)),
        Response(text=f"second {i}", token_ids=(2, i), finish_reason="length"),
    )
    for i in range(5)
]
JUDGEMENTS = [Judgement(p=0.8), Judgement(p=0.1), Judgement(p=0.5), abstention("malformed"), abstention("too long")]


class Watching:
    """Says what it is told to, and remembers what it was asked."""

    name = identity = "watching"

    def __init__(self, judgements: Sequence[Judgement]) -> None:
        self.judgements, self.asked = judgements, list[Comparison]()

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        self.asked += comparisons
        advance(len(comparisons))
        return list(self.judgements[: len(comparisons)])


def sides(pairs: Sequence[Pair]) -> list[tuple[str, str, float]]:
    return [(pair.chosen.text, pair.rejected.text, pair.p) for pair in pairs]


def test_hard_labels_choose_the_likelier_for_certain() -> None:
    assert sides(label(COMPARISONS, JUDGEMENTS)) == [("first 0", "second 0", 1.0), ("second 1", "first 1", 1.0)]


def test_soft_labels_keep_the_probability_of_the_chosen() -> None:
    pairs = label(COMPARISONS, JUDGEMENTS, labels="soft")
    assert sides(pairs) == [("first 0", "second 0", 0.8), ("second 1", "first 1", 0.9)]


def test_ties_and_abstentions_are_counted_by_reason_and_make_no_pair() -> None:
    stage = Stage.detached()
    annotate([*COMPARISONS, *COMPARISONS[:1]], Watching([*JUDGEMENTS, abstention("malformed")]), stage=stage)
    assert stage.counts == {
        "questions dropped: tie": 1,
        "questions dropped: abstained, malformed": 2,
        "questions dropped: abstained, too long": 1,
        "pairs made": 2,
    }


def test_identical_answers_are_never_asked_about() -> None:
    prompt, a, b = COMPARISONS[0]
    same_text = Comparison(prompt, a, a.model_copy(update={"token_ids": (7,), "text": " first 0\n"}))
    same_ids = Comparison(prompt, a, b.model_copy(update={"token_ids": a.token_ids}))
    annotator, stage = Watching([Judgement(p=0.9)]), Stage.detached()
    pairs = annotate([same_text, COMPARISONS[1], same_ids], annotator, stage=stage)
    assert annotator.asked == [COMPARISONS[1]]
    assert sides(pairs) == [("first 1", "second 1", 1.0)]
    assert stage.counts == {"questions dropped: identical answers": 2, "pairs made": 1}


def test_responses_go_into_the_pairs_untouched() -> None:
    [pair] = annotate(COMPARISONS[:1], Watching([Judgement(p=0.2)]))
    prompt, a, b = COMPARISONS[0]
    assert pair == Pair(prompt=prompt, chosen=b, rejected=a, source="generated", p=1.0)


def test_groups_of_two_are_comparisons() -> None:
    groups = [Group(prompt=prompt, responses=(a, b)) for prompt, a, b in COMPARISONS]
    assert annotate(groups, load_rule("short")) == annotate(COMPARISONS, load_rule("short"))
    three = Group(prompt=groups[0].prompt, responses=(*groups[0].responses, COMPARISONS[1].a))
    with pytest.raises(InputError, match=r"has 3 responses; an annotator compares two \(k = 2\)"):
        annotate([three], load_rule("short"))


def test_no_questions_no_pairs() -> None:
    assert annotate([], Watching([])) == []


def test_in_a_run_counts_and_agreement_are_recorded(tmp_path: Path) -> None:
    votes = Votes([load_rule("short"), load_rule("long")], quorum=2)

    def judge(stage: Stage) -> list[Pair]:
        return annotate(COMPARISONS, votes, stage=stage)

    judge.fingerprint = "judge"
    with Run.open(tmp_path / "run", recipe="test", config=Config()) as run:
        assert len(run.stage("feedback", judge)) == 0
        assert run.manifest["feedback"]["counts"] == {"questions dropped: tie": 5, "pairs made": 0}
    lines = (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for line in lines if (event := json.loads(line))["event"] == "agreement"]
    assert [(event["said"], event["share"], event["kappa"]) for event in events] == [
        ("rule:short and rule:long: 0 of 5 the same, kappa -1.00", 0.0, -1.0)
    ]
