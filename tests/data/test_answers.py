"""Questions and answers in prefloop's, AlpacaEval's and MT-Bench's files: read, matched, written and read again."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefloop.data.answers import Answered, Question, files_of, mt_bench_questions, read_answers
from prefloop.errors import InputError
from prefloop.records import Group, Prompt, Response

TWO_TURNS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 111, "category": "math", "turns": ["Add.", "More."], "reference": ["1", "2"]},
]


def lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def mt_bench_answers(file: Path, *turns: list[str]) -> str:
    rows = [{"question_id": id, "choices": [{"index": 0, "turns": t}]} for id, t in zip((81, 111), turns, strict=False)]
    return lines(file, rows)


def test_mt_bench_questions_and_answers(tmp_path: Path) -> None:
    questions = mt_bench_questions(lines(tmp_path / "question.jsonl", TWO_TURNS))
    assert [(q.prompt.id, q.prompt.category, q.second) for q in questions] == [
        ("81", "writing", "Again."),
        ("111", "math", "More."),
    ]
    after = questions[0].after(Response(text="Once."))
    assert [(m.role, m.content) for m in after.messages] == [
        ("user", "Write."),
        ("assistant", "Once."),
        ("user", "Again."),
    ]
    assert after.id == "81-turn-2" and after.category == "writing"
    found = read_answers(mt_bench_answers(tmp_path / "a.jsonl", ["Once.", "Twice."], ["1", "2"]), questions)
    assert found[0].whole.text == "Once.\n\n[User:]\nAgain.\n\n[Assistant:]\nTwice."
    written = files_of(found, "mine")
    assert set(written) == {"question.jsonl", "model_answer.jsonl"}
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    again = mt_bench_questions(str(tmp_path / "question.jsonl"))
    assert again == questions and read_answers(str(tmp_path / "model_answer.jsonl"), again) == found


def test_alpaca_eval_outputs(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Sum", "input": "1 2", "output": "3", "generator": "m", "dataset": "koala"},
        {"instruction": "Say hi", "output": "", "generator": "m", "dataset": "vicuna"},
    ]
    file = tmp_path / "model_outputs.json"
    file.write_text(json.dumps(rows))
    found = read_answers(str(file))
    assert [(a.prompt.messages[0].content, a.answers[0].text, a.prompt.category) for a in found] == [
        ("Sum\n\n1 2", "3", "koala"),
        ("Say hi", "", "vicuna"),
    ]
    written = json.loads(files_of(found, "me")["model_outputs.json"])
    assert written[1] == {"instruction": "Say hi", "output": "", "generator": "me", "dataset": "vicuna"}
    file.write_text(json.dumps(written))
    assert read_answers(str(file)) == found


def test_answers_are_put_into_the_order_of_the_questions(tmp_path: Path) -> None:
    prompts = [Prompt.of(f"Question {i}?", id=str(i)) for i in range(3)]
    file = tmp_path / "groups.jsonl"
    groups = [
        Group(prompt=prompt, responses=(Response(text=f"A{prompt.id}"), Response(text="another")))
        for prompt in reversed(prompts)
    ]
    file.write_text("".join(group.to_json() + "\n" for group in groups))
    found = read_answers(str(file), [Question(prompt) for prompt in prompts])
    assert [a.answers[0].text for a in found] == ["A0", "A1", "A2"]


def test_what_cannot_be_matched_is_refused(tmp_path: Path) -> None:
    questions = mt_bench_questions(lines(tmp_path / "question.jsonl", TWO_TURNS))
    short = mt_bench_answers(tmp_path / "short.jsonl", ["Once.", "Twice."], ["only one"])
    with pytest.raises(InputError, match=r"1 of 2 prompts have no answer there, the first 'Add\.'"):
        read_answers(short, questions)
    with pytest.raises(InputError, match=r"name their questions by id only; give --prompts"):
        read_answers(short)
    one = lines(tmp_path / "one.jsonl", [{"prompt": "Hello?", "response": "Hi"}])
    with pytest.raises(InputError, match="the questions have two turns"):
        read_answers(one, questions)
    with pytest.raises(InputError, match=r"one.jsonl: 1 of 1 prompts have no answer there, the first 'Bye\?'"):
        read_answers(one, [Question(Prompt.of("Bye?"))])
    for bad in ({"question_id": 1, "turns": "x"}, {"turns": ["x"]}, {"question_id": 1, "turns": ["a", "b", "c"]}):
        with pytest.raises(InputError, match="line 1: expected 'question_id' and one or two texts"):
            mt_bench_questions(lines(tmp_path / "bad.jsonl", [bad]))
    with pytest.raises(InputError, match="question_id 81 is there twice"):
        mt_bench_questions(lines(tmp_path / "twice.jsonl", [TWO_TURNS[0], TWO_TURNS[0]]))
    with pytest.raises(InputError, match="line 1: expected 'question_id' and 'choices'"):
        read_answers(lines(tmp_path / "odd.jsonl", [{"question_id": 81, "choices": []}]), questions)


def test_conversations_have_no_place_in_other_tools_files() -> None:
    prompt = Prompt.of([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert files_of([Answered(prompt=prompt, answers=(Response(text="Hi."),))], "m") == {}
