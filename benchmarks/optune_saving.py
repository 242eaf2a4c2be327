"""What OPTune saves: seconds and tokens of an iteration with 1, 3/4, 1/2 and 1/4 of the answers new, and the reward.

    python benchmarks/optune_saving.py --out runs/optune_saving [--seeds 3]

The policy is a small language model that is trained on the spot (small_world.py). Every run is `prefloop optune`: 3
iterations of one pass over the prompts, two answers each, scored by `rule:helpful`, which is the truth here; only the
regenerated fraction differs. Fractions take turns, in another order for every seed, so that a machine that is busy for
a while slows all of them. The first iteration is the same for all (it samples everything), so what its seconds differ
by is the machine; the figures are of the iterations after it, and of the whole run.

Cost model (docs/methods/optune.md): with C the seconds at rho = 1,

    speed-up(rho) = (C_sample + C_score + C_reference + C_train) / (rho (C_sample + C_score + C_reference) + C_train)

"At equal reward": seconds of the run at rho = 1 over those of the other, each until it first came to the highest reward
that both came to, between two iterations by a straight line.
Intervals are 95 % by Student's t over seeds; speed-ups and rewards are compared within a seed. The same command
continues; a run that was stopped midway begins again, so that its seconds are whole. Prints, last, one line of JSON.
"""

import argparse
import json
import os
import shutil
import tempfile
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from intervals import interval
from prefloop.feedback.rule import load_rule
from prefloop.models import ModelRef
from prefloop.recipes.optune import OptuneConfig, optune
from prefloop.recipes.steps import LookAt
from prefloop.records import Prompt
from prefloop.run import Run
from prefloop.sample.sampling import Sampling
from prefloop.sample.stage import sample
from prefloop.train.config import Compute, Train
from small_world import prompts, small_model

