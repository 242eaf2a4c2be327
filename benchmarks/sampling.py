"""Sampling K = 8 answers a prompt: our engines against `model.generate(num_return_sequences=8)`.

    python benchmarks/sampling.py --engines transformers,openvino,vllm --baseline generate [--quick] [--dtype bfloat16]
    python benchmarks/sampling.py --device cuda --shape llama-1b --engines transformers,vllm --max-new-tokens 512

All sample at temperature 1 from the same shipped prompts, with natural ends: answers are ragged. Each side is a process
of its own; they take turns over all prompts, with other seeds each time. The baseline is transformers' loop as it is,
in left-padded batches of prompts of similar length; its batch size (answers at once) is the fastest of `--batch-sizes`,
each tried on all prompts.

The rate is that of tokens up to and including the end token (after it the baseline pads), over all turns but the first.
`load_s` is what comes before: building the engine (with the handover of the weights), and what the first turn took
beyond its tokens at the later turns' rate. `peak_gb` is the largest resident size of a side's process and of those that
it started, summed; on CUDA the memory that PyTorch reserved there, and nothing for a server, which takes a share that
it is told. `logprob_gap` is |log p(engine) - log p(trainer, float32)| by token, over the answers of the last turn.

`--shape` makes a model of that shape with random weights, and SmolLM2's tokenizer; its answers hardly ever end, so
`--max-new-tokens` is their length. Prints, last, one line of JSON. Memory of processes is read from /proc (Linux only).
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shapes import SHAPES, shaped
from turns import Side, report, timed

if TYPE_CHECKING:
    from prefloop.records import Group, Prompt
    from prefloop.sample.options import Server

K = 8
BASELINE = "generate"
TOKENS_PER_FORWARD = 2048
"""Of the trainer's float32 pass over the answers."""


class Job(NamedTuple):
    """What a side is told. `batch_size`: answers at once. `turns`: with the first, which is not in the rate."""

    engine: str
    model: str
    dtype: str
    device: str
    prompts: tuple["Prompt", ...]
    max_new_tokens: int
    batch_size: int
    turns: int
    server: "Server"
    log: Path


class Turn(NamedTuple):
    """What came out of a turn: tokens up to the end token, and the groups of an engine of ours."""

    tokens: int
    groups: "list[Group]"


def side(job: Job, turn: Connection) -> None:
    """Worker: builds its engine, samples whenever it gets its turn, reports its memory at the end."""
    start = time.perf_counter()
    sample, close = (baseline if job.engine == BASELINE else engine)(job)
    report(turn, time.perf_counter() - start)
    for number in range(job.turns):
        timed(turn, lambda number=number: sample(number))
    turn.recv()
    report(turn, {"peak": peak_memory(job.device)})
    close()


def engine(job: Job) -> tuple[Callable[[int], Turn], Callable[[], None]]:
    """One of our engines: sampling with a seed, and the end of it."""
    from prefloop.models import resolve
    from prefloop.sample.engines import EngineSetting, load_engine
    from prefloop.sample.sampling import Sampling

    setting = EngineSetting(job.dtype, job.device, job.batch_size, job.server, job.log)
    loaded = load_engine(job.engine, resolve(job.model), setting)
    sampling = Sampling(max_new_tokens=job.max_new_tokens)

    def sample(seed: int) -> Turn:
        groups = loaded.sample(job.prompts, k=K, sampling=sampling, seed=seed)
        return Turn(sum(response.length_tokens for group in groups for response in group.responses), groups)

    return sample, loaded.close


