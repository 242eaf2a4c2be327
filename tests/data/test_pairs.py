"""Every way in which rows are read as preference pairs, and every row that is not one."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from prefloop.data.mapping import load_pairs, load_prompts
from prefloop.records import Message, Pair, Prompt, Response
from tests.data.rows import answer, in_short, message_of, said, share_gpt, turns, write_rows


@pytest.mark.parametrize(
    ("row", "expected", "mapping"),
    [
        (
            {"prompt": "a", "chosen": " good\n", "rejected": "bad"},
            (["a"], "good", "bad"),
            "prompt <- column 'prompt' (text); chosen <- column 'chosen' (text); rejected <- column 'rejected' (text)",
        ),
        (
            {"instruction": "a", "input": "b", "chosen": "good", "rejected": "bad"},
            (["a\n\nb"], "good", "bad"),
            "prompt <- column 'instruction' (text); prompt, after a blank line <- column 'input' (text); "
            "chosen <- column 'chosen' (text); rejected <- column 'rejected' (text)",
        ),
        (
            {"prompt": turns("a", "b", "c", system="s"), "chosen": answer("good "), "rejected": answer("bad")},
            (["s", "a", "b", "c"], "good", "bad"),
            "prompt <- column 'prompt' (messages); chosen <- column 'chosen' (messages, last assistant turn); "
            "rejected <- column 'rejected' (messages, last assistant turn)",
        ),
        (
            {"prompt": "a", "system": "s", "chosen": turns("a ", "good"), "rejected": turns("a", "bad")},
            (["s", "a"], "good", "bad"),
            "prompt <- column 'prompt' (text); system <- column 'system' (text); "
            "chosen <- column 'chosen' (messages, last assistant turn); "
            "rejected <- column 'rejected' (messages, last assistant turn)",
        ),
        (
            {"conversations": share_gpt("a", "b", "c"), "chosen": {"from": "gpt", "value": "good"},
             "rejected": {"from": "gpt", "value": "bad"}},
            (["a", "b", "c"], "good", "bad"),
            "prompt <- column 'conversations' (ShareGPT turns); chosen <- column 'chosen' (ShareGPT turns, last "
            "assistant turn); rejected <- column 'rejected' (ShareGPT turns, last assistant turn)",
        ),
        (
            {"chosen": turns("a", "b", "c", "good"), "rejected": turns("a", "b", "c", "bad")},
            (["a", "b", "c"], "good", "bad"),
            "prompt <- column 'chosen' (what both conversations share); chosen <- column 'chosen' (messages, last "
            "assistant turn); rejected <- column 'rejected' (messages, last assistant turn)",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
             "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad\n\nand worse"},
            (["a", "b", "c"], "good", "bad\n\nand worse"),
            "prompt <- column 'chosen' (what both conversations share); chosen <- column 'chosen' (transcript, last "
            "assistant turn); rejected <- column 'rejected' (transcript, last assistant turn)",
        ),
        (
            {"prompt": "a", "chosen": "\n\nHuman: a\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nAssistant: bad"},
            (["a"], "good", "bad"),
            "prompt <- column 'prompt' (text); chosen <- column 'chosen' (transcript, last assistant turn); "
            "rejected <- column 'rejected' (transcript, last assistant turn)",
        ),
        (
            {"system": "s", "chosen": turns("a", "good"), "rejected": turns("a", "bad")},
            (["s", "a"], "good", "bad"),
            "system <- column 'system' (text); prompt <- column 'chosen' (what both conversations share); "
            "chosen <- column 'chosen' (messages, last assistant turn); "
            "rejected <- column 'rejected' (messages, last assistant turn)",
        ),
    ],
    ids=["text", "alpaca", "messages", "whole conversations", "ShareGPT", "implicit", "transcripts",
         "transcripts and prompt", "implicit and system"],
)  # fmt: skip
def test_pair(tmp_path: Path, row: dict[str, Any], expected: tuple[list[str], str, str], mapping: str) -> None:
    loaded = load_pairs(write_rows(tmp_path / "a.jsonl", row))
    (pair,) = loaded.records
    assert in_short(pair) == expected
    roles = ["system"] * ("s" in expected[0]) + ["user", "assistant", "user"]
    assert [role for role, _ in said(pair.prompt)] == roles[: len(expected[0])]
    assert (pair.p, pair.weight, pair.source, pair.chosen.finish_reason) == (1.0, 1.0, "offline", "given")
    assert loaded.mapping.describe() == mapping


def test_ultrafeedback_binarized_as_parquet(tmp_path: Path) -> None:
    row = {"prompt": "a", "prompt_id": "0b2c", "chosen": turns("a", "good"), "rejected": turns("a", "bad"),
           "messages": turns("a", "good"), "score_chosen": 8.5, "score_rejected": 6.0}  # fmt: skip
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    loaded = load_pairs(tmp_path / "a.parquet")
    assert loaded.records == [
        Pair(
            prompt=Prompt.of("a", id="0b2c"),
            chosen=Response(text="good"),
            rejected=Response(text="bad"),
            chosen_score=8.5,
            rejected_score=6.0,
        )
    ]
    assert loaded.mapping.describe() == (
        "prompt <- column 'prompt' (text); chosen <- column 'chosen' (messages, last assistant turn); "
        "rejected <- column 'rejected' (messages, last assistant turn); chosen_score <- column 'score_chosen'; "
        "rejected_score <- column 'score_rejected'; id <- column 'prompt_id'; not used: messages"
    )


def test_soft_label_weight_scores_and_category_from_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "id,category,prompt,chosen,rejected,p,weight,chosen_score,rejected_score\n"
        "x,list,a,good,bad,0.75,2,1e1,-1\ny,,b,good,bad,,,,\n"
    )
    first, second = load_pairs(path).records
    assert (first.prompt.id, first.prompt.category) == ("x", "list")
    assert (first.p, first.weight, first.chosen_score, first.rejected_score) == (0.75, 2.0, 10.0, -1.0)
    assert (second.prompt.id, second.prompt.category) == ("y", None)
    assert (second.p, second.weight, second.chosen_score, second.rejected_score) == (1.0, 1.0, None, None)


def test_datasets_folder_and_limit(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "chosen": "good", "rejected": "bad"} for i in range(4)]
    parts = {"train": datasets.Dataset.from_list(rows[:3]), "test": datasets.Dataset.from_list(rows[3:])}
    datasets.DatasetDict(**parts).save_to_disk(tmp_path / "saved")
    loaded = load_pairs(tmp_path / "saved", split="train", limit=2)
    assert [in_short(pair)[0] for pair in loaded.records] == [["0"], ["1"]]
    assert loaded.source == f"{tmp_path / 'saved'}:train"
    assert [in_short(pair)[0] for pair in load_pairs(f"{tmp_path / 'saved'}:test").records] == [["3"]]


def test_pairs_that_share_a_prompt_share_its_id(tmp_path: Path) -> None:
    rows = [{"id": name, "prompt": prompt, "chosen": name, "rejected": "bad"} for name, prompt in ["xa", "ya", "zb"]]
    assert [pair.prompt.id for pair in load_pairs(write_rows(tmp_path / "a.jsonl", *rows)).records] == ["x", "x", "z"]
    rows = [{**row, "prompt_id": "same"} for row in rows]
    hashes = [Prompt.of(prompt).id for prompt in "aab"]
    assert [pair.prompt.id for pair in load_pairs(write_rows(tmp_path / "a.jsonl", *rows)).records] == hashes


def test_shared_beginning_ends_at_the_first_answer_that_differs(tmp_path: Path) -> None:
    row = {"chosen": turns("a", "b", "c", "same start, good"), "rejected": turns("a", "b", "c", "same start, bad")}
    (pair,) = load_pairs(write_rows(tmp_path / "a.jsonl", row)).records
    assert in_short(pair) == (["a", "b", "c"], "same start, good", "same start, bad")


def test_pairs_that_prefloop_wrote_keep_their_token_ids(tmp_path: Path) -> None:
    pair = Pair(
        prompt=Prompt(id="x", messages=(Message(role="user", content="a"),)),
        chosen=Response(text="good ", token_ids=(1, 2), finish_reason="stop", score=0.5),
        rejected=Response(text="bad", token_ids=(3,), finish_reason="length", policy_logp=-1.25),
        source="generated",
        reference_logps=(-1.5, -2.5),
        reference="abc",
    )
    path = tmp_path / "a.jsonl"
    path.write_text(pair.to_json() + "\n")
    loaded = load_pairs(path)
    assert loaded.records == [pair]
    assert loaded.mapping.describe() == "pairs as prefloop writes them"
    same = pair.model_copy(update={"chosen": Response(text="bad ")})
    path.write_text(same.to_json())
    assert f"{path} line 1: 'chosen' and 'rejected' are the same text" in message_of(lambda: load_pairs(path))
    path.write_text(pair.to_json()[:-1] + ', "margin": 1}')
    assert f"{path} line 1: margin = 1: extra inputs are not permitted" in message_of(lambda: load_pairs(path))


SAME = "are the same text; expected two different answers"
NO_PROMPT = ("there is no prompt, and 'chosen' is only an answer; expected a column 'prompt', or whole conversations "
             "in 'chosen' and 'rejected'")  # fmt: skip


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "chosen": "x", "rejected": " x\n"}, f"'chosen' and 'rejected' {SAME}"),
        ({"prompt": "a", "chosen": answer("x"), "rejected": "x"}, f"'chosen' and 'rejected' {SAME}"),
        ({"prompt": "a", "chosen": "x"}, "there is no 'rejected'; expected an answer"),
        ({"prompt": "a", "chosen": None, "rejected": "x"}, "there is no 'chosen'; expected an answer"),
        ({"prompt": "a", "chosen": " ", "rejected": "x"}, "the response in column 'chosen' is empty; expected text"),
        ({"prompt": "a", "chosen": "x", "rejected": answer("\n")},
         "the response in column 'rejected' is empty; expected text"),
        ({"prompt": "a", "chosen": [], "rejected": "x"}, "column 'chosen' is an empty list; expected an answer"),
        ({"prompt": "", "chosen": "x", "rejected": "y"},
         "message 1 of the prompt is empty; expected text from the user"),
        ({"prompt": turns("a", "b"), "chosen": "x", "rejected": "y"},
         "the prompt ends with assistant; expected it to end with user"),
        ({"prompt": "a", "chosen": turns("b"), "rejected": "y"},
         "column 'chosen' ends with user; expected it to end with an assistant message"),
        ({"prompt": "a", "chosen": turns("b", "x"), "rejected": turns("a", "y")},
         "column 'chosen' is a conversation of 2 messages that does not begin with the row's prompt; expected the "
         "prompt's messages and one answer"),
        ({"prompt": "a", "chosen": turns("a", "x"), "rejected": turns("a", "y", "a", "z")},
         "column 'rejected' is a conversation of 4 messages that does not begin with the row's prompt; expected the "
         "prompt's messages and one answer"),
        ({"prompt": "a", "chosen": 3, "rejected": "x"},
         "column 'chosen' is of type int; expected text or a list of messages (role and content)"),
        ({"chosen": "x", "rejected": "y"}, NO_PROMPT),
        ({"chosen": answer("x"), "rejected": answer("y")}, NO_PROMPT),
        ({"chosen": answer("x")[0], "rejected": answer("y")[0]}, NO_PROMPT),
        ({"chosen": turns("a", "x"), "rejected": answer("y")}, NO_PROMPT.replace("'chosen' is", "'rejected' is")),
        ({"chosen": turns("a", "x"), "rejected": turns("a", "x")},
         "'chosen' and 'rejected' are the same conversation; expected two different answers"),
        ({"chosen": turns("a", "x"), "rejected": turns("a", "x ")}, f"'chosen' and 'rejected' {SAME}"),
        ({"chosen": turns("a", "x"), "rejected": turns("a", "x", "b", "y")},
         "one of 'chosen' and 'rejected' is the beginning of the other; expected one answer in each"),
        ({"chosen": turns("a", "x"), "rejected": turns("b", "y")},
         "'chosen' and 'rejected' first differ at message 1, which is not an assistant message in both; "
         "expected the same prompt in both"),
        ({"chosen": turns("a", "x"), "rejected": turns("a", "y", "b", "z")},
         "'chosen' and 'rejected' differ from message 2 on, with up to 2 more after it; "
         "expected only the last answer to differ"),
        ({"chosen": turns("a", " "), "rejected": turns("a", "y")},
         "the response in column 'chosen' is empty; expected text"),
        ({"chosen": answer("b") + answer("x"), "rejected": answer("b") + answer("y")},
         "message 1 of the prompt is assistant first; expected system or user"),
        ({"prompt": "a", "chosen": "x", "rejected": "y", "p": 1.5}, "p = 1.5: input should be less than or equal to 1"),
        ({"prompt": "a", "chosen": "x", "rejected": "y", "weight": -1},
         "weight = -1: input should be greater than or equal to 0"),
        ({"prompt": "a", "chosen": "x", "rejected": "y", "score_chosen": "high"},
         "chosen_score = 'high': input should be a valid number, unable to parse string as a number"),
    ],
)  # fmt: skip
def test_bad_row_is_named_or_skipped(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    good = {"prompt": "a", "chosen": "good", "rejected": "bad"} if "prompt" in row else {
        "chosen": turns("a", "good"), "rejected": turns("a", "bad")}  # fmt: skip
    path = write_rows(tmp_path / "a.jsonl", row, good)
    message = message_of(lambda: load_pairs(path))
    assert message.startswith(f"{path} line 1: {problem}; seen: {next(iter(row))} = ")
    assert message.endswith("; fix the row, or leave such rows out (on_bad_row: skip)")
    loaded = load_pairs(path, on_bad_row="skip")
    assert [in_short(pair) for pair in loaded.records] == [(["a"], "good", "bad")]
    assert [bad.number for bad in loaded.bad_rows] == [1]
    assert loaded.bad_rows[0].reason.startswith(f"line 1: {problem}; seen: ")


def test_missing_column(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "a", "choosen": "x", "rejected": "y"})
    assert message_of(lambda: load_pairs(path, on_bad_row="skip")) == (
        f"{path}: there is no column 'chosen'; columns: 'prompt', 'choosen', 'rejected'; pairs need 'chosen', "
        "'rejected' and a prompt, or whole conversations. Did you mean 'choosen'?"
    )


def test_packaged_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "seed", {"prompt": "not this"})
    assert load_prompts("seed:held_out", limit=1).records == load_prompts("seed", split="held_out").records[:1]
    assert load_pairs("seed:train").source == "seed:train"
    assert message_of(lambda: load_pairs("seed:test")) == "seed: there is no split 'test'; splits: held_out, train."
