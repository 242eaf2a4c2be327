"""Scoring K = 16 responses a prompt under two models: ours against a padded, length-sorted transformers forward.

    python benchmarks/score_groups.py [--quick] [--dtype bfloat16] [--only multi_turn]
    python benchmarks/score_groups.py --device cuda --dtype bfloat16 --shape llama-1b

Ours is the product's own pass, `logps_under`, over each model in turn. The opponent is the usual program, well written:
all sequences sorted by length, right-padded in batches, the decoder's output cut to the response positions before the
head, log-softmax in float32; its batch size is the fastest of `BATCH_SIZES` on the first prompt's responses. Each side
is a process of its own, they take turns model by model, and each loads a model when its pass begins and frees it at
the end.

The program stops if a summed log-probability differs by more than 1e-5 of itself plus 10 nats (float32; 2e-2 in
bfloat16).
`matmul_fraction` is the rate of the operations needed at least (each prompt once, no padding) over this machine's rate
on the model's own shapes. Prints, last, one line of JSON.
"""

import argparse
import json
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from shapes import SHAPES, shaped
from turns import Side, report, timed

K = 16
BATCH_SIZES = (1, 4, 16)


class Job(NamedTuple):
    """What both sides are told."""

    model: str
    workload: str
    dtype: str
    prompts: int
    seed: int
    tokens_per_forward: int
    device: str
    batch_size: int


def ours(job: Job, turn: Connection) -> None:
    """Worker: one turn for each of the two models."""
    import torch

    from prefloop.data.chat import ChatFormat
    from prefloop.models import load_model, load_tokenizer, resolve
    from prefloop.train.config import Compute
    from prefloop.train.reference import logps_under, token_group
    from workloads import WORKLOADS, make_items, matmul_rate, model_flops, peak_memory

    ref = resolve(job.model)
    chat = ChatFormat(load_tokenizer(ref))
    items = make_items(WORKLOADS[f"{job.workload}_groups"], chat, job.prompts, responses=K, seed=job.seed)
    compute = Compute(device=job.device, dtype=job.dtype, tokens_per_forward=job.tokens_per_forward)
    report(turn, "ready")
    for _ in range(2):
        timed(turn, lambda: [value for row in logps_under(ref, items, compute=compute) for value in row])
    peak = peak_memory(job.device)
    turn.recv()
    groups = [token_group(chat, prompt, responses) for prompt, responses in items]
    model = load_model(ref, device=job.device)
    with torch.no_grad():
        rate = matmul_rate(model, job.dtype, job.tokens_per_forward)
    report(turn, {"peak": peak, "flops": model_flops(model, groups, backward=False), "matmul_rate": rate})


def padded(job: Job, turn: Connection) -> None:
    """Worker: the opponent."""
    import torch
    from transformers import AutoModelForCausalLM

    from prefloop.data.chat import ChatFormat
    from prefloop.models import load_tokenizer, resolve
    from prefloop.train.reference import token_group
    from workloads import WORKLOADS, make_items, peak_memory

    ref = resolve(job.model)
    chat = ChatFormat(load_tokenizer(ref))
    items = make_items(WORKLOADS[f"{job.workload}_groups"], chat, job.prompts, responses=K, seed=job.seed)
    groups = [token_group(chat, prompt, responses) for prompt, responses in items]
    sequences = [(group.prompt_ids, response) for group in groups for response in group.responses]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))

    @torch.inference_mode()
    def score() -> list[float]:
        model: Any = AutoModelForCausalLM.from_pretrained(ref.path, dtype=torch.float32).to(job.device).eval()
        sums = [0.0] * len(sequences)
        with torch.autocast(job.device, dtype=torch.bfloat16, enabled=job.dtype == "bfloat16"):
            for start in range(0, len(order), job.batch_size):
                chosen = order[start : start + job.batch_size]
                rows = [torch.tensor([*sequences[i][0], *sequences[i][1]]) for i in chosen]
                ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(job.device)
                lengths = torch.tensor([len(row) for row in rows])
                mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(job.device)
                hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                states, targets = [], []
                for row, i in enumerate(chosen):
                    prompt, response = sequences[i]
                    states.append(hidden[row, len(prompt) - 1 : len(prompt) + len(response) - 1])
                    targets.append(torch.tensor(response))
                logits = model.lm_head(torch.cat(states)).float()
                found = logits.log_softmax(-1).gather(1, torch.cat(targets).to(job.device)[:, None])[:, 0]
                for i, part in zip(chosen, found.split([len(sequences[i][1]) for i in chosen]), strict=True):
                    sums[i] = float(part.sum())
        return sums

    report(turn, "ready")
    for _ in range(2):
        timed(turn, score)
    peak = peak_memory(job.device)
    turn.recv()
    report(turn, {"peak": peak})


def best_batch_size(job: Job) -> int:
    """The opponent's batch sizes on the first group, shortest time wins."""
    seconds = {}
    for size in BATCH_SIZES:
        side = Side(padded, job._replace(batch_size=size, prompts=1))
        seconds[size] = min(side.go()[0] for _ in range(2))
        side.finish()
        print(f"{job.workload} {job.dtype}: padded, batches of {size}: {seconds[size]:.1f} s", flush=True)
    return min(seconds, key=lambda size: seconds[size])


def compare(job: Job) -> dict[str, Any]:
    """The figures of one workload."""
    if not job.batch_size:
        job = job._replace(batch_size=best_batch_size(job))
    sides = [Side(ours, job), Side(padded, job)]
    seconds = [0.0, 0.0]
    for turn in range(2):
        found: list[list[float]] = [[], []]
        for side in (0, 1) if turn == 0 else (1, 0):
            took, found[side] = sides[side].go()
            seconds[side] += took
        relative = 1e-5 if job.dtype == "float32" else 2e-2
        # The plain float32 forward of SmolLM2-135M is 3e-5 off its own float64 values on short responses.
        worst = max(abs(a - b) / (abs(b) + 10) for a, b in zip(*found, strict=True))
        if worst > relative:
            raise SystemExit(
                f"log-probabilities differ by {worst:.1e} of themselves plus 10 nats, more than {relative}"
            )
        print(f"{job.workload} {job.dtype}: seconds so far {seconds}, largest difference {worst:.1e}", flush=True)
    us, them = (side.finish() for side in sides)
    return {
        "speed_ratio": seconds[1] / seconds[0],
        "memory_ratio": us["peak"] / them["peak"],
        "matmul_fraction": 2 * us["flops"] / seconds[0] / us["matmul_rate"],
        "seconds": seconds,
        "responses_per_second": 2 * job.prompts * K / seconds[0],
        "opponent": f"batches of {job.batch_size}",
        "peak_gb": [us["peak"] / 1e9, them["peak"] / 1e9],
        "matmul_gflops": us["matmul_rate"] / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape, in place of --model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", choices=["multi_turn", "long_prompt"])
    parser.add_argument("--quick", action="store_true", help="4 prompts a workload, the opponent in batches of 4")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens-per-forward", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = {}
    with shaped(args.shape, args.device) as folder:
        for workload in [args.only] if args.only else ["multi_turn", "long_prompt"]:
            prompts, batch_size = (4, 4) if args.quick else (args.prompts, 0)
            job = Job(folder or args.model, workload, args.dtype, prompts, args.seed, args.tokens_per_forward,
                      args.device, batch_size)  # fmt: skip
            result[workload] = compare(job)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
