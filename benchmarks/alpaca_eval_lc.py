"""Length-controlled win rates without the published difficulties, against the published ones of AlpacaEval 2.

    python benchmarks/alpaca_eval_lc.py --data FOLDER

FOLDER holds `annotations.csv.gz` (model, instruction, p_model_preferred, chars_baseline, chars_model: the judgements of
every model against one baseline, in the order of the judged file) and `leaderboard.csv` (model, win_rate,
length_controlled_win_rate, in percent: what was published). `published_coefficients.csv` is not read.

**What is shared, and from whom.** A model's length-controlled rate needs the difficulties of the instructions and the
mean of phi (`prefloop.evaluate.length_control.Shared`). Both are learned from the judgements and lengths of *other*
models only: the models, by name, are cut into FOLDS runs of neighbours (variants of one model mostly fall into the same
run), and those of one run are scored with what the models of the other runs share. No published length-controlled rate
and no published coefficient enters a fit. The spreads of the priors are constants of that module; docs/log.md says what
other values give.

**Difficulties by row.** The published program takes the difficulty of an annotation by its row in the model's file. In
a file where an instruction was not judged, every later row so gets the difficulty of another instruction. This concerns
the models that `incomplete` names: their published rates were made with difficulties that belong elsewhere. The
headline does the same look-up, because it asks whether the published procedure is reproduced; `aligned_...` gives every
instruction its own difficulty, as `learn_shared` means it. All other models have the same rate in both.

Prints a table and, last, one line of JSON: differences in points (percent), Spearman's rank correlation of all models,
and how far the variants of a model are apart, in points and in logits.
"""

import argparse
import csv
import gzip
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from prefloop.errors import InputError
from prefloop.evaluate.length_control import Floats, Shared, fit, learn_shared, length_term

FOLDS = 7
VARIANTS = ("_concise", "_verbose")
"""Endings of the names of models that were told to be brief or to be detailed."""


class Data(NamedTuple):
    """M models by name, N instructions in the order of the file; `p`, `ours`, `theirs` are [M, N], NaN: not judged."""

    models: list[str]
    p: Floats
    ours: Floats
    theirs: Floats
    published: dict[str, tuple[float, float]]

    @property
    def complete(self) -> list[bool]:
        return [not np.isnan(row).any() for row in self.p]

    def is_baseline(self, m: int) -> bool:
        """Whether a model is the baseline itself, which wins half of the time by definition."""
        judged = ~np.isnan(self.p[m])
        return bool(np.all(self.p[m][judged] == 0.5) and np.all(self.ours[m][judged] == self.theirs[m][judged]))


def read(folder: Path) -> Data:
    """Raises InputError when a file is missing, or when no model was judged on all instructions."""
    files = {name: folder / name for name in ("annotations.csv.gz", "leaderboard.csv")}
    for file in files.values():
        if not file.is_file():
            raise InputError(f"{file}: no such file; --data must hold {' and '.join(files)}")
    with gzip.open(files["annotations.csv.gz"], "rt", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    with files["leaderboard.csv"].open(encoding="utf-8") as handle:
        published = {
            row["model"]: (float(row["win_rate"]), float(row["length_controlled_win_rate"]))
            for row in csv.DictReader(handle)
        }
    orders: dict[str, list[str]] = {}
    for row in rows:
        orders.setdefault(row["model"], []).append(row["instruction"])
    place = {instruction: i for i, instruction in enumerate(max(orders.values(), key=len))}
    if len(place) < len({row["instruction"] for row in rows}):
        raise InputError(f"{folder}: no model was judged on all instructions, so their order is not known")
    models = sorted(orders)
    tables = np.full((3, len(models), len(place)), np.nan)
    for row in rows:
        values = [float(row[name]) for name in ("p_model_preferred", "chars_model", "chars_baseline")]
        tables[:, models.index(row["model"]), place[row["instruction"]]] = values
    return Data(models, *tables, published)


def by_row(difficulty: Floats, judged: np.ndarray) -> Floats:
    """[J] the difficulties of the first J instructions, whichever were judged: the published look-up."""
    return difficulty[: judged.sum()]


def controlled(data: Data, m: int, shared: Shared, *, aligned: bool) -> float:
    """The length-controlled win rate of a model in percent, with difficulties of its instructions or by row."""
    judged = ~np.isnan(data.p[m])
    length = length_term(data.ours[m][judged], data.theirs[m][judged])
    difficulty = shared.difficulty[judged] if aligned else by_row(shared.difficulty, judged)
    return 100 * fit(data.p[m][judged], length, shared=shared._replace(difficulty=difficulty)).rate(difficulty)


def leave_models_out(data: Data, *, aligned: bool) -> Floats:
    """[M] length-controlled win rates, each with what the models of the other runs share."""
    rates = np.full(len(data.models), 50.0)
    others = [m for m in range(len(data.models)) if not data.is_baseline(m)]
    terms = np.zeros_like(data.p)
    for m in others:
        judged = ~np.isnan(data.p[m])
        terms[m][judged] = length_term(data.ours[m][judged], data.theirs[m][judged])
    for scored in np.array_split(others, FOLDS):
        rest = [m for m in others if m not in scored]
        shared = learn_shared(data.p[rest], terms[rest])
        for m in scored:
            rates[m] = controlled(data, m, shared, aligned=aligned)
    return rates


def apart(one: float, other: float) -> tuple[float, float]:
    """Distance of two win rates in points and in logits."""
    logits = np.log([one / (100 - one), other / (100 - other)])
    return round(float(abs(one - other)), 2), round(float(abs(logits[0] - logits[1])), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with annotations.csv.gz and leaderboard.csv")
    data = read(parser.parse_args().data)
    raw = 100 * np.nanmean(data.p, axis=1)
    as_published, aligned = (leave_models_out(data, aligned=choice) for choice in (False, True))
    raw_published, published = np.array([data.published[model] for model in data.models]).T

    print(f"{'model':32} {'raw':>6} {'LC':>6} {'aligned':>8} {'published':>10}   difference")
    for m, model in enumerate(data.models):
        difference = as_published[m] - published[m]
        row = f"{raw[m]:6.2f} {as_published[m]:6.2f} {aligned[m]:8.2f} {published[m]:10.2f}   {difference:+6.2f}"
        print(f"{model:32} {row}{'' if data.complete[m] else '   not judged on every instruction'}")
    variants = {}
    for m, model in enumerate(data.models):
        plain = next((model.removesuffix(end) for end in VARIANTS if model.endswith(end)), None)
        if plain in data.models:
            pair = [m, data.models.index(plain)]
            variants[model] = {"raw": apart(*raw[pair]), "lc": apart(*as_published[pair])}
            points, logits = zip(*variants[model].values(), strict=True)
            print(f"{model} and {plain}: raw and controlled {points} points, {logits} logits apart")
    result = {
        "raw_max_abs_difference": np.abs(raw - raw_published).max(),
        "lc_mean_abs_difference": np.abs(as_published - published).mean(),
        "lc_spearman": spearmanr(as_published, published).statistic,
        "aligned_mean_abs_difference": np.abs(aligned - published).mean(),
        "aligned_spearman": spearmanr(aligned, published).statistic,
        "raw_mean_abs_difference": np.abs(raw - published).mean(),
        "raw_spearman": spearmanr(raw, published).statistic,
    }
    shown = {name: round(float(value), 6) for name, value in result.items()}
    incomplete = [model for model, complete in zip(data.models, data.complete, strict=True) if not complete]
    print(json.dumps({**shown, "models": len(data.models), "incomplete": incomplete, "variants": variants}))


if __name__ == "__main__":
    main()
