"""One step of online DPO, ours against TRL's `OnlineDPOTrainer`: pairs per second and peak memory.

    pip install -c constraints.txt -e '.[all,bench]'
    python benchmarks/online_step.py --opponent trl [--quick] [--dtype bfloat16]
    python benchmarks/online_step.py --device cuda --dtype bfloat16 --shape llama-1b --max-new-tokens 256

A step is what OAIF does: two answers to every prompt of a batch from the current weights at temperature 0.9, the same
rule (`rule:helpful-short`; TRL gets it as its reward function), reference log-probabilities, one AdamW update of DPO.
Both have the same model, prompts in the same order, batch, limit of new tokens, beta, clipping and learning rate. Each
side is a process of its own; they take turns, step by step, so that a noisy machine is noisy for both. Not counted:
imports, loading, and the first step of each, which is warm-up. Each side samples its own answers, so their lengths
differ a little. TRL runs without gradient checkpointing (which would switch its key-value cache off) in several sizes
of forward (`--variants`, prompts a forward; the rest is accumulated). The headline speed is that over the fastest of
them, the headline memory that against the leanest. Counted are pairs that are trained on: ours leaves out two answers
that are the same or that the rule does not tell apart, TRL trains on them too.

In bfloat16 both compute in it over float32 weights, by autocast in TRL, which samples so too; ours samples from a
bfloat16 copy that is written anew at every step. TRL can sample with vLLM on a GPU; that is not compared here.

The program stops if a side's loss of the first step is not ln 2 to 2e-3: policy and reference are the same model
there. In bfloat16 TRL's policy and reference agree only when their rounding does, and 2e-2 is allowed.
Prints, last, one line of JSON.
"""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from shapes import SHAPES, shaped
from turns import Side, report, timed, trainer_options, turns_of_trainer

LEARNING_RATE = 1e-6
BETA = 0.1
TEMPERATURE = 0.9
RULE = "helpful-short"


class Job(NamedTuple):
    """What both sides are told. `micro`: prompts a forward of TRL's."""

    model: str
    workload: str
    dtype: str
    steps: int
    batch: int
    max_new_tokens: int
    seed: int
    tokens_per_forward: int
    device: str
    micro: int = 0


def prompts_of(job: Job, tokenizer: Any) -> list[Any]:
    from prefloop.data.chat import ChatFormat
    from workloads import WORKLOADS, make_items

    items = make_items(
        WORKLOADS[job.workload], ChatFormat(tokenizer), job.steps * job.batch, responses=2, seed=job.seed
    )
    return [prompt for prompt, _ in items]


def ours(job: Job, turn: Connection) -> None:
    """Worker: waits for its turn, does one step as `prefloop oaif` does, reports seconds and loss."""

    from prefloop.feedback.registry import load_annotator
    from prefloop.models import load_tokenizer, resolve
    from prefloop.recipes.oaif import OaifConfig, preferences
    from prefloop.seeds import derive_seed
    from prefloop.train.config import Compute, Train
    from prefloop.train.learner import Learner
    from prefloop.train.losses import parse_loss
    from prefloop.train.memory import reused_memory
    from prefloop.train.objective import PairObjective
    from prefloop.train.online import OnlineLearner
    from workloads import peak_memory

    ref = resolve(job.model)
    prompts = prompts_of(job, load_tokenizer(ref))
    compute = Compute(
        device=job.device, dtype=job.dtype, sampling_dtype=job.dtype, tokens_per_forward=job.tokens_per_forward
    )
    train = Train(
        steps=job.steps, batch_size=job.batch, learning_rate=LEARNING_RATE, warmup_steps=0, validation_pairs=0
    )
    cfg = OaifConfig(annotator=f"rule:{RULE}", train=train, compute=compute).replace(
        sampling__temperature=TEMPERATURE, sampling__max_new_tokens=job.max_new_tokens
    )
    annotator = load_annotator(cfg.annotator, cfg.feedback, compute=compute)
    learner = Learner(
        ref, [], objective=PairObjective(parse_loss("dpo", beta=BETA)), config=train, compute=compute, seed=0
    )
    online = OnlineLearner(learner)
    report(turn, learner.why)
    tokens = 0
    trained: list[int] = []

    def step(number: int) -> float:
        nonlocal tokens
        batch = prompts[number * job.batch : (number + 1) * job.batch]
        groups = online.sample(batch, k=2, sampling=cfg.sampling, seed=derive_seed(job.seed, "step", number))
        tokens += sum(response.length_tokens for group in groups for response in group.responses)
        pairs, _ = preferences(groups, annotator, cfg)
        trained.append(len(pairs))
        return online.step(pairs, number)["loss"] if pairs else math.nan

    with reused_memory():  # as the recipe does
        for number in range(job.steps):
            timed(turn, lambda number=number: step(number))
    turn.recv()
    report(turn, {"peak": peak_memory(job.device), "tokens": tokens, "pairs": sum(trained[1:])})


