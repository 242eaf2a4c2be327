"""All methods on equal terms: reward against KL divergence where the true reward is known, at equal label calls and at
equal tokens, with several seeds; and what came out of each paper's claim.

    python benchmarks/bake_off.py --out runs/bake_off [--processes 2] [--docs docs/comparison.md]     (make bake-off)

The world is made up (bake/world.py: questions, truth, annotator, a small model that is trained on the spot). The rows
are a table (bake/methods.py); a new one is one entry there. Every row is a recipe, run as `prefloop RECIPE` runs it, at
three strengths (learning rates, the same for all; ExPO: alphas) with `--n` label calls, and for every seed. Then the
models answer held-out questions: true reward, KL divergence from the start model, win rate, length.

First all rows have the same label calls. Then the rows of `EQUAL_TOKENS` get as many labels as make them cost what
OAIF costs (tokens sampled, scored and trained, weighted by what a token of each takes). Last, some rows in other cases:
an annotator that does not like length, one that errs far more often, few questions.

A finished row is kept in OUT/rows; the same command continues. Intervals are 95 % by Student's t over seeds. Prints,
last, one line of JSON; all but the seconds is the same when it is run again.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from math import ceil
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

from bake.claims import judged
from bake.figures import CALLS, KL, PLAIN, TOKENS, Runs, cost, middle_of, summary

EQUAL_TOKENS = ("dpo", "oaif-dpo", "bpo-5", "dice", "optune-1", "optune-half", "ppo", "ppo-scored", "fa", "ca")
"""Rows of the second comparison."""
LIKE = "oaif-dpo"
"""The row whose cost all others get."""
OTHER_CASES = {
    "fair": ("dpo", "ipo", "oaif-dpo", "oaif-ipo", "fa"),
    "weak": ("ipo", "oaif-ipo", "osp", "osp-hard", "fa"),
    "few": ("dpo", "ipo", "oaif-dpo", "oaif-ipo", "fa"),
}
"""Rows of the other comparisons."""
OTHER_STRENGTHS = (1, 2)
"""Theirs: the two that are around the place of comparison."""
FARTHEST = (0.25, 2.0)
"""Of the label calls: how far the second comparison departs from the first one's."""

SMALL = {"n": 672, "strengths": [1, 2], "methods": ["dice", "dice-no-length", "fa", "ca"], "only_equal_calls": True}
SMALL_SEEDS = 3
STRONGEST = (
    ("DICE: the length term keeps answers short", "words saved at equal KL", 1),
    ("CA over FA", "best true reward of the strengths", -1),
)
"""Claim, figure, and on which side of 0 its mean over seeds is in the small version too, or CI fails."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="runs/bake_off; of the small version runs/bake_off_small")
    parser.add_argument("--n", type=int, default=960, help="label calls of a row")
    parser.add_argument("--seeds", type=int, help="5; of the small version 3")
    parser.add_argument("--first-seed", type=int, default=1, help="1: the world was shaped by looking at seed 0")
    parser.add_argument("--methods", nargs="+", help="only these rows")
    parser.add_argument("--strengths", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only-equal-calls", action="store_true", help="leave the other comparisons out")
    parser.add_argument("--small", action="store_true", help="what CI runs: the machinery and the strongest effects")
    parser.add_argument("--measure", action="store_true", help="only measure what a token costs (bake.figures.COSTS)")
    parser.add_argument("--processes", type=int, default=2, help="rows at once, of one thread each")
    parser.add_argument("--docs", type=Path, help="a Markdown page whose generated part is written, with its plot")
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    args.seeds = args.seeds or (SMALL_SEEDS if args.small else 5)
    args.out = args.out or Path("runs/bake_off_small" if args.small else "runs/bake_off")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: they import torch
    args.out.mkdir(parents=True, exist_ok=True)
    if args.measure:
        from bake.rows import measure, prepare

        print(json.dumps(measure(prepare(args.out, args.first_seed))))
        return
    found = compare(args)
    for name, one in found["comparisons"].items():
        for line in one["claims"]:
            print(f"{name}: {line['claim']}: {line['figure']}: {line['difference']}: {line['verdict']}")
    (args.out / "bake_off.json").write_text(json.dumps(found, indent=1) + "\n")
    if args.docs:
        from bake.page import write_page

        write_page(args.docs, found, {name: runs_of(found, name) for name in found["comparisons"]})
    first, *others = ({"methods": one["methods"], "claims": one["claims"]} for one in found["comparisons"].values())
    names = list(found["comparisons"])[1:]
    last = {"kl": found["kl"], "n": found["n"], "seeds": found["seeds"], **first,
            "others": dict(zip(names, others, strict=True))}  # fmt: skip
    if args.small:
        last["strongest"] = strongest(first["claims"])
    print(json.dumps(last))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    from bake.methods import METHODS

    names = args.methods or list(METHODS)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    with ProcessPoolExecutor(
        args.processes, mp_context=multiprocessing.get_context("spawn"), initializer=one_thread
    ) as pool:
        every(pool, prepared, [(args.out, seed, PLAIN) for seed in seeds])
        sanity = dict(zip(seeds, every(pool, sane, [(args.out, seed) for seed in seeds]), strict=True))
        rows = rows_of(args, pool, seeds, dict.fromkeys(names, args.n))
        comparisons = {CALLS: rows}
        if not args.only_equal_calls:
            if LIKE in names:
                compared = [name for name in EQUAL_TOKENS if name in names]
                comparisons[TOKENS] = rows_of(args, pool, seeds, sizes_at_equal_tokens(rows, compared, args.n))
            for case, compared in OTHER_CASES.items():
                sizes = {name: args.n for name in compared if name in names}
                comparisons[case] = rows_of(args, pool, seeds, sizes, case, OTHER_STRENGTHS)
    found: dict[str, Any] = {
        "kl": KL, "n": args.n, "seeds": args.seeds, "said": {name: METHODS[name].said for name in names},
        "sanity": {name: fmean(one[name] for one in sanity.values()) for name in sanity[seeds[0]] if name != "start"},
        "start": {str(seed): one["start"] for seed, one in sanity.items()},
        "comparisons": {name: {"rows": its_rows} for name, its_rows in comparisons.items() if its_rows},
    }  # fmt: skip
    for name, one in found["comparisons"].items():
        runs = runs_of(found, name)
        one["methods"] = {method: summary(of_method) for method, of_method in runs.items()}
        one["claims"] = judged(runs, costs=name != TOKENS)
    return found


def rows_of(
    args: argparse.Namespace,
    pool: ProcessPoolExecutor,
    seeds: Sequence[int],
    sizes: dict[str, int],
    case: str = PLAIN,
    strengths: Sequence[int] = (0, 1, 2),
) -> list[dict[str, Any]]:
    """The rows of methods with so many labels each, of all seeds and strengths, in a case of `bake.methods.CASES`."""
    from bake.methods import METHODS, REWARD_MODELS

    # What several rows begin with is there before any of them begins.
    every(pool, prepared, [(args.out, seed, case) for seed in seeds])
    judged_by = sorted({(METHODS[name].needs, n) for name, n in sizes.items() if METHODS[name].needs in REWARD_MODELS})
    every(pool, reward_model_of, [(args.out, needs, seed, n, case) for needs, n in judged_by for seed in seeds])
    strengths = [i for i in args.strengths if i in strengths] or args.strengths
    jobs = [(args.out, name, seed, i, n, case) for seed in seeds for name, n in sizes.items() for i in strengths]
    return every(pool, row_of, jobs)


def strongest(claims: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Whether the strongest effects are there, and how often the mean over SMALL_SEEDS such seeds would be on the other
    side of 0, by the spread of the seeds (normal approximation: take many, others than CI's, for a figure to trust).
    """
    found = {}
    for claim, figure, side in STRONGEST:
        values = [
            side * value
            for one in claims
            if (one["claim"], one["figure"]) == (claim, figure)
            for value in one["by_seed"]
        ]
        one: dict[str, Any] = {"shows": bool(values) and fmean(values) > 0, "seeds": len(values)}
        if len(values) > 2:
            of_the_mean = NormalDist(fmean(values), stdev(values) / SMALL_SEEDS**0.5)
            one["error_rate"] = round(of_the_mean.cdf(0.0), 5)
        found[f"{claim}: {figure}"] = one
    return found


