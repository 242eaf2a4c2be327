"""One step of PPO, split by what it is spent on: sampling, scoring, log-probabilities and values before the update, and
the update; and the peak memory with policy, reference, values and a reward model.

    python benchmarks/ppo_step.py [--quick] [--lora 16] [--epochs 4] [--minibatches 1]
    python benchmarks/ppo_step.py --device cuda --dtype bfloat16 --batch 64 --max-new-tokens 256

Each step does what `prefloop ppo` does, by the recipe's own functions, on prompts of a workload (`workloads.py`). The
reward model is made from the same language model with a random head: what it prefers does not matter for the time. Not
counted: imports, loading, checkpoints, records, and the first step, which is warm-up. With LoRA, policy, reference and
values share one base; the reward model is a whole model in both configurations. Each configuration is a process of its
own, so that its peak memory is its own. Prints, last, one line of JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One configuration in this process."""
    import torch

    from prefloop.data.chat import ChatFormat
    from prefloop.feedback.registry import load_annotator
    from prefloop.models import load_tokenizer, resolve, write_model
    from prefloop.recipes.ppo import Ppo, PpoConfig, experience, learners, update
    from prefloop.run import Stage
    from prefloop.sample.sampling import Sampling
    from prefloop.seeds import derive_seed
    from prefloop.train.config import Compute, Lora, Train
    from prefloop.train.memory import reused_memory
    from prefloop.train.ppo import ActorCritic
    from prefloop.train.scalar import load_scalar_model
    from workloads import WORKLOADS, make_items, peak_memory

    ref = resolve(args.model)
    tokenizer = load_tokenizer(ref)
    compute = Compute(device=args.device, dtype=args.dtype, sampling_dtype=args.dtype)
    items = make_items(WORKLOADS[args.workload], ChatFormat(tokenizer), args.steps * args.batch, responses=1, seed=0)
    prompts = [prompt for prompt, _ in items]
    spent: dict[str, list[float]] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        spent.setdefault(what, []).append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder, reused_memory():
        reward = Path(folder) / "reward"
        write_model(reward, load_scalar_model(ref, head_std=0.02), tokenizer)
        cfg = PpoConfig(
            annotator=f"reward-model:{reward}",
            ppo=Ppo(epochs=args.epochs, minibatches=args.minibatches),
            sampling=Sampling(max_new_tokens=args.max_new_tokens),
            train=Train(steps=args.steps, batch_size=args.batch, learning_rate=1e-6, warmup_steps=0,
                        validation_pairs=0, lora=Lora(rank=args.lora)),
            compute=compute,
        )  # fmt: skip
        annotator: Any = load_annotator(cfg.annotator, cfg.feedback, compute=compute)
        online = ActorCritic(*learners(ref, ref, cfg, Stage.detached()))
        tokens = []
        for step in range(args.steps):
            batch = prompts[step * args.batch : (step + 1) * args.batch]
            with timed("sampling"):
                groups = online.sample(batch, k=1, sampling=cfg.sampling, seed=derive_seed(0, "step", step))
            tokens.append(sum(group.responses[0].length_tokens for group in groups))
            with timed("scoring"):
                scores = annotator.score([(group.prompt, group.responses[0]) for group in groups])
            with timed("passes"):
                rollouts = experience(groups, scores, online, cfg, beta=cfg.beta)
            with timed("update"):
                update(online, rollouts, step, cfg)
    found = {what: median(seconds[1:]) for what, seconds in spent.items()}
    total = sum(found.values())
    return {
        "lora": args.lora,
        "seconds": {what: round(seconds, 3) for what, seconds in found.items()},
        "step_s": round(total, 3),
        "not_sampling": round(1 - found["sampling"] / total, 3),
        "tokens_a_step": round(sum(tokens[1:]) / (args.steps - 1)),
        "peak_gb": round(peak_memory(args.device) / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--workload", default="multi_turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=4, help="the first is warm-up")
    parser.add_argument("--batch", type=int, default=8, help="prompts a step")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--lora", type=int, default=16, help="rank of the second configuration; 0 leaves it out")
    parser.add_argument("--quick", action="store_true", help="two steps of two prompts")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch, args.max_new_tokens, args.epochs = 2, 2, 16, 2
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: expected 2 or more, the first is warm-up")
    if args.alone:
        print(json.dumps(run(args)))
        return
    rows = []
    for rank in dict.fromkeys((0, args.lora)):
        command = [sys.executable, __file__, *sys.argv[1:], "--lora", str(rank), "--alone"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    print(json.dumps({"benchmark": "ppo_step", "epochs": args.epochs, "batch": args.batch, "runs": rows}))


if __name__ == "__main__":
    main()
