"""Progress on stderr: a bar with rate and end time on a terminal, a line now and then in a log file."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 30.0
WINDOW = 60.0
"""Seconds over which the rate is taken."""


class Advance(Protocol):
    """Called when `n` more units are done."""

    def __call__(self, n: int = 1, /) -> None: ...


def ignore(n: int = 1, /) -> None:
    """Progress that nobody watches."""


class Pace:
    """The rate of the last minute or, where a unit takes longer, of the last two advances; and the end it promises.

    What the first advance reports is counted as done but not as fast: on resume it is the work that was found finished.
    """

    def __init__(self, total: int, *, unit: str) -> None:
        self.total, self.unit, self.done = total, unit, 0
        self._seen: deque[tuple[float, int]] = deque()

    def advance(self, n: int, *, now: float) -> None:
        """`n` more units are done at `now`, in seconds on any steady clock."""
        self.done += n
        self._seen.append((now, self.done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()

    @property
    def rate(self) -> float | None:
        """Units a second; None before it can be known."""
        if not self._seen:
            return None
        (start, before), (now, done) = self._seen[0], self._seen[-1]
        return (done - before) / (now - start) if now > start and done > before else None

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate else None

    def __str__(self) -> str:
        """`4.20 answers/s, ends 14:32 (in 0:03:00)`; nothing before the rate is known."""
        if self.rate is None or self.seconds_left is None:
            return ""
        left, now = timedelta(seconds=round(self.seconds_left)), datetime.now()
        end = now + left
        clock = f"{end:%H:%M}" if end.date() == now.date() else f"{end:%a %d %b %H:%M}"
        return f"{self.rate:.2f} {self.unit}/s, ends {clock} (in {left})"


def show_progress(console: Console | None, label: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    """Gives `advance(n=1)`. Without a console nothing is shown."""
    if console is None:
        return nullcontext(ignore)
    return (_bar if console.is_terminal else _lines)(console, label, Pace(total, unit=unit))


@contextmanager
def _bar(console: Console, label: str, pace: Pace) -> Iterator[Advance]:
    # Labels hold names of models and paths, in which brackets are no mark-up.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[pace]}", markup=False),
    )
    with Progress(*columns, console=console, expand=True, redirect_stdout=False) as progress:
        task = progress.add_task(label, total=pace.total, unit=pace.unit, pace="")

        def advance(n: int = 1, /) -> None:
            pace.advance(n, now=time.monotonic())
            progress.update(task, advance=n, pace=str(pace))

        yield advance


@contextmanager
def _lines(console: Console, label: str, pace: Pace) -> Iterator[Advance]:
    start = last = time.monotonic()

    def advance(n: int = 1, /) -> None:
        nonlocal last
        now = time.monotonic()
        pace.advance(n, now=now)
        if now - last >= SECONDS_BETWEEN_LINES and 0 < pace.done < pace.total:
            last = now
            elapsed = timedelta(seconds=round(now - start))
            parts = [f"{label}: {pace.done}/{pace.total} {pace.unit}", f"{elapsed} elapsed", *filter(None, [str(pace)])]
            console.print(", ".join(parts), markup=False, highlight=False, emoji=False, soft_wrap=True)

    yield advance
