"""Runs: a folder of named stages with atomic artifacts, a manifest and an event log; the same command continues it.

    runs/NAME/config.yaml  manifest.json  events.jsonl  round-1/{groups,feedback,pairs}.jsonl  round-1/model/

A stage is a function call. Its artifact is written whole under another name, flushed to disk and renamed; then, and
only then, its line goes into the manifest, which is replaced in the same way; then its scratch folder is removed. A
kill before the rename leaves the scratch folder, from which the stage goes on; a kill after it leaves an artifact that
the manifest does not know, which is made again to the same bytes; a kill after the manifest leaves a finished stage and
perhaps a scratch folder, which the next opening removes.
"""

import hashlib
import importlib
import inspect
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import yaml
from rich.console import Console

from prefloop import __version__
from prefloop.atomic import cannot_write, remove_leftovers, write_atomically, write_folder_atomically
from prefloop.config import Config
from prefloop.errors import InputError
from prefloop.progress import show_progress
from prefloop.records import Record

R = TypeVar("R", bound=Record)
SCRATCH = ".partial"


class Records(list[R]):
    """The records of a finished stage, with the file they are in and its fingerprint."""

    def __init__(self, records: Sequence[R], path: Path, fingerprint: str) -> None:
        super().__init__(records)
        self.path = path
        self.fingerprint = fingerprint


@dataclass(frozen=True)
class FolderArtifact:
    """The folder that a finished stage has written."""

    name: str
    path: Path
    fingerprint: str


@dataclass
class Stage:
    """What a stage function gets when it has a parameter `stage`; `Stage.detached()` is one outside any run.

    scratch: a folder for partial work, kept when the stage is killed and given back when it is run again.
    output: for a stage that writes a folder (a model): fill it and return it.
    """

    name: str = ""
    scratch: Path | None = None
    output: Path | None = None
    counts: dict[str, int] = field(default_factory=dict)
    run: "Run | None" = None

    @classmethod
    def detached(cls) -> Self:
        return cls()

    @contextmanager
    def progress(self, total: int, *, unit: str, description: str = "") -> Iterator[Callable[[int], None]]:
        """Yields `advance(n)`, to be called as `total` units of work are done."""
        label = f"{self.name}: {description}" if description else self.name
        with show_progress(self.run.console if self.run else None, label, total, unit) as advance:
            yield advance

    def count(self, reason: str, n: int = 1) -> None:
        """Add to a count that ends in the manifest and in the report."""
        self.counts[reason] = self.counts.get(reason, 0) + n

    def event(self, kind: str, **fields: Any) -> None:
        """One line in the event log."""
        if self.run:
            self.run.event(kind, stage=self.name, **fields)

    def note(self, text: str) -> None:
        """One line for the person watching, also in the event log."""
        if self.run:
            self.run.note(text, stage=self.name)


