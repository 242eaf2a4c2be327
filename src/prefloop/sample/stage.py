"""The sampling stage of a run: K answers to every prompt, in shards that survive a kill.

A shard is a few batches of answers, a pure function of the inputs, and its file is named by a hash of everything that
its answers depend on. A rerun takes finished shards as they are and ends with the same groups as an uninterrupted run.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloop.atomic import write_atomically
from prefloop.errors import CheckFailed
from prefloop.models import ModelRef, choose_device, choose_sampling_dtype
from prefloop.records import Group, Prompt
from prefloop.run import Stage
from prefloop.sample.engine import check_request, shards
from prefloop.sample.engines import EngineSetting, choose_engine, load_engine
from prefloop.sample.options import Server
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute

if TYPE_CHECKING:
    from prefloop.sample.handover import Gap

BATCHES = 4
"""Batches of answers in a shard: enough that an engine which fills up as answers end is seldom half empty."""


def sample(
    policy: ModelRef,
    prompts: Sequence[Prompt],
    *,
    k: int,
    sampling: Sampling,
    seed: int,
    compute: Compute,
    engine: str = "auto",
    server: Server | None = None,
    stage: Stage | None = None,
) -> list[Group]:
    """K answers of `policy` to every prompt, in the order of `prompts`.

    After the first shard, and over answers of all shards at the end, the engine's own log-probabilities are held
    against the trainer's; beyond the engine's tolerance that is a CheckFailed. Raises InputError for an unknown engine
    or one that cannot do what is asked, k < 1, a repeated prompt id, or a prompt without room for
    `sampling.max_new_tokens` in the model's context, before anything is sampled.
    """
    from prefloop.sample.handover import LOGGED, PROBES

    stage = stage or Stage.detached()
    check_request(prompts, k)
    if not prompts:
        return []
    device = choose_device(compute.device)
    setting = EngineSetting(
        dtype=choose_sampling_dtype(device, compute.sampling_dtype),
        device=device,
        batch_size=compute.sequences_per_batch,
        server=server or Server(),
        log=stage.scratch / "engine.log" if stage.scratch else None,
    )
    name, why = choose_engine(engine, policy, sampling, setting)
    stage.event("engine", name=name, why=why, model=policy.name, dtype=setting.dtype, device=device)
    if engine == "auto":
        stage.note(f"engine {name} ({why})")
    request = {
        "policy": policy.fingerprint,
        "engine": [name, setting.dtype, device, setting.batch_size],
        "k": k,
        "sampling": sampling.model_dump(),
        "seed": seed,
    }
    shards_at = partial(_shard_file, stage, request)
    with closing(load_engine(name, policy, setting)) as sampler:
        lengths = sampler.prompt_lengths(prompts, sampling=sampling)
        parts = [[prompts[i] for i in part] for part in shards(lengths, k, BATCHES * compute.sequences_per_batch)]
        check = partial(_check, stage, policy, name, sampler.tolerance, seed, compute)
        finished: list[list[Group]] = []
        tokens, seconds = 0, 0.0
        with stage.progress(len(prompts) * k, unit="answers", description=f"answers of {policy.name}") as advance:
            for part in parts:
                groups = _read_shard(shards_at(part))
                if groups is not None:
                    advance(len(part) * k)
                else:
                    started = time.perf_counter()
                    groups = sampler.sample(part, k=k, sampling=sampling, seed=seed, advance=advance)
                    seconds += time.perf_counter() - started
                    if not tokens and len(parts) > 1:
                        # The engine is still there, and its memory: on a GPU the trainer has no room beside it.
                        check([groups], device="cpu", answers=PROBES)
                    tokens += _tokens(groups)
                    _write_shard(shards_at(part), groups)
                finished.append(groups)
    try:
        gap = check(finished, device=device, answers=LOGGED)
    except CheckFailed:
        for file in filter(None, map(shards_at, parts)):
            file.unlink(missing_ok=True)
        raise
    if gap is not None:
        stage.figure("sampler gap, mean nats a token", gap.mean)
        stage.figure("sampler gap, 99th percentile", gap.p99)
        stage.note(str(gap))
    by_id = {group.prompt.id: group for groups in finished for group in groups}
    _report(stage, list(by_id.values()), tokens, seconds)
    return [by_id[prompt.id] for prompt in prompts]


def _check(
    stage: Stage,
    policy: ModelRef,
    engine: str,
    tolerance: float | None,
    seed: int,
    compute: Compute,
    parts: Sequence[Sequence[Group]],
    *,
    device: str,
    answers: int,
) -> "Gap | None":
    """Hold the engine's log-probabilities against the trainer's; None when it gives none."""
    from prefloop.sample import handover

    gap = None
    if tolerance is not None:
        gap = handover.measure(
            policy, parts, budget=compute.tokens_per_forward, device=device, answers=answers, seed=seed
        )
    if gap is None or tolerance is None:
        stage.event("sampler_gap", engine=engine, seen="the engine gives no log-probabilities")
        return None
    stage.event("sampler_gap", engine=engine, tolerance=tolerance, **gap._asdict())
    handover.check(gap, tolerance, engine=engine, policy=policy.name)
    return gap


def _shard_file(stage: Stage, request: dict[str, Any], prompts: Sequence[Prompt]) -> Path | None:
    """The file of a shard, named by a hash of the request and of the shard's prompts; None outside a run."""
    if stage.scratch is None:
        return None
    text = json.dumps([request, [prompt.to_json() for prompt in prompts]], sort_keys=True)
    return stage.scratch / f"groups-{_sha256(text)[:24]}.jsonl"


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
    if sampled_tokens:
        stage.figure("tokens/s", sampled_tokens / seconds)
    stage.note(f"{len(responses)} answers, {_tokens(groups)} tokens, {unfinished} unfinished; {rate}")


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
