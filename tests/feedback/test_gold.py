"""`prefloop judge check`: figures against gold labels, worked by hand, and on a judge behind a server."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from prefloop.errors import BudgetReached, InputError
from prefloop.feedback.annotator import Comparison, Judgement, abstention
from prefloop.feedback.gold import JudgeReport, Question, check_judge, compare, estimate_check, gold_questions
from prefloop.feedback.meter import Meter, Price, Prices
from prefloop.feedback.rule import RuleAnnotator, load_rule
from prefloop.records import Prompt, Response
from tests.feedback.annotators import likes_the_first_slot
from tests.feedback.judge_server import JudgeServer, judge_of


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    """Forty pairs, in thirty of which the gold answer is the longer one."""
    file = tmp_path / "gold.jsonl"
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"{i} " + "long " * 9, "rejected": f"{i} short"} for i in range(30)
    ] + [{"prompt": f"Question {i}?", "chosen": f"{i} short", "rejected": f"{i} " + "long " * 9} for i in range(30, 40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def question(length_a: int, length_b: int, sign: int) -> Question:
    return Question(Comparison(Prompt.of("?"), Response(text="a" * length_a), Response(text="b" * length_b)), sign)


def test_the_figures_by_hand() -> None:
    questions = [
        question(30, 10, 1), question(30, 10, -1), question(10, 30, 1), question(20, 20, 1), question(5, 5, -1),
        question(9, 1, 1), question(9, 1, 1),
    ]  # fmt: skip
    judgements = [
        Judgement(p=0.9, q_ab=0.9, q_ba=0.1),  # right, longer, consistent
        Judgement(p=0.6, q_ab=0.9, q_ba=0.7),  # wrong, longer, the first slot twice
        Judgement(p=0.6, q_ab=0.4, q_ba=0.2),  # right, shorter, the second slot twice
        Judgement(p=0.5, q_ab=0.5, q_ba=0.5),  # a tie, undecided in both orders
        Judgement(p=0.1),  # right, of equal length, without slots
        abstention("malformed"),
        Judgement(reason="too long", q_ab=0.9),
    ]
    found = compare(questions, judgements)
    assert (found["judged"], found["ties"], found["abstained"]) == (5, 1, {"malformed": 1, "too long": 1})
    assert found["agreement"] == pytest.approx((3.5 / 5, 0.2988, 0.9274), abs=1e-3)
    assert (found["consistent"], found["first_slot"], found["second_slot"]) == (1, 1, 1)
    assert found["same_slot"] == pytest.approx((2 / 3, 0.2077, 0.9385), abs=1e-3)
    assert found["prefers_longer"] == pytest.approx((2 / 3, 0.2077, 0.9385), abs=1e-3)
    assert found["gold_longer"] == pytest.approx((1 / 3, 0.0615, 0.7923), abs=1e-3)
    # p - 1/2: 0.4, 0.1, 0.1, 0, -0.4; relative differences: 0.5, 0.5, -0.5, 0, 0.
    assert found["length_correlation"] == pytest.approx(0.2 / (0.34 * 0.75) ** 0.5)


def test_nothing_judged_has_no_figures() -> None:
    found = compare([question(3, 1, 1)], [abstention("no")])
    nothing = ("agreement", "same_slot", "prefers_longer", "gold_longer", "length_correlation")
    assert [found[name] for name in nothing] == [None] * 5


def test_swapping_the_two_answers_of_a_question_changes_no_figure() -> None:
    questions = [question(30, 10, 1), question(10, 25, 1), question(7, 9, -1)]
    judgements = [Judgement(p=0.9, q_ab=0.9, q_ba=0.1), Judgement(p=0.2, q_ab=0.1, q_ba=0.7), Judgement(p=0.4)]
    swapped = [Question(q.comparison.swapped, -q.sign) for q in questions]
    first, second = compare(questions, judgements), compare(swapped, [j.swapped for j in judgements])
    assert second.pop("length_correlation") == pytest.approx(first.pop("length_correlation"))
    assert first == second


def test_which_answer_is_called_a_says_nothing_about_the_label(gold: Path) -> None:
    questions = gold_questions(gold)
    assert questions == gold_questions(gold)
    assert 10 <= sum(question.sign == 1 for question in questions) <= 30
    for prompt, (comparison, sign) in enumerate(questions):
        chosen = comparison.a if sign == 1 else comparison.b
        assert ("long" in chosen.text) == (prompt < 30)


def test_rules_against_gold(gold: Path) -> None:
    long = check_judge(gold, load_rule("long"), meter=Meter())
    assert (long.pairs, long.judged) == (40, 40)
    assert long.agreement is not None and long.agreement[0] == 0.75
    assert (long.prefers_longer or [0])[0] == 1.0 and (long.gold_longer or [0])[0] == 0.75
    assert long.length_correlation == pytest.approx(1.0, abs=0.01)
    assert (long.same_slot, long.label_mass, long.usage) == (None, None, {})
    slot = check_judge(gold, RuleAnnotator(likes_the_first_slot, "slot"), meter=Meter())
    assert (slot.agreement or [0])[0] == 0.5 and slot.ties == 40
    assert (slot.same_slot or [0])[0] == 1.0 and (slot.first_slot, slot.second_slot, slot.consistent) == (40, 0, 0)


def test_a_judge_that_leans_to_a_slot(gold: Path, tmp_path: Path) -> None:
    meter = Meter(Prices(models={"small": Price(input=1.0, output=1.0)}))
    with JudgeServer(bias=-9.0, mass=0.4) as server:
        judge = judge_of(server, tmp_path / "judgements.sqlite", meter=meter)
        [before] = estimate_check(gold, judge, meter=meter)
        assert (before.calls, server.requests) == (80, [])
        report = check_judge(gold, judge, meter=meter)
    assert (report.second_slot, report.first_slot, report.consistent) == (40, 0, 0)
    assert (report.agreement or [0])[0] == 0.75  # of what is left when the slot is averaged away
    assert (report.label_mass, report.low_mass) == (pytest.approx(0.4), 1.0)
    assert report.usage["api:small"]["calls"] == 80 and report.usage["api:small"]["money"] > 0
    assert JudgeReport.from_json(report.to_json()) == report
    console = Console(width=150, record=True, file=(tmp_path / "out").open("w", encoding="utf-8"))
    console.print(report.render())
    shown = " ".join(console.export_text().split())
    console.file.close()
    for expected in (
        "40 of 40 judged", "agrees with gold 75.0 % [59.8, 85.8]",
        "follows the slot 100.0 % [91.2, 100.0] (0 the first, 40 the second, of 40)", "gold: 75.0 % [59.8, 85.8]",
        "mean 0.4, below one half on 100.0 % of questions", "80 calls",
    ):  # fmt: skip
        assert expected in shown


def test_a_check_that_a_budget_stops_goes_on(gold: Path, tmp_path: Path) -> None:
    with JudgeServer() as server:
        for _ in range(2):
            meter = Meter(budget_calls=30)
            with pytest.raises(BudgetReached):
                check_judge(gold, judge_of(server, tmp_path / "c.sqlite", meter=meter), meter=meter)
        meter = Meter(budget_calls=30)
        report = check_judge(gold, judge_of(server, tmp_path / "c.sqlite", meter=meter), meter=meter)
    assert report.judged == 40 and report.usage["api:small"]["calls"] == 20
    assert (len(server.answered), server.most_asked()) == (80, 1)


def test_a_limit_and_a_file_without_pairs(gold: Path, tmp_path: Path) -> None:
    assert check_judge(gold, load_rule("short"), meter=Meter(), limit=7).pairs == 7
    bad = tmp_path / "bad.jsonl"
    bad.write_text(gold.read_text(encoding="utf-8") + '{"prompt": "Same?", "chosen": "yes", "rejected": "yes"}\n')
    with pytest.raises(InputError, match="line 41: 'chosen' and 'rejected' are the same text"):
        check_judge(bad, load_rule("short"), meter=Meter())
    assert check_judge(bad, load_rule("short"), meter=Meter(), on_bad_row="skip").pairs == 40
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"empty\.jsonl"):
        check_judge(empty, load_rule("short"), meter=Meter())
