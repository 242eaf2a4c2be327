"""Runs: a folder of named stages with atomic artifacts, a manifest and an event log; the same command continues it.

    runs/NAME/config.yaml  manifest.json  events.jsonl  round-1/{groups,feedback,pairs}.jsonl  round-1/model/

A stage is a function call. Its artifact is written whole under another name, flushed to disk and renamed; then, and
only then, its line goes into the manifest, which is replaced in the same way; then its scratch folder is removed. A
kill before the rename leaves the scratch folder, from which the stage goes on; a kill after it leaves an artifact that
the manifest does not know, which is made again to the same bytes; a kill after the manifest leaves a finished stage and
perhaps a scratch folder, which the next opening removes. An artifact that is replaced is struck off the manifest
first: a kill in between must not leave the new bytes under the old inputs.
"""

import errno
import inspect
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Self, TypeVar

import yaml
from rich.console import Console

from prefloop import __version__
from prefloop.artifacts import is_intact, read_artifact, write_artifact
from prefloop.atomic import TEMPORARY, cannot_write, remove_leftovers, write_atomically
from prefloop.config import Config, read_yaml
from prefloop.errors import InputError, PrefloopError
from prefloop.fingerprints import fingerprint, sha256
from prefloop.metrics import STREAMED, Tracker, figures, open_tracker
from prefloop.progress import Advance, show_progress
from prefloop.records import Record

