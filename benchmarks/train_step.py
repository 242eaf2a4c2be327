"""One epoch of DPO, ours against TRL's `DPOTrainer`: pairs per second, peak memory, and the same losses.

    python benchmarks/train_step.py --opponent trl [--quick] [--dtype bfloat16] [--only multi_turn]

Both train the same model on the same token ids in the same order with the same AdamW, clipping, beta and batch. Each
side is a process of its own; they take turns, step by step, so that a noisy machine is noisy for both. Both pay for
their reference log-probabilities before the first step. Not counted: imports, loading, tokenisation, the first step of
each (warm-up; its share of the reference pass is counted).

TRL runs at its fastest of the variants in `TRL_VARIANTS` (tried first on the workload's own first steps), without
gradient checkpointing. Under `dice` is the same epoch without our reference pass: there scoring has already paid.

The program stops if the two sides' losses differ by more than 1e-3 (float32; 2e-2 in bfloat16) on a step.
`matmul_fraction` is the rate of the operations that the log-probabilities need at least, over the rate of this
machine's matrix products with the model's own shapes, measured between the steps. Prints, last, one line of JSON.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from turns import Side, report, timed

NAMES = ("multi_turn", "long_prompt", "short_prompt")
BATCH = 4
LEARNING_RATE = 1e-6
BETA = 0.1
# Pairs per forward x accumulation, and where the reference log-probabilities come from.
TRL_VARIANTS = {
    "4 pairs a forward, precomputed": {"micro": 4, "precompute": True},
    "4 pairs a forward, reference model": {"micro": 4, "precompute": False},
    "2 pairs a forward, precomputed": {"micro": 2, "precompute": True},
    "1 pair a forward, precomputed": {"micro": 1, "precompute": True},
}


class Job(NamedTuple):
    """What both sides are told. `pairs` is the number of pairs, steps x BATCH."""

    model: str
    workload: str
    dtype: str
    pairs: int
    seed: int
    tokens_per_forward: int
    variant: dict[str, Any]


def ours(job: Job, turn: Connection) -> None:
    """Worker: waits for its turn, does the reference pass or one step, reports seconds and loss."""
    from functools import partial

    from prefloop.data.chat import ChatFormat
    from prefloop.models import load_tokenizer, resolve
    from prefloop.train.config import Compute, Train
    from prefloop.train.learner import Learner
    from prefloop.train.losses import dpo
    from prefloop.train.reference import token_group, with_reference_logps
    from workloads import WORKLOADS, as_pairs, make_items, matmul_rate, model_flops, peak_memory

    ref = resolve(job.model)
    chat = ChatFormat(load_tokenizer(ref))
    pairs = as_pairs(make_items(WORKLOADS[job.workload], chat, job.pairs, responses=2, seed=job.seed))
    compute = Compute(device="cpu", dtype=job.dtype, tokens_per_forward=job.tokens_per_forward)
    config = Train(steps=job.pairs // BATCH, batch_size=BATCH, learning_rate=LEARNING_RATE, warmup_steps=0)
    learner = Learner(ref, pairs, loss=partial(dpo, beta=BETA), beta=BETA, config=config, compute=compute, seed=0)
    report(turn, learner.why)

    def reference_pass() -> None:
        pairs[:] = with_reference_logps(pairs, ref, compute=compute)

    timed(turn, reference_pass)
    for step in range(job.pairs // BATCH):
        batch = pairs[step * BATCH : (step + 1) * BATCH]
        timed(turn, lambda step=step, batch=batch: learner.step(batch, step)["loss"])
    groups = [token_group(chat, pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
    peak = peak_memory()
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
    from transformers import AutoModelForCausalLM, TrainerCallback
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

    class Turns(TrainerCallback):
        """A step's time runs from the moment this side gets its turn to the end of the optimiser step."""

        started = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn.recv()
            self.started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:
                return
            turn.send((time.perf_counter() - self.started, float(logs["loss"])))
            if state.global_step < state.max_steps:
                turn.recv()
                self.started = time.perf_counter()

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(ref.path, dtype=torch.float32)

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
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            weight_decay=0.0,
            beta=BETA,
            num_train_epochs=1,
            bf16=job.dtype == "bfloat16",
            use_cpu=True,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = OnIds(
            model=load(), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[Turns()],
        )  # fmt: skip
        turn.send((time.perf_counter() - start, 0.0))
        trainer.train()
    turn.recv()
    report(turn, {"peak": peak_memory()})


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