class Run:
    """A run folder that is open in this process. Use `with Run.open(...) as run`."""

    def __init__(self, path: Path, *, recipe: str, config: Config, console: Console | None) -> None:
        self.path, self.recipe, self.config, self.console = path, recipe, config, console
        self.stages: dict[str, dict[str, Any]] = {}
        self.current: str | None = None
        self._lock: IO[str] | None = None

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, recipe: str, config: Config, console: Console | None = None) -> Iterator[Self]:
        """Create or continue a run folder. Raises InputError when it belongs to something else, or is in use."""
        run = cls(Path(path), recipe=recipe, config=config, console=console)
        run._take()
        try:
            yield run
        except KeyboardInterrupt:
            run.event("interrupted", stage=run.current)
            run.say(f"interrupted in {run.current or 'the run'}; run the same command again to continue")
            raise
        except BaseException as error:
            run.event("failed", stage=run.current, type=type(error).__name__, message=str(error))
            raise
        finally:
            if run._lock:
                run._lock.close()

    def _take(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            mine = {"config.yaml", ".lock", "manifest.json", "events.jsonl"}
            foreign = [entry.name for entry in self.path.iterdir() if entry.name not in mine]
        except OSError as error:
            raise cannot_write(self.path, error) from None
        if foreign and not (self.path / "config.yaml").is_file():
            raise InputError(
                f"{self.path} is not empty and not a run folder (it holds {sorted(foreign)[0]}); give another --out"
            )
        self._lock = _lock(self.path / ".lock")
        remove_leftovers(self.path)
        self._check_config()
        self._read_manifest()
        for scratch in self.path.rglob("*" + SCRATCH):
            if scratch.name.removesuffix(SCRATCH) and self._finished(scratch):
                shutil.rmtree(scratch)
        self.event("opened", version=__version__, pid=os.getpid())

    def _finished(self, scratch: Path) -> bool:
        """True for the scratch folder of a stage that ended before it could be removed."""
        entry = self.stages.get(str(scratch.relative_to(self.path)).removesuffix(SCRATCH))
        return entry is not None and entry["key"] == _scratch_key(scratch)

    def _check_config(self) -> None:
        """A run folder belongs to one recipe and one configuration."""
        file = self.path / "config.yaml"
        if not file.is_file():
            write_atomically(file, f"# prefloop {self.recipe}\n" + self.config.to_yaml())
            return
        text = file.read_text(encoding="utf-8")
        recipe = text.splitlines()[0].removeprefix("# prefloop ") if text.startswith("# prefloop ") else None
        fix = "give another --out, or the same options as before"
        if recipe != self.recipe:
            raise InputError(f"{self.path} is a run of {recipe or 'something else'}, not of {self.recipe}; {fix}")
        here, asked = _flat(yaml.safe_load(text) or {}), _flat(yaml.safe_load(self.config.to_yaml()) or {})
        different = [
            f"{name}: {here.get(name, 'not set')} here, {asked.get(name, 'not set')} asked for"
            for name in {**here, **asked}
            if here.get(name) != asked.get(name)
        ]
        if different:
            raise InputError(f"{self.path} was started with other options ({'; '.join(different)}); {fix}")

    def _read_manifest(self) -> None:
        file = self.path / "manifest.json"
        if not file.is_file():
            return
        try:
            self.stages = dict(json.loads(file.read_text(encoding="utf-8"))["stages"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{file} is damaged (not the JSON that prefloop writes); delete it to compute the stages again, "
                "or give another --out"
            ) from None

    def _write_manifest(self) -> None:
        manifest = {
            "recipe": self.recipe,
            "version": __version__,
            "environment": environment(),
            "stages": self.stages,
        }
        write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    def event(self, kind: str, **fields: Any) -> None:
        """Append a line to events.jsonl. A half line that a kill left stays a line of its own."""
        file = self.path / "events.jsonl"
        line = json.dumps({"time": _now(), "event": kind, **fields}, default=str)
        try:
            with file.open("ab+") as handle:
                if handle.tell() and (handle.seek(-1, os.SEEK_END), handle.read(1))[1] != b"\n":
                    handle.write(b"\n")
                handle.write(line.encode() + b"\n")
        except OSError as error:
            raise cannot_write(file, error) from None

    def note(self, text: str, stage: str | None = None) -> None:
        """One line for the person watching, also in the event log."""
        self.event("note", stage=stage, text=text)
        self.say(f"{stage}: {text}" if stage else text)

    def say(self, text: str) -> None:
        if self.console:
            self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def round(self, t: int) -> "Round":
        """The stages of round t: `run.round(2).stage("groups", ...)` is stage `round-2/groups`."""
        return self.part(f"round-{t}")

    def part(self, label: str) -> "Round":
        """Stages under a common name."""
        return Round(self, label)

    def stage(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The artifact of `function(*args, **kwargs)`: read when it is there already, computed and written otherwise.

        A list of records becomes NAME.jsonl and comes back as `Records`; a record or a dictionary NAME.json; the folder
        that a function filled (`stage.output`) comes back as a `FolderArtifact`. It is computed again when the
        function, an argument's fingerprint or the prefloop version has changed, or when its file is not as it was.
        """
        inputs = {
            "function": fingerprint(function),
            "args": [fingerprint(value) for value in args],
            "kwargs": {key: fingerprint(value) for key, value in kwargs.items()},
            "version": __version__,
        }
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        entry = self.stages.get(name)
        if entry and entry["key"] == key and _intact(self.path, entry["artifact"]):
            self.say(f"{name}: done before, reused")
            return _read(self.path, name, entry["artifact"])
        self.current = name
        stage = self._begin(name, key)
        takes_stage = "stage" in inspect.signature(function).parameters
        started = time.monotonic()
        result = function(*args, **kwargs, **({"stage": stage} if takes_stage else {}))
        artifact = _write(self.path, name, result, stage)
        seconds = time.monotonic() - started
        self.stages[name] = {
            "key": key,
            "inputs": inputs,
            "artifact": artifact,
            "counts": stage.counts,
            "seconds": round(seconds, 3),
            "finished": _now(),
        }
        self._write_manifest()
        assert stage.scratch is not None
        shutil.rmtree(stage.scratch, ignore_errors=True)
        self.event("finished", stage=name, seconds=round(seconds, 3), counts=stage.counts)
        counts = ", ".join(f"{n} {reason}" for reason, n in stage.counts.items())
        self.say(f"{name}: {seconds:.1f} s{'; ' + counts if counts else ''}")
        self.current = None
        return _read(self.path, name, artifact)

    def _begin(self, name: str, key: str) -> Stage:
        """A stage with its scratch folder: the one of an earlier try at the same inputs, or a new one."""
        scratch = self.path / (name + SCRATCH)
        try:
            if _scratch_key(scratch) != key:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
                write_atomically(scratch / "key", key)
            # A half-filled output of an earlier try is never built upon.
            shutil.rmtree(scratch / "output", ignore_errors=True)
        except OSError as error:
            raise cannot_write(scratch, error) from None
        self.event("started", stage=name)
        return Stage(name=name, scratch=scratch, output=scratch / "output", run=self)


@dataclass(frozen=True)
class Round:
    """A view of a run whose stage names begin with `label`."""

    run: Run
    label: str

    def stage(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`Run.stage` for `label/name`."""
        return self.run.stage(f"{self.label}/{name}", function, *args, **kwargs)


def fingerprint(value: Any) -> str:
    """A string that is equal for equal inputs of a stage. Raises TypeError for what has no stable content."""
    if isinstance(getattr(value, "fingerprint", None), str):
        return value.fingerprint
    if isinstance(value, Record):
        return _sha256(type(value).__name__ + value.to_json())
    if isinstance(value, Config):
        return _sha256(type(value).__name__ + value.model_dump_json())
    if isinstance(value, Path):
        return _hash_file(value)
    if isinstance(value, partial):
        return fingerprint([value.func, list(value.args), dict(value.keywords)])
    if isinstance(value, list | tuple):
        total = hashlib.sha256(b"list")
        for item in value:
            total.update(fingerprint(item).encode() + b"\n")
        return total.hexdigest()
    if isinstance(value, dict):
        return fingerprint([[str(key), item] for key, item in sorted(value.items())])
    if value is None or isinstance(value, bool | int | float | str):
        return f"{type(value).__name__}:{value!r}"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    raise TypeError(f"a stage cannot take a {type(value).__name__}: it has no fingerprint")


def environment() -> dict[str, Any]:
    """Versions and hardware, read without importing anything heavy."""
    versions: dict[str, Any] = {"prefloop": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**versions, "platform": platform.platform(), "cpus": os.cpu_count()}


def _write(root: Path, name: str, result: Any, stage: Stage) -> dict[str, Any]:
    """Write a stage's result whole; returns what the manifest says of it."""
    if isinstance(result, Path):
        if result != stage.output:
            raise TypeError(f"stage {name} returned the path {result}, which is not its stage.output")
        folder = root / name
        write_folder_atomically(folder, lambda temporary: _move_contents(result, temporary))
        files = {
            str(file.relative_to(folder)): [file.stat().st_size, _hash_file(file)]
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        return {"path": name, "kind": "folder", "sha256": _sha256(json.dumps(files)), "files": files}
    if isinstance(result, list | tuple):
        kinds = {type(record) for record in result}
        if len(kinds) > 1 or not all(issubclass(kind, Record) for kind in kinds):
            raise TypeError(f"stage {name} returned a list of {kinds}; expected records of one kind")
        text = "".join(record.to_json() + "\n" for record in result)
        kind, type_name, suffix = "records", _name(kinds.pop()) if kinds else None, ".jsonl"
    elif isinstance(result, Record):
        text, kind, type_name, suffix = result.to_json() + "\n", "record", _name(type(result)), ".json"
    elif isinstance(result, dict):
        text, kind, type_name, suffix = json.dumps(result, indent=1) + "\n", "json", None, ".json"
    else:
        raise TypeError(
            f"stage {name} returned a {type(result).__name__}; expected records, a dictionary or its output"
        )
    data = text.encode()
    write_atomically(root / (name + suffix), data)
    digest = hashlib.sha256(data).hexdigest()
    return {"path": name + suffix, "kind": kind, "type": type_name, "sha256": digest, "bytes": len(data)}


def _read(root: Path, name: str, artifact: dict[str, Any]) -> Any:
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
        return record_type.from_json(text)
    return Records([record_type.from_json(line) for line in text.split("\n")[:-1]], path, artifact["sha256"])


def _intact(root: Path, artifact: dict[str, Any]) -> bool:
    """True when the artifact's files are there with the sizes they had."""
    if artifact["kind"] == "folder":
        folder = root / artifact["path"]
        return all((folder / n).is_file() and (folder / n).stat().st_size == size for n, (size, _) in
                   artifact["files"].items())  # fmt: skip
    path = root / artifact["path"]
    return path.is_file() and path.stat().st_size == artifact["bytes"]


def _move_contents(source: Path, target: Path) -> None:
    for entry in sorted(source.iterdir()):
        shutil.move(str(entry), target / entry.name)


def _scratch_key(scratch: Path) -> str | None:
    file = scratch / "key"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _lock(file: Path) -> IO[str] | None:
    """Hold a run folder for this process; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on this platform: two processes in one folder are then the user's care
        return None
    try:
        handle = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise cannot_write(file, error) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise InputError(
            f"{file.parent} is in use by another prefloop process (pid {owner}); wait, or end it"
        ) from None
    handle.seek(0)
    handle.truncate()
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


__all__ = [
    "FolderArtifact",
    "Records",
    "Round",
    "Run",
    "Stage",
    "environment",
    "fingerprint",
    "write_atomically",
    "write_folder_atomically",
]
