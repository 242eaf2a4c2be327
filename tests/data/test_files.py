"""Every file format that rows are read from, and every way in which a file can be broken."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from prefloop.data.files import read_rows
from prefloop.errors import InputError

ROWS = [{"prompt": "Name a colour.\u2028Or two.", "chosen": "Red, or \"blue\"\nor é", "score": "1"},
        {"prompt": "x", "chosen": "y", "score": "2"}]  # fmt: skip
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'prompt,chosen,score\n"Name a colour.\u2028Or two.","Red, or ""blue""\nor é",1\nx,y,2\n'


def write(path: Path, content: str | bytes) -> Path:
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" and isinstance(content, str) else data)
    return path


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "unit"),
    [
        ("a.jsonl", LINES, "line"),
        ("a.ndjson", LINES, "line"),
        ("a.jsonl.gz", LINES, "line"),
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n"), "line"),
        ("a.json", json.dumps(ROWS, indent=2), "row"),
        ("a.json", json.dumps({"version": 1, "data": ROWS}), "row"),
        ("a.json", LINES, "row"),
        ("a.json.gz", json.dumps(ROWS), "row"),
        ("a.csv", CSV, "row"),
        ("a.csv.gz", CSV, "row"),
    ],
)
def test_text_formats_hold_the_same_rows(tmp_path: Path, name: str, content: str, unit: str) -> None:
    path = write(tmp_path / name, content)
    rows = read_rows(path)
    assert [row.data for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{path} {unit} 1", f"{path} {unit} 2"]


def test_parquet_keeps_lists_of_messages(tmp_path: Path) -> None:
    made = [{"prompt": [{"role": "user", "content": "é"}], "p": 0.25}, {"prompt": [], "p": None}]
    datasets.Dataset.from_list(made).to_parquet(tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert [row.data for row in rows] == made
    assert rows.rows[1].where == f"{tmp_path / 'a.parquet'} row 2"


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n\n  \n{"a": 2}')
    assert [(row.number, row.data) for row in read_rows(path)] == [(1, {"a": 1}), (4, {"a": 2})]


def test_empty_csv_cell_is_no_value_and_long_cells_are_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"a,b\n,{'x' * 200_000}\n")
    (row,) = read_rows(path)
    assert row.data == {"a": None, "b": "x" * 200_000}
    assert read_rows(path).columns == ["b"]


def test_split_of_a_file_is_its_split_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1, "split": "train"}\n{"a": 2, "split": "test"}\n{"a": 3}\n')
    assert [row.data["a"] for row in read_rows(path, split="test")] == [2]
    assert [row.where for row in read_rows(f"{path}:test")] == [f"{path} line 2"]
    assert len(read_rows(path)) == 3
    assert message_of(lambda: read_rows(path, split="tests")) == (
        f"{path}: there is no split 'tests'; splits: test, train. Did you mean 'test'?"
    )
    assert message_of(lambda: read_rows(f"{path}:test", split="train")) == (
        f"'{path}:test' names the split 'test' and split='train' another; give one of them"
    )
    path = write(tmp_path / "b.jsonl", '{"a": 1}')
    assert message_of(lambda: read_rows(path, split="train")) == (
        f"{path}: there are no splits here, so split 'train' cannot be chosen; leave it out"
    )


def test_saved_dataset_folder(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    rows = read_rows(folder)
    assert [row.data for row in rows] == ROWS
    assert rows.rows[0].where == f"{folder} row 1"
    assert message_of(lambda: read_rows(folder, split="train")) == (
        f"{folder}: there are no splits here, so split 'train' cannot be chosen; leave it out"
    )


def test_saved_dataset_dict_folder(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    parts = {"train_prefs": datasets.Dataset.from_list(ROWS[:1]), "test_prefs": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(**parts).save_to_disk(folder)
    assert [row.data for row in read_rows(folder, split="test_prefs")] == ROWS[1:]
    assert [row.data for row in read_rows(f"{folder}:train_prefs")] == ROWS[:1]
    assert message_of(lambda: read_rows(folder)) == (
        f"{folder}: choose one of its splits (train_prefs, test_prefs), as in {folder}:train_prefs"
    )
    assert message_of(lambda: read_rows(f"{folder}:train")) == (
        f"{folder}: there is no split 'train'; splits: train_prefs, test_prefs. Did you mean 'train_prefs'?"
    )
    single = tmp_path / "single"
    datasets.DatasetDict({"train": parts["train_prefs"]}).save_to_disk(single)
    assert [row.data for row in read_rows(single)] == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", "", "there are no rows in it; expected at least one"),
        ("a.json", " \n", "there are no rows in it; expected at least one"),
        ("a.json", "[]", "there are no rows in it; expected at least one"),
        ("a.csv", "", "there are no rows in it; expected at least one"),
        ("a.csv", "prompt,chosen\n", "there are no rows in it; expected at least one"),
        ("a.txt", "x", "the ending '.txt' is unknown; known: .csv, .json, .jsonl, .ndjson, .parquet (the text formats "
                       "also with .gz), folders of the datasets library, and hub names"),
        ("a.parquet.gz", "x", "the ending '.parquet.gz' is unknown; known: .csv, .json, .jsonl, .ndjson, .parquet (the "
                              "text formats also with .gz), folders of the datasets library, and hub names"),
        ("prefs", "x", "it has no ending; known: .csv, .json, .jsonl, .ndjson, .parquet (the text formats "
                       "also with .gz), folders of the datasets library, and hub names"),
        ("a.json", '{"prompt": "x", "n": 1}', "expected a list of objects or {\"data\": [...]}, found an object with "
                                             "keys 'prompt', 'n'; a file of one object per line is called .jsonl"),
        ("a.json", "3", "expected a list of objects or {\"data\": [...]}, found a number; a file of one object per "
                        "line is called .jsonl"),
        ("a.csv", "a,a\n1,2\n", "'a' is there twice in the first line, which must name each column once: a,a"),
        ("a.csv", "a,,b\n1,2,3\n", "a name is empty in the first line, which must name each column once: a,,b"),
        ("a.csv", 'a\n"x', "not valid CSV (unexpected end of data); check the quotes"),
        ("a.jsonl", b'{"a": "\xff"}', "not UTF-8 text (byte 0xff at position 7); save it as UTF-8"),
        ("a.jsonl.gz", b"no gzip", "not a whole gzip file (Not a gzipped file (b'no')); copy or compress it again"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0)[:-9], "not a whole gzip file (Compressed file ended before "
                       "the end-of-stream marker was reached); copy or compress it again"),
    ],
)  # fmt: skip
def test_broken_file_is_one_line(tmp_path: Path, name: str, content: str | bytes, problem: str) -> None:
    path = write(tmp_path / name, content)
    assert message_of(lambda: read_rows(path)) == f"{path}: {problem}"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2,}\n', "line 2: not valid JSON (Illegal trailing comma before end of object at "
                    "column 8); expected one object per line"),
        ("a.jsonl", '{"a": 1}\n{"a": "cut of', "line 2: not valid JSON (Unterminated string starting at at column 7); "
                    "expected one object per line"),
        ("a.jsonl", '{"a": 1}\n\n["a"]\n', "line 3: expected a JSON object {...}, found a list"),
        ("a.jsonl", "null", "line 1: expected a JSON object {...}, found null"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "line 2: not valid JSON (Expecting ':' delimiter at column 7)"),
        ("a.json", '{"a": 1}\n{"a" 2}', "line 2: not valid JSON (Expecting ':' delimiter at column 6); expected one "
                   "object per line"),
        ("a.json", '[{"a": 1}, "b", true]', "row 2: expected a JSON object {...}, found a text"),
        ("a.csv", "a,b\n1,2\n\n3,4,5\n", "row 2: 3 cells under 2 columns; put text with commas, quotes or line ends "
                  "between double quotes"),
    ],
)  # fmt: skip
def test_broken_row_is_named(tmp_path: Path, name: str, content: str, problem: str) -> None:
    if "trailing comma" in problem and sys.version_info < (3, 13):
        problem = problem.replace("Illegal trailing comma before end of object at column 8",
                                  "Expecting property name enclosed in double quotes at column 9")  # fmt: skip
    path = write(tmp_path / name, content)
    assert message_of(lambda: read_rows(path)) == f"{path} {problem}"


def test_damaged_parquet_and_folders(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", b"PAR1 but not really")
    assert message_of(lambda: read_rows(path)).startswith(f"{path}: not a readable Parquet file (")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert message_of(lambda: read_rows(empty)) == (
        f"{empty}: this folder was not written by the datasets library's save_to_disk; name a file"
    )
    write(empty / "b.jsonl", LINES)
    assert message_of(lambda: read_rows(empty)) == (
        f"{empty}: this folder was not written by the datasets library's save_to_disk; name one file in it (b.jsonl)"
    )
    write(empty / "state.json", "{}")
    assert message_of(lambda: read_rows(empty)).startswith(f"{empty}: the datasets library cannot load this folder (")
    hollow = tmp_path / "hollow.parquet"
    datasets.Dataset.from_dict({"prompt": []}).to_parquet(hollow)
    assert message_of(lambda: read_rows(hollow)) == f"{hollow}: there are no rows in it; expected at least one"


def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix = "no such file or folder; check the path, or name a hub data set as org/name"
    assert message_of(lambda: read_rows(tmp_path / "a.jsonl")) == f"{tmp_path / 'a.jsonl'}: {fix}"
    monkeypatch.chdir(tmp_path)
    assert message_of(lambda: read_rows("data/a.jsonl.gz")) == f"data/a.jsonl.gz: {fix}"
    assert message_of(lambda: read_rows("imdb")) == f"imdb: {fix}"


def test_unreachable_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = message_of(lambda: read_rows("nobody/nothing-here:train"))
    assert message.startswith(
        "nobody/nothing-here: neither a file or folder here nor reachable as a data set on the hub ("
    )
    assert message.endswith("); check the spelling and the network, or download it and name the file")


def test_reading_text_imports_nothing_heavy() -> None:
    program = (
        "import sys; from prefloop.data.mapping import load_prompts; load_prompts('seed');"
        "print(*sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == ""


def test_reading_parquet_imports_no_torch(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    program = (
        "import sys; from prefloop.data.files import read_rows;"
        f"read_rows({str(tmp_path / 'a.parquet')!r}); read_rows({str(tmp_path / 'saved')!r});"
        "print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
