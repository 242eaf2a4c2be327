"""Answers of annotators that cost time or money, kept for every later run.

One SQLite file that processes and threads share. An entry's key is a hash of all that decides the answer (annotator,
rendered question with the order of the two responses, decoding), so an entry never grows old and is never replaced: of
two answers to one question the first stays. Values are answers and token counts, never a key to a server.
"""

import json
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from prefloop.atomic import cannot_write
from prefloop.errors import FeedbackError, InputError
from prefloop.fingerprints import sha256
from prefloop.models import cache_folder

T = TypeVar("T")
FORMAT = 1
"""Of the table, kept in the file's `user_version`."""
KEYS_PER_QUERY = 500
"""Older builds of SQLite take no more than 999 values in a statement."""
SECONDS_BETWEEN_TRIES = 0.01
OPTIONS = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
"""
"""Readers go on while another process writes; a commit is on the disk when it returns."""
TABLE = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, value TEXT NOT NULL, digest TEXT NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {FORMAT};
COMMIT;
"""


class JudgementCache:
    """Kept answers by key. Raises FeedbackError when the file is damaged, locked for good or cannot be written.

    The file is opened for writing at once, so that a run learns of such a file before it pays for an answer. `timeout`
    is how many seconds to wait for other processes that are writing.

        >>> cache = JudgementCache(Path(tempfile.mkdtemp()) / "judgements.sqlite")
        >>> cache.put({JudgementCache.key("judge", "Which one?"): {"p": 0.75}})
        >>> cache.get([JudgementCache.key("judge", "Which one?"), JudgementCache.key("judge", "And now?")])
        {'27b94f55...': {'p': 0.75}}
    """

    def __init__(self, path: Path | None = None, *, timeout: float = 60.0) -> None:
        self.path = path or cache_folder() / "judgements.sqlite"
        self.timeout = timeout
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self._connection = self._guarded(self._open)
        self._close = weakref.finalize(self, self._connection.close)

    @staticmethod
    def key(*parts: Any) -> str:
        """The SHA-256, in hex, of the JSON of all that decides an answer."""
        return sha256(json.dumps(parts, sort_keys=True))

    def get(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What is kept of these keys, in their order. A damaged entry is forgotten, so that it is asked for again."""
        rows = self._guarded(lambda: self._select(keys))
        damaged = [key for key, (value, digest) in rows.items() if digest != sha256(key + value)]
        if damaged:
            self._guarded(lambda: self._delete(damaged))
        return {key: json.loads(rows[key][0]) for key in dict.fromkeys(keys) if key in rows and key not in damaged}

    def put(self, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Keep entries, all or none of them; they are on the disk on return. A key that is kept already stays.

        Returns what is kept of these keys now: another process may have been first, and who asks again is told that.
        """
        values = {key: json.dumps(value, allow_nan=False) for key, value in entries.items()}
        self._guarded(lambda: self._insert([(key, text, sha256(key + text)) for key, text in values.items()]))
        return self.get(list(entries))

    def close(self) -> None:
        """Give the file back; nothing may be asked of the cache after it."""
        with self._lock:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> sqlite3.Connection:
        # One connection for all threads, one at a time: opening one for every answer costs five times the writing.
        connection = sqlite3.connect(self.path, timeout=self.timeout, check_same_thread=False)
        try:
            [version] = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, FORMAT):
                raise InputError(
                    f"{self.path} is a cache of format {version}, and this version of prefloop knows {FORMAT}; set "
                    "PREFLOOP_CACHE to another folder, or update prefloop"
                )
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Options and table. SQLite does not wait its time-out where two processes turn a new file to WAL at once."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                connection.executescript(OPTIONS + TABLE)
                return
            except sqlite3.OperationalError as error:
                if not _is_locked(error) or time.monotonic() >= deadline:
                    raise
                connection.rollback()
                time.sleep(SECONDS_BETWEEN_TRIES)

    def _select(self, keys: Sequence[str]) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        for start in range(0, len(keys), KEYS_PER_QUERY):
            some = keys[start : start + KEYS_PER_QUERY]
            marks = ", ".join("?" * len(some))
            query = f"SELECT key, value, digest FROM judgements WHERE key IN ({marks})"
            found.update({key: (value, digest) for key, value, digest in self._connection.execute(query, some)})
        return found

    def _insert(self, rows: Sequence[tuple[str, str, str]]) -> None:
        with self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO judgements VALUES (?, ?, ?)", rows)

    def _delete(self, keys: Sequence[str]) -> None:
        with self._connection:
            self._connection.executemany("DELETE FROM judgements WHERE key = ?", [(key,) for key in keys])

    def _guarded(self, action: Callable[[], T]) -> T:
        """`action()` while no other thread uses the connection; SQLite's failures in one line with what to do."""
        with self._lock:
            try:
                return action()
            except sqlite3.Error as error:
                raise FeedbackError(f"the cache of judgements {self.path} {self._explain(error)}") from None

    def _explain(self, error: sqlite3.Error) -> str:
        if _is_locked(error):
            return (
                f"has been locked by another process for {self.timeout:g} s; end that process, or set PREFLOOP_CACHE "
                "to another folder, then run the same command again"
            )
        if _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return (
                f"is damaged ({error}); move it away (what it held is then asked again, unless "
                "`sqlite3 FILE .recover` brings it back) and run the same command again"
            )
        return (
            f"cannot be read or written ({error}); free some space, make it writable or set PREFLOOP_CACHE to a folder "
            "on a local disk, then run the same command again"
        )


def _code(error: sqlite3.Error) -> int:
    """The result code of SQLite, without its extended part."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _is_locked(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
