"""The server as a page and as an attacker meet it: blind, one origin, a token, several raters, a kill."""

import os
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from prefloop.arena.server import ArenaServer
from prefloop.arena.votes import Arena
from prefloop.errors import InputError
from tests.arena.arenas import ask, files, make_arena, serving, vote_all

TOKEN = "open-sesame-please"


def test_the_page_asks_and_votes_without_a_word_about_models(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "alpha", "beta", prompts=3))
    with serving(arena) as url:
        status, state = ask(url, "next", {"rater": "  Ann \t Lee "})
        shown = state["shown"]
        assert status == 200 and (state["done"], state["of"]) == (0, 3)
        assert set(shown) == {"match", "prompt", "answers"}
        assert shown["prompt"][0]["role"] == "user" and len(set(shown["answers"])) == 2
        status, state = ask(url, "vote", {"rater": "Ann Lee", "match": shown["match"], "choice": "2"})
        assert (status, state["done"]) == (200, 1)
        [vote] = arena.votes()
        match = arena.match(vote.match)
        preferred = match.response_1 if vote.p == 1 else match.response_2
        assert vote.rater == "Ann Lee" and preferred == shown["answers"][1]
        # The vote is taken back: the same match, the same sides.
        assert ask(url, "undo", {"rater": "Ann Lee"})[1] == {"shown": shown, "done": 0, "of": 3}
        assert vote_all(url, "Ann Lee", lambda a, b: "tie") == 3
        assert ask(url, "next", {"rater": "Ann Lee"})[1] == {"shown": None, "done": 3, "of": 3}
        # The same vote again, as after an answer that was lost, is no error; another one is.
        assert ask(url, "vote", {"rater": "Ann Lee", "match": 1, "choice": "tie"})[0] == 200
        assert ask(url, "vote", {"rater": "Ann Lee", "match": 1, "choice": "1"})[0] == 409


@pytest.mark.parametrize(
    ("data", "headers", "status"),
    [
        ({}, {"Origin": "http://evil.example"}, 403),
        ({}, {"Origin": "null"}, 403),
        ({}, {"Origin": "http://127.0.0.1:1"}, 403),
        ({}, {"Sec_Fetch_Site": "cross-site"}, 403),
        ({}, {"Sec_Fetch_Site": "same-site"}, 403),
        ({}, {"Host": "evil.example"}, 403),
        ({}, {"Host": "127.0.0.1.evil.example"}, 403),
        ({}, {"Host": "[evil"}, 403),
        ({}, {"Content_Type": "text/plain"}, 415),
        ({}, {"Content_Type": "application/x-www-form-urlencoded"}, 415),
        (b"rater=Ann", {}, 400),
        (b"[1]", {}, 400),
        (b"x" * 5000, {}, 413),
        ({"rater": ""}, {}, 400),
        ({"rater": "x" * 41}, {}, 400),
        ({"rater": "a\u202eb"}, {}, 400),
        ({"rater": "\ud800"}, {}, 400),
        ({"match": 99}, {}, 400),
        ({"match": 2**70}, {}, 400),
        (b"[" * 4000, {}, 400),
        ({"match": True}, {}, 400),
        ({"match": "1"}, {}, 400),
        ({"choice": "3"}, {}, 400),
        ({"choice": ["1"]}, {}, 400),
    ],
)
def test_what_is_no_vote_of_the_page_is_refused(
    shared: tuple[Arena, str], data: Any, headers: dict[str, str], status: int
) -> None:
    arena, url = shared
    body = {"rater": "Ann", "match": 1, "choice": "1", **data} if isinstance(data, dict) else data
    found, answer = ask(url, "vote", body, **headers)
    assert (found, list(answer)) == (status, ["error"]) and answer["error"]
    assert arena.votes() == []


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("arena")
    arena = make_arena(folder, files(folder, "a", "b"))
    with serving(arena) as url:
        yield arena, url


def test_the_pages_own_requests_pass(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "a", "b"))
    with serving(arena) as url:
        for headers in (
            {"Origin": url, "Sec_Fetch_Site": "same-origin"},
            {"Host": "localhost:9", "Origin": "http://localhost:9"},
        ):
            assert ask(url, "next", {"rater": "Ann"}, **headers)[0] == 200  # fmt: skip
        with urllib.request.urlopen(url) as page:
            policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self';" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert ask(url, "everything", {"rater": "Ann"})[0] == 404
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/../votes.py")


