"""Artifacts: the results of stages as files and folders, written whole and read back as the same values."""

import hashlib
import importlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from prefloop.atomic import write_atomically, write_folder_atomically
from prefloop.config import Config
from prefloop.errors import CheckFailed
from prefloop.fingerprints import hash_file, hash_listing, listing
from prefloop.records import Record

R = TypeVar("R", bound=Record)


class Records(list[R]):
    """The records of a finished stage, with the file they are in and its fingerprint.

    Read-only, because the fingerprint is the file's: a changed list would pass for what the file holds. Slices, sums
    and copies are ordinary lists.
    """

    def __init__(self, records: Sequence[R], path: Path, fingerprint: str) -> None:
        super().__init__(records)
        self.path = path
        self.fingerprint = fingerprint

    def __reduce__(self) -> tuple[type, tuple[list[R]]]:
        return list, (self[:],)  # copying and pickling would otherwise append to an empty one


def _read_only(*_: Any, **__: Any) -> Any:
    raise TypeError("the records of a stage are read-only; change a copy: list(records)")


for _change in "append clear extend insert pop remove reverse sort __delitem__ __iadd__ __imul__ __setitem__".split():
    setattr(Records, _change, _read_only)


@dataclass(frozen=True)
class FolderArtifact:
    """The folder that a finished stage has written."""

    name: str
    path: Path
    fingerprint: str


def write_artifact(root: Path, name: str, result: Any, output: Path | None) -> dict[str, Any]:
    """Write a stage's result whole; returns what the manifest says of it."""
    if isinstance(result, Path):
        if result != output:
            raise TypeError(f"stage {name} returned the path {result}, which is not its stage.output")
        write_folder_atomically(root / name, lambda temporary: _move_contents(result, temporary))
        files = listing(root / name)
        return {"path": name, "kind": "folder", "sha256": hash_listing(files), "files": files}
    if isinstance(result, list | tuple):
        kinds = {type(record) for record in result}
        if len(kinds) > 1 or not all(issubclass(kind, Record) for kind in kinds):
            raise TypeError(f"stage {name} returned a list of {kinds}; expected records of one kind")
        text = "".join(_line(record, name) + "\n" for record in result)
        kind, type_name, suffix = "records", _name(kinds.pop()) if kinds else None, ".jsonl"
    elif isinstance(result, Record | Config):
        text, kind, type_name, suffix = _line(result, name) + "\n", "record", _name(type(result)), ".json"
    elif isinstance(result, dict):
        text, kind, type_name, suffix = json.dumps(result, indent=1) + "\n", "json", None, ".json"
    else:
        raise TypeError(
            f"stage {name} returned a {type(result).__name__}; expected records, a config, a dictionary or its output"
        )
    data = text.encode()
    write_atomically(root / (name + suffix), data)
    digest = hashlib.sha256(data).hexdigest()
    return {"path": name + suffix, "kind": kind, "type": type_name, "sha256": digest, "bytes": len(data)}


def read_artifact(root: Path, name: str, artifact: dict[str, Any]) -> Any:
    """A finished artifact as the value that `Run.stage` returns."""
    path, kind = root / artifact["path"], artifact["kind"]
    if kind == "folder":
        return FolderArtifact(name=name, path=path, fingerprint=artifact["sha256"])
    text = path.read_text(encoding="utf-8")
    if kind == "json":
        return json.loads(text)
    if artifact["type"] is None:
        return Records([], path, artifact["sha256"])
    module, _, qualified = artifact["type"].partition(":")
    record_type = getattr(importlib.import_module(module), qualified)
    if kind == "record":
        return record_type.model_validate_json(text)
    return Records([record_type.from_json(line) for line in text.split("\n")[:-1]], path, artifact["sha256"])


def _line(value: Record | Config, name: str) -> str:
    """One line of JSON from which the same value is read. JSON has no NaN or infinity: they would become null."""

    def written(value: Record | Config) -> str:
        return value.to_json() if isinstance(value, Record) else value.model_dump_json()

    line = written(value)
    try:
        same = written(type(value).model_validate_json(line)) == line
    except ValidationError:
        same = False
    if not same:
        raise CheckFailed(
            f"stage {name}: a {type(value).__name__} does not read back from JSON as it was written; it should hold no "
            f"NaN and no infinite number: {line if len(line) <= 200 else line[:197] + '...'}"
        )
    return line


def is_intact(root: Path, artifact: dict[str, Any]) -> bool:
    """True when a file is as it was written, and the files of a folder (a model: large) have the sizes they had."""
    if artifact["kind"] == "folder":
        folder = root / artifact["path"]
        return all((folder / n).is_file() and (folder / n).stat().st_size == size for n, (size, _) in
                   artifact["files"].items())  # fmt: skip
    path = root / artifact["path"]
    return path.is_file() and hash_file(path) == artifact["sha256"]


def _move_contents(source: Path, target: Path) -> None:
    for entry in sorted(source.iterdir()):
        shutil.move(str(entry), target / entry.name)


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
