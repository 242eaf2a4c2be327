"""Answers in, scored or not: every format that users have them in, and what does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefloop.data.groups import load_groups
from prefloop.errors import InputError
from prefloop.records import Group, Prompt, Response

HI = [{"role": "user", "content": "hi"}]
YO = {"role": "assistant", "content": " yo "}


@pytest.fixture
def source(tmp_path: Path):
    def write(*rows: dict[str, Any]) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "rows.jsonl"

    return write


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"input": "hi", "output": "yo", "reward": 1.5}, [("yo", 1.5)]),
        ({"prompt": "hi", "completion": "yo", "score": "-2e-1"}, [("yo", -0.2)]),
        ({"prompt": HI, "completion": [YO]}, [("yo", None)]),
        ({"messages": [*HI, YO], "reward": 3}, [("yo", 3.0)]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, [("yo", None)]),
        ({"prompt": HI, "response": [*HI, YO]}, [("yo", None)]),
        ({"prompt": "hi", "responses": ["yo", "no"], "rewards": [0.5, None]}, [("yo", 0.5), ("no", None)]),
        (
            {"question": "hi", "completions": [{"response": "yo", "overall_score": 7}, {"response": "no"}]},
            [("yo", 7.0), ("no", None)],
        ),
        (
            {"prompt": "hi", "chosen": "yo", "rejected": "no", "chosen_score": 2, "score_rejected": 1},
            [("yo", 2.0), ("no", 1.0)],
        ),
    ],
)
def test_a_row_becomes_a_group_with_its_rewards(source: Any, row: dict[str, Any], answers: list[Any]) -> None:
    (group,) = load_groups(source(row)).records
    assert [(r.text, r.score) for r in group.responses] == answers
    assert group.prompt.messages == Prompt.of("hi").messages


def test_an_alpaca_row_has_its_input_below_the_instruction(source: Any) -> None:
    loaded = load_groups(source({"instruction": "Add.", "input": "1 2", "output": "3", "source": "x"}))
    assert loaded.records[0].prompt.messages[0].content == "Add.\n\n1 2"
    assert loaded.mapping.describe() == (
        "prompt <- column 'instruction' (text); prompt, after a blank line <- column 'input' (text); "
        "answer <- column 'output' (text); not used: source"
    )


def test_rows_of_one_prompt_are_one_group_and_an_answer_of_several_pairs_counts_once(source: Any) -> None:
    rows = [{"prompt": p, "response": r, "reward": n} for n, (p, r) in enumerate(["ax", "by", "az", "ax"])]
    groups = load_groups(source(*rows)).records
    assert [[(r.text, r.score) for r in g.responses] for g in groups] == [
        [("x", 0.0), ("z", 2.0), ("x", 3.0)],
        [("y", 1.0)],
    ]
    pairs = [{"prompt": "a", "chosen": c, "rejected": r} for c, r in ("xy", "xz", "yz")]
    assert [r.text for r in load_groups(source(*pairs)).records[0].responses] == ["x", "y", "z"]
    assert [r.text for r in load_groups(source(*pairs), rejected=False).records[0].responses] == ["x", "y"]


def test_groups_that_prefloop_wrote_come_back_as_they_were(tmp_path: Path) -> None:
    group = Group(
        prompt=Prompt.of("hi", id="mine"),
        responses=(Response(text="yo", token_ids=(3, 2), finish_reason="stop", score=1.0),),
    )
    (tmp_path / "groups.jsonl").write_text(group.to_json() + "\n")
    assert load_groups(tmp_path / "groups.jsonl").records == [group]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "hi", "output": "yo", "reward": "high"}, "column 'reward' is 'high'; expected a finite number"),
        ({"prompt": "hi", "output": "yo", "reward": True}, "column 'reward' is True; expected a finite number"),
        ({"prompt": "hi", "output": "yo", "reward": float("nan")}, "column 'reward' is nan; expected a finite"),
        ({"prompt": "hi", "responses": ["a", "b"], "scores": [1]}, "has 1 rewards for 2 answers; expected as many"),
        ({"prompt": "hi", "responses": "yo"}, "column 'responses' is of type str; expected a list"),
        ({"prompt": "hi", "response": None, "other": 1}, "there is no answer; expected one in 'response'"),
        ({"messages": HI}, "the conversation in column 'messages' ends with user; expected it to end with the"),
        ({"messages": [*HI, {"role": "assistant", "content": " "}]}, "the last answer in column 'messages' is empty"),
        ({"prompt": "hi"}, "no column holds an answer; columns: 'prompt'"),
        ({"text": "hi", "output": "yo"}, "no column holds a prompt; columns: 'text', 'output'"),
    ],
)
def test_a_row_that_does_not_fit_is_one_line_with_its_place(source: Any, row: dict[str, Any], said: str) -> None:
    good = {"messages": [*HI, YO]} if "messages" in row else {"prompt": "hi", "response": "yo"}
    with pytest.raises(InputError) as caught:
        load_groups(source(row) if "column holds" in said else source(good, row))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    if "column holds" not in said:
        assert "rows.jsonl line 2" in str(caught.value)
        skipped = load_groups(source(good, row), on_bad_row="skip")
        assert [bad.number for bad in skipped.bad_rows] == [2] and len(skipped.records) == 1


def test_the_seed_pairs_are_groups_of_two() -> None:
    groups = load_groups("seed:train").records
    assert len(groups) == 128 and {len(group.responses) for group in groups} == {2}
