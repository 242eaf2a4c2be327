"""The vLLM engine over a stand-in: a package called vllm in another interpreter, which serves by tests.sample.loopback.

What is ours is real: the process, its start and its end, the command line, the weights that it loads from the folder.
benchmarks/vllm_dice.py does the same with vLLM itself.
"""

import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from transformers import AutoModelForCausalLM

from prefloop.errors import EngineError, InputError
from prefloop.models import ModelRef
from prefloop.sample.options import Server
from prefloop.sample.sampling import Sampling
from prefloop.sample.server import ServerEngine
from prefloop.sample.vllm import VllmEngine, serve_command, vllm_engine, vllm_obstacle, vllm_python
from tests.sample.engines import CHAT, PROMPTS, ids_of
from tests.sample.loopback import Loopback, shared
from tests.tiny import save_tiny_model

SAMPLING = Sampling(max_new_tokens=12)
API_SERVER = """
import sys, time

if "--no-room" in sys.argv:
    sys.exit("ValueError: no room for the KV cache")
if "--hang" in sys.argv:
    time.sleep(600)
if __name__ == "__main__":
    from tests.sample.loopback import main
    main()
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that finds a package vllm."""
    folder = tmp_path_factory.mktemp("environment")
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for part in (package, package.parent, package.parent.parent):
        (part / "__init__.py").touch()
    (package / "api_server.py").write_text(API_SERVER)
    program = folder / "python"
    root = Path(__file__).parents[2]
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}:{root}" OMP_NUM_THREADS=1 exec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef.of(save_tiny_model(tmp_path_factory.mktemp("models") / "policy", seed=5), name="policy")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "vllm.log"


@pytest.fixture(scope="module")
def engine(policy: ModelRef, python: str, log: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(policy, CHAT, Server(python=python), dtype="float32", context=1024, log=log)
    yield engine
    engine.close()


def with_arguments(policy: ModelRef, python: str, log: Path, args: str, start_timeout: float = 60) -> VllmEngine:
    options = Server(python=python, args=args, start_timeout=start_timeout, retries=0)
    return VllmEngine(policy, CHAT, options, dtype="float32", context=1024, log=log)


def test_nothing_is_started_before_there_is_something_to_sample(engine: VllmEngine, log: Path) -> None:
    lengths = engine.prompt_lengths(PROMPTS, sampling=SAMPLING)
    assert lengths == [len(CHAT.prompt_ids(prompt)) for prompt in PROMPTS]
    assert engine.sample([], k=2, sampling=SAMPLING, seed=3) == []
    with pytest.raises(InputError, match="context of 1024"):
        engine.sample(PROMPTS, k=2, sampling=SAMPLING.replace(max_new_tokens=1024), seed=3)
    with pytest.raises(InputError, match="min_p before top_p"):
        engine.sample(PROMPTS, k=2, sampling=SAMPLING.replace(min_p=0.1, top_p=0.9), seed=3)
    assert not log.exists()


@pytest.mark.slow
def test_it_samples_from_the_weights_in_the_folder(engine: VllmEngine, policy: ModelRef, log: Path) -> None:
    groups = engine.sample(PROMPTS, k=2, sampling=SAMPLING, seed=3)
    model = AutoModelForCausalLM.from_pretrained(policy.path)
    with Loopback(model, CHAT.tokenizer) as here:
        expected = ServerEngine(CHAT, Server(url=here.url)).sample(PROMPTS, k=2, sampling=SAMPLING, seed=3)
    assert ids_of(groups) == ids_of(expected)
    assert "loading the model" in log.read_text()


def test_the_same_server_samples_again_and_is_gone_after_close(engine: VllmEngine, log: Path) -> None:
    engine.sample(PROMPTS[:1], k=1, sampling=SAMPLING, seed=4)
    assert log.read_text().count("loading the model") == 1
    assert engine.url is not None
    address = urlsplit(engine.url)
    assert address.hostname == "127.0.0.1" and address.port
    engine.close()
    engine.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address.hostname, address.port))
    with pytest.raises(InputError, match="this engine was closed"):
        engine.sample(PROMPTS, k=1, sampling=SAMPLING, seed=4)


