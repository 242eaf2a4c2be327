"""Supervised processes, with real ones: whatever happens to us, what we started is gone."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefloop.sample.process import SupervisedProcess
from prefloop.sample.process import __file__ as watchdog

# A process shows that it lives by a connection that it holds, and that it is gone by the end of that connection.
HOLD = "import socket, sys, time; held = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"
HOLD_TWICE = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1]]); " + HOLD
HOLD_ON = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + HOLD

PARENT = f"""
import os, sys, time
from pathlib import Path
from prefloop.sample.process import SupervisedProcess
process = SupervisedProcess([sys.executable, "-c", {HOLD!r}, sys.argv[1]], log=Path(sys.argv[2]), grace=0.5)
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        yield server


def port(listener: socket.socket) -> str:
    return str(listener.getsockname()[1])


def accept(listener: socket.socket) -> socket.socket:
    connection, _ = listener.accept()
    return connection


def is_gone(connection: socket.socket, within: float = 5.0) -> bool:
    """Whether the process at the other end ends in time; its connection is closed then."""
    connection.settimeout(within)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    finally:
        connection.close()


def started(code: str, listener: socket.socket, log: Path, *arguments: str, grace: float = 5.0) -> SupervisedProcess:
    return SupervisedProcess([sys.executable, "-c", code, port(listener), *arguments], log=log, grace=grace)


def parent(then: str, listener: socket.socket, log: Path) -> "subprocess.Popen[bytes]":
    """A process that supervises another one and goes on with `then`."""
    return subprocess.Popen([sys.executable, "-c", PARENT + then, port(listener), str(log)], stdout=subprocess.PIPE)


def test_output_goes_to_the_log_and_the_status_is_the_commands(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    code = "import sys; print('out'); print('err', file=sys.stderr); print(sys.stdin.read() == ''); sys.exit(3)"
    process = SupervisedProcess([sys.executable, "-u", "-c", code], log=log)
    assert process.wait(20) == 3
    assert process.returncode == 3
    assert log.read_text() == "before\nout\nerr\nTrue\n"
    process.close()


def test_a_signal_is_128_and_its_number(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    process = SupervisedProcess([sys.executable, "-c", code], log=tmp_path / "log")
    assert process.wait(20) == 128 + signal.SIGSEGV
    process.close()


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    process = SupervisedProcess(["/nowhere/python"], log=tmp_path / "log")
    assert process.wait(20) == 127
    assert (tmp_path / "log").read_text() == "cannot start /nowhere/python: No such file or directory\n"
    process.close()


def test_the_environment_is_the_given_one(tmp_path: Path) -> None:
    code = "import os; print(os.environ['COLOUR'])"
    process = SupervisedProcess([sys.executable, "-c", code], log=tmp_path / "log", environment={"COLOUR": "blue"})
    assert process.wait(20) == 0
    assert (tmp_path / "log").read_text() == "blue\n"
    process.close()


def test_close_ends_the_command_and_what_it_has_started(listener: socket.socket, tmp_path: Path) -> None:
    process = started(HOLD_TWICE, listener, tmp_path / "log", HOLD)
    held = [accept(listener), accept(listener)]
    assert process.wait(0.3) is None
    process.close()
    process.close()
    assert process.returncode == 128 + signal.SIGTERM
    assert all(is_gone(connection, within=1) for connection in held)


def test_what_a_dead_command_has_left_behind_is_ended(listener: socket.socket, tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1]])"
    process = started(code + "; import time; time.sleep(0.5)", listener, tmp_path / "log", HOLD)
    held = accept(listener)
    assert process.wait(20) == 0
    assert is_gone(held, within=1)
    process.close()


def test_a_command_that_does_not_listen_is_killed_after_the_grace(listener: socket.socket, tmp_path: Path) -> None:
    process = started(HOLD_ON, listener, tmp_path / "log", grace=0.3)
    held = accept(listener)
    process.close()
    assert process.returncode == 128 + signal.SIGKILL
    assert is_gone(held, within=1)


def test_our_sudden_death_ends_the_command(listener: socket.socket, tmp_path: Path) -> None:
    with parent("time.sleep(600)", listener, tmp_path / "log") as us:
        held = accept(listener)
        us.kill()
        assert us.wait() == -signal.SIGKILL
        assert is_gone(held)


def test_what_we_have_forked_does_not_keep_the_command_alive(listener: socket.socket, tmp_path: Path) -> None:
    fork_and_stay = "fork = os.fork(); fork and print(fork, flush=True); time.sleep(600)"
    with parent(fork_and_stay, listener, tmp_path / "log") as us:
        assert us.stdout is not None
        fork = int(us.stdout.readline())
        held = accept(listener)
        us.kill()
        assert is_gone(held)
        os.kill(fork, signal.SIGKILL)


@pytest.mark.parametrize("then", ["sys.exit(0)", "raise KeyboardInterrupt", "del process; time.sleep(600)"])
def test_an_exit_an_exception_and_a_forgotten_process_end_the_command(
    listener: socket.socket, tmp_path: Path, then: str
) -> None:
    with parent(f"time.sleep(0.5); sys.stderr = open(os.devnull, 'w'); {then}", listener, tmp_path / "log") as us:
        assert is_gone(accept(listener))
        us.kill()


def test_the_end_of_the_watchdog_is_the_end_of_the_command(listener: socket.socket) -> None:
    command = [sys.executable, "-c", HOLD, port(listener)]
    with subprocess.Popen([sys.executable, "-I", watchdog, "5", *command], stdin=subprocess.PIPE) as process:
        held = accept(listener)
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
        assert is_gone(held, within=1)
