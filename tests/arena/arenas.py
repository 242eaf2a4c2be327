"""Arenas for tests: files of answers, and a real server on 127.0.0.1 with a client that speaks to it."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from prefloop.arena.matches import matches_of, read_sides
from prefloop.arena.server import ArenaServer
from prefloop.arena.votes import Arena


def answers(file: Path, texts: Mapping[str, str]) -> str:
    """A file of answers as AlpacaEval writes it: prompt -> answer."""
    rows = [{"instruction": prompt, "output": text, "generator": "m"} for prompt, text in texts.items()]
    file.write_text(json.dumps(rows))
    return str(file)


def files(folder: Path, *models: str, prompts: int = 6) -> list[str]:
    """A file a model: `NAME says 0` to `Question 0?`, and so on."""
    return [
        answers(folder / f"{model}.json", {f"Question {i}?": f"{model} says {i}" for i in range(prompts)})
        for model in models
    ]


def make_arena(folder: Path, given: Sequence[str], *, seed: int = 0, wanted: int = 0) -> Arena:
    _, sides = read_sides(given)
    matches, identical = matches_of(sides, seed=seed)
    prompts = len(next(iter(sides.values())))
    return Arena.of(folder / "arena.sqlite", matches, models=list(sides), prompts=prompts, identical=identical,
                    seed=seed, wanted=wanted)  # fmt: skip


@contextmanager
def serving(arena: Arena, *, host: str = "127.0.0.1", port: int = 0, token: str = "") -> Iterator[str]:
    """The address of a server of this arena, without the token."""
    server = ArenaServer(arena, host=host, port=port, token=token)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        arena.close()


def ask(url: str, question: str, data: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    """(status, answer) of a POST; `data` is sent as JSON, bytes as they are."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    request = urllib.request.Request(f"{url}/api/{question}", body, {"Content-Type": "application/json"})
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def vote_all(url: str, rater: str, prefers: Any) -> int:
    """Vote until there is nothing left; prefers(answer 1, answer 2) is the choice. How many votes that were."""
    _, state = ask(url, "next", {"rater": rater})
    n = 0
    while state["shown"]:
        choice = prefers(*state["shown"]["answers"])
        status, state = ask(url, "vote", {"rater": rater, "match": state["shown"]["match"], "choice": choice})
        assert status == 200
        n += 1
    return n
