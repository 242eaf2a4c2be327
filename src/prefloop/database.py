"""A SQLite file that threads and processes share, in which a commit is on the disk when it returns."""

import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from prefloop.atomic import cannot_write
from prefloop.errors import InputError, PrefloopError

T = TypeVar("T")
SECONDS_BETWEEN_TRIES = 0.01
OPTIONS = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
"""
"""Readers go on while another process writes; a commit is on the disk when it returns."""


@dataclass(frozen=True)
class Kind:
    """What a file is for: `name` is what errors call it, `error` their class, `elsewhere` how to choose another file,
    `lost` what becomes of the content of a damaged one. `tables` are the statements that make its tables where they are
    missing, and `format` is theirs, kept in the file's `user_version`.
    """

    name: str
    tables: str
    format: int
    error: type[PrefloopError]
    elsewhere: str
    lost: str


class Database:
    """Raises `kind.error` when the file is damaged, locked for good or cannot be written, InputError when it is of
    another format.

    The file is opened for writing at once. `timeout` is how many seconds to wait for other processes that are writing.
    """

    def __init__(self, path: Path, kind: Kind, *, timeout: float = 60.0) -> None:
        self.path, self.kind, self.timeout = path, kind, timeout
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        with self._explained():
            self._connection = self._open()
        self._close = weakref.finalize(self, self._connection.close)

    def do(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """`action(connection)` while no other thread uses it: all that it writes is kept, or nothing."""
        with self._lock, self._explained(), self._connection:
            return action(self._connection)

    def close(self) -> None:
        """Give the file back; nothing may be asked of it after that."""
        with self._lock:
            self._close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's failures in one line with what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise self.kind.error(f"{self.kind.name} {self.path} {self._explain(error)}") from None

    def _open(self) -> sqlite3.Connection:
        # One connection for all threads, one at a time: opening one for every answer costs five times the writing.
        connection = sqlite3.connect(self.path, timeout=self.timeout, check_same_thread=False)
        try:
            [version] = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, self.kind.format):
                raise InputError(
                    f"{self.kind.name} {self.path} is of format {version}, and this version of prefloop knows "
                    f"{self.kind.format}; {self.kind.elsewhere}, or update prefloop"
                )
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Options and tables. SQLite does not wait its time-out where two processes turn a new file to WAL at once."""
        tables = f"BEGIN IMMEDIATE;\n{self.kind.tables}\nPRAGMA user_version = {self.kind.format};\nCOMMIT;\n"
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                connection.executescript(OPTIONS + tables)
                return
            except sqlite3.OperationalError as error:
                if not _is_locked(error) or time.monotonic() >= deadline:
                    raise
                connection.rollback()
                time.sleep(SECONDS_BETWEEN_TRIES)

    def _explain(self, error: sqlite3.Error) -> str:
        again = "then run the same command again"
        if _is_locked(error):
            return (
                f"has been locked by another process for {self.timeout:g} s; end that process, or "
                f"{self.kind.elsewhere}, {again}"
            )
        if _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return (
                f"is damaged ({error}); move it away ({self.kind.lost}, unless `sqlite3 FILE .recover` brings it "
                "back) and run the same command again"
            )
        return (
            f"cannot be read or written ({error}); free some space, make it writable or {self.kind.elsewhere}, on a "
            f"local disk, {again}"
        )


def _code(error: sqlite3.Error) -> int:
    """The result code of SQLite, without its extended part."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _is_locked(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
