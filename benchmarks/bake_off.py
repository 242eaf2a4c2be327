"""All methods on equal terms: reward against KL divergence where the true reward is known, at equal label calls and at
equal tokens, with several seeds; and what came out of each paper's claim.

    python benchmarks/bake_off.py --out runs/bake_off [--processes 2] [--docs docs/comparison.md]     (make bake-off)

The world is made up (bake/world.py: questions, truth, annotator, a small model that is trained on the spot). The rows
are a table (bake/methods.py); a new one is one entry there. Every row is a recipe, run as `prefloop RECIPE` runs it, at
three strengths (learning rates, the same for all; ExPO: alphas) with `--n` label calls, and for every seed. Then the
models answer held-out questions: true reward, KL divergence from the start model, win rate, length.

First all rows have the same label calls. Then the rows of `EQUAL_TOKENS` get as many labels as make them cost what
OAIF costs (tokens sampled, scored and trained, weighted by what a token of each takes). Last, the rows of `FAIR_JUDGE`
have an annotator that is as noisy but does not like length: which of the first results come of that liking?

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
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

from bake.claims import judged
from bake.figures import KL, MIDDLE, PARTS, Part, Runs, cost, summary

EQUAL_TOKENS = ("dpo", "oaif-dpo", "iterative-5", "bpo-5", "dice", "optune-half", "osp", "ppo", "ca")
"""Rows of the second comparison."""
LIKE = "oaif-dpo"
"""The row whose cost all others get."""
FAIR_JUDGE = ("dpo", "ipo", "slic", "oaif-dpo", "oaif-ipo", "oaif-slic", "dice", "dice-no-length", "ppo-scored", "fa")
"""Rows of the third comparison."""
FARTHEST = (0.25, 2.0)
"""Of the label calls: how far the second comparison departs from the first one's."""

SMALL_SEEDS = 3
SMALL = {"n": 480, "strengths": [1, 2], "methods": ["dice", "dice-no-length", "optune-1", "optune-half"],
         "only_equal_calls": True}  # fmt: skip