def baseline(job: Job) -> tuple[Callable[[int], Turn], Callable[[], None]]:
    """transformers' generate over batches of prompts, shortest first."""
    import torch
    from transformers import GenerationConfig

    from prefloop.data.chat import ChatFormat
    from prefloop.models import load_model, load_tokenizer, resolve

    ref = resolve(job.model)
    model: Any = load_model(ref, dtype=job.dtype, device=job.device)
    chat = ChatFormat(load_tokenizer(ref))
    prompt_ids = sorted((chat.prompt_ids(prompt) for prompt in job.prompts), key=len)
    stops = sorted(chat.stop_token_ids)
    # Every value stated: nothing comes from the model's own generation config.
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=K, max_new_tokens=job.max_new_tokens,
        eos_token_id=stops, pad_token_id=chat.end_token_id,
    )  # fmt: skip
    at_once = max(1, job.batch_size // K)

    def sample(seed: int) -> Turn:
        torch.manual_seed(seed)
        tokens = 0
        for start in range(0, len(prompt_ids), at_once):
            rows = {"input_ids": prompt_ids[start : start + at_once]}
            inputs = chat.tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(job.device)
            new = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
            ended = torch.isin(new, torch.tensor(stops, device=new.device))
            tokens += int(((ended.cumsum(dim=1) - ended.long()) == 0).sum())
        return Turn(tokens, [])

    return sample, lambda: None


def peak_memory(device: str) -> int:
    """Bytes: what PyTorch reserved on CUDA; else the largest resident sizes of this process and its descendants."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_reserved()
    statuses: dict[int, dict[str, str]] = {}
    for file in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        statuses[int(file.parent.name)] = dict(line.split(":", 1) for line in lines if ":" in line)
    tree = {os.getpid()}
    while grown := {pid for pid, status in statuses.items() if int(status["PPid"]) in tree} - tree:
        tree |= grown
    # A process that has ended and is not yet reaped has no memory.
    return sum(1024 * int(statuses[pid].get("VmHWM", "0 kB").split()[0]) for pid in tree)


def best_batch_size(job: Job, sizes: list[int]) -> tuple[int, dict[str, dict[str, float]]]:
    """The baseline's fastest batch size, and rate and memory at each: one pass over all prompts, alone."""
    found = {}
    for size in sizes:
        alone = Side(side, job._replace(batch_size=size, turns=1))
        seconds, turn = alone.go()
        found[size] = {"tokens_per_second": turn.tokens / seconds, "peak_gb": alone.finish()["peak"] / 1e9}
        print(f"{job.engine}, {size} answers at once: {json.dumps(rounded(found[size]))}", flush=True)
    best = max(found, key=lambda size: found[size]["tokens_per_second"])
    print(f"{job.engine}: best with {best} answers at once", flush=True)
    return best, {str(size): figures for size, figures in found.items()}


def race(jobs: list[Job]) -> list[dict[str, Any]]:
    """Rate, load time, memory and last groups of every side; the sides take turns."""
    sides = [Side(side, job) for job in jobs]
    results: list[list[tuple[float, Turn]]] = [[] for _ in jobs]
    for turn in range(jobs[0].turns):
        # Who goes first changes, so that no side always follows the same other.
        for i in range(len(jobs)) if turn % 2 == 0 else reversed(range(len(jobs))):
            seconds, found = sides[i].go()
            results[i].append((seconds, found))
            print(f"turn {turn}: {jobs[i].engine}: {found.tokens} tokens in {seconds:.1f} s", flush=True)
    figures = []
    for one, turns in zip(sides, results, strict=True):
        (first_seconds, first), later = turns[0], turns[1:]
        rate = sum(turn.tokens for _, turn in later) / sum(seconds for seconds, _ in later)
        figures.append(
            {
                "tokens_per_second": rate,
                "load_s": one.why + max(0.0, first_seconds - first.tokens / rate),
                "peak_gb": one.finish()["peak"] / 1e9,
                "groups": turns[-1][1].groups,
            }
        )
    return figures


def compare(job: Job, engines: list[str], sizes: list[int]) -> dict[str, Any]:
    """The figures of every engine, against the baseline at its best."""
    from prefloop.models import resolve
    from prefloop.sample.handover import measure

    best, search = best_batch_size(job, sizes)
    jobs = [job._replace(batch_size=best), *(job._replace(engine=name) for name in engines)]
    them, *ours = race([one._replace(log=job.log / f"{one.engine}.log") for one in jobs])
    result: dict[str, Any] = {}
    for name, figures in zip(engines, ours, strict=True):
        gap = measure(
            resolve(job.model), [figures.pop("groups")], budget=TOKENS_PER_FORWARD, device=job.device,
            answers=len(job.prompts) * K, seed=0,
        )  # fmt: skip
        result[name] = {
            "speed_ratio": figures["tokens_per_second"] / them["tokens_per_second"],
            "memory_ratio": figures["peak_gb"] / them["peak_gb"] if figures["peak_gb"] else None,
            "logprob_gap": {"mean": gap.mean, "p99": gap.p99} if gap else None,
            **figures,
        }
    del them["groups"]
    return {**result, BASELINE: {"batch_size": best, "searched": search, **them}}


def rounded(value: Any) -> Any:
    """Four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def engine_names(text: str) -> list[str]:
    """The engines in a list with commas; argparse reports a name that there is none of."""
    from prefloop.sample.engines import ENGINES

    names = text.split(",")
    for name in names:
        if name not in ENGINES:
            raise argparse.ArgumentTypeError(f"unknown engine {name!r}; expected names among {', '.join(ENGINES)}")
    return names


def vllm_server(python: str, device: str) -> "Server":
    """How vLLM is started here."""
    from prefloop.sample.options import Server

    # What it takes for its cache on a CPU is otherwise a share of the whole memory: no figure of this workload.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # On a GPU the sides that wait keep their weights there; on a CPU compiling takes longer than it saves here.
    args = "--gpu-memory-utilization 0.5" if device.startswith("cuda") else "--enforce-eager"
    return Server(python=python, args=args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=engine_names, default="transformers,openvino", help="with commas")
    parser.add_argument("--baseline", choices=[BASELINE], default=BASELINE)
    parser.add_argument("--model", default="smollm2-135m", help="a folder, a hub id or smollm2-135m")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape, in place of --model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--turns", type=int, default=3, help="beside the first, which is not in the rate")
    parser.add_argument("--batch-size", type=int, default=64, help="answers at once of our engines")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128], help="of the baseline")
    parser.add_argument("--vllm-python", default="", help="interpreter of an environment with vLLM")
    parser.add_argument("--quick", action="store_true", help="8 prompts, one turn, two batch sizes")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from prefloop.data.mapping import load_prompts
    from prefloop.seeds import generator

    every = load_prompts("seed").records
    count, turns, sizes = (8, 1, [32, 64]) if args.quick else (args.prompts, args.turns, args.batch_sizes)
    prompts = tuple(every[i] for i in sorted(generator(0, "prompts").permutation(len(every))[:count]))
    with tempfile.TemporaryDirectory(prefix="prefloop-sampling-") as logs, shaped(args.shape, args.device) as folder:
        job = Job(
            BASELINE, folder or args.model, args.dtype, args.device, prompts, args.max_new_tokens, args.batch_size,
            turns + 1, vllm_server(args.vllm_python, args.device), Path(logs),
        )  # fmt: skip
        fitting = [size for size in sizes if size <= count * K] or [count * K]
        result = compare(job, args.engines, fitting)
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
