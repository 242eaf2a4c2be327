"""Rows in: a file, a folder of the `datasets` library or a hub data set becomes plain rows that know where they stand.

    .jsonl .ndjson        one JSON object per line
    .json                 a list of objects, {"data": [...]}, or one object per line
    .csv                  the first line names the columns
    .parquet              one table
    folder                written by `save_to_disk`: a Dataset, or a DatasetDict with a choice of split
    org/name              a data set on the hub

The text formats may be compressed (`.jsonl.gz`). A split is named after a colon (`org/name:train`) or with `split=`.
"""

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefloop.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Row:
    """One row: its columns, the source it comes from, and its 1-based number there (`unit`: a "line" or a "row")."""

    data: dict[str, Any]
    source: str
    unit: str
    number: int

    @property
    def place(self) -> str:
        """`line 12`."""
        return f"{self.unit} {self.number}"

    @property
    def where(self) -> str:
        """`prefs.jsonl line 12`."""
        return f"{self.source} {self.place}"


@dataclass(frozen=True)
class Rows:
    """All rows of a source, in order; never none."""

    source: str
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """The columns that have a value in at least one row, in order of first appearance."""
        return list({key: None for row in self.rows for key, value in row.data.items() if value is not None})


def read_rows(source: str | Path, *, split: str | None = None) -> Rows:
    """The rows of a file, a `datasets` folder or a hub data set.

    `split` chooses among the splits of a data set, or the rows of a file whose column `split` has that value.
    Raises InputError, in one line with the fix, for anything that cannot be read as a table of named columns.
    """
    name, split = _split_of(str(source), split)
    path = Path(name).expanduser()
    if path.is_dir():
        rows = _from_dataset(_load_folder(path), name, split)
    elif path.is_file():
        rows = _from_file(path, name)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and _reader_of(path) is None:
        rows = _from_dataset(_load_from_hub(name), name, split)
    else:
        raise InputError(f"{name}: no such file or folder; check the path, or name a hub data set as org/name")
    if not rows.rows:
        raise InputError(f"{name}: there are no rows in it; expected at least one")
    return choose_split(rows, split) if split and path.is_file() else rows


def _split_of(source: str, split: str | None) -> tuple[str, str | None]:
    """`("org/name", "train")` for `"org/name:train"`; a path that exists is never cut."""
    found = re.fullmatch(r"(.+):([\w.-]+)", source)
    if found is None or Path(source).exists():
        return source, split
    if split not in (None, found[2]):
        raise InputError(f"{source!r} names the split {found[2]!r} and split={split!r} another; give one of them")
    return found[1], found[2]