def runs_of(found: dict[str, Any], comparison: str) -> dict[str, Runs]:
    """The rows of a comparison by method, in the order of the table."""
    start = {int(seed): one for seed, one in found["start"].items()}
    by_method = {
        name: [row for row in found["comparisons"][comparison]["rows"] if row["method"] == name]
        for name in found["said"]
    }
    return {name: Runs.of(rows, start) for name, rows in by_method.items() if rows}


def sizes_at_equal_tokens(rows: Sequence[dict[str, Any]], names: Sequence[str], n: int) -> dict[str, int]:
    """Labels with which a row costs what LIKE costs, by its costs at the middle strength; whole batches."""
    from bake.methods import BATCH

    def mean(name: str) -> float:
        return fmean(cost(middle_of(list(of_seed))) for of_seed in by_seed(rows, name))

    unit = 6 * BATCH
    low, high = ceil(n * FARTHEST[0] / unit) * unit, int(n * FARTHEST[1] / unit) * unit
    sizes = {name: min(high, max(low, round(n * mean(LIKE) / mean(name) / unit) * unit)) for name in names}
    return sizes | {LIKE: n}


def by_seed(rows: Sequence[dict[str, Any]], name: str) -> list[list[dict[str, Any]]]:
    """The rows of a method, those of a seed together."""
    of_name = [row for row in rows if row["method"] == name]
    return [[row for row in of_name if row["seed"] == seed] for seed in sorted({row["seed"] for row in of_name})]


def every(pool: ProcessPoolExecutor, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The results, in the order of the jobs; each is told as it comes. The first failure ends all."""
    futures = {pool.submit(work, *job): job for job in jobs}
    for i, future in enumerate(as_completed(futures), 1):
        error = future.exception()
        if error:
            pool.shutdown(cancel_futures=True)
            raise SystemExit(f"{work.__name__} {futures[future][1:]}: {type(error).__name__}: {error}") from error
        print(
            f"{work.__name__} {' '.join(map(str, futures[future][1:]))}: {i} of {len(jobs)}",
            file=sys.stderr,
            flush=True,
        )
    return [future.result() for future in futures]


def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def sane(out: Path, seed: int) -> dict[str, Any]:
    from bake.rows import prepare, sanity

    return sanity(prepare(out, seed), seed)


def prepared(out: Path, seed: int, case: str) -> None:
    from bake.rows import prepare

    prepare(out, seed, case)


def reward_model_of(out: Path, needs: str, seed: int, n: int, case: str) -> None:
    from bake.rows import prepare_reward_model

    prepare_reward_model(out, needs, seed, n, case)


def row_of(out: Path, name: str, seed: int, strength: int, n: int, case: str) -> dict[str, Any]:
    from bake.rows import Job, run_row

    return run_row(out, Job(name, seed, strength, n, case))


if __name__ == "__main__":
    main()
