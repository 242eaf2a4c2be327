"""Online against offline feedback (OAIF, figure 3), and length control by the annotator's instruction (its table 8).

    python benchmarks/oaif_vs_offline.py --out runs/oaif_vs_offline [--processes 2] [--plot docs/methods/oaif.svg]

The policy is a small language model that is trained on the spot (small_world.py), or `--policy` with `--prompts` and
`--held-out`. Each of DPO, IPO and SLiC runs `prefloop oaif` and the same with `--offline true`, with several seeds:
same number of steps, so of labels, from the same annotator, `rule:helpful`. Offline gets a fresh pair of the start
model at every step. Every `--every` steps the model answers held-out prompts; the win rate against the start model is
by the annotator's own rule, which is the truth here. Length control: DPO online, with the rule at 60, 25 and 8 words,
in place of an annotator that is told to like plain, short and very short answers.
Learning rate and betas were chosen from shorter runs of seed 0; they are the same for all seeds and both kinds.

Intervals are 95 % by Student's t over seeds. Resumable: the same command continues. Prints, last, one line of JSON.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from intervals import interval
from small_world import prompts, small_model

BETAS = {"dpo": 0.1, "ipo": 0.1, "slic": 0.002}
"""Loss -> beta, the same for online and offline. The paper's, but for IPO, whose 1.0 stops at half a nat a pair: there
the small model stays where it is (docs/methods/oaif.md).
"""
RULES = {"plain": "helpful", "short": "helpful-short", "very short": "helpful-very-short"}
LOG = "round-1/model/training_log.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/oaif_vs_offline"))
    parser.add_argument("--policy", default="", help="a model in place of the small one")
    parser.add_argument("--prompts", default="", help="for --policy")
    parser.add_argument("--held-out", default="", help="for --policy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=25, help="steps between win rates")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--answers", type=int, default=150, help="held-out prompts")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of all runs")
    parser.add_argument("--betas", type=json.loads, default=BETAS, help="JSON, by loss")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, of one thread each")
    parser.add_argument("--plot", type=Path, help="an SVG file to draw the curves into")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.policy:
        args.policy = str(small_model(args.out / "start"))
        args.prompts, args.held_out = write_prompts(args)

    jobs: dict[tuple[str, str, int], Callable[[], Path]] = {}
    for seed in range(args.seeds):
        for loss in BETAS:
            for kind in ("online", "offline"):
                jobs[loss, kind, seed] = lambda loss=loss, kind=kind, seed=seed: run(
                    args, f"{loss}-{kind}-{seed}", seed, loss, RULES["plain"], offline=kind == "offline"
                )
        for name in list(RULES)[1:]:
            jobs["length", name, seed] = lambda name=name, seed=seed: run(
                args, f"length-{RULES[name]}-{seed}", seed, "dpo", RULES[name]
            )
    with ThreadPoolExecutor(args.processes) as pool:
        futures = {key: pool.submit(job) for key, job in jobs.items()}
        logs = {key: evaluations(future.result()) for key, future in futures.items()}
    # The plain instruction is the online DPO of the comparison.
    logs |= {("length", "plain", seed): logs["dpo", "online", seed] for seed in range(args.seeds)}

    def over_seeds(a: str, b: str, figure: Callable[[dict[str, Any]], float]) -> dict[int, list[float]]:
        steps = logs[a, b, 0]
        return {step: interval([figure(logs[a, b, seed][step]) for seed in range(args.seeds)]) for step in steps}

    curves = {
        loss: {kind: over_seeds(loss, kind, win) for kind in ("online", "offline")} for loss in BETAS
    }  # fmt: skip
    lengths = {name: over_seeds("length", name, length) for name in RULES}
    print_tables(curves, lengths)
    if args.plot:
        plot(args.plot, curves, lengths)
    last = args.steps
    print(
        json.dumps(
            {
                **{loss: {kind: curve[last] for kind, curve in kinds.items()} for loss, kinds in curves.items()},
                "length_control": [lengths[name][last][0] for name in RULES],
                "length_control_intervals": [lengths[name][last] for name in RULES],
                "seeds": args.seeds,
                "policy": Path(args.policy).name,
            }
        )
    )


def write_prompts(args: argparse.Namespace) -> tuple[str, str]:
    """Files of training and held-out questions."""
    training = args.steps * args.batch
    found = prompts(training + args.answers, seed=0)
    files = args.out / "prompts.jsonl", args.out / "held_out.jsonl"
    for file, part in zip(files, (found[args.answers :], found[: args.answers]), strict=True):
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in part))
    return str(files[0]), str(files[1])


def run(args: argparse.Namespace, name: str, seed: int, loss: str, rule: str, *, offline: bool = False) -> Path:
    """One run of the recipe, in a process of its own. A run folder refuses other options and goes on with the same."""
    out = args.out / name
    command = [
        sys.executable, "-m", "prefloop.cli", "oaif", "--out", str(out), "--policy", args.policy,
        "--prompts", args.prompts, "--held-out", args.held_out, "--annotator", f"rule:{rule}",
        "--evaluator", "rule:varied", "--loss", loss, "--beta", str(args.betas[loss]),
        "--offline", str(offline), "--seed", str(seed),
        "--evaluate-every", str(args.every), "--look-at.answers", str(args.answers),
        "--sampling.max-new-tokens", str(args.max_new_tokens), "--engine", "transformers",
        "--compute.dtype", "float32", "--compute.sampling-dtype", "float32",
        "--train.steps", str(args.steps), "--train.batch-size", str(args.batch), "--train.warmup-steps", "10",
        "--train.learning-rate", str(args.learning_rate), "--train.checkpoint-every", str(args.every),
        "--train.validation-pairs", "0",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"} if args.processes > 1 else None, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    print(f"{name}: done", flush=True)
    return out / LOG


def evaluations(log: Path) -> dict[int, dict[str, Any]]:
    """What was found, by step."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return {row["step"]: row["evaluation"] for row in rows if "evaluation" in row}


