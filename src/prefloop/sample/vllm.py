"""Sampling from vLLM: a server on loopback that is started for the first prompt, watched, and gone when we are.

vLLM lives in an environment of its own; nothing of it is imported here. It is spoken to over its public HTTP interface
(`ServerEngine`) and started by its public command line.
"""

import gc
import http.client
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from prefloop.data.chat import ChatFormat
from prefloop.errors import EngineError, InputError
from prefloop.models import ModelRef, choose_device
from prefloop.progress import Advance, ignore
from prefloop.records import Group, Prompt
from prefloop.sample.engine import Engine, check_request, checked_prompt_ids
from prefloop.sample.options import Server
from prefloop.sample.process import SupervisedProcess
from prefloop.sample.sampling import Sampling
from prefloop.sample.server import TOLERANCE, ServerEngine, check_sampling, server_obstacle

HOST = "127.0.0.1"
LAST_LINES = 20
"""Lines of a dead server's log that are shown."""

AN_ERROR = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception): .*)")
"""A line that ends a traceback. The first one is the cause; the last lines are how the others followed."""

LAST_WORDS = 5.0
"""Seconds in which a server that failed a request may be found dead: its front goes a little after its engine."""

INSTALL = (
    "install vLLM into an environment of its own (python -m venv vllm-env; vllm-env/bin/pip install vllm) and name its "
    "interpreter: --server.python vllm-env/bin/python"
)


def vllm_engine(
    policy: ModelRef,
    chat: ChatFormat,
    options: Server,
    *,
    dtype: str = "bfloat16",
    context: int | None = None,
    log: Path | None = None,
) -> Engine:
    """Engine `vllm`: the server at `options.url` where one is named, else one of our own."""
    if options.url:
        return ServerEngine(chat, options, context=context, dtype=dtype)
    return VllmEngine(policy, chat, options, dtype=dtype, context=context, log=log)


def vllm_obstacle(options: Server, sampling: Sampling) -> str | None:
    """Why vLLM cannot be used here for `sampling`, or None."""
    obstacle = server_obstacle(sampling)
    if obstacle is None and not options.url:
        try:
            vllm_python(options.python)
        except InputError as error:
            obstacle = str(error)
    return obstacle


