"""A child process that cannot outlive this one.

    this process --pipe--> watchdog --> the command, in a process group of its own

The watchdog is this file run as a program (standard library only). It ends the command's group, SIGTERM first and
SIGKILL after a grace, when the pipe closes: by `close`, at exit, or because this process is gone, SIGKILL included.
POSIX only.
"""

import os
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

POLL = 0.2
"""Seconds between the watchdog's looks at its two ends."""

SLACK = 10.0
"""Seconds beyond the grace in which the watchdog must have ended."""


class SupervisedProcess:
    """A running command. Its output, and the watchdog's, is appended to `log`; its input is empty.

    `grace`: seconds between SIGTERM and SIGKILL. A command that cannot be started has returncode 127.
    """

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None, grace: float = 10.0
    ) -> None:
        with log.open("ab") as output:
            self._watchdog = subprocess.Popen(
                [sys.executable, "-I", __file__, str(grace), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # Out of the terminal's group: Ctrl-C is for this process, which then closes the pipe.
                start_new_session=True,
            )
        self._end = weakref.finalize(self, _end, self._watchdog, grace)

    @property
    def returncode(self) -> int | None:
        """Exit status of the command, 128 + n after signal n; None while it runs."""
        return self._watchdog.poll()

    def wait(self, timeout: float) -> int | None:
        """`returncode` as soon as it is known, or None after `timeout` seconds."""
        try:
            return self._watchdog.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """End the command and whatever is left of its group; returns when they are gone. May be called twice."""
        self._end()


def _end(watchdog: "subprocess.Popen[bytes]", grace: float) -> None:
    assert watchdog.stdin is not None
    watchdog.stdin.close()
    try:
        watchdog.wait(grace + SLACK)
    except subprocess.TimeoutExpired:
        watchdog.kill()
        watchdog.wait()


def watch(grace: float, command: Sequence[str]) -> int:
    """Run `command` until it ends, or end it when standard input closes; its exit status, 128 + n after signal n."""
    parent = os.getppid()
    told_to_end: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: told_to_end.append(number))
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return 127
    while child.poll() is None and not told_to_end:
        # Nothing is ever written to the pipe: readable means closed. What the parent has forked may hold it open
        # beyond the parent's death, so the parent itself is looked at too.
        if select.select([sys.stdin], [], [], POLL)[0] or os.getppid() != parent:
            break
    status = _end_group(child, grace)
    return status if status >= 0 else 128 - status


def _end_group(child: "subprocess.Popen[bytes]", grace: float) -> int:
    """End a command and everything in its group; the command's exit status."""
    _signal_group(child.pid, signal.SIGTERM)
    try:
        child.wait(grace)
    except subprocess.TimeoutExpired:
        pass
    _signal_group(child.pid, signal.SIGKILL)
    return child.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:  # nobody is left in it
        pass


if __name__ == "__main__":
    sys.exit(watch(float(sys.argv[1]), sys.argv[2:]))