@pytest.mark.slow
def test_a_server_that_dies_while_it_samples_says_its_last_words(policy: ModelRef, python: str, tmp_path: Path) -> None:
    engine = with_arguments(policy, python, tmp_path / "log", "--die-at 3")
    with pytest.raises(EngineError) as caught:
        engine.sample(PROMPTS, k=2, sampling=SAMPLING, seed=3)
    said = str(caught.value)
    assert "vLLM ended with status 3 while it sampled (policy); the first error is RuntimeError: out of memory" in said
    assert f"the last lines of {tmp_path / 'log'}:" in said
    assert "  RuntimeError: out of memory\n" in said
    engine.close()


def test_a_server_that_dies_at_its_start_says_its_last_words(policy: ModelRef, python: str, tmp_path: Path) -> None:
    log = tmp_path / "folder" / "log"
    log.parent.mkdir()
    log.write_text("of an earlier server\n")
    engine = with_arguments(policy, python, log, "--no-room")
    with pytest.raises(EngineError, match=r"vLLM ended with status 1 before it was ready \(policy\)") as caught:
        engine.sample(PROMPTS, k=2, sampling=SAMPLING, seed=3)
    assert str(caught.value).endswith(":\n  ValueError: no room for the KV cache")


def test_a_server_that_does_not_get_ready_is_ended(policy: ModelRef, python: str, tmp_path: Path) -> None:
    engine = with_arguments(policy, python, tmp_path / "log", "--hang", start_timeout=0.5)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"vLLM was not ready after 0.5 s; raise server.start_timeout"):
        engine.sample(PROMPTS, k=2, sampling=SAMPLING, seed=3)
    assert time.monotonic() - started < 5


def test_the_command_line(policy: ModelRef) -> None:
    options = Server(tensor_parallel_size=2, data_parallel_size=4, args="--max-model-len 512")
    command = serve_command("python", policy, options, dtype="bfloat16", context=1024, port=8123, device="cuda")
    assert " ".join(command) == (
        f"python -m vllm.entrypoints.openai.api_server --model {policy.path} "
        f"--served-model-name prefloop-{policy.fingerprint[:12]} --host 127.0.0.1 --port 8123 --dtype bfloat16 "
        "--max-model-len 1024 --generation-config vllm --enable-prefix-caching --tensor-parallel-size 2 "
        "--data-parallel-size 4 --disable-uvicorn-access-log --max-model-len 512"
    )
    on_cpu = serve_command("python", policy, Server(), dtype="bfloat16", context=None, port=1, device="cpu")
    assert "--max-model-len" not in on_cpu and "--no-enable-chunked-prefill" in on_cpu


def test_a_url_in_the_options_is_used_in_place_of_a_server_of_ours(policy: ModelRef) -> None:
    engine = vllm_engine(policy, CHAT, Server(url=shared().url), dtype="float32")
    assert isinstance(engine, ServerEngine)
    assert len(engine.sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)) == 5
    assert vllm_obstacle(Server(url=shared().url), SAMPLING) is None


def test_the_interpreter_is_the_one_beside_the_script(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(python).with_name("vllm-script")
    script.touch(0o755)
    (tmp_path / "vllm").symlink_to(script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert vllm_python("") == python
    assert vllm_obstacle(Server(), SAMPLING) is None


def test_without_vllm_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = r"install vLLM into an environment of its own .*pip install vllm.*--server.python"
    with pytest.raises(InputError, match=rf"'/nowhere/python' is not a program that can be run; {install}"):
        vllm_python("/nowhere/python")
    with pytest.raises(InputError, match=rf"{sys.executable} has no vLLM; {install}"):
        vllm_python(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=rf"no vllm on the PATH and no server.python; {install}"):
        vllm_python("")
    assert vllm_obstacle(Server(), SAMPLING) is not None
    (tmp_path / "vllm").touch(0o755)
    with pytest.raises(InputError, match=r"no interpreter beside .*vllm; name the one that has vLLM"):
        vllm_python("")


def test_what_vllm_draws_otherwise_is_an_obstacle(python: str) -> None:
    assert vllm_obstacle(Server(python=python), SAMPLING) is None
    obstacle = vllm_obstacle(Server(python=python), SAMPLING.replace(min_p=0.1, top_p=0.9))
    assert obstacle is not None and "min_p before top_p" in obstacle
