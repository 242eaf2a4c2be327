"""The table of engines, and the choice among them.

An engine is taken only where it draws exactly what `Sampling` says from exactly the model that is asked for: its
`obstacle` is the reason why it does not, which `auto` passes over and a user who named the engine is told.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prefloop.data.chat import ChatFormat
from prefloop.errors import InputError, did_you_mean
from prefloop.models import ModelRef, context_of, load_model, load_tokenizer
from prefloop.sample.engine import Engine
from prefloop.sample.options import Server
from prefloop.sample.sampling import Sampling


@dataclass(frozen=True)
class EngineSetting:
    """What an engine is built with. `batch_size`: answers decoded at once; `log`: file for a server's output."""

    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 64
    server: Server = field(default_factory=Server)
    log: Path | None = None


@dataclass(frozen=True)
class EngineKind:
    """One engine: how it is built, and why it may not be used here (None: it may)."""

    load: Callable[[ModelRef, EngineSetting], Engine]
    obstacle: Callable[[ModelRef, Sampling, EngineSetting], str | None]


def _chat(policy: ModelRef) -> ChatFormat:
    return ChatFormat(load_tokenizer(policy))


def _transformers(policy: ModelRef, setting: EngineSetting) -> Engine:
    from prefloop.sample.transformers import TransformersEngine

    model = load_model(policy, dtype=setting.dtype, device=setting.device)
    return TransformersEngine(model, _chat(policy), batch_size=setting.batch_size)


def _openvino(policy: ModelRef, setting: EngineSetting) -> Engine:
    from prefloop.sample.openvino import OpenVinoEngine

    return OpenVinoEngine(
        policy,
        _chat(policy),
        dtype=setting.dtype,
        batch_size=setting.batch_size,
        context=context_of(policy),
        folder=setting.log.parent if setting.log else None,
    )


def _openvino_obstacle(policy: ModelRef, sampling: Sampling, setting: EngineSetting) -> str | None:
    from prefloop.sample.openvino import openvino_obstacle

    return openvino_obstacle(policy, sampling, setting.device)


def _vllm(policy: ModelRef, setting: EngineSetting) -> Engine:
    from prefloop.sample.vllm import vllm_engine

    return vllm_engine(
        policy, _chat(policy), setting.server, dtype=setting.dtype, context=context_of(policy), log=setting.log
    )


def _vllm_obstacle(policy: ModelRef, sampling: Sampling, setting: EngineSetting) -> str | None:
    from prefloop.sample.vllm import vllm_obstacle

    return vllm_obstacle(setting.server, sampling)


def _server(policy: ModelRef, setting: EngineSetting) -> Engine:
    from prefloop.sample.server import ServerEngine

    return ServerEngine(_chat(policy), setting.server, context=context_of(policy), dtype=setting.dtype)


def _server_obstacle(policy: ModelRef, sampling: Sampling, setting: EngineSetting) -> str | None:
    from prefloop.sample.server import server_obstacle

    if not setting.server.url:
        return "server.url is missing: name the server, such as http://127.0.0.1:8000/v1"
    return server_obstacle(sampling)


def _scripted(policy: ModelRef, setting: EngineSetting) -> Engine:
    from prefloop.sample.scripted import ScriptedEngine, echo

    return ScriptedEngine(_chat(policy), echo)


def _none(policy: ModelRef, sampling: Sampling, setting: EngineSetting) -> str | None:
    return None


ENGINES: dict[str, EngineKind] = {
    "transformers": EngineKind(_transformers, _none),
    "openvino": EngineKind(_openvino, _openvino_obstacle),
    "vllm": EngineKind(_vllm, _vllm_obstacle),
    "server": EngineKind(_server, _server_obstacle),
    "scripted": EngineKind(_scripted, _none),
}
"""Engines by the name that `--engine` takes."""

PREFERRED = {"cpu": ("openvino", "transformers"), "cuda": ("vllm", "transformers"), "mps": ("transformers",)}
"""What `auto` tries on a kind of device, fastest first; the last one takes every model."""


def choose_engine(name: str, policy: ModelRef, sampling: Sampling, setting: EngineSetting) -> tuple[str, str]:
    """The engine to use and why, in one line.

    Raises InputError for a name that the table lacks, and for a named engine that cannot do what is asked.
    """
    if name == "auto":
        passed_over = []
        for candidate in PREFERRED[setting.device.split(":")[0]]:
            obstacle = ENGINES[candidate].obstacle(policy, sampling, setting)
            if obstacle is None:
                return candidate, "; ".join([*passed_over, f"the fastest there is for {setting.device}"])
            passed_over.append(f"not {candidate}: {obstacle}")
        raise AssertionError("the last engine of every device takes all models")
    if name not in ENGINES:
        known = ["auto", *ENGINES]
        raise InputError(f"unknown engine {name!r}; expected one of {', '.join(known)}.{did_you_mean(name, known)}")
    obstacle = ENGINES[name].obstacle(policy, sampling, setting)
    if obstacle:
        raise InputError(f"engine {name!r} cannot be used: {obstacle}; --engine auto takes one that can")
    return name, "asked for"


def load_engine(name: str, policy: ModelRef, setting: EngineSetting) -> Engine:
    """The engine of this name over the model in a folder."""
    return ENGINES[name].load(policy, setting)