def trl(job: Job, turn: Connection) -> None:
    """Worker: TRL's trainer with the same rule. A callback hands the turn back after every optimiser step."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    from prefloop.feedback.rules import RULES
    from prefloop.models import load_tokenizer, resolve
    from prefloop.records import Prompt, Response
    from workloads import LONGEST, peak_memory

    ref = resolve(job.model)
    tokenizer: Any = load_tokenizer(ref)
    prompts = prompts_of(job, tokenizer)
    rows = [{"prompt": [{"role": "user", "content": prompt.messages[0].content}]} for prompt in prompts]
    ends: set[int] = set()
    tokens = 0

    def reward(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal tokens
        scores = []
        for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
            ended = next((i for i, id in enumerate(ids) if id in ends), None)
            tokens += len(ids) if ended is None else ended + 1
            reason = "length" if ended is None else "stop"
            response = Response(text=completion[0]["content"], finish_reason=reason)
            scores.append(RULES[RULE](Prompt.of(prompt[0]["content"]), response))
        return scores

    model: Any = AutoModelForCausalLM.from_pretrained(ref.path, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as out:
        config = OnlineDPOConfig(
            output_dir=out,
            per_device_train_batch_size=job.micro,
            gradient_accumulation_steps=job.batch // job.micro,
            gradient_checkpointing=False,
            max_new_tokens=job.max_new_tokens,
            max_length=LONGEST + job.max_new_tokens,
            temperature=TEMPERATURE,
            beta=[BETA],
            learning_rate=LEARNING_RATE,
            max_grad_norm=1.0,
            **trainer_options(job.dtype, job.device),
        )
        trainer = OnlineDPOTrainer(
            model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[turns_of_trainer(turn)],
        )  # fmt: skip
        ends |= set(trainer.eos_token_ids)
        report(turn, f"{job.micro} prompts a forward")
        trainer.train()
    turn.recv()
    report(turn, {"peak": peak_memory(job.device), "tokens": tokens, "pairs": (job.steps - 1) * job.batch})


def race(job: Job, sides: Sequence[Side]) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds and losses of every side, step by step, the sides taking turns."""
    seconds: list[list[float]] = [[] for _ in sides]
    losses: list[list[float]] = [[] for _ in sides]
    for turn in range(job.steps):
        # Who goes first changes, so that neither side always follows the other.
        for side in range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides))):
            took, loss = sides[side].go()
            seconds[side].append(took)
            losses[side].append(loss)
        print(f"  step {turn + 1}: seconds {[round(column[-1], 2) for column in seconds]}, "
              f"losses {[round(column[-1], 4) for column in losses]}", flush=True)  # fmt: skip
    return seconds, losses


def compare(job: Job, variants: Sequence[int]) -> dict[str, Any]:
    """The figures; the headline ratios are those to the fastest variant."""
    sides = [Side(ours, job), *(Side(trl, job._replace(micro=micro)) for micro in variants)]
    print(f"{job.workload} {job.dtype}: {'; '.join(side.why for side in sides)}", flush=True)
    seconds, losses = race(job, sides)
    allowed = 2e-3 if job.dtype == "float32" else 2e-2
    for column in losses:
        if not abs(column[0] - math.log(2)) <= allowed:
            raise SystemExit(f"the first step's loss is {column[0]:.4f}, expected ln 2 = {math.log(2):.4f}")
    us, *them = (side.finish() for side in sides)
    rate, *rates = (side["pairs"] / sum(column[1:]) for side, column in zip([us, *them], seconds, strict=True))
    opponents = {
        str(micro): {
            "speed_ratio": rate / theirs,
            "memory_ratio": us["peak"] / side["peak"],
            "pairs_per_second": theirs,
            "peak_gb": side["peak"] / 1e9,
            "tokens_an_answer": side["tokens"] / (2 * job.steps * job.batch),
        }
        for micro, side, theirs in zip(variants, them, rates, strict=True)
    }
    fastest = min(opponents, key=lambda name: opponents[name]["speed_ratio"])
    return {
        "speed_ratio": opponents[fastest]["speed_ratio"],
        "memory_ratio": max(opponent["memory_ratio"] for opponent in opponents.values()),
        "pairs_per_second": rate,
        "peak_gb": us["peak"] / 1e9,
        "tokens_an_answer": us["tokens"] / (2 * job.steps * job.batch),
        "fastest_opponent": fastest,
        "opponents": opponents,
        "workload": job.workload,
        "dtype": job.dtype,
        "batch": job.batch,
        "max_new_tokens": job.max_new_tokens,
        "steps": job.steps,
        "pairs_trained": us["pairs"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opponent", choices=["trl"], default="trl")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape, in place of --model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--workload", choices=["multi_turn", "long_prompt", "short_prompt"], default="multi_turn")
    parser.add_argument("--batch", type=int, default=8, help="prompts a step")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="3 steps, one of TRL's variants")
    parser.add_argument("--variants", type=int, nargs="+", default=[4, 2], help="prompts a forward of TRL's")
    parser.add_argument("--tokens-per-forward", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    wrong = [micro for micro in args.variants if args.batch % micro]
    if wrong:
        parser.error(f"--variants {wrong[0]}: expected divisors of --batch {args.batch}")
    with shaped(args.shape, args.device) as folder:
        job = Job(folder or args.model, args.workload, args.dtype, 3 if args.quick else args.steps, args.batch,
                  args.max_new_tokens, args.seed, args.tokens_per_forward, args.device)  # fmt: skip
        print(json.dumps(compare(job, args.variants[:1] if args.quick else args.variants)))


if __name__ == "__main__":
    main()
