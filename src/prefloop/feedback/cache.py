"""Answers of annotators that cost time or money, kept for every later run.

One SQLite file that processes and threads share. An entry's key is a hash of all that decides the answer (annotator,
rendered question with the order of the two responses, decoding), so an entry never grows old and is never replaced: of
two answers to one question the first stays. Values are answers and token counts, never a key to a server.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from prefloop.database import Database, Kind
from prefloop.errors import FeedbackError
from prefloop.fingerprints import sha256
from prefloop.models import cache_folder

KEYS_PER_QUERY = 500
"""Older builds of SQLite take no more than 999 values in a statement."""
KIND = Kind(
    name="the cache of judgements",
    tables="CREATE TABLE IF NOT EXISTS judgements "
    "(key TEXT PRIMARY KEY, value TEXT NOT NULL, digest TEXT NOT NULL) WITHOUT ROWID;",
    format=1,
    error=FeedbackError,
    elsewhere="set PREFLOOP_CACHE to another folder",
    lost="what it held is then asked again",
)


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
        self.database = Database(self.path, KIND, timeout=timeout)

    @staticmethod
    def key(*parts: Any) -> str:
        """The SHA-256, in hex, of the JSON of all that decides an answer."""
        return sha256(json.dumps(parts, sort_keys=True))

    def get(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What is kept of these keys, in their order. A damaged entry is forgotten, so that it is asked for again."""
        rows = self.database.do(lambda connection: _select(connection, keys))
        damaged = [key for key, (value, digest) in rows.items() if digest != sha256(key + value)]
        if damaged:
            self.database.do(lambda connection: _delete(connection, damaged))
        return {key: json.loads(rows[key][0]) for key in dict.fromkeys(keys) if key in rows and key not in damaged}

    def put(self, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Keep entries, all or none of them; they are on the disk on return. A key that is kept already stays.

        Returns what is kept of these keys now: another process may have been first, and who asks again is told that.
        """
        values = {key: json.dumps(value, allow_nan=False) for key, value in entries.items()}
        rows = [(key, text, sha256(key + text)) for key, text in values.items()]
        self.database.do(lambda connection: _insert(connection, rows))
        return self.get(list(entries))

    def close(self) -> None:
        """Give the file back; nothing may be asked of the cache after it."""
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _select(connection: sqlite3.Connection, keys: Sequence[str]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for start in range(0, len(keys), KEYS_PER_QUERY):
        some = keys[start : start + KEYS_PER_QUERY]
        marks = ", ".join("?" * len(some))
        query = f"SELECT key, value, digest FROM judgements WHERE key IN ({marks})"
        found.update({key: (value, digest) for key, value, digest in connection.execute(query, some)})
    return found


def _insert(connection: sqlite3.Connection, rows: Sequence[tuple[str, str, str]]) -> None:
    connection.executemany("INSERT OR IGNORE INTO judgements VALUES (?, ?, ?)", rows)


def _delete(connection: sqlite3.Connection, keys: Sequence[str]) -> None:
    connection.executemany("DELETE FROM judgements WHERE key = ?", [(key,) for key in keys])
