"""Fingerprints: what makes two inputs of a stage the same."""

import hashlib
import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

from prefloop.config import Config
from prefloop.errors import InputError
from prefloop.records import Record


def fingerprint(value: Any) -> str:
    """A string that is equal for equal inputs of a stage. Raises TypeError for what has no stable content.

    A function of prefloop is known by its name, because the version counts anyway; one of the user's own also by its
    source. What it calls is not seen.
    """
    if isinstance(getattr(value, "fingerprint", None), str):
        return value.fingerprint
    if isinstance(getattr(value, "identity", None), str):  # an annotator
        return sha256(f"{type(value).__name__} {value.identity}")
    if isinstance(value, Record):
        return sha256(type(value).__name__ + value.to_json())
    if isinstance(value, Config):
        return sha256(type(value).__name__ + json.dumps(value.identity()))
    if isinstance(value, Path):
        return _hash_path(value)
    if isinstance(value, partial):
        return _hash_parts("partial", value.func, value.args, value.keywords)
    if isinstance(value, list | tuple):
        if all(isinstance(item, Record) for item in value):
            return sha256("".join(record.to_json() + "\n" for record in value))  # that of the file of these records
        return _hash_parts("list", *value)
    if isinstance(value, dict):
        return _hash_parts("dict", *sorted(_hash_parts("item", key, item) for key, item in value.items()))
    if value is None or isinstance(value, bool | int | float | str):
        text = f"{type(value).__name__}:{value!r}"
        return text if len(text) <= 100 else sha256(text)  # short ones can be read in the manifest
    if callable(value) and hasattr(value, "__qualname__") and not inspect.ismethod(value):
        name = f"{value.__module__}:{value.__qualname__}"
        if "<" in name:
            raise TypeError(
                f"{name} has no name of its own; define it at the top of a module, or use functools.partial"
            )
        return name if name.startswith("prefloop.") else f"{name}:{sha256(_source(value))}"
    raise TypeError(f"a stage cannot take a {type(value).__name__}: it has no fingerprint")


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # a built-in, or typed in by hand
        return ""


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_parts(kind: str, *parts: Any) -> str:
    return sha256(json.dumps([kind, *map(fingerprint, parts)]))


def hash_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def listing(folder: Path) -> dict[str, list[Any]]:
    """Size and hash of every file below a folder, by its name from there."""
    files = sorted((file.relative_to(folder).as_posix(), file) for file in folder.rglob("*") if file.is_file())
    return {name: [file.stat().st_size, hash_file(file)] for name, file in files}


def hash_listing(files: dict[str, list[Any]]) -> str:
    return sha256(json.dumps(files))


def _hash_path(path: Path) -> str:
    """The contents of a file, or of a folder. Raises InputError when there is none."""
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path")
    return hash_listing(listing(path)) if path.is_dir() else hash_file(path)
