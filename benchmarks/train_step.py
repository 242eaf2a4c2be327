"""One epoch of DPO, ours against TRL's `DPOTrainer`: pairs per second, peak memory, and the same losses.

    pip install -c constraints.txt -e '.[all,bench]'
    python benchmarks/train_step.py --opponent trl [--quick] [--dtype bfloat16] [--only multi_turn]
    python benchmarks/train_step.py --device cuda --dtype bfloat16 --shape llama-8b --lora-rank 16

Both train the same model on the same token ids in the same order with the same AdamW, clipping, beta and batch. Each
side is a process of its own; they take turns, step by step, so that a noisy machine is noisy for both. Both pay for
their reference log-probabilities before the first step. Not counted: imports, loading, tokenisation, and the first step
of each (warm-up) with its pairs' share of the reference pass.

TRL runs in several variants (`--variants`; all without gradient checkpointing), each a side of its own; the headline
ratios are those to the fastest, whatever its memory. Under `dice` is the same epoch without our reference pass: there
scoring has already paid. In the time of the reference pass, ours also loads its model and TRL builds its trainer.

The program stops if the two sides' losses differ by more than 1e-3 (float32) on a step. In bfloat16 it is
5e-2: TRL's own two settings differ by up to 1e-2 there, since a sum over a hundred rounded terms differs in its order.
`matmul_fraction` is the rate of the operations that the log-probabilities need at least, over the rate of this
machine's matrix products with the model's own shapes, measured at the end. Prints, last, one line of JSON.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from shapes import SHAPES, shaped
from turns import Side, report, timed, trainer_options, turns_of_trainer

NAMES = ("multi_turn", "long_prompt", "short_prompt")
BATCH = 4
LEARNING_RATE = 1e-6
BETA = 0.1
# Pairs per forward x accumulation, and where the reference log-probabilities come from.
TRL_VARIANTS = {
    "4-precomputed": {"micro": 4, "precompute": True},
    "4-reference-model": {"micro": 4, "precompute": False},
    "2-precomputed": {"micro": 2, "precompute": True},
    "1-precomputed": {"micro": 1, "precompute": True},
}


class Job(NamedTuple):
    """What both sides are told. `pairs` is the number of pairs, steps x BATCH."""

    model: str
    workload: str
    dtype: str
    pairs: int
    seed: int
    tokens_per_forward: int
    device: str
    lora: int
    variant: dict[str, Any]


def ours(job: Job, turn: Connection) -> None:
    """Worker: waits for its turn, does the reference pass or one step, reports seconds and loss."""

    from prefloop.data.chat import ChatFormat
    from prefloop.models import load_tokenizer, resolve
    from prefloop.train.config import Compute, Lora, Train
    from prefloop.train.learner import Learner
    from prefloop.train.losses import parse_loss
    from prefloop.train.memory import reused_memory
    from prefloop.train.objective import PairObjective
    from prefloop.train.reference import token_group, with_reference_logps
    from workloads import WORKLOADS, as_pairs, make_items, matmul_rate, model_flops, peak_memory

    ref = resolve(job.model)
    # No earlier run of this program answers for the reference pass.
    os.environ["PREFLOOP_CACHE"] = tempfile.mkdtemp()
    chat = ChatFormat(load_tokenizer(ref))
    pairs = as_pairs(make_items(WORKLOADS[job.workload], chat, job.pairs, responses=2, seed=job.seed))
    compute = Compute(device=job.device, dtype=job.dtype, tokens_per_forward=job.tokens_per_forward)
    config = Train(
        steps=job.pairs // BATCH, batch_size=BATCH, learning_rate=LEARNING_RATE, warmup_steps=0,
        lora=Lora(rank=job.lora),
    )  # fmt: skip
    learner = Learner(
        ref, pairs, objective=PairObjective(parse_loss("dpo", beta=BETA)), config=config, compute=compute, seed=0
    )
    report(turn, learner.why)

    def reference_pass() -> None:
        # With an adapter in training the reference is that model with the adapter off; else it is loaded for the pass.
        pairs[:] = (
            learner.with_reference_logps(pairs) if job.lora else with_reference_logps(pairs, ref, compute=compute)
        )

    timed(turn, reference_pass)
    with reused_memory():  # as `fit` does
        for step in range(job.pairs // BATCH):
            batch = pairs[step * BATCH : (step + 1) * BATCH]
            timed(turn, lambda step=step, batch=batch: learner.step(batch, step)["loss"])
    groups = [token_group(chat, pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
    peak = peak_memory(job.device)
    turn.recv()
    tokens = sum(group.tokens for group in groups) * BATCH // job.pairs
    report(
        turn,
        {
            "peak": peak,
            "flops": model_flops(learner.model, groups, backward=True),
            "reference_flops": model_flops(learner.model, groups, backward=False),
            "first_flops": model_flops(learner.model, groups[:BATCH], backward=True),
            "matmul_rate": matmul_rate(learner.model, job.dtype, min(tokens, job.tokens_per_forward)),
        },
    )


def trl(job: Job, turn: Connection) -> None:
    """Worker: TRL's trainer on the same ids. A callback hands the turn back after every optimiser step."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from prefloop.data.chat import ChatFormat
    from prefloop.models import load_tokenizer, resolve
    from prefloop.train.reference import token_group
    from workloads import WORKLOADS, as_pairs, make_items, peak_memory

    ref = resolve(job.model)
    tokenizer = load_tokenizer(ref)
    chat = ChatFormat(tokenizer)
    pairs = as_pairs(make_items(WORKLOADS[job.workload], chat, job.pairs, responses=2, seed=job.seed))
    groups = [token_group(chat, pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
    rows = [
        {
            "prompt_ids": list(group.prompt_ids),
            "chosen_ids": list(group.responses[0]),
            "rejected_ids": list(group.responses[1]),
        }
        for group in groups
    ]

    class OnIds(DPOTrainer):
        """The trainer as it is, given token ids instead of text: both sides must see the same ones."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    model: Any = AutoModelForCausalLM.from_pretrained(ref.path, dtype=torch.float32)
    adapter = None
    if job.lora:
        from peft import LoraConfig

        adapter = LoraConfig(r=job.lora, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    data = Dataset.from_list(rows)
    report(turn, "ready")
    turn.recv()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=job.variant["micro"],
            gradient_accumulation_steps=BATCH // job.variant["micro"],
            precompute_ref_log_probs=job.variant["precompute"],
            gradient_checkpointing=False,
            max_length=None,
            learning_rate=LEARNING_RATE,
            max_grad_norm=1.0,
            weight_decay=0.0,
            beta=BETA,
            **trainer_options(job.dtype, job.device),
        )
        trainer = OnIds(
            model=model, args=config, train_dataset=data, processing_class=tokenizer,
            callbacks=[turns_of_trainer(turn)], peft_config=adapter,
        )  # fmt: skip
        turn.send((time.perf_counter() - start, 0.0))
        trainer.train()
    turn.recv()
    report(turn, {"peak": peak_memory(job.device)})


def race(job: Job, sides: Sequence[Side]) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds and losses of every side: the reference pass first, then each step, the sides taking turns."""
    seconds: list[list[float]] = [[] for _ in sides]
    losses: list[list[float]] = [[] for _ in sides]
    for turn in range(1 + job.pairs // BATCH):
        # Who goes first changes, so that neither side always follows the other.
        for side in range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides))):
            took, loss = sides[side].go()
            seconds[side].append(took)
            losses[side].append(loss)
    return seconds, [column[1:] for column in losses]