def win(found: dict[str, Any]) -> float:
    return found["against_start_by_the_annotator"]["rate"][0]


def length(found: dict[str, Any]) -> float:
    return found["length_chars"][0]


def print_tables(
    curves: dict[str, dict[str, dict[int, list[float]]]], lengths: dict[str, dict[int, list[float]]]
) -> None:
    """Markdown, for docs/methods/oaif.md."""
    steps = list(next(iter(lengths.values())))

    def row(name: str, curve: dict[int, list[float]], digits: int) -> str:
        cells = (f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" for mean, low, high in curve.values())
        return f"| {name} | {' | '.join(cells)} |"

    head = f"| steps | {' | '.join(map(str, steps))} |\n|---|{'---|' * len(steps)}"
    print(f"\nWin rate against the start model\n\n{head}")
    for loss, kinds in curves.items():
        for kind, curve in kinds.items():
            print(row(f"{loss} {kind}", curve, 2))
    print(f"\nMean length in characters\n\n{head}")
    for name, curve in lengths.items():
        print(row(name, curve, 0))
    print()


def plot(
    file: Path, curves: dict[str, dict[str, dict[int, list[float]]]], lengths: dict[str, dict[int, list[float]]]
) -> None:
    """Win rates of each loss, and lengths, with their intervals."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "prefloop"  # same figures, same bytes
    figure, axes = plt.subplots(1, len(curves) + 1, figsize=(13, 3.2), layout="constrained")
    panels = [*((f"{loss}: win rate", kinds, 0.5) for loss, kinds in curves.items()), ("mean length", lengths, None)]
    for axis, (title, lines, level) in zip(axes, panels, strict=True):
        for name, curve in lines.items():
            steps = [0, *curve] if level is not None else list(curve)
            rows = [[level] * 3, *curve.values()] if level is not None else list(curve.values())
            mean, low, high = zip(*rows, strict=True)
            axis.plot(steps, mean, label=name)
            axis.fill_between(steps, low, high, alpha=0.2)
        axis.set(title=title, xlabel="steps")
        axis.legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
