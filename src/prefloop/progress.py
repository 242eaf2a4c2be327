"""Progress on stderr: a bar with rate and end time on a terminal, a line now and then in a log file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 30.0


class _Rate(TextColumn):
    def __init__(self, unit: str) -> None:
        super().__init__("")
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} {self.unit}/s" if task.speed else "", style="progress.data.speed")


@contextmanager
def show_progress(console: Console | None, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. Without a console nothing is shown."""
    if console is None:
        yield lambda n: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn(unit),
            _Rate(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, expand=True) as progress:
            task = progress.add_task(label, total=total)
            yield lambda n: progress.update(task, advance=n)
    else:
        with _lines(console, label, total, unit) as advance:
            yield advance


@contextmanager
def _lines(console: Console, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal last, done
        done += n
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and 0 < done < total:
            last = now
            rate = done / (now - start)
            left = (total - done) / rate
            console.print(f"{label}: {done}/{total} {unit}, {rate:.2f} {unit}/s, about {left:.0f} s left", markup=False)

    yield advance