def compare(job: Job, variants: Sequence[str]) -> dict[str, Any]:
    """The figures of one workload: the headline ratios are those to the fastest variant."""
    sides = [Side(ours, job), *(Side(trl, job._replace(variant=TRL_VARIANTS[name])) for name in variants)]
    print(f"{job.workload} {job.dtype}: {sides[0].why}", flush=True)
    seconds, losses = race(job, sides)
    for step, row in enumerate(zip(*losses, strict=True)):
        taken = ", ".join(f"{column[step + 1]:.2f} s" for column in seconds)
        print(f"  step {step + 1}: ours, {', '.join(variants)}: {taken}; losses {row}", flush=True)
        allowed = 1e-3 if job.dtype == "float32" else 5e-2
        if max(row) - min(row) > allowed:
            raise SystemExit(f"losses of step {step + 1} differ by {max(row) - min(row):.2e}, more than {allowed}")
    us, *them = (side.finish() for side in sides)
    # The first step is warm-up on every side; its pairs' share of the reference pass is left out with it.
    steps = len(losses[0])
    references = [column[0] * (steps - 1) / steps for column in seconds]
    training = [sum(column[2:]) for column in seconds]
    totals = [reference + step for reference, step in zip(references, training, strict=True)]
    flops = us["flops"] - us["first_flops"]
    reference_flops = us["reference_flops"] * (steps - 1) / steps
    opponents = {
        name: {
            "speed_ratio": total / totals[0],
            "memory_ratio": us["peak"] / side["peak"],
            "dice_speed_ratio": total / training[0],
            "reference_s": reference,
            "steps_s": step,
            "peak_gb": side["peak"] / 1e9,
        }
        for name, side, total, reference, step in zip(
            variants, them, totals[1:], references[1:], training[1:], strict=True
        )
    }
    fastest = min(opponents, key=lambda name: opponents[name]["speed_ratio"])
    return {
        "speed_ratio": opponents[fastest]["speed_ratio"],
        "memory_ratio": opponents[fastest]["memory_ratio"],
        "matmul_fraction": (flops + reference_flops) / totals[0] / us["matmul_rate"],
        "pairs_per_second": (steps - 1) * BATCH / totals[0],
        "reference_s": references[0],
        "steps_s": training[0],
        "peak_gb": us["peak"] / 1e9,
        "matmul_gflops": us["matmul_rate"] / 1e9,
        "fastest_opponent": fastest,
        "opponents": opponents,
        "dice": {
            "speed_ratio": opponents[fastest]["dice_speed_ratio"],
            "matmul_fraction": flops / training[0] / us["matmul_rate"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opponent", choices=["trl"], default="trl")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape, in place of --model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lora-rank", type=int, default=0, help="train an adapter of this rank; 0 trains all weights")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="2 steps a workload, the one of TRL's variants that was the fastest on CPUs",
    )
    parser.add_argument("--variants", nargs="+", choices=list(TRL_VARIANTS), default=list(TRL_VARIANTS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens-per-forward", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    steps = 2 if args.quick else args.steps
    variants = ["1-precomputed"] if args.quick else args.variants
    result = {}
    with shaped(args.shape, args.device) as folder:
        for workload in [args.only] if args.only else NAMES:
            job = Job(folder or args.model, workload, args.dtype, steps * BATCH, args.seed, args.tokens_per_forward,
                      args.device, args.lora_rank, {})  # fmt: skip
            result[workload] = compare(job, variants)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