def compare(job: Job, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of one workload."""
    name = fastest_variant(job, variants) if len(variants) > 1 else next(iter(variants))
    sides = [Side(ours, job), Side(trl, job._replace(variant=variants[name]))]
    print(f"{job.workload} {job.dtype}: ours: {sides[0].why}; TRL: {name}", flush=True)
    (our_seconds, their_seconds), (our_losses, their_losses) = race(job, sides)
    for step, (a, b) in enumerate(zip(our_losses, their_losses, strict=True)):
        print(
            f"  step {step + 1}: ours {our_seconds[step + 1]:6.2f} s, loss {a:.6f}; "
            f"TRL {their_seconds[step + 1]:6.2f} s, loss {b:.6f}",
            flush=True,
        )
        allowed = 1e-3 if job.dtype == "float32" else 2e-2
        if abs(a - b) > allowed:
            raise SystemExit(f"losses of step {step + 1} differ by {abs(a - b):.2e}, more than {allowed}")
    us, them = (side.finish() for side in sides)
    steps = len(our_losses) - 1
    # The warm-up step is left out on both sides, and its pairs' share of the reference pass stays in.
    ours_alone, theirs_alone = sum(our_seconds[2:]), sum(their_seconds[2:])
    flops = us["flops"] - us["first_flops"]
    ours_total, theirs_total = our_seconds[0] + ours_alone, their_seconds[0] + theirs_alone
    return {
        "speed_ratio": theirs_total / ours_total,
        "memory_ratio": us["peak"] / them["peak"],
        "matmul_fraction": (flops + us["reference_flops"]) / ours_total / us["matmul_rate"],
        "pairs_per_second": steps * BATCH / ours_total,
        "opponent": name,
        "seconds": {"reference": [our_seconds[0], their_seconds[0]], "steps": [ours_alone, theirs_alone]},
        "peak_gb": [us["peak"] / 1e9, them["peak"] / 1e9],
        "matmul_gflops": us["matmul_rate"] / 1e9,
        "dice": {
            "speed_ratio": theirs_total / ours_alone,
            "matmul_fraction": flops / ours_alone / us["matmul_rate"],
        },
    }


def fastest_variant(job: Job, variants: dict[str, dict[str, Any]]) -> str:
    """TRL's variants on the first steps of the workload, each in its own process; the quickest total wins."""
    totals = {}
    short = job._replace(pairs=min(job.pairs, 3 * BATCH))
    for name, variant in variants.items():
        side = Side(trl, short._replace(variant=variant))
        (seconds,), _ = race(short, [side])
        peak = side.finish()["peak"]
        totals[name] = seconds[0] + sum(seconds[2:])
        print(f"{job.workload} {job.dtype}: TRL, {name}: {totals[name]:.1f} s, {peak / 1e9:.1f} GB", flush=True)
    return min(totals, key=lambda name: totals[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opponent", choices=["trl"], default="trl")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="3 steps a workload, TRL's usually fastest variant only")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens-per-forward", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    steps = 3 if args.quick else args.steps
    variants = dict(list(TRL_VARIANTS.items())[:1]) if args.quick else TRL_VARIANTS
    result = {}
    for workload in [args.only] if args.only else NAMES:
        job = Job(args.model, workload, args.dtype, steps * BATCH, args.seed, args.tokens_per_forward, {})
        result[workload] = compare(job, variants)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
