"""Every way in which rows are read as prompts, and every row that is not one."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from prefloop.data.mapping import load_prompts
from prefloop.records import Group, Pair, Prompt, Response
from tests.data.rows import answer, message_of, said, share_gpt, turns, write_rows

HASH_OF_HI = Prompt.of("hi").id


@pytest.mark.parametrize("column", ["prompt", "instruction", "question", "messages", "conversation", "conversations"])
@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        ("hi ", "text", [("user", "hi ")]),
        (turns("a", "b", "c"), "messages", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        (turns("a", system="s"), "messages", [("system", "s"), ("user", "a")]),
        (share_gpt("a", "b", "c"), "ShareGPT turns", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ("\n\nHuman: a\n\nAssistant: b \n\nHuman: c\nd", "transcript",
         [("user", "a"), ("assistant", "b"), ("user", "c\nd")]),
    ],
    ids=["text", "messages", "system", "ShareGPT", "transcript"],
)  # fmt: skip
def test_prompt_column(tmp_path: Path, column: str, value: Any, form: str, expected: list[tuple[str, str]]) -> None:
    loaded = load_prompts(write_rows(tmp_path / "a.jsonl", {column: value}))
    (prompt,) = loaded.records
    assert said(prompt) == expected
    assert prompt.id == Prompt.of([{"role": role, "content": content} for role, content in expected]).id
    assert prompt.category is None
    assert loaded.mapping.describe() == f"prompt <- column {column!r} ({form})"
    assert (loaded.bad_rows, loaded.duplicates, loaded.source) == ([], 0, str(tmp_path / "a.jsonl"))


def test_optional_columns_and_what_is_not_used(tmp_path: Path) -> None:
    row = {"licence": "MIT", "instruction": "Sum up.", "input": "A long text.", "system": "Be brief.", "id": 7,
           "category": "summarise", "output": "A text."}  # fmt: skip
    loaded = load_prompts(write_rows(tmp_path / "a.jsonl", row, {"instruction": "Name one.", "input": "", "id": "8"}))
    first, second = loaded.records
    assert said(first) == [("system", "Be brief."), ("user", "Sum up.\n\nA long text.")]
    assert (first.id, first.category) == ("7", "summarise")
    assert said(second) == [("user", "Name one.")]
    assert (second.id, second.category) == ("8", None)
    assert loaded.mapping.describe() == (
        "prompt <- column 'instruction' (text); prompt, after a blank line <- column 'input' (text); "
        "system <- column 'system' (text); category <- column 'category'; id <- column 'id'; not used: licence, output"
    )


def test_first_known_column_is_the_prompt(tmp_path: Path) -> None:
    loaded = load_prompts(write_rows(tmp_path / "a.jsonl", {"messages": turns("a", "b"), "prompt": "a"}))
    assert loaded.mapping.describe() == "prompt <- column 'prompt' (text); not used: messages"


def test_answer_at_the_end_of_a_conversation_is_left_out_and_said(tmp_path: Path) -> None:
    loaded = load_prompts(write_rows(tmp_path / "a.jsonl", {"messages": turns("a", "b", "c", "d")}))
    assert said(loaded.records[0]) == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert loaded.mapping.describe() == (
        "prompt <- column 'messages' (messages); the last answer of a conversation is left out"
    )


def test_forms_may_differ_from_row_to_row(tmp_path: Path) -> None:
    loaded = load_prompts(write_rows(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": turns("b")}))
    assert [said(prompt) for prompt in loaded.records] == [[("user", "a")], [("user", "b")]]
    assert loaded.mapping.describe() == "prompt <- column 'prompt' (text or messages)"


def test_system_column_beside_a_system_message(tmp_path: Path) -> None:
    row = {"prompt": turns("a", system="s"), "system": "s"}
    assert said(load_prompts(write_rows(tmp_path / "a.jsonl", row)).records[0]) == [("system", "s"), ("user", "a")]
    path = write_rows(tmp_path / "a.jsonl", {**row, "system": "t"})
    assert "column 'system' and the conversation's system message differ" in message_of(lambda: load_prompts(path))


def test_equal_prompts_are_kept_once_with_the_first_id(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "id": "a", "category": "x"}, {"prompt": "ho", "id": "b"}, {"prompt": "hi", "id": "c"}]
    loaded = load_prompts(write_rows(tmp_path / "a.jsonl", *rows))
    assert loaded.records == [Prompt.of("hi", id="a", category="x"), Prompt.of("ho", id="b")]
    assert loaded.duplicates == 1


def test_an_id_that_two_prompts_share_becomes_a_hash(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "id": "a"}, {"prompt": "ho", "id": "a"}, {"prompt": "hu", "id": "b"}]
    loaded = load_prompts(write_rows(tmp_path / "a.jsonl", *rows))
    assert [prompt.id for prompt in loaded.records] == [HASH_OF_HI, Prompt.of("ho").id, "b"]
    assert loaded.mapping.describe() == (
        "prompt <- column 'prompt' (text); id <- column 'id'; "
        "ids that several prompts share are replaced by a hash of the prompt"
    )


def test_limit_keeps_the_first(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", *({"prompt": str(i)} for i in range(5)))
    assert [said(prompt)[0][1] for prompt in load_prompts(path, limit=2).records] == ["0", "1"]


def test_pairs_file_as_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "1", "rejected": "2", "id": "x"},
            {"prompt": "a", "chosen": "1", "rejected": "3", "id": "y"},
            {"prompt": "b", "chosen": "1", "rejected": "2", "id": "z"}]  # fmt: skip
    loaded = load_prompts(write_rows(tmp_path / "a.jsonl", *rows))
    assert [(prompt.id, said(prompt)) for prompt in loaded.records] == [("x", [("user", "a")]), ("z", [("user", "b")])]
    assert loaded.duplicates == 1


def test_what_prefloop_writes_is_read_back(tmp_path: Path) -> None:
    prompts = [Prompt.of("a", id="one", category="list"), Prompt.of(turns("b", "c", "d"))]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(prompt.to_json() + "\n" for prompt in prompts))
    assert load_prompts(path).records == prompts
    groups = [Group(prompt=prompt, responses=(Response(text="x"),)) for prompt in prompts]
    path.write_text("".join(group.to_json() + "\n" for group in groups))
    loaded = load_prompts(path)
    assert loaded.records == prompts
    assert loaded.mapping.describe() == "prompts as prefloop writes them; not used: responses"
    pair = Pair(prompt=prompts[0], chosen=Response(text="x"), rejected=Response(text="y"))
    path.write_text(pair.to_json())
    assert load_prompts(path).records == prompts[:1]


def test_parquet_and_csv(tmp_path: Path) -> None:
    rows = [{"messages": turns("a"), "category": None}, {"messages": turns("b", "c", "d"), "category": "list"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    loaded = load_prompts(tmp_path / "a.parquet")
    assert loaded.records == [Prompt.of(turns("a")), Prompt.of(turns("b", "c", "d"), category="list")]
    (tmp_path / "a.csv").write_text('instruction,input\n"Say, please",more\nGo,\n')
    assert load_prompts(tmp_path / "a.csv").records == [Prompt.of("Say, please\n\nmore"), Prompt.of("Go")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": None}, "there is no prompt in column 'prompt'; expected text or a list of messages; "
                           "seen: prompt = None (NoneType)"),
        ({"prompt": " \n"}, "message 1 of the prompt is empty; expected text from the user; "
                           "seen: prompt = ' \\n' (str)"),
        ({"prompt": []}, "the prompt is empty; expected text or at least one message; seen: prompt = [] (list)"),
        ({"prompt": 3}, "column 'prompt' is of type int; expected text or a list of messages (role and content); "
                        "seen: prompt = 3 (int)"),
        ({"prompt": ["a", "b"]}, "column 'prompt' is of type list; expected text or a list of messages (role and "
                                 "content); seen: prompt = ['a', 'b'] (list)"),
        ({"prompt": [{"role": "user", "content": None}]}, "message 1 of column 'prompt' has content of type NoneType; "
         "expected text; seen: prompt = [{'role': 'user', 'content': None}] (list)"),
        ({"prompt": [{"role": "bot", "content": ""}]}, "message 1 of column 'prompt' has role 'bot'; expected one of "
         "system, user, human, assistant, gpt, tool; seen: prompt = [{'role': 'bot', 'content': ''}] (list)"),
        ({"prompt": [{"from": "user"}]}, "message 1 of column 'prompt' has value of type NoneType; "
         "expected text; seen: prompt = [{'from': 'user'}] (list)"),
        ({"prompt": "x", "category": ["a"]}, "column 'category' is of type list; expected text; "
         "seen: prompt = 'x' (str), category = ['a'] (list)"),
        ({"prompt": "x" * 50, "id": 1.5}, "column 'id' is of type float; expected text; "
         f"seen: prompt = '{'x' * 36}... (str), id = 1.5 (float)"),
        ({"prompt": {"id": "a", "messages": [{"role": "user"}]}},
         "messages.0.content = {'role': 'user'}: field required; "
         "seen: prompt = {'id': 'a', 'messages': [{'role': 'us... (dict)"),
    ],
)  # fmt: skip
def test_bad_row_is_named_or_skipped(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "good"}, row)
    fix = "fix the row, or leave such rows out (on_bad_row: skip)"
    assert message_of(lambda: load_prompts(path)) == f"{path} line 2: {problem}; {fix}"
    loaded = load_prompts(path, on_bad_row="skip")
    assert loaded.records == [Prompt.of("good")]
    assert [(bad.number, bad.reason) for bad in loaded.bad_rows] == [(2, f"line 2: {problem}")]


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        (["system"], "the prompt ends with system; expected it to end with user"),
        (["assistant"], "message 1 of the prompt is assistant first; expected system or user"),
        (["user", "system", "user"], "message 2 of the prompt is system after user; expected assistant"),
        (["user", "user"], "message 2 of the prompt is user after user; expected assistant"),
        (["user", "assistant", "assistant", "user"],
         "message 3 of the prompt is assistant after assistant; expected tool or user"),
        (["system", "system", "user"], "message 2 of the prompt is system after system; expected user"),
    ],
)  # fmt: skip
def test_order_of_roles(tmp_path: Path, roles: list[str], problem: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": [{"role": role, "content": "x"} for role in roles]})
    assert f"{path} line 1: {problem}; seen: messages = [" in message_of(lambda: load_prompts(path))


def test_tool_turns_are_taken(tmp_path: Path) -> None:
    messages = [*turns("a", "b"), {"role": "tool", "content": "c"}]
    assert load_prompts(write_rows(tmp_path / "a.jsonl", {"messages": messages})).records == [Prompt.of(messages)]


def test_missing_column_and_no_good_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "a", "n": 1})
    expected = "'prompt', 'instruction', 'question', 'messages', 'conversation', 'conversations', 'input'"
    assert message_of(lambda: load_prompts(path, on_bad_row="skip")) == (
        f"{path}: no column holds a prompt; columns: 'text', 'n'; expected one of {expected}"
    )
    (tmp_path / "a.csv").write_text("What is red?\nA colour?\n")
    assert message_of(lambda: load_prompts(tmp_path / "a.csv")) == (
        f"{tmp_path / 'a.csv'}: no column holds a prompt; columns: 'What is red?'; expected one of {expected} "
        "(the first line of a CSV file names the columns)"
    )
    path = write_rows(tmp_path / "a.jsonl", {"prompt": ""}, {"prompt": 1})
    assert message_of(lambda: load_prompts(path, on_bad_row="skip")) == (
        f"{path}: none of 2 rows fits; the first: line 1: message 1 of the prompt is empty; expected text from the "
        "user; seen: prompt = '' (str)"
    )
    assert message_of(lambda: load_prompts(path, on_bad_row="ignore")) == (
        "on_bad_row = 'ignore': expected 'error' or 'skip'"
    )


def test_long_rows_are_shortened(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {**{f"c{i}": "x" for i in range(9)}, "prompt": answer("")})
    assert message_of(lambda: load_prompts(path)).endswith(
        "seen: c0 = 'x' (str), c1 = 'x' (str), c2 = 'x' (str), c3 = 'x' (str), c4 = 'x' (str), c5 = 'x' (str), ...; "
        "fix the row, or leave such rows out (on_bad_row: skip)"
    )
