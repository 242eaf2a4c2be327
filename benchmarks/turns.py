"""Two programs that take turns: each in a process of its own, one at work at a time, so that noise hits both alike."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def report(turn: Connection, value: Any) -> None:
    turn.send((0.0, value))


def timed(turn: Connection, work: Callable[[], Any]) -> None:
    """Wait for the turn, work, report how long it took and what came out."""
    turn.recv()
    start = time.perf_counter()
    result = work()
    turn.send((time.perf_counter() - start, result))


class Side:
    """The other end of a worker process."""

    def __init__(self, target: Callable[[Any, Connection], None], job: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.turn, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(job, theirs))
        self.process.start()
        theirs.close()
        self.why = self.turn.recv()[1]

    def go(self) -> tuple[float, Any]:
        self.turn.send(None)
        return self.turn.recv()

    def finish(self) -> dict[str, float]:
        found = self.go()[1]
        self.process.join()
        return found
