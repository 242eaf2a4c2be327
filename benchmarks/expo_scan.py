"""Does a part-trained model plus ExPO reach the fully trained one (the question of ExPO's table of partial trainings)?

    python benchmarks/expo_scan.py --out runs/expo_scan [--plot docs/methods/expo.svg]

The start model theta_0 is a small language model that is trained on the spot (small_world.py). Its own answers, two a
prompt, are ranked by `rule:helpful`, which is the truth here, and DPO trains on these pairs. It is stopped at 5, 10,
20, 40 and 100 % of its steps (a constant learning rate after the warm-up, so a stopped training is the beginning of the
whole one), and every theta_1 so made is extrapolated over alpha, as far as (1 + alpha) times its share of the steps is
at most 2. All models answer the same prompts with the same seeds. alpha is chosen on one half of the prompts, with
the guard of `prefloop expo`; every figure is of the other half.

Figures are means over seeds (of the pairs, of DPO's order, of the prompts) with a 95 % interval by Student's t over
seeds (of perplexities, geometric means). Resumable: the same command continues. Prints, last, one line of JSON.
"""

import argparse
import json
from collections.abc import Sequence
from math import exp, log
from pathlib import Path

from rich.console import Console

from intervals import interval
from prefloop.config import Config, free
from prefloop.evaluate.candidate import Candidate, Guard, candidate, refusal
from prefloop.feedback.rule import load_rule
from prefloop.feedback.rules import RULES
from prefloop.feedback.scorer import score_with
from prefloop.feedback.stage import annotate
from prefloop.merge.extrapolate import distance
from prefloop.models import ModelRef
from prefloop.recipes.dpo import dpo_round
from prefloop.recipes.expo import ExpoConfig, answers_at
from prefloop.records import Group, Pair, Prompt
from prefloop.run import Run, Stage
from prefloop.sample.sampling import Sampling
from prefloop.sample.stage import sample
from prefloop.train.config import Compute, Train
from prefloop.train.reference import logps_under
from small_world import prompts, small_model

SHARES = (5, 10, 20, 40, 100)
"""Per cent of the steps."""
ALPHAS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
FARTHEST = 2.0
"""Largest (1 + alpha) times the share of the steps."""
SAMPLING = Sampling(temperature=0.9, max_new_tokens=160)
COMPUTE = Compute(dtype="float32", sampling_dtype="float32")


class ScanConfig(Config):
    """Size of the experiment."""

    seeds: int = free(default=3)
    pairs: int = 1200
    prompts: int = 200
    steps: int = 100
    batch_size: int = 24
    learning_rate: float = 5e-4
    beta: float = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/expo_scan"))
    parser.add_argument("--start", type=Path, help="where the small model is, or goes; OUT-start when left out")
    parser.add_argument("--plot", type=Path, help="an SVG file to draw the curves into")
    for name, field in ScanConfig.model_fields.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    out, start, plot_file = args.pop("out"), args.pop("start"), args.pop("plot")
    cfg = ScanConfig(**args)
    theta_0 = ModelRef.of(small_model(start or out.with_name(out.name + "-start")), name="start")
    with Run.open(out, recipe="expo_scan", config=cfg, console=Console(stderr=True)) as run:
        scans = [scan(run, cfg, seed, theta_0) for seed in range(cfg.seeds)]
    table = {
        key: {name: over_seeds(name, [figure(one[key]) for one in scans]) for name, figure in FIGURES.items()}
        for key in scans[0]
    }
    chosen = [{share: chosen_alpha(one, share) for share in SHARES} for one in scans]
    print_tables(table)
    if plot_file:
        plot(plot_file, table)
    whole = [reward(one[100, 0.0][TEST]) for one in scans]
    outcome = {}
    for share in SHARES:
        best = [reward(one[share, alpha[share]][TEST]) for one, alpha in zip(scans, chosen, strict=True)]
        outcome[f"{share} %"] = {
            "alpha": [alpha[share] for alpha in chosen],
            "stopped": table[share, 0.0]["reward"],
            "with_expo": interval(best),
            "less_the_whole_training": interval([a - b for a, b in zip(best, whole, strict=True)]),
            "chars": interval(
                [chars(one[share, alpha[share]][TEST]) for one, alpha in zip(scans, chosen, strict=True)]
            ),
        }
    print(json.dumps({"start": table[0, 0.0]["reward"], "shares": outcome, "seeds": cfg.seeds}))


CHOOSE, TEST, TEST_UNDER_START = 0, 1, 2
"""The three rows of figures of a model: two halves of the prompts, and the second with perplexity under theta_0."""


def reward(one: Candidate) -> float:
    assert one.score
    return one.score[0]


def chars(one: Candidate) -> float:
    assert one.length_chars
    return one.length_chars[0]


def over_seeds(name: str, values: Sequence[float]) -> list[float]:
    """`interval`; of perplexities, which differ by orders of magnitude, that of their logarithms."""
    return (
        [exp(value) for value in interval([log(value) for value in values])]
        if name == "perplexity"
        else interval(values)
    )


def perplexity(one: Candidate) -> float:
    assert one.perplexity
    return one.perplexity[0]


