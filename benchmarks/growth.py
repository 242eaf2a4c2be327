"""How time and memory of the core grow: with the responses of a prompt, with the prompt's length, with the vocabulary.

    python benchmarks/growth.py [--quick]

A SmolLM2-shaped model of 8 layers with random weights, float32, one group a row. Each point is a process of its own and
takes the better of two passes. `forward` is a scoring pass, `step` forward and backward. Memory is what a pass adds to
the resident size of a process that already holds weights and gradients (peak of the pass minus size before it).
`plain tokens` is what a padded forward would compute: the prompt again for each response.

Prints the tables of `docs/performance.md` and, last, one line of JSON. Linux only (it reads and resets /proc).
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

RESPONSE = 64
SWEEPS = {
    "responses": [{"k": k} for k in (2, 4, 8, 16, 32)],
    "prompt": [{"prompt": prompt} for prompt in (64, 256, 1024, 4096)],
    "vocabulary": [{"vocabulary": vocabulary} for vocabulary in (2**15, 2**16, 2**17, 2**18)],
}


class Point(NamedTuple):
    """One row of a table."""

    k: int = 4
    prompt: int = 256
    vocabulary: int = 2**15


def measure(point: Point) -> dict[str, float]:
    """Seconds and added megabytes of a scoring pass and of a training pass."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefloop.seeds import generator
    from prefloop.train.logprobs import response_logps
    from prefloop.train.packing import TokenGroup

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=point.vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = generator(0, "growth").integers(0, point.vocabulary, point.prompt + point.k * RESPONSE).tolist()
    responses = [ids[start : start + RESPONSE] for start in range(point.prompt, len(ids), RESPONSE)]
    group = TokenGroup(tuple(ids[: point.prompt]), tuple(map(tuple, responses)))

    def forward() -> None:
        with torch.no_grad():
            response_logps(model, [group])

    def step() -> None:
        model.zero_grad(set_to_none=False)
        response_logps(model, [group]).sums.sum().backward()

    small = TokenGroup((1, 2), ((3, 4),))
    response_logps(model, [small]).sums.sum().backward()  # gradients exist from here on
    found: dict[str, float] = {"tokens": group.tokens, "plain tokens": point.k * (point.prompt + RESPONSE)}
    for name, work in (("forward", forward), ("step", step)):
        passes = [timed(work) for _ in range(2)]
        found[f"{name} s"] = min(seconds for seconds, _ in passes)
        found[f"{name} MB"] = max(added for _, added in passes)
    return found


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and megabytes that the resident size rose above its value before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = status("VmRSS"), time.perf_counter()
    work()
    return time.perf_counter() - start, (status("VmHWM") - before) / 1e3


def status(field: str) -> float:
    """A size in /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the ends of each range only")
    args = parser.parse_args()
    result: dict[str, list[dict[str, float]]] = {}
    for name, points in SWEEPS.items():
        for i, change in enumerate([points[0], points[-1]] if args.quick else points):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = {**Point(**change)._asdict(), **pool.apply(measure, (Point(**change),))}
            if i == 0:
                print("\n| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
            figures = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in row.values()]
            print("| " + " | ".join(figures) + " |", flush=True)
            result.setdefault(name, []).append(row)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
