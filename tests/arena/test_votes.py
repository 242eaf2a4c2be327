"""The file of votes: what a vote says, undo, resume, how many raters a match gets, files that are something else."""

import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from prefloop.arena import votes
from prefloop.arena.matches import side_1
from prefloop.arena.votes import Arena, Choice, Place, Vote
from prefloop.errors import InputError
from tests.arena.arenas import answers, files, make_arena


@pytest.mark.parametrize(
    ("side", "choice", "p"),
    [
        (1, "1", 1.0),
        (1, "2", 0.0),
        (2, "1", 0.0),
        (2, "2", 1.0),
        (1, "tie", 0.5),
        (2, "both bad", None),
        (1, "skip", None),
    ],
)
def test_a_vote_is_about_the_answer_that_was_on_that_side(side: int, choice: Choice, p: float | None) -> None:
    assert Vote.model_validate({"rater": "Ann", "match": 1, "side_1": side, "choice": choice}).p == p


def test_a_rater_goes_on_where_he_was_and_the_side_is_recorded(tmp_path: Path) -> None:
    given = files(tmp_path, "a", "b")
    arena = make_arena(tmp_path, given, seed=4)
    assert arena.place("Ann") == Place(1, 0, 6)
    arena.vote("Ann", 1, "1")
    arena.vote("Ann", 2, "skip")
    arena.close()
    for again in (make_arena(tmp_path, given, seed=4), Arena(tmp_path / "arena.sqlite")):
        assert again.place("Ann") == Place(3, 2, 6) and again.place("Bo") == Place(1, 0, 6)
        assert [(vote.side_1, vote.choice) for vote in again.votes()] == [
            (side_1(4, 1, "Ann"), "1"),
            (side_1(4, 2, "Ann"), "skip"),
        ]
        again.close()


def test_undo_takes_back_the_last_vote_of_this_rater_alone(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "a", "b"))
    arena.vote("Ann", 1, "1")
    arena.vote("Ann", 2, "tie")
    arena.vote("Bo", 1, "2")
    assert arena.undo("Ann") == 2 and arena.place("Ann") == Place(2, 1, 6)
    arena.vote("Ann", 2, "both bad")
    assert [(v.rater, v.match, v.choice) for v in arena.votes()] == [
        ("Ann", 1, "1"),
        ("Bo", 1, "2"),
        ("Ann", 2, "both bad"),
    ]
    assert [arena.undo("Ann"), arena.undo("Ann"), arena.undo("Ann")] == [2, 1, None]
    assert [v.rater for v in arena.votes()] == ["Bo"]


def test_a_rater_has_one_vote_a_match(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "a", "b"))
    assert arena.vote("Ann", 1, "1") and arena.vote("Ann", 1, "1")
    assert not arena.vote("Ann", 1, "2")
    assert [vote.choice for vote in arena.votes()] == ["1"]
    with pytest.raises(InputError, match="match = 7: there is none of this number"):
        arena.vote("Ann", 7, "1")


def test_a_match_is_shown_to_as_many_raters_as_are_wanted(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "a", "b", "c", prompts=4), wanted=2)
    raters = ["Ann", "Bo", "Cy", "Di"]
    at = {rater: arena.place(rater).match for rater in raters}
    assert list(at.values()) == [1, 1, 2, 2]  # two are looking at the first, so the others get the next
    while any(at.values()):
        for rater in raters:
            match = at[rater]
            if match:
                # A match that is skipped still wants a vote.
                arena.vote(rater, match, "skip" if rater == "Di" and match == 2 else "1")
            at[rater] = arena.place(rater).match
    given = Counter(vote.match for vote in arena.votes() if vote.choice != "skip")
    assert [given[match] for match in range(1, 13)] == [2] * 12
    assert arena.place("Ed") == Place(None, 0, 0)


def test_what_somebody_left_open_is_shown_to_others_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "a", "b", prompts=2), wanted=1)
    assert arena.place("Ann").match == 1 and arena.place("Bo").match == 2
    arena.vote("Bo", 2, "1")
    assert arena.place("Bo") == Place(None, 1, 1)
    monkeypatch.setattr(votes, "LEASE", 0.0)
    assert arena.place("Bo") == Place(1, 1, 2)


def test_votes_are_on_the_disk_when_they_are_acknowledged(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "a", "b"))
    arena.vote("Ann", 1, "1")
    with closing(sqlite3.connect(arena.path)) as other:
        assert other.execute("SELECT count(*) FROM votes").fetchone() == (1,)
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert arena._database.do(lambda own: own.execute("PRAGMA synchronous").fetchone()) == (2,)


def test_files_that_are_something_else_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    given = files(tmp_path, "a", "b", "c")
    make_arena(tmp_path, given[:2]).close()
    for others, seed in ((given[1:], 0), (given, 0), (given[:2], 1)):
        with pytest.raises(InputError, match=r"arena\.sqlite is of other answers, names, prompts or another seed"):
            make_arena(tmp_path, others, seed=seed)
    with pytest.raises(InputError, match=r"none\.sqlite: no such file; `prefloop arena` makes one"):
        Arena(tmp_path / "none.sqlite")
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE judgements (key TEXT)")
    text = tmp_path / "text.sqlite"
    text.write_bytes(b"prompt,answer\n" * 400)
    for file, why in ((other, "its tables are judgements"), (text, "file is not a database")):
        before = file.read_bytes()
        with pytest.raises(InputError, match=rf"not an arena's file \({why}\); give another one"):
            Arena(file)
        assert file.read_bytes() == before
    same = [answers(tmp_path / f"{name}.json", {"Q": "yes"}) for name in ("x", "y")]
    with pytest.raises(InputError, match="nothing to compare: all answers"):
        make_arena(tmp_path / "new", same)
    assert not (tmp_path / "new").exists()
