"""Files and folders that are there whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from prefloop.errors import InputError

TEMPORARY = ".tmp-"
"""Names that start so are unfinished work of a process that was killed."""


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file under another name, flush it to disk, and rename it. Raises InputError when that is impossible."""
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise cannot_write(path, error) from None


def write_folder_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder under another name, flush every file, and rename it over `path`.

    Raises InputError when it cannot be written; whatever `write` raises passes through. Nothing half-written stays.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")  # two processes may convert the same model
    try:
        _remove(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            else:
                _flush_folder(file)
        _flush_folder(temporary)
        _remove(path)
        temporary.rename(path)
        _flush_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise cannot_write(path, error) from None
    except BaseException:
        _remove(temporary)
        raise


def cannot_write(path: Path, error: OSError) -> InputError:
    """One line for a full disk, a read-only place or a path that runs through a file."""
    reason = error.strerror or type(error).__name__
    return InputError(f"cannot write {path}: {reason}; free some space or choose another place, then run it again")


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished files and folders that a kill left anywhere below `folder`."""
    for path in sorted(folder.rglob(TEMPORARY + "*"), reverse=True):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _flush_folder(folder: Path) -> None:
    """Make renames in a folder durable, on the systems where a folder can be flushed."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
