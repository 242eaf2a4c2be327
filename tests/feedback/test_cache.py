"""The cache of judgements: durable, shared, the first answer stays, and files that cannot be used."""

import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from prefloop.errors import FeedbackError, InputError
from prefloop.feedback.cache import JudgementCache
from prefloop.models import cache_folder

key = JudgementCache.key

WRITER = """
import sys, time
from pathlib import Path
from prefloop.feedback.cache import JudgementCache
for n in range(12):
    while time.time() < float(sys.argv[2]) + 0.06 * n:
        pass
    with JudgementCache(Path(sys.argv[1]) / f"{n}.sqlite", timeout=20) as cache:
        cache.put({JudgementCache.key(n): {"writer": sys.argv[3]}, sys.argv[3]: {}})
"""
"""Opens twelve new files, each at the same moment as the other processes."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "judgements.sqlite"


def test_what_is_put_is_there_for_every_later_cache(file: Path) -> None:
    with JudgementCache(file) as cache:
        cache.put({key("a"): {"p": 0.1, "text": "größer\u2028"}, key("b"): {"votes": [1, 2], "why": None}})
    with JudgementCache(file) as again:
        found = again.get([key("b"), key("c"), key("a"), key("b")])
    assert list(found) == [key("b"), key("a")]
    assert found == {key("a"): {"p": 0.1, "text": "größer\u2028"}, key("b"): {"votes": [1, 2], "why": None}}


def test_the_first_answer_stays(file: Path) -> None:
    with JudgementCache(file) as cache, JudgementCache(file) as other:
        cache.put({key("a"): {"p": 1}})
        other.put({key("a"): {"p": 2}, key("b"): {"p": 3}})
        assert cache.get([key("a"), key("b")]) == {key("a"): {"p": 1}, key("b"): {"p": 3}}


def test_a_write_is_on_the_disk_when_it_returns(file: Path) -> None:
    """Another connection sees it, and the log is flushed at every commit."""
    with JudgementCache(file) as cache, closing(sqlite3.connect(file)) as other:
        cache.put({key("a"): {}})
        assert other.execute("SELECT count(*) FROM judgements").fetchone() == (1,)
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert cache.database.do(lambda own: own.execute("PRAGMA synchronous").fetchone()) == (2,)


def test_all_entries_or_none_are_kept(file: Path) -> None:
    with JudgementCache(file) as cache:
        with pytest.raises(ValueError):
            cache.put({key("a"): {"p": 1}, key("b"): {"p": float("nan")}})
        assert cache.get([key("a"), key("b")]) == {}


def test_more_keys_than_one_query_takes(file: Path) -> None:
    entries = {key(i): {"i": i} for i in range(1201)}
    with JudgementCache(file) as cache:
        cache.put(entries)
        assert cache.get(list(entries)) == entries


def test_keys_tell_apart_whatever_decides_an_answer() -> None:
    asked = [("judge", "ab", "c"), ("judge", "a", "bc"), ("judge", "abc"), ("judge", ["ab", "c"]), ("judge", "abc", 1)]
    assert len({key(*parts) for parts in asked}) == len(asked)
    assert key({"top_p": 1, "seed": 2}) == key({"seed": 2, "top_p": 1})
    assert len(key("a")) == 64


def test_threads_share_one_cache(file: Path) -> None:
    with JudgementCache(file) as cache:

        def write(thread: int) -> None:
            for i in range(10):
                cache.put({key(thread, i): {"i": i}})
                assert cache.get([key(thread, i)]) == {key(thread, i): {"i": i}}

        threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(cache.get([key(thread, i) for thread in range(8) for i in range(10)])) == 80


def test_processes_that_make_a_file_together_share_it(tmp_path: Path) -> None:
    """One opening in ten fails where SQLite is trusted to wait while two processes turn a new file to WAL."""
    begin = str(time.time() + 1.0)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), begin, name], stderr=subprocess.PIPE, text=True)
        for name in "abcd"
    ]
    assert [(writer.communicate()[1], writer.returncode) for writer in writers] == [("", 0)] * 4
    for n in range(12):
        with JudgementCache(tmp_path / f"{n}.sqlite") as cache:
            assert len(cache.get([key(n), *"abcd"])) == 5


def test_an_entry_that_is_not_as_it_was_written_is_forgotten_and_asked_again(file: Path) -> None:
    with JudgementCache(file) as cache:
        cache.put({key("a"): {"p": 0.25}, key("b"): {"p": 0.75}})
        with closing(sqlite3.connect(file)) as other, other:
            other.execute("UPDATE judgements SET value = '{\"p\": 0.95}' WHERE key = ?", (key("a"),))
        assert cache.get([key("a"), key("b")]) == {key("b"): {"p": 0.75}}
        cache.put({key("a"): {"p": 0.5}})
        assert cache.get([key("a")]) == {key("a"): {"p": 0.5}}


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"prompt,answer\n" * 400)
    with pytest.raises(
        FeedbackError, match=r"judgements\.sqlite is damaged .*move it away .*run the same command again"
    ):
        JudgementCache(file)
    assert file.read_bytes() == b"prompt,answer\n" * 400


def test_a_file_that_is_overwritten_in_the_middle_is_damaged(file: Path) -> None:
    with JudgementCache(file) as cache:
        cache.put({key(i): {"text": "x" * 500} for i in range(200)})
    data = bytearray(file.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    file.write_bytes(data)
    with JudgementCache(file) as cache, pytest.raises(FeedbackError, match="is damaged"):
        cache.get([key(i) for i in range(200)])


def test_a_file_that_another_process_holds_is_waited_for_and_then_named(file: Path) -> None:
    with JudgementCache(file, timeout=0.05) as cache, closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(FeedbackError, match=r"locked by another process for 0\.05 s; end that process"):
            cache.put({key("a"): {}})
        with pytest.raises(FeedbackError, match="locked by another process"):
            JudgementCache(file, timeout=0.05)
        other.execute("COMMIT")
        cache.put({key("a"): {}})
        assert cache.get([key("a")]) == {key("a"): {}}


def test_a_place_that_cannot_be_written_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*judgements"):
        JudgementCache(tmp_path / "file" / "judgements.sqlite")
    with pytest.raises(FeedbackError, match=r"cannot be read or written \(unable to open database file\)"):
        JudgementCache(tmp_path)


def test_a_newer_format_is_refused(file: Path) -> None:
    JudgementCache(file).close()
    with closing(sqlite3.connect(file)) as other:
        other.execute("PRAGMA user_version = 7")
    with pytest.raises(
        InputError, match="sqlite is of format 7, and this version of prefloop knows 1; set PREFLOOP_CACHE"
    ):
        JudgementCache(file)


def test_without_a_path_it_is_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path))
    with JudgementCache() as cache:
        assert cache.path == cache_folder() / "judgements.sqlite" == tmp_path / "judgements.sqlite"