class VllmEngine:
    """An `Engine` over a vLLM server of its own, started by the first `sample` that has prompts.

    `dtype`: "float32" or "bfloat16", of its weights and products. `log`: the file that gets the server's output, a
    temporary one when None. Raises InputError when there is no vLLM.
    """

    def __init__(
        self,
        policy: ModelRef,
        chat: ChatFormat,
        options: Server,
        *,
        dtype: str = "bfloat16",
        context: int | None = None,
        log: Path | None = None,
    ) -> None:
        self.policy, self.chat, self.options, self.dtype, self.context = policy, chat, options, dtype, context
        self.tolerance: float | None = TOLERANCE[dtype]
        self.python = vllm_python(options.python)
        self._log = log
        self._log_start = 0
        self._process: SupervisedProcess | None = None
        self._server: ServerEngine | None = None
        self._closed = False

    @property
    def url(self) -> str | None:
        """Of the server, once it has been started."""
        return None if self._server is None else self._server.options.url

    def prompt_lengths(self, prompts: Sequence[Prompt], *, sampling: Sampling) -> list[int]:
        return [len(ids) for ids in checked_prompt_ids(self.chat, prompts, sampling, self.context)]

    def sample(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seed: int, advance: Advance = ignore
    ) -> list[Group]:
        check_request(prompts, k)
        check_sampling(sampling)
        checked_prompt_ids(self.chat, prompts, sampling, self.context)
        if not prompts:
            return []
        if self._closed:
            raise InputError("this engine was closed; load another")
        if self._server is None:
            self._server = self._start()
        try:
            return self._server.sample(prompts, k=k, sampling=sampling, seed=seed, advance=advance)
        except EngineError as error:
            assert self._process is not None
            if self._process.wait(LAST_WORDS) is None:
                raise
            raise EngineError(f"{self._how_it_died('while it sampled')}\n({error})") from None

    def close(self) -> None:
        self._closed = True
        if self._server is not None:
            self._server.close()
        if self._process is not None:
            self._process.close()

    def _start(self) -> ServerEngine:
        """A server that is ready, and the engine over it."""
        port, key = _free_port(), secrets.token_hex(16)
        options = self.options.replace(url=f"http://{HOST}:{port}/v1", model=served_name(self.policy))
        engine = ServerEngine(self.chat, options, context=self.context, dtype=self.dtype, api_key=key)
        if self._log is None:
            handle, name = tempfile.mkstemp(prefix="prefloop-vllm-", suffix=".log")
            os.close(handle)
            self._log = Path(name)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        give_back_gpu_memory()
        command = serve_command(
            self.python, self.policy, self.options, dtype=self.dtype, context=self.context, port=port,
            device=choose_device("auto"),
        )  # fmt: skip
        self._process = SupervisedProcess(
            command,
            log=self._log,
            # By the environment, not the command line: any user of the machine can list command lines, and reach the
            # port.
            environment={**os.environ, "VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1"},
        )
        try:
            self._wait_until_ready(port)
        except BaseException:
            self._process.close()
            raise
        return engine

    def _wait_until_ready(self, port: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.options.start_timeout
        while not _is_healthy(port):
            if self._process.wait(0.2) is not None:
                raise EngineError(self._how_it_died("before it was ready"))
            if time.monotonic() > deadline:
                raise EngineError(
                    f"vLLM was not ready after {self.options.start_timeout:g} s; raise server.start_timeout, or see "
                    f"{self._log}"
                )

    def _how_it_died(self, when: str) -> str:
        assert self._log is not None and self._process is not None
        with self._log.open("rb") as handle:
            handle.seek(self._log_start)
            lines = handle.read().decode("utf-8", errors="replace").splitlines()
        errors = [found.group(1) for line in lines if (found := AN_ERROR.search(line))]
        first = f"the first error is {errors[0]}; " if errors else ""
        last = "\n".join(f"  {line}" for line in lines[-LAST_LINES:])
        return (
            f"vLLM ended with status {self._process.returncode} {when} ({self.policy.name}); {first}the last lines of "
            f"{self._log}:\n{last}"
        )


def give_back_gpu_memory() -> None:
    """What this process holds on GPUs and no longer uses: a server that starts takes a share of what is free."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def served_name(policy: ModelRef) -> str:
    """The name that our server gives to a model: its fingerprint, so that no other server is taken for it."""
    return f"prefloop-{policy.fingerprint[:12]}"


def serve_command(
    python: str, policy: ModelRef, options: Server, *, dtype: str, context: int | None, port: int, device: str
) -> list[str]:
    """The command line of the server; `options.args` come last, so that they win.

    The module and not the script `vllm`: the CPU build is a distribution of another name, and its script fails on that.
    """
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(policy.path), "--served-model-name", served_name(policy)),
        *("--host", HOST, "--port", str(port)),
        *("--dtype", dtype),
        *(("--max-model-len", str(context)) if context is not None else ()),
        # No sampling defaults from the model's generation_config.json.
        *("--generation-config", "vllm"),
        "--enable-prefix-caching",
        # On a CPU a prompt that is cut between two batches ends the server, where its request has a seed (0.32).
        *(("--no-enable-chunked-prefill",) if device == "cpu" else ()),
        *("--tensor-parallel-size", str(options.tensor_parallel_size)),
        *("--data-parallel-size", str(options.data_parallel_size)),
        "--disable-uvicorn-access-log",
        *shlex.split(options.args),
    ]


def vllm_python(named: str) -> str:
    """The interpreter that has vLLM: the one `named`, else the one beside the script `vllm` on the PATH.

    Raises InputError when there is none, or when it cannot import vLLM.
    """
    if named:
        python = shutil.which(os.path.expanduser(named))
        if python is None:
            raise InputError(f"server.python = {named!r} is not a program that can be run; {INSTALL}")
    else:
        script = shutil.which("vllm")
        if script is None:
            raise InputError(f"no vllm on the PATH and no server.python; {INSTALL}")
        # Links lead from a folder on the PATH into the environment that has the interpreter.
        folder = Path(script).resolve().parent
        python = next((str(folder / name) for name in ("python", "python3") if (folder / name).exists()), None)
        if python is None:
            raise InputError(f"there is no interpreter beside {script}; name the one that has vLLM with server.python")
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([python, "-c", look], capture_output=True).returncode:
        raise InputError(f"{python} has no vLLM; {INSTALL}")
    return python


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return listener.getsockname()[1]


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    with suppress(OSError, http.client.HTTPException):
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        finally:
            connection.close()
    return False
