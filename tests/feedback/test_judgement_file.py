"""Judgements from a file: found by content, in either order, never guessed."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import InputError
from prefloop.feedback.annotator import Comparison, Judgement
from prefloop.feedback.judgement_file import JudgementFile
from prefloop.records import Pair, Prompt, Response

RED_OR_NO = Comparison(Prompt.of("Name a colour."), Response(text="Red."), Response(text="No."))
ROW = {"prompt": "Name a colour.", "response_1": "Red.", "response_2": "No."}


def read(folder: Path, *rows: dict[str, Any], name: str = "people.jsonl") -> JudgementFile:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return JudgementFile(file)


def judged(annotator: JudgementFile, comparison: Comparison = RED_OR_NO) -> Judgement:
    [judgement] = annotator.judge([comparison])
    return judgement


@pytest.mark.parametrize(
    ("preference", "p"),
    [
        (1, 1.0),
        (2, 0.0),
        ("1", 1.0),
        ("2", 0.0),
        ("a", 1.0),
        ("B", 0.0),
        ("tie", 0.5),
        (0.75, 0.75),
        ("0.25", 0.25),
        (1.0, 1.0),
        (2.0, 0.0),
        (0.0, 0.0),
        (1e-3, 1e-3),
    ],
)
def test_every_way_to_write_a_preference(tmp_path: Path, preference: Any, p: float) -> None:
    annotator = read(tmp_path, {**ROW, "preference": preference})
    assert judged(annotator).p == pytest.approx(p)
    assert judged(annotator, RED_OR_NO.swapped).p == pytest.approx(1 - p)


@pytest.mark.parametrize("preference", [0, 3, "0", "c", "both", 1.5, -0.5, "nan", True, [1]])
def test_a_preference_that_says_nothing_is_named_with_its_line(tmp_path: Path, preference: Any) -> None:
    with pytest.raises(InputError, match=r"people\.jsonl line 2: preference is .*; expected 1 or 'a'.*fix the row"):
        read(tmp_path, {**ROW, "preference": 1}, {**ROW, "preference": preference})


def test_content_decides_not_ids_order_or_surrounding_space(tmp_path: Path) -> None:
    annotator = read(tmp_path, {**ROW, "response_1": " Red.\n", "preference": 1})
    prompt = Prompt.of("Name a colour.", id="mine", category="list")
    a, b = Response(text="No."), Response(text="Red.\n", token_ids=(1, 2), finish_reason="stop")
    assert judged(annotator, Comparison(prompt, a, b)).p == 0.0


@pytest.mark.parametrize(
    "comparison",
    [
        RED_OR_NO._replace(prompt=Prompt.of("Name a color.")),
        RED_OR_NO._replace(a=Response(text="red.")),
        RED_OR_NO._replace(prompt=Prompt.of([{"role": "system", "content": ""}, {"role": "user", "content": "Name."}])),
    ],
)
def test_what_the_file_does_not_hold_is_an_abstention(tmp_path: Path, comparison: Comparison) -> None:
    annotator = read(tmp_path, {**ROW, "preference": 1})
    assert judged(annotator, comparison).reason == "the file has no judgement of these two answers"


def test_rows_that_differ_are_votes_and_said(tmp_path: Path) -> None:
    swapped = {"prompt": ROW["prompt"], "response_1": "No.", "response_2": "Red."}
    annotator = read(
        tmp_path,
        {**ROW, "preference": 1},
        {**swapped, "preference": 2},
        {**ROW, "preference": 2},
        {**ROW, "prompt": "Yes or no?", "preference": 1},
        {**ROW, "prompt": "Yes or no?", "preference": 1},
        {**ROW, "prompt": "Unjudged?", "preference": None},
    )
    assert judged(annotator).p == pytest.approx(2 / 3)
    assert (annotator.conflicts, annotator.unjudged) == (1, 1)
    assert annotator.description.endswith(
        "people.jsonl: judgements of 2 comparisons; those of 1 differ between rows, and their mean counts; "
        "1 rows have no preference"
    )


def test_votes_that_cancel_are_a_tie(tmp_path: Path) -> None:
    assert judged(read(tmp_path, {**ROW, "preference": "a"}, {**ROW, "preference": "b"})).p == 0.5


@pytest.mark.parametrize("names", [("response_a", "response_b"), ("a", "b"), ("output_1", "output_2")])
def test_other_names_of_the_answers(tmp_path: Path, names: tuple[str, str]) -> None:
    row = {"instruction": "Name a colour.", names[0]: "Red.", names[1]: "No.", "preference": 1}
    assert judged(read(tmp_path, row)).p == 1.0


def test_a_prompt_as_prefloop_writes_it_and_as_messages(tmp_path: Path) -> None:
    own = json.loads(RED_OR_NO.prompt.to_json())
    for prompt in (own, own["messages"]):
        assert judged(read(tmp_path, {**ROW, "prompt": prompt, "preference": 2})).p == 0.0


def test_a_csv_file(tmp_path: Path) -> None:
    file = tmp_path / "people.csv"
    file.write_text("prompt,response_1,response_2,preference\nName a colour.,Red.,No.,1\n", encoding="utf-8")
    assert judged(JudgementFile(file)).p == 1.0


def test_pairs_are_judgements_too(tmp_path: Path) -> None:
    prompt, red, no = RED_OR_NO
    file = tmp_path / "pairs.jsonl"
    file.write_text(Pair(prompt=prompt, chosen=no, rejected=red, p=0.8).to_json() + "\n", encoding="utf-8")
    assert judged(JudgementFile(file)).p == pytest.approx(0.2)
    plain = read(tmp_path, {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "No."}, name="plain.jsonl")
    assert judged(plain).p == 1.0


def test_identity_is_of_the_judgements_not_of_the_file(tmp_path: Path) -> None:
    other = {**ROW, "prompt": "And now?", "preference": 1}
    first = read(tmp_path, {**ROW, "preference": 1}, other, name="a.jsonl")
    same = read(tmp_path, other, {**ROW, "preference": "a", "who": "me"}, name="b.jsonl")
    different = read(tmp_path, {**ROW, "preference": 2}, other, name="c.jsonl")
    assert first.identity == same.identity != different.identity


@pytest.mark.parametrize("missing", ["prompt", "response_2", "preference"])
def test_missing_columns_are_named(tmp_path: Path, missing: str) -> None:
    row = {key: value for key, value in {**ROW, "preference": 1}.items() if key != missing}
    with pytest.raises(InputError, match="judgements need 'prompt', 'response_1', 'response_2' and 'preference'"):
        read(tmp_path, row)