STRONGEST = (
    ("DICE: the length term keeps answers short", "words saved at equal KL", 0.0),
    ("OPTune: 1.27 to 1.56 times less work", "weighted tokens, times less", 1.0),
)
"""Claim, figure and what its mean over seeds is above in the small version too, or CI fails. `error_rate` says how
often SMALL_SEEDS such seeds would have a mean below that (normal approximation).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bake_off"))
    parser.add_argument("--n", type=int, default=960, help="label calls of a row")
    parser.add_argument("--seeds", type=int, help="5; of the small version 3")
    parser.add_argument("--methods", nargs="+", help="only these rows")
    parser.add_argument("--strengths", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only-equal-calls", action="store_true", help="leave the other two comparisons out")
    parser.add_argument("--small", action="store_true", help="what CI runs: the machinery and the strongest effects")
    parser.add_argument("--measure", action="store_true", help="only measure what a token costs (bake.figures.COSTS)")
    parser.add_argument("--processes", type=int, default=2, help="rows at once, of one thread each")
    parser.add_argument("--docs", type=Path, help="a Markdown page whose generated part is written, with its plot")
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    args.seeds = args.seeds or (SMALL_SEEDS if args.small else 5)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: they import torch
    args.out.mkdir(parents=True, exist_ok=True)
    if args.measure:
        from bake.rows import measure, prepare

        print(json.dumps(measure(prepare(args.out, 0))))
        return
    found = compare(args)
    for part in PARTS.values():
        for line in found[part.claims]:
            print(f"{part.said}: {line['claim']}: {line['figure']}: {line['difference']}: {line['verdict']}")
    (args.out / "bake_off.json").write_text(json.dumps(found, indent=1) + "\n")
    if args.docs:
        from bake.page import write_page

        write_page(args.docs, found, runs_of(found, PARTS["equal calls"]))
    last = {name: value for name, value in found.items() if name not in ("start", "sanity", "said")}
    for part in PARTS.values():
        del last[part.rows]
    if args.small:
        last["strongest"] = strongest(found["claims"])
    print(json.dumps(last))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    from bake.methods import METHODS

    names = args.methods or list(METHODS)
    seeds = list(range(args.seeds))
    with ProcessPoolExecutor(
        args.processes, mp_context=multiprocessing.get_context("spawn"), initializer=one_thread
    ) as pool:
        sanity = dict(zip(seeds, every(pool, sane, [(args.out, seed) for seed in seeds]), strict=True))
        rows = rows_of(args, pool, dict.fromkeys(names, args.n))
        cost_alike: list[dict[str, Any]] = []
        fairly_judged: list[dict[str, Any]] = []
        if not args.only_equal_calls:
            if LIKE in names:
                compared = [name for name in EQUAL_TOKENS if name in names]
                cost_alike = rows_of(args, pool, sizes_at_equal_tokens(rows, compared, args.n))
            sizes = {name: args.n for name in FAIR_JUDGE if name in names}
            fairly_judged = rows_of(args, pool, sizes, judge="fair")
    found: dict[str, Any] = {
        "kl": KL, "n": args.n, "seeds": args.seeds, "said": {name: METHODS[name].said for name in names},
        "sanity": {name: fmean(one[name] for one in sanity.values()) for name in sanity[0] if name != "start"},
        "start": {str(seed): one["start"] for seed, one in sanity.items()},
    }  # fmt: skip
    for part, its_rows in zip(PARTS.values(), (rows, cost_alike, fairly_judged), strict=True):
        found[part.rows] = its_rows
        runs = runs_of(found, part)
        found[part.methods] = {name: summary(one) for name, one in runs.items()}
        found[part.claims] = judged(runs)
    return found


def rows_of(
    args: argparse.Namespace, pool: ProcessPoolExecutor, sizes: dict[str, int], judge: str = "score"
) -> list[dict[str, Any]]:
    """The rows of methods with so many labels each of the judge, of all seeds and strengths."""
    from bake.methods import METHODS

    seeds = range(args.seeds)
    judged_by = sorted({n for name, n in sizes.items() if METHODS[name].needs == "reward-model"})
    every(pool, reward_model_of, [(args.out, seed, n) for n in judged_by for seed in seeds])
    jobs = [(args.out, name, seed, i, n, judge) for seed in seeds for name, n in sizes.items() for i in args.strengths]
    return every(pool, row_of, jobs)


def strongest(claims: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Whether the strongest effects are as in the whole comparison, and how often that fails."""
    found = {}
    for claim, figure, level in STRONGEST:
        values = next(one["by_seed"] for one in claims if (one["claim"], one["figure"]) == (claim, figure))
        one: dict[str, Any] = {"shows": bool(values) and fmean(values) > level, "seeds": len(values)}
        if len(values) > 1:
            of_the_mean = NormalDist(fmean(values), stdev(values) / SMALL_SEEDS**0.5)
            one["error_rate"] = round(of_the_mean.cdf(level), 4)
        found[f"{claim}: {figure}"] = one
    return found


def runs_of(found: dict[str, Any], part: Part) -> dict[str, Runs]:
    """The rows of a comparison by method, in the order of the table."""
    start = {int(seed): one for seed, one in found["start"].items()}
    by_method = {name: [row for row in found[part.rows] if row["method"] == name] for name in found["said"]}
    return {name: Runs.of(rows, start) for name, rows in by_method.items() if rows}


def sizes_at_equal_tokens(rows: Sequence[dict[str, Any]], names: Sequence[str], n: int) -> dict[str, int]:
    """Labels with which a row costs what LIKE costs, by its costs at the middle strength; whole batches."""
    from bake.methods import BATCH

    def mean(name: str) -> float:
        of_name = [row for row in rows if row["method"] == name]
        middle = sorted({row["strength"] for row in of_name})[
            min(MIDDLE, len({row["strength"] for row in of_name}) - 1)
        ]
        return fmean(cost(row) for row in of_name if row["strength"] == middle)

    low, high = (n * share for share in FARTHEST)
    unit = 6 * BATCH
    return {name: round(min(high, max(low, n * mean(LIKE) / mean(name))) / unit) * unit for name in names}


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


def reward_model_of(out: Path, seed: int, n: int) -> None:
    from bake.rows import prepare_reward_model

    prepare_reward_model(out, seed, n)


def row_of(out: Path, name: str, seed: int, strength: int, n: int, judge: str) -> dict[str, Any]:
    from bake.rows import Job, run_row

    return run_row(out, Job(name, seed, strength, n, judge))


if __name__ == "__main__":
    main()
