"""The sampling stage of a run: K answers to every prompt, in shards that survive a kill.

A shard is one batch of prompts, a pure function of the inputs, and its file is named by a hash of everything that its
answers depend on. A rerun takes finished shards as they are and ends with the same groups as an uninterrupted run.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefloop.atomic import write_atomically
from prefloop.errors import InputError, did_you_mean
from prefloop.models import ModelRef, choose_device, choose_sampling_dtype, load_model, load_tokenizer
from prefloop.records import Group, Prompt
from prefloop.run import Stage
from prefloop.sample.engine import Engine, check_request, shards
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute


def _transformers(policy: ModelRef, dtype: str, device: str, batch_size: int) -> Engine:
    from prefloop.data.chat import ChatFormat
    from prefloop.sample.transformers import TransformersEngine

    chat = ChatFormat(load_tokenizer(policy))
    return TransformersEngine(load_model(policy, dtype=dtype, device=device), chat, batch_size=batch_size)


def _scripted(policy: ModelRef, dtype: str, device: str, batch_size: int) -> Engine:
    from prefloop.data.chat import ChatFormat
    from prefloop.sample.scripted import ScriptedEngine, echo

    return ScriptedEngine(ChatFormat(load_tokenizer(policy)), echo)


ENGINES: dict[str, Callable[[ModelRef, str, str, int], Engine]] = {
    "transformers": _transformers,
    "scripted": _scripted,
}
"""Engines by name: (policy, dtype, device, batch_size) -> engine."""


def load_engine(
    policy: ModelRef,
    *,
    engine: str = "transformers",
    dtype: str = "float32",
    device: str = "cpu",
    batch_size: int = 64,
) -> Engine:
    """The named engine over the model in a folder. Raises InputError for a name that `ENGINES` lacks."""
    if engine not in ENGINES:
        raise InputError(
            f"unknown engine {engine!r}; expected one of {', '.join(ENGINES)}.{did_you_mean(engine, list(ENGINES))}"
        )
    return ENGINES[engine](policy, dtype, device, batch_size)


def sample(
    policy: ModelRef,
    prompts: Sequence[Prompt],
    *,
    k: int,
    sampling: Sampling,
    seed: int,
    compute: Compute,
    engine: str = "transformers",
    stage: Stage | None = None,
) -> list[Group]:
    """K answers of `policy` to every prompt, in the order of `prompts`.

    Raises InputError for an unknown engine, k < 1, a repeated prompt id, or a prompt without room for
    `sampling.max_new_tokens` in the model's context, before anything is sampled.
    """
    stage = stage or Stage.detached()
    check_request(prompts, k)
    if not prompts:
        return []
    device = choose_device(compute.device)
    dtype = choose_sampling_dtype(device) if compute.sampling_dtype == "auto" else compute.sampling_dtype
    batch_size = compute.sequences_per_batch
    sampler = load_engine(policy, engine=engine, dtype=dtype, device=device, batch_size=batch_size)
    stage.event("engine", name=engine, model=policy.name, dtype=dtype, device=device)
    lengths = sampler.prompt_lengths(prompts, sampling=sampling)
    request = {
        "policy": policy.fingerprint,
        "engine": [engine, dtype, device, batch_size],
        "k": k,
        "sampling": sampling.model_dump(),
        "seed": seed,
    }

    groups: dict[str, Group] = {}
    sampled_tokens, started = 0, time.perf_counter()
    with stage.progress(len(prompts) * k, unit="answers", description=f"answers of {policy.name}") as advance:
        for indices in shards(lengths, k, batch_size):
            shard = [prompts[i] for i in indices]
            file = stage.scratch / _shard_name(request, shard) if stage.scratch else None
            finished = _read_shard(file)
            if finished is not None:
                advance(len(shard) * k)
            else:
                finished = sampler.sample(shard, k=k, sampling=sampling, seed=seed, advance=advance)
                sampled_tokens += _tokens(finished)
                _write_shard(file, finished)
            groups.update((group.prompt.id, group) for group in finished)
    _report(stage, list(groups.values()), sampled_tokens, time.perf_counter() - started)
    return [groups[prompt.id] for prompt in prompts]


def _tokens(groups: Sequence[Group]) -> int:
    return sum(response.length_tokens for group in groups for response in group.responses)


def _report(stage: Stage, groups: Sequence[Group], sampled_tokens: int, seconds: float) -> None:
    responses = [response for group in groups for response in group.responses]
    unfinished = sum(response.finish_reason == "length" for response in responses)
    stage.count("answers", len(responses))
    stage.count("answers finished", len(responses) - unfinished)
    stage.count("answers unfinished", unfinished)
    stage.count("tokens", _tokens(groups))
    rate = f"{sampled_tokens / seconds:.0f} tokens/s" if sampled_tokens else "all of them sampled before"
    stage.note(f"{len(responses)} answers, {_tokens(groups)} tokens, {unfinished} unfinished; {rate}")


def _shard_name(request: dict[str, Any], prompts: Sequence[Prompt]) -> str:
    """The file name of a shard: a hash of the request and of the shard's prompts."""
    text = json.dumps([request, [prompt.to_json() for prompt in prompts]], sort_keys=True)
    return f"groups-{_sha256(text)[:24]}.jsonl"


def _write_shard(file: Path | None, groups: Sequence[Group]) -> None:
    """One line with the hash of what follows, then one group a line."""
    if file is not None:
        body = "".join(group.to_json() + "\n" for group in groups)
        write_atomically(file, json.dumps({"sha256": _sha256(body)}) + "\n" + body)


def _read_shard(file: Path | None) -> list[Group] | None:
    """The groups of a finished shard; None when there is no such file or it is not what was written."""
    if file is None or not file.is_file():
        return None
    head, _, body = file.read_bytes().decode("utf-8", errors="replace").partition("\n")
    if head != json.dumps({"sha256": _sha256(body)}):
        return None
    # Not splitlines: an answer may contain other line separators, such as U+2028, which JSON leaves as they are.
    return [Group.from_json(line) for line in body.split("\n")[:-1]]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