FIGURES = {
    "reward": lambda rows: reward(rows[TEST]),
    "chars": lambda rows: chars(rows[TEST]),
    "perplexity": lambda rows: perplexity(rows[TEST_UNDER_START]),
}


def scan(run: Run, cfg: ScanConfig, seed: int, theta_0: ModelRef) -> dict[tuple[int, float], list[Candidate]]:
    """The figures of every (share of the steps, alpha); share 0 is theta_0."""
    label = f"seed-{seed}"
    every = [Prompt.of(text) for text in prompts(cfg.pairs + cfg.prompts, seed=seed)]
    asked, held_out = every[: cfg.pairs], every[cfg.pairs :]
    drawn = run.stage(f"{label}/groups", sample, theta_0, asked, k=2, sampling=SAMPLING, seed=seed, compute=COMPUTE,
                      engine="transformers")  # fmt: skip
    pairs: list[Pair] = run.stage(f"{label}/pairs", annotate, drawn, load_rule("helpful"))
    options = ExpoConfig(sampling=SAMPLING, compute=COMPUTE, engine="transformers", seed=seed)

    def look(name: str, theta_1: ModelRef, alpha: float) -> list[Candidate]:
        answers = run.stage(f"{name}/answers", answers_at, theta_0, theta_1, alpha, held_out, options)
        return run.stage(f"{name}/figures", figures, alpha, answers, theta_0, theta_1)

    found = {(0, 0.0): look(f"{label}/start", theta_0, 0.0)}
    for share in SHARES:
        steps = cfg.steps * share // 100
        train = Train(steps=steps, batch_size=cfg.batch_size, learning_rate=cfg.learning_rate, warmup_steps=10,
                      validation_pairs=0)  # fmt: skip
        part = run.part(f"{label}/{share}")
        theta_1 = dpo_round(part, theta_0, theta_0, pairs, beta=cfg.beta, train=train, compute=COMPUTE, seed=seed)
        part.stage("distance", distance, theta_0, theta_1)
        for alpha in ALPHAS:
            if alpha == 0 or (1 + alpha) * share / 100 <= FARTHEST:
                found[share, alpha] = look(f"{label}/{share}/alpha-{alpha:g}", theta_1, alpha)
    return found


def figures(
    alpha: float, answers: list[Group], theta_0: ModelRef, theta_1: ModelRef, *, stage: Stage
) -> list[Candidate]:
    """Stage: CHOOSE, TEST and TEST_UNDER_START."""
    half = len(answers) // 2
    items = [(group.prompt, group.responses) for group in answers]
    own, start = (
        logps_under(ref, items, compute=COMPUTE, part=part, stage=stage)
        for part, ref in (("own", theta_1), ("start", theta_0))
    )
    scored = score_with(answers, helpful)
    return [
        candidate(alpha, answers[:half], own[:half], scored[:half]),
        candidate(alpha, answers[half:], own[half:], scored[half:]),
        candidate(alpha, answers[half:], start[half:], scored[half:]),
    ]


def helpful(groups: Sequence[Group]) -> list[list[float | None]]:
    return [[RULES["helpful"](group.prompt, response) for response in group.responses] for group in groups]


def chosen_alpha(found: dict[tuple[int, float], list[Candidate]], share: int) -> float:
    """The best of those that the guard lets pass, on the half that is for choosing."""
    of_share = {alpha: rows[CHOOSE] for (s, alpha), rows in found.items() if s == share}
    passed = [alpha for alpha, one in of_share.items() if refusal(one, of_share[0.0], Guard()) is None]
    return max(passed, key=lambda alpha: (reward(of_share[alpha]), -alpha))


Table = dict[tuple[int, float], dict[str, list[float]]]


def print_tables(table: Table) -> None:
    """Markdown, for docs/methods/expo.md."""
    for name, digits in (("reward", 2), ("chars", 0), ("perplexity", 2)):
        print(f"\n{name}\n\n| steps | " + " | ".join(f"alpha = {alpha:g}" for alpha in ALPHAS) + " |")
        print("|---|" + "---|" * len(ALPHAS))
        for share in (0, *SHARES):
            cells = []
            for alpha in ALPHAS:
                value = table.get((share, alpha), {}).get(name)
                cells.append("" if value is None else "{0:.{3}f} [{1:.{3}f}, {2:.{3}f}]".format(*value, digits))
            print(f"| {share} % | " + " | ".join(cells) + " |")


def plot(file: Path, table: Table) -> None:
    """Reward, length and perplexity against (1 + alpha), a line a share."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "prefloop"  # same figures, same bytes
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    titles = {"reward": "true reward", "chars": "characters", "perplexity": "perplexity under the start model"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for share in SHARES:
            alphas = [alpha for s, alpha in table if s == share]
            mean, low, high = zip(*(table[share, alpha][name] for alpha in alphas), strict=True)
            x = [1 + alpha for alpha in alphas]
            axis.plot(x, mean, marker="o", markersize=3, label=f"{share} % of the steps")
            axis.fill_between(x, low, high, alpha=0.15)
        axis.axhline(table[100, 0.0][name][0], color="grey", linewidth=0.8, linestyle="--")
        axis.set(title=title, xlabel="1 + alpha", xscale="log", yscale="log" if name == "perplexity" else "linear")
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