FRACTIONS = (1.0, 0.75, 0.5, 0.25)
RULE = "helpful"
PARTS = {"sample": "groups", "score": "feedback", "reference": "training_pairs", "train": "model"}
"""What an iteration consists of -> the stage that does it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/optune_saving"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--held-out", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--weights", default="linear", choices=["linear", "sigmoid", "none"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = ModelRef.of(small_model(args.out / "start"), name="start")
    found = prompts(args.prompts + args.held_out, seed=0)
    file = args.out / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in found[args.held_out :]))
    held_out = [Prompt.of(text) for text in found[: args.held_out]]
    (args.out / "held_out.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in found[: args.held_out]))

    rows: dict[float, list[dict[str, Any]]] = {fraction: [] for fraction in FRACTIONS}
    before = []
    for seed in range(args.seeds):
        before.append(reward(start, held_out, seed))
        turn = seed % len(FRACTIONS)
        for fraction in (*FRACTIONS[turn:], *FRACTIONS[:turn]):
            row = one_run(args, start, fraction, seed)
            models = [ModelRef.of(args.out / f"{fraction}-{seed}/round-{t}/model") for t in (1, 2, 3)]
            row["rewards"] = [before[-1], *(reward(model, held_out, seed) for model in models)]
            rows[fraction].append(row)
            print(f"seed {seed}, rho {fraction}: {json.dumps(row)}", flush=True)
    figures = {str(fraction): compared(rows[fraction], rows[1.0], fraction) for fraction in FRACTIONS}
    print_table(figures)
    print(json.dumps({"start_reward": interval(before), **figures, "seeds": args.seeds, "weights": args.weights}))


def one_run(args: argparse.Namespace, start: ModelRef, fraction: float, seed: int) -> dict[str, Any]:
    """Seconds by part and tokens sampled: of the first iteration, and of a later one on average."""
    out = args.out / f"{fraction}-{seed}"
    cfg = OptuneConfig(
        policy=str(start.path),
        prompts=str(args.out / "prompts.jsonl"),
        held_out=str(args.out / "held_out.jsonl"),
        annotator=f"rule:{RULE}",
        regenerate=fraction,
        seed=seed,
        sampling=SAMPLING,
        look_at=LookAt(answers=0, shown=0),
        train=Train(
            steps=args.prompts // args.batch, batch_size=args.batch, learning_rate=args.learning_rate, warmup_steps=2,
            validation_pairs=0,
        ),
        compute=COMPUTE,
        engine="transformers",
    ).replace(weights__function=args.weights)  # fmt: skip
    if not (out / "report.html").is_file():
        shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as cache, Run.open(out, recipe="optune", config=cfg) as run:
        os.environ["PREFLOOP_CACHE"] = cache  # an earlier run of the seed had the same first pairs
        optune(cfg, run)
        stages = dict(run.manifest)

    def seconds(t: int) -> dict[str, float]:
        return {part: stages[f"round-{t}/{name}"]["seconds"] for part, name in PARTS.items()}

    def tokens(t: int) -> int:
        return stages[f"round-{t}/groups"]["counts"]["tokens"]

    first, *later = (seconds(t) for t in range(1, cfg.rounds + 1))
    return {
        "first_iteration": sum(first.values()),
        "seconds": {part: sum(row[part] for row in later) / len(later) for part in PARTS},
        "tokens": sum(tokens(t) for t in range(2, cfg.rounds + 1)) / len(later),
        "elapsed": list(accumulate((sum(row.values()) for row in (first, *later)), initial=0.0)),
        "mean_weight": stages[f"round-{cfg.rounds}/weighted"]["figures"]["E[w] before normalisation"],
    }


def reward(model: ModelRef, held_out: list[Prompt], seed: int) -> float:
    """Mean score of one answer to every held-out prompt."""
    answers = sample(model, held_out, k=1, sampling=SAMPLING, seed=seed, compute=COMPUTE, engine="transformers")
    scores = load_rule(RULE).score([(group.prompt, group.responses[0]) for group in answers])
    return fmean(score for score in scores if not isinstance(score, str))


def compared(rows: list[dict[str, Any]], full: list[dict[str, Any]], fraction: float) -> dict[str, Any]:
    """The figures of a fraction beside those of rho = 1, seed by seed."""

    def total(row: dict[str, Any]) -> float:
        return sum(row["seconds"].values())

    def predicted(row: dict[str, Any]) -> float:
        scaled = total(row) - row["seconds"]["train"]
        return total(row) / (fraction * scaled + row["seconds"]["train"])

    def seconds_to(reward: float, row: dict[str, Any]) -> float:
        points = zip(row["elapsed"], row["rewards"], strict=True)
        reached = (
            t0 + (reward - r0) / (r1 - r0) * (t1 - t0) for (t0, r0), (t1, r1) in pairwise(points) if r0 < reward <= r1
        )
        return next(reached, row["elapsed"][-1])  # a run that never rises above its start takes all its time

    def at_equal_reward(row: dict[str, Any], one: dict[str, Any]) -> float:
        both_reached = min(max(row["rewards"]), max(one["rewards"]))
        return seconds_to(both_reached, one) / seconds_to(both_reached, row)

    both = list(zip(rows, full, strict=True))
    over_seeds = partial(map, interval)
    names = ("seconds_per_iteration", "tokens_per_iteration", "speed_up", "speed_up_of_the_run", "speed_up_predicted",
             "reward", "reward_less_that_of_rho_1", "speed_up_at_equal_reward", "first_iteration")  # fmt: skip
    values = (
        [total(row) for row in rows],
        [row["tokens"] for row in rows],
        [total(one) / total(row) for row, one in both],
        [one["elapsed"][-1] / row["elapsed"][-1] for row, one in both],
        [predicted(one) for one in full],
        [row["rewards"][-1] for row in rows],
        [row["rewards"][-1] - one["rewards"][-1] for row, one in both],
        [at_equal_reward(row, one) for row, one in both],
        [row["first_iteration"] for row in rows],
    )
    parts = {part: interval([row["seconds"][part] for row in rows])[0] for part in PARTS}
    return {**dict(zip(names, over_seeds(values), strict=True)), "seconds_by_part": parts}


def print_table(figures: dict[str, dict[str, Any]]) -> None:
    """Markdown, for docs/methods/optune.md."""

    def cell(value: list[float], digits: int) -> str:
        return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*value, d=digits)

    rows = [
        ("seconds per iteration", "seconds_per_iteration", 1),
        ("tokens sampled per iteration", "tokens_per_iteration", 0),
        ("speed-up of an iteration", "speed_up", 2),
        ("speed-up by the cost model", "speed_up_predicted", 2),
        ("speed-up of the run", "speed_up_of_the_run", 2),
        ("reward at the end", "reward", 3),
        ("the same, less that of rho = 1", "reward_less_that_of_rho_1", 3),
        ("speed-up at equal reward", "speed_up_at_equal_reward", 2),
        ("seconds of the first iteration", "first_iteration", 1),
    ]
    print("\n| rho | " + " | ".join(figures) + " |\n|---|" + "---|" * len(figures))
    for said, name, digits in rows:
        print(f"| {said} | " + " | ".join(cell(found[name], digits) for found in figures.values()) + " |")
    by_part = (
        " / ".join(f"{seconds:.1f}" for seconds in found["seconds_by_part"].values()) for found in figures.values()
    )
    print(f"| {' / '.join(PARTS)} | " + " | ".join(by_part) + " |\n")


SAMPLING = Sampling(max_new_tokens=160)
COMPUTE = Compute(dtype="float32", sampling_dtype="float32")

if __name__ == "__main__":
    main()
