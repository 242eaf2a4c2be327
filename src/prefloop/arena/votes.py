"""The votes of people, in a SQLite file with everything that they were asked about.

    arena     one row: what the file is of (`About`, as JSON)
    matches   id in the order of asking, model_1, model_2, prompt (JSON), response_1, response_2
    votes     rater, match, side_1 (which response was shown as Answer 1), choice ('1', '2', 'tie', 'both bad', 'skip')

A vote is on the disk when `vote` returns.
"""

import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from prefloop.arena.matches import Match, Side, side_1
from prefloop.database import Database, Kind
from prefloop.errors import InputError
from prefloop.fingerprints import sha256
from prefloop.records import Prompt, Record

Choice = Literal["1", "2", "tie", "both bad", "skip"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
LEASE = 600.0
"""Seconds for which a match that a rater is looking at counts as one that will have this rater's vote."""
KIND = Kind(
    name="the arena's file",
    tables="""
CREATE TABLE IF NOT EXISTS arena (about TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS matches (
    id INTEGER PRIMARY KEY, model_1 TEXT NOT NULL, model_2 TEXT NOT NULL, prompt TEXT NOT NULL,
    response_1 TEXT NOT NULL, response_2 TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS votes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, rater TEXT NOT NULL, match INTEGER NOT NULL REFERENCES matches,
    side_1 INTEGER NOT NULL, choice TEXT NOT NULL, UNIQUE (rater, match)
);
""",
    format=1,
    error=InputError,
    elsewhere="give another file",
    lost="its votes are lost",
)


class About(Record):
    """What an arena's file is of. identical: matches of identical answers, which nobody is asked about."""

    models: tuple[str, ...]
    prompts: int
    identical: int
    seed: int
    content: str


class Vote(Record):
    """One rater's choice of the sides as they were shown."""

    rater: str
    match: int
    side_1: Side
    choice: Choice

    @property
    def p(self) -> float | None:
        """P(response_1 of the match is preferred), 1/2 for a tie; None where both were bad and where it was skipped."""
        if self.choice in ("1", "2"):
            return float((self.choice == "1") == (self.side_1 == 1))
        return 0.5 if self.choice == "tie" else None


class Place(NamedTuple):
    """Where a rater is: the next match (None at the end), votes given, votes that this rater will have given then."""

    match: int | None
    done: int
    of: int


class Arena:
    """An arena's file, open. `wanted`: of how many raters a match wants a judgement; 0 asks every rater about all.

    Threads may share it, and several processes the file. Raises InputError when the file is something else, or cannot
    be read or written.
    """

    def __init__(self, path: Path, *, wanted: int = 0) -> None:
        if not path.is_file():
            raise InputError(f"{path}: no such file; `prefloop arena` makes one from files of answers")
        self._open(path, wanted)
        rows = self._database.do(lambda db: db.execute("SELECT about FROM arena").fetchall())
        if not rows:
            raise InputError(f"{path} holds no matches; delete it, and start `prefloop arena` with files of answers")
        self.about = About.from_json(rows[0][0])

    @classmethod
    def of(
        cls, path: Path, matches: Sequence[Match], *, models: Sequence[str], prompts: int, identical: int, seed: int,
        wanted: int = 0,
    ) -> "Arena":  # fmt: skip
        """Make a file of these matches, or go on with one. Raises InputError when it is of others."""
        if not matches:
            raise InputError("nothing to compare: all answers to the same prompt are the same")
        arena = cls.__new__(cls)
        content = sha256("".join(match.to_json() + "\n" for match in matches))
        arena.about = About(models=tuple(models), prompts=prompts, identical=identical, seed=seed, content=content)
        arena._open(path, wanted)
        arena._database.do(lambda db: arena._fill(db, matches))
        return arena

    def _open(self, path: Path, wanted: int) -> None:
        self.path, self.wanted = path, wanted
        self._shown: dict[str, tuple[int, float]] = {}  # rater -> match, and since when
        _check_ours(path)
        self._database = Database(path, KIND)

    def _fill(self, db: sqlite3.Connection, matches: Sequence[Match]) -> None:
        db.execute("BEGIN IMMEDIATE")  # two processes may make the file together
        rows = db.execute("SELECT about FROM arena").fetchall()
        if rows:
            if About.from_json(rows[0][0]) != self.about:
                raise InputError(
                    f"{self.path} is of other answers, names, prompts or another seed; give another --out, or delete it"
                )
            return
        db.execute("INSERT INTO arena VALUES (?)", (self.about.to_json(),))
        db.executemany(
            "INSERT INTO matches VALUES (?, ?, ?, ?, ?, ?)",
            [
                (i, m.model_1, m.model_2, m.prompt.to_json(), m.response_1, m.response_2)
                for i, m in enumerate(matches, start=1)
            ],
        )

    def place(self, rater: str) -> Place:
        """Where this rater is. The match is the first in order that he or she has not voted on and that, where `wanted`
        says how many raters it wants, still wants one beside those who are looking at it.
        """
        return self._database.do(lambda db: self._place(db, rater))

    def _place(self, db: sqlite3.Connection, rater: str) -> Place:
        own = {match for (match,) in db.execute("SELECT match FROM votes WHERE rater = ?", (rater,))}
        ids = [match for (match,) in db.execute("SELECT id FROM matches ORDER BY id") if match not in own]
        if self.wanted:
            counted = db.execute("SELECT match, count(*) FROM votes WHERE choice <> 'skip' GROUP BY match")
            votes: dict[int, int] = dict(counted.fetchall())
            now = time.monotonic()
            seen = Counter(m for other, (m, since) in self._shown.items() if other != rater and now - since < LEASE)
            ids = [match for match in ids if votes.get(match, 0) + seen[match] < self.wanted]
        if ids:
            self._shown[rater] = ids[0], time.monotonic()
        else:
            self._shown.pop(rater, None)
        return Place(ids[0] if ids else None, len(own), len(own) + len(ids))

    def vote(self, rater: str, match: int, choice: Choice) -> bool:
        """Keep a vote; it is on the disk on return. The same vote again is no other. False: this rater has voted
        otherwise on this match. Raises InputError for a match that there is not.
        """

        def insert(db: sqlite3.Connection) -> bool:
            if db.execute("SELECT 1 FROM matches WHERE id = ?", (match,)).fetchone() is None:
                raise InputError(f"match = {match}: there is none of this number here")
            shown = side_1(self.about.seed, match, rater)
            db.execute(
                "INSERT OR IGNORE INTO votes (rater, match, side_1, choice) VALUES (?, ?, ?, ?)",
                (rater, match, shown, choice),
            )
            kept = db.execute("SELECT choice FROM votes WHERE rater = ? AND match = ?", (rater, match)).fetchone()
            return kept == (choice,)

        return self._database.do(insert)

    def undo(self, rater: str) -> int | None:
        """Take this rater's last vote back; the match that it was about, None where there is no vote."""

        def delete(db: sqlite3.Connection) -> int | None:
            last = db.execute(
                "SELECT id, match FROM votes WHERE rater = ? ORDER BY id DESC LIMIT 1", (rater,)
            ).fetchone()
            if last is None:
                return None
            db.execute("DELETE FROM votes WHERE id = ?", (last[0],))
            self._shown[rater] = last[1], time.monotonic()
            return last[1]

        return self._database.do(delete)

    def match(self, id: int) -> Match:
        return self._matches("WHERE id = ?", (id,))[id]

    def matches(self) -> dict[int, Match]:
        """All matches by id, in the order of asking."""
        return self._matches("ORDER BY id", ())

    def _matches(self, which: str, values: tuple[int, ...]) -> dict[int, Match]:
        columns = "id, prompt, model_1, model_2, response_1, response_2"
        rows = self._database.do(lambda db: db.execute(f"SELECT {columns} FROM matches {which}", values).fetchall())
        return {
            id: Match(prompt=Prompt.from_json(prompt), model_1=one, model_2=two, response_1=first, response_2=second)
            for id, prompt, one, two, first, second in rows
        }

    def votes(self) -> list[Vote]:
        """All votes, in the order in which they were given."""
        rows = self._database.do(
            lambda db: db.execute("SELECT rater, match, side_1, choice FROM votes ORDER BY id").fetchall()
        )
        return [Vote(rater=rater, match=match, side_1=side, choice=choice) for rater, match, side, choice in rows]

    def close(self) -> None:
        self._database.close()


def _check_ours(path: Path) -> None:
    """Raises InputError for a file with other tables, which is left as it is."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise InputError(f"{path}: not an arena's file ({error}); give another one") from None
    if tables and not {"arena", "matches", "votes"} <= tables:
        raise InputError(f"{path}: not an arena's file (its tables are {', '.join(sorted(tables))}); give another one")