def _from_file(path: Path, name: str) -> Rows:
    reader = _reader_of(path)
    if reader is None:
        known = ", ".join(sorted(READERS))
        ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
        raise InputError(
            f"{name}: {f'the ending {ending!r} is unknown' if ending else 'it has no ending'}; known: {known} "
            "(the text formats also with .gz), folders of the datasets library, and hub names"
        )
    unit, read = reader
    try:
        numbered = read(path, name)
    except (gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{name}: not a whole gzip file ({error}); copy or compress it again") from None
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise InputError(f"{name}: not UTF-8 text ({byte}); save it as UTF-8") from None
    return Rows(name, tuple(Row(data, name, unit, number) for number, data in numbered))


def choose_split(rows: Rows, split: str) -> Rows:
    """The rows whose column `split` is `split`. Raises InputError when there is none."""
    splits = sorted({str(row.data["split"]) for row in rows if row.data.get("split") is not None})
    if split not in splits:
        raise InputError(f"{rows.source}: {_no_such_split(split, splits)}")
    return Rows(rows.source, tuple(row for row in rows if str(row.data.get("split")) == split))


def _no_such_split(split: str, splits: list[str]) -> str:
    if not splits:
        return f"there are no splits here, so split {split!r} cannot be chosen; leave it out"
    return f"there is no split {split!r}; splits: {', '.join(splits)}.{did_you_mean(split, splits)}"


Numbered = list[tuple[int, dict[str, Any]]]


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")


def _read_jsonl(path: Path, name: str) -> Numbered:
    return _parse_lines(_read_text(path), name)


def _parse_lines(text: str, name: str) -> Numbered:
    """One object per line; blank lines are passed over. Only "\\n" ends a line: JSON text may hold other separators."""
    rows: Numbered = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"not valid JSON ({error.msg} at column {error.colno})"
            raise InputError(f"{name} line {number}: {problem}; expected one object per line") from None
        if not isinstance(row, dict):
            raise InputError(f"{name} line {number}: expected a JSON object {{...}}, found {_json_type(row)}")
        rows.append((number, row))
    check_text(rows, text, f"{name} line")
    return rows


def check_text(rows: Numbered, source: str, where: str) -> None:
    """Raises InputError for a JSON text that holds half of a surrogate pair, which no tokenizer and no file takes."""
    if "\\ud" not in source.lower():
        return
    for number, row in rows:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise InputError(
                f"{where} {number}: a text has {half}, half of a character that JSON writes as two; write both halves, "
                "or remove it"
            ) from None


def _read_json(path: Path, name: str) -> Numbered:
    text = _read_text(path)
    if not text.strip():
        return []
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):  # JSON lines under the ending .json
            return _parse_lines(text, name)
        problem = f"{error.msg} at column {error.colno}"
        raise InputError(f"{name} line {error.lineno}: not valid JSON ({problem})") from None
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    if not isinstance(data, list):
        keys = f" with keys {', '.join(map(repr, data))}" if isinstance(data, dict) else ""
        raise InputError(
            f'{name}: expected a list of objects or {{"data": [...]}}, found {_json_type(data)}{keys}; '
            "a file of one object per line is called .jsonl"
        )
    for number, row in enumerate(data, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{name} row {number}: expected a JSON object {{...}}, found {_json_type(row)}")
    rows = list(enumerate(data, start=1))
    check_text(rows, text, f"{name} row")
    return rows


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _read_csv(path: Path, name: str) -> Numbered:
    """Rows by column name; an empty cell is no value. Cells may span lines, so rows are counted, not lines."""
    text = _read_text(path)
    limit = csv.field_size_limit(sys.maxsize)  # the module's default cuts at 128 KiB, less than a long conversation
    try:
        lines = [cells for cells in csv.reader(io.StringIO(text, newline=""), strict=True) if cells]
    except csv.Error as error:
        raise InputError(f"{name}: not valid CSV ({error}); check the quotes") from None
    finally:
        csv.field_size_limit(limit)
    if not lines:
        return []
    header = [cell.strip() for cell in lines[0]]
    wrong = [cell for cell in header if not cell or header.count(cell) > 1]
    if wrong:
        problem = f"{wrong[0]!r} is there twice" if wrong[0] else "a name is empty"
        raise InputError(f"{name}: {problem} in the first line, which must name each column once: {','.join(header)}")
    for number, cells in enumerate(lines[1:], start=1):
        if len(cells) != len(header):
            raise InputError(
                f"{name} row {number}: {len(cells)} cells under {len(header)} columns; "
                "put text with commas, quotes or line ends between double quotes"
            )
    return [
        (number, {column: cell or None for column, cell in zip(header, cells, strict=True)})
        for number, cells in enumerate(lines[1:], start=1)
    ]


def _read_parquet(path: Path, name: str) -> Numbered:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{name}: not a readable Parquet file ({_one_line(error)}); write or copy it again") from None
    return list(enumerate(rows, start=1))


READERS: dict[str, tuple[str, Callable[[Path, str], Numbered]]] = {
    ".jsonl": ("line", _read_jsonl),
    ".ndjson": ("line", _read_jsonl),
    ".json": ("row", _read_json),
    ".csv": ("row", _read_csv),
    ".parquet": ("row", _read_parquet),
}
"""Per ending: what a row's number counts, and the reader."""


def _reader_of(path: Path) -> tuple[str, Callable[[Path, str], Numbered]] | None:
    if path.suffix == ".gz":
        return None if path.stem.endswith(".parquet") else READERS.get(Path(path.stem).suffix)
    return READERS.get(path.suffix)


def _load_folder(path: Path) -> Any:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = [file.name for file in sorted(path.iterdir()) if _reader_of(file) is not None]
        fix = f"name one file in it ({', '.join(files[:4])})" if files else "name a file"
        raise InputError(f"{path}: this folder was not written by the datasets library's save_to_disk; {fix}")
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # damaged folders fail in many ways inside the library; to the user they are one thing
        raise InputError(
            f"{path}: the datasets library cannot load this folder ({_one_line(error)}); write it again"
        ) from None


def _load_from_hub(name: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name)
    except Exception as error:  # the hub client has a dozen failure types; to the user they are one thing
        raise InputError(
            f"{name}: neither a file or folder here nor reachable as a data set on the hub ({_one_line(error)}); "
            "check the spelling and the network, or download it and name the file"
        ) from None


def _from_dataset(data: Any, name: str, split: str | None) -> Rows:
    """Rows of a `datasets.Dataset`, or of one split of a `DatasetDict`."""
    import datasets

    if isinstance(data, datasets.Dataset):
        if split is not None and split != str(data.split):
            here = [str(data.split)] if data.split is not None else []
            raise InputError(f"{name}: {_no_such_split(split, here)}")
    else:
        splits = [str(key) for key in data]
        if split is None and len(splits) > 1:
            raise InputError(f"{name}: choose one of its splits ({', '.join(splits)}), as in {name}:{splits[0]}")
        if split is not None and split not in splits:
            raise InputError(f"{name}: {_no_such_split(split, splits)}")
        data = data[split or splits[0]]
    return Rows(name, tuple(Row(dict(row), name, "row", number) for number, row in enumerate(data, start=1)))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