def test_a_token_is_demanded_of_every_question(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "a", "b"))
    with serving(arena, host="0.0.0.0", token=TOKEN) as url:
        body = {"rater": "Ann", "match": 1, "choice": "1"}
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": f"Bearer {TOKEN}x"}):
            assert ask(url, "vote", body, **headers) == (401, {"error": "the token is missing or another one"})
        assert arena.votes() == []
        # Reachable by other names than loopback's.
        good = {"Authorization": f"Bearer {TOKEN}", "Host": "lab.example:80", "Origin": "http://lab.example:80"}
        assert ask(url, "vote", body, **good)[0] == 200
        assert ask(url, "vote", body, **{**good, "Origin": "http://evil.example"})[0] == 403
        assert len(arena.votes()) == 1


def test_raters_at_once(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "a", "b", "c", prompts=4))
    with serving(arena) as url, ThreadPoolExecutor(4) as pool:
        raters = ["Ann", "Bo", "Cy", "Di"]
        votes = list(pool.map(lambda rater: vote_all(url, rater, lambda a, b: "1" if a < b else "2"), raters))
        assert votes == [12] * 4
        found = arena.votes()
        assert len({(vote.rater, vote.match) for vote in found}) == len(found) == 48
        assert {vote.p for vote in found} == {1.0}  # "a says" < "b says" < "c says", on whatever side


def start(*options: str) -> tuple["subprocess.Popen[str]", str, list[str]]:
    """A server by command: (process, its address, what it said)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "prefloop.cli", "arena", *options, "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    said = []
    for line in process.stdout:
        said.append(line.strip())
        if line.startswith("open "):
            return process, line.split()[1], said
    raise AssertionError(said)


def test_a_killed_server_has_every_vote_that_it_acknowledged(tmp_path: Path) -> None:
    out = str(tmp_path / "arena.sqlite")
    process, url, _ = start(*files(tmp_path, "a", "b", prompts=300), "--out", out)
    given: list[int] = []

    def vote(rater: str) -> int:
        """Votes until the server is gone; how many were acknowledged."""
        n = 0
        try:
            for match in range(1, 301):
                if ask(url.rstrip("/"), "vote", {"rater": rater, "match": match, "choice": "1"})[0] == 200:
                    n += 1
                    given.append(match)
                if len(given) >= 40:
                    os.kill(process.pid, signal.SIGKILL)
        except (OSError, ValueError):
            return n
        return n

    with ThreadPoolExecutor(2) as pool:
        acknowledged = dict(zip(("Ann", "Bo"), pool.map(vote, ("Ann", "Bo")), strict=True))
    assert process.wait(10) == -signal.SIGKILL and process.stdout
    process.stdout.close()
    assert sum(acknowledged.values()) >= 40
    again, url, said = start("--out", out)
    try:
        assert "300 matches of 2 models" in said[0]
        for rater, n in acknowledged.items():
            _, state = ask(url.rstrip("/"), "next", {"rater": rater})
            # The vote that was under way may have been kept; none that was acknowledged is lost.
            assert state["done"] in (n, n + 1) and state["shown"]["match"] == state["done"] + 1
    finally:
        again.send_signal(signal.SIGTERM)
        output, _ = again.communicate(timeout=20)
    assert again.returncode == 0 and f"votes in {out}; prefloop arena results {out} shows" in output


def test_the_command_makes_a_token_for_others_and_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefloop.cli import main

    given, out = files(tmp_path, "a", "b"), str(tmp_path / "arena.sqlite")
    served: list[ArenaServer] = []

    def interrupted(server: ArenaServer) -> None:
        served.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(ArenaServer, "serve_forever", interrupted)
    for options in ([], ["--host", "localhost"], ["--token", TOKEN], ["--host", "0.0.0.0"]):
        assert main(["arena", *given, "--out", out, "--port", "0", *options]) == 0
    assert [server.token for server in served[:3]] == ["", "", TOKEN] and len(served[3].token) > 20
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("open ")]
    assert shown == [server.url for server in served]
    assert [url.partition("#")[2] for url in shown] == ["", "", TOKEN, served[3].token]
    cases = [
        (["--out", str(tmp_path / "new.sqlite")], "--answers is missing"),
        ([*given, "--out", out, "--token", "short"], "--token: expected at least 12 characters"),
        ([*given, "--out", out, "--seed", "5"], "is of other answers, names, prompts or another seed"),
        ([*given, "--out", out, "--host", "192.0.2.1"], "cannot listen on 192.0.2.1, port 8765"),
        (["results", str(tmp_path / "none")], "none: no such file"),
        (["results", out], "nobody has voted yet"),
        (["results", out, "--judgements", "votes.txt"], "expected a name that ends with .jsonl"),
    ]
    for options, expected in cases:
        assert main(["arena", *options]) == 2
        said = capsys.readouterr().err.strip().split("\n")[-1]
        assert said.startswith("prefloop: ") and expected in said, said


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "a", "b"))
    with serving(arena) as url, pytest.raises(InputError, match=r"cannot listen on 127\.0\.0\.1, port \d+ \(.*in use"):
        ArenaServer(arena, port=int(url.rpartition(":")[2]))