R = TypeVar("R", bound=Record)
SCRATCH = ".partial"
HEADER = "# prefloop "
"""How the config.yaml of a run folder begins; the recipe follows."""
STAGE_NAME = re.compile(r"(?!(?:manifest|events)$)\w[\w.-]*(?:/\w[\w.-]*)*(?<!\.partial)")
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
    figures: dict[str, float] = field(default_factory=dict)
    run: "Run | None" = None

    @classmethod
    def detached(cls) -> Self:
        return cls()

    @contextmanager
    def progress(self, total: int, *, unit: str, description: str = "") -> Iterator[Advance]:
        """Yields `advance(n=1)`, to be called as `total` units of work are done."""
        label = f"{self.name}: {description}" if description else self.name
        with show_progress(self.run.console if self.run else None, label, total, unit) as advance:
            yield advance

    def count(self, reason: str, n: int = 1) -> None:
        """Add to a count that ends in the manifest and in the report."""
        self.counts[reason] = self.counts.get(reason, 0) + n

    def figure(self, name: str, value: float) -> None:
        """A measured number that ends in the manifest and in the report."""
        self.figures[name] = value

    def event(self, kind: str, **fields: Any) -> None:
        """One line in the event log."""
        if self.run:
            self.run.event(kind, self.name, **fields)

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
        self.tracker: Tracker | None = None
        self._keys: dict[str, str] = {}
        self._lock: IO[str] | None = None
        self._new = False

    @property
    def manifest(self) -> Mapping[str, dict[str, Any]]:
        """What the manifest says of every stage, by name, in order: inputs, artifact, counts, seconds."""
        return MappingProxyType(self.stages)

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, recipe: str, config: Config, console: Console | None = None) -> Iterator[Self]:
        """Create or continue a run folder. Raises InputError when it belongs to something else, or is in use."""
        run = cls(Path(path), recipe=recipe, config=config, console=console)
        try:
            run._take()
            try:
                run.tracker = open_tracker(getattr(config, "metrics", ""), run.path, config.model_dump(mode="json"))
                yield run
            except BaseException as error:
                run._record_end(error)
                if run._new and not run._begun() and isinstance(error, InputError):
                    shutil.rmtree(
                        run.path, ignore_errors=True
                    )  # refused before its first stage: nothing is left behind
                raise
        finally:
            if run.tracker:
                run.tracker.close()
            if run._lock:
                run._lock.close()

    def _begun(self) -> bool:
        """True once a stage has started here."""
        return (self.path / "manifest.json").is_file() or any(self.path.rglob("*" + SCRATCH))

    def _record_end(self, error: BaseException) -> None:
        with suppress(InputError):  # a log on a full disk must not hide why the run ended
            if isinstance(error, KeyboardInterrupt):
                self.event("interrupted", self.current)
            else:
                self.event("failed", self.current, type=type(error).__name__, message=str(error))
        if isinstance(error, KeyboardInterrupt):
            self.say(f"interrupted in {self.current or 'the run'}; run the same command again to continue")

    def _take(self) -> None:
        try:
            self._new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            names = {entry.name for entry in self.path.iterdir()}
        except OSError as error:
            raise cannot_write(self.path, error) from None
        # config.yaml is the first thing written: without a whole one there can be only this of ours.
        foreign = names - {".lock", TEMPORARY + "config.yaml"}
        if foreign and recipe_of(self.path / "config.yaml") is None:
            raise InputError(
                f"{self.path} is not empty and not a run folder (it holds {min(foreign)}); give another --out"
            )
        self._lock = _lock(self.path / ".lock")
        self._check_config()
        self._read_manifest()
        remove_leftovers(self.path)
        for name, entry in self.stages.items():
            scratch = self.path / (name + SCRATCH)
            # Of a finished stage, killed before or while it was removed; the key may be gone already.
            if scratch.is_dir() and _scratch_key(scratch) in (None, entry["key"]):
                shutil.rmtree(scratch)
        self.event("opened", version=__version__, pid=os.getpid())

    def _check_config(self) -> None:
        """A run folder belongs to one recipe and one configuration, but for the options that change no result."""
        file = self.path / "config.yaml"
        # A command that failed before its first stage leaves nothing worth guarding from the corrected command.
        if not self._begun():
            write_atomically(file, f"{HEADER}{self.recipe}\n{self.config.to_yaml()}")
            return
        recipe = recipe_of(file)
        fix = "give another --out, or the same options as before"
        if recipe != self.recipe:
            raise InputError(f"{self.path} is a run of {recipe}, not of {self.recipe}; {fix}")
        here, asked = _flat(read_yaml(file)), _flat(yaml.safe_load(self.config.to_yaml()) or {})
        different = [
            f"{name}: {here.get(name, 'not set')} here, {asked.get(name, 'not set')} asked for"
            for name in {**here, **asked}
            if here.get(name) != asked.get(name) and name not in self.config.free_options()
        ]
        if different:
            raise InputError(f"{self.path} was started with other options ({'; '.join(different)}); {fix}")

    def _read_manifest(self) -> None:
        file = self.path / "manifest.json"
        if not file.is_file():
            return
        try:
            self.stages = json.loads(file.read_text(encoding="utf-8"))["stages"]
            for entry in self.stages.values():
                _ = entry["key"], entry["artifact"]["path"], entry["artifact"]["kind"]
        except (ValueError, KeyError, TypeError, AttributeError):
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

    def event(self, kind: str, stage: str | None = None, /, **fields: Any) -> None:
        """Append a line to events.jsonl. A half line that a kill left stays a line of its own.

        A tracker gets the figures of steps and evaluations too.
        """
        if self.tracker and kind in STREAMED:
            self.tracker.log((stage or "").partition("/")[0], fields["step"], dict(figures(fields)))
        file = self.path / "events.jsonl"
        line = json.dumps(dict(time=_now(), stage=stage, event=kind, **fields), default=str)
        try:
            with file.open("ab+") as handle:
                if handle.tell() and (handle.seek(-1, os.SEEK_END), handle.read(1))[1] != b"\n":
                    handle.write(b"\n")
                handle.write(line.encode() + b"\n")
        except OSError as error:
            raise cannot_write(file, error) from None

    def note(self, text: str, stage: str | None = None) -> None:
        """One line for the person watching, also in the event log."""
        self.event("note", stage, text=text)
        self.say(f"{stage}: {text}" if stage else text)

    def say(self, text: str) -> None:
        if self.console:
            self.console.print(text, style="dim", markup=False, highlight=False, emoji=False, soft_wrap=True)

    def round(self, t: int) -> "Round":
        """The stages of round t: `run.round(2).stage("groups", ...)` is stage `round-2/groups`."""
        return self.part(f"round-{t}")

    def part(self, label: str) -> "Round":
        """Stages under a common name."""
        return Round(self, label)

    def stage(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The artifact of `function(*args, **kwargs)`: read when it is there already, computed and written otherwise.

        A list of records becomes NAME.jsonl and comes back as `Records`; a record, config or dictionary NAME.json; the
        folder that a function filled (`stage.output`) comes back as a `FolderArtifact`. It is computed again when the
        function, an argument's fingerprint or the prefloop version has changed, or when its file is not as it was.
        """
        if not STAGE_NAME.fullmatch(name):
            raise ValueError(f"stage name {name!r}: expected words of letters, digits, '_', '-' and '.', joined by '/'")
        inputs = {
            "function": fingerprint(function),
            "args": [fingerprint(value) for value in args],
            "kwargs": {key: fingerprint(value) for key, value in kwargs.items()},
            "version": __version__,
        }
        key = sha256(json.dumps(inputs, sort_keys=True))
        if self._keys.setdefault(name, key) != key:
            raise ValueError(f"stage {name!r} has already run with other inputs; every stage needs a name of its own")
        entry = self.stages.get(name)
        if entry and entry["key"] == key and is_intact(self.path, entry["artifact"]):
            self.say(f"{name}: done before, reused")
            return read_artifact(self.path, name, entry["artifact"])
        if entry:
            entry["key"] = None
            self._write_manifest()
        self.current = name
        stage = self._begin(name, key)
        started = time.monotonic()
        value, artifact = self._compute(stage, partial(function, *args, **kwargs), _takes_stage(function))
        seconds = round(time.monotonic() - started, 3)
        self.stages[name] = {
            "key": key,
            "inputs": inputs,
            "artifact": artifact,
            "counts": stage.counts,
            "figures": stage.figures,
            "seconds": seconds,
            "finished": _now(),
        }
        self._write_manifest()
        assert stage.scratch is not None
        shutil.rmtree(stage.scratch, ignore_errors=True)
        self.event("finished", name, seconds=seconds, counts=stage.counts)
        counts = ", ".join(f"{n} {reason}" for reason, n in stage.counts.items())
        self.say(f"{name}: {seconds:.1f} s{'; ' + counts if counts else ''}")
        self.current = None
        return value

    def _compute(self, stage: Stage, call: Callable[..., Any], takes_stage: bool) -> tuple[Any, dict[str, Any]]:
        """Make and write an artifact; returns it as it reads back, which is what a resumed run will see."""
        try:
            artifact = write_artifact(self.path, stage.name, call(stage=stage) if takes_stage else call(), stage.output)
            return read_artifact(self.path, stage.name, artifact), artifact
        except BaseException as error:
            assert stage.output is not None
            shutil.rmtree(stage.output, ignore_errors=True)
            full = _disk_full(error)
            if full:
                raise cannot_write(self.path / stage.name, full) from None
            raise

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
        self.event("started", name)
        if self.console and not self.console.is_terminal:
            self.say(f"{name}: started")
        return Stage(name=name, scratch=scratch, output=scratch / "output", run=self)


@dataclass(frozen=True)
class Round:
    """A view of a run whose stage names begin with `label`."""

    run: Run
    label: str

    def stage(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`Run.stage` for `label/name`."""
        return self.run.stage(f"{self.label}/{name}", function, *args, **kwargs)


@cache
def environment() -> dict[str, Any]:
    """Versions and hardware, read without importing anything heavy."""
    versions: dict[str, Any] = {"prefloop": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**versions, "platform": platform.platform(), "cpus": os.cpu_count()}


def _takes_stage(function: Callable[..., Any]) -> bool:
    return "stage" in inspect.signature(function).parameters


def _disk_full(error: BaseException) -> OSError | None:
    """The system's complaint that there is no room, where that is what an error comes from.

    Writers in Rust (safetensors) say it in their message only.
    """
    if isinstance(error, PrefloopError):
        return None
    cause: BaseException | None = error
    while cause:
        said = re.search(r"\(os error (\d+)\)", str(cause))
        number = cause.errno if isinstance(cause, OSError) else int(said[1]) if said else None
        if number in DISK_FULL:
            return OSError(number, os.strerror(number))
        cause = cause.__cause__ or cause.__context__
    return None


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
    except BlockingIOError:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise InputError(
            f"{file.parent} is in use by another prefloop process (pid {owner}); wait, or end it"
        ) from None
    except OSError:  # a file system without locks
        handle.close()
        return None
    handle.seek(0)
    handle.truncate()
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def recipe_of(file: Path) -> str | None:
    """The recipe of a run folder's config.yaml; None when there is no such file or it is not one of ours."""
    if not file.is_file():
        return None
    first = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return first.removeprefix(HEADER) if first.startswith(HEADER) else None


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
