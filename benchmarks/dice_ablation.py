"""What DICE's two corrections do, on the real small model: length debiasing and replay, with several seeds.

    python benchmarks/dice_ablation.py --out runs/ablation

For each seed, from one DPO policy pi(0) and its reference pi(-1):
- length gap of best against worst at alpha = 0, for K = 2, 4, 8, 16, and at alpha* (K = 16). 16 answers are sampled to
  each prompt and prompts with at least 8 finished ones are kept, so that the same prompts are compared at every K:
  K = 2, 4, 8 are means over random subsets of the finished answers, K = 16 is all of them;
- mean length in characters of answers to held-out prompts (cut ones included) by pi(0), and after one round at
  alpha = 0 and at alpha* (gamma = 0: pairs of the model's own only, where the length correction acts most);
- negative log-likelihood per token of held-out offline chosen responses after one round with gamma = 0, 0.5 and 1.

Figures are mean over seeds with a 95 % interval (Student t over seeds). Resumable: the same command continues.
Prints, last, one line of JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from intervals import interval
from prefloop.config import Config
from prefloop.feedback.implicit_reward import implicit_reward
from prefloop.models import ModelRef, resolve
from prefloop.pairs.filters import keep_finished
from prefloop.pairs.length import fixed_coefficient, length_coefficient
from prefloop.pairs.replay import mix
from prefloop.pairs.select import best_vs_worst, debias_length
from prefloop.recipes.dpo import dpo_round
from prefloop.recipes.steps import load, prompts_of, some, tokenise
from prefloop.records import Group, Pair
from prefloop.run import Run
from prefloop.sample.sampling import Sampling
from prefloop.sample.stage import sample
from prefloop.seeds import generator
from prefloop.train.config import Compute, Train
from prefloop.train.reference import logps_under

KS = (2, 4, 8, 16)


class AblationConfig(Config):
    """Size of the experiment."""

    policy: str = "smollm2-135m"
    seeds: int = 3
    pairs: int = 64
    prompts: int = 32
    min_valid: int = 8
    subsets: int = 50
    answers: int = 2
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 80
    steps: int = 12
    batch_size: int = 4
    learning_rate: float = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    for name, field in AblationConfig.model_fields.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    out = args.pop("out")
    cfg = AblationConfig(**args)
    with Run.open(out, recipe="ablation", config=cfg, console=Console(stderr=True)) as run:
        figures = [one_seed(run, cfg, seed) for seed in range(cfg.seeds)]
    for seed, row in enumerate(figures):
        print(f"seed {seed}: {json.dumps(row)}")
    summary = {
        "gap_alpha0": {str(k): interval([row["gap_alpha0"][k] for row in figures]) for k in KS},
        **{
            name: interval([row[name] for row in figures])
            for name in ("gap_alpha_star", "length_start", "length_alpha0", "length_alpha_star")
        },
        "nll_by_gamma": {
            gamma: interval([row["nll_by_gamma"][gamma] for row in figures]) for gamma in ("0", "0.5", "1")
        },
        "nll_start": interval([row["nll_start"] for row in figures]),
        "seeds": cfg.seeds,
    }
    print(json.dumps(summary))


def one_seed(run: Run, cfg: AblationConfig, seed: int) -> dict:
    """All figures of one seed."""
    compute, label = Compute(), f"seed-{seed}"
    stage = run.part(label).stage
    start = resolve(cfg.policy)
    every = run.stage("data/pairs", tokenise, load("seed:train", "pairs", "error", run), start)
    offline = [every[i] for i in sorted(generator(seed, "pairs").permutation(len(every))[: cfg.pairs])]
    held_out = run.stage("data/held_out", tokenise, load("seed:held_out", "held-out", "error", run), start)
    train = Train(steps=cfg.steps, batch_size=cfg.batch_size, learning_rate=cfg.learning_rate, warmup_steps=2,
                  validation_pairs=0)  # fmt: skip
    sampling = Sampling(temperature=cfg.temperature, top_p=cfg.top_p, max_new_tokens=cfg.max_new_tokens)

    def trained(name: str, policy: ModelRef, pairs: list[Pair]) -> ModelRef:
        return dpo_round(run.part(f"{label}/{name}"), policy, policy, pairs, beta=0.1, train=train, compute=compute,
                         seed=seed)  # fmt: skip

    policy = trained("pi-0", start, offline)
    prompts = some(prompts_of(offline), cfg.prompts, seed)
    groups = stage("groups", sample, policy, prompts, k=max(KS), sampling=sampling, seed=seed, compute=compute)
    valid = stage("valid", keep_finished, groups, min_chars=3, max_chars=6700, min_valid=cfg.min_valid)
    scored = stage("feedback", implicit_reward, valid, policy, start, compute=compute)
    coefficient = length_coefficient(scored)

    def own_pairs(alpha: float) -> list[Pair]:
        debiased = debias_length(scored, fixed_coefficient(scored, alpha, unit="chars"))
        return best_vs_worst(debiased, reference=policy.fingerprint)

    star, zero = own_pairs(coefficient.alpha), own_pairs(0.0)
    half = mix(star, offline, fraction=0.5, seed=seed)
    models = {
        "alpha-0": trained("alpha-0", policy, zero),
        "gamma-0": trained("gamma-0", policy, star),
        "gamma-0.5": trained("gamma-0.5", policy, half),
        "gamma-1": trained("gamma-1", policy, mix([], offline, fraction=1.0, seed=seed)),
    }

    def length_of(name: str, model: ModelRef) -> float:
        answers = stage(f"{name}-answers", sample, model, prompts_of(held_out), k=cfg.answers, sampling=sampling,
                        seed=seed, compute=compute)  # fmt: skip
        return float(np.mean([response.length_chars for group in answers for response in group.responses]))

    def nll(name: str, model: ModelRef) -> float:
        return stage(f"{name}-nll", chosen_nll, model, held_out, compute=compute)["nll_per_token"]

    return {
        "gap_alpha0": {k: gap_of_subsets(scored, k, cfg.subsets, seed) for k in KS},
        "gap_alpha_star": coefficient.gap,
        "alpha_star": coefficient.alpha,
        "prompts_kept": len(scored),
        "length_start": length_of("start", policy),
        "length_alpha0": length_of("alpha-0", models["alpha-0"]),
        "length_alpha_star": length_of("gamma-0", models["gamma-0"]),
        "nll_start": nll("start", policy),
        "nll_by_gamma": {gamma: nll(f"gamma-{gamma}", models[f"gamma-{gamma}"]) for gamma in ("0", "0.5", "1")},
    }


def gap_of_subsets(scored: list[Group], k: int, subsets: int, seed: int) -> float:
    """Mean length gap at alpha = 0 when k of each prompt's answers compete: all of them where there are no more."""
    gaps = []
    for draw in range(subsets if k < max(len(group.responses) for group in scored) else 1):
        rng = generator(seed, "subset", k, draw)
        smaller = [
            group.model_copy(
                update={
                    "responses": tuple(group.responses[i] for i in sorted(rng.permutation(len(group.responses))[:k]))
                }
            )
            for group in scored
        ]
        gaps.append(fixed_coefficient(smaller, 0.0, unit="chars").gap)
    return float(np.mean(gaps))


def chosen_nll(model: ModelRef, pairs: list[Pair], *, compute: Compute) -> dict[str, float]:
    """Negative log-likelihood per token, in nats, of the chosen responses."""
    rows = logps_under(model, [(pair.prompt, (pair.chosen,)) for pair in pairs], compute=compute)
    return {"nll_per_token": -sum(row[0] for row in rows) / sum(pair.chosen.length_tokens for pair in pairs)}


if __name__ == "__main__":
    main()
