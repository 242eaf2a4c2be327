"""The implicit reward of a policy and its reference on pairs whose preference is known.

    margin = beta ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected))        in reward units

accuracy: share of margins above 0. calibration: the model says sigmoid(|margin|) that its choice is right; is it right
as often (expected calibration error over BINS bins, Naeini et al. 2015; Brier score)?

RewardBench (Lambert et al. 2024, arXiv 2403.13787) sorts its subsets into four sections. A section's score is the share
of its pairs that are ranked right, except that in Reasoning mathematics and code count alike; the score of the model is
the mean of the sections.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefloop.evaluate.reward_accuracy import accuracy, mean_interval
from prefloop.models import ModelRef, check_different
from prefloop.records import Pair, Record
from prefloop.run import Stage
from prefloop.train.config import Compute

Floats = NDArray[np.float64]
Interval = tuple[float, float, float]
BINS = 10
CODE = tuple(f"hep-{language}" for language in ("cpp", "go", "java", "js", "python", "rust"))
SECTIONS: dict[str, tuple[str, ...]] = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        *(f"llmbar-adver-{kind}" for kind in ("neighbor", "GPTInst", "GPTOut", "manual")),
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", *CODE),
}
"""Section -> its subsets."""


class Ranking(Record):
    """Of some pairs: accuracy (ties 1/2) and mean margin, each [value, low, high] at 95 %."""

    pairs: int
    accuracy: Interval
    margin: Interval


class ImplicitPairs(Record):
    """All about some pairs.

    calibration_error and brier: see the module. chosen_change and rejected_change: mean change of the log-probability a
    token under the policy since the reference, in nats, [value, low, high] at 95 %. rewardbench: section -> score, and
    `average`; where the pairs have RewardBench's subsets.
    """

    beta: float
    overall: Ranking
    categories: dict[str, Ranking]
    calibration_error: float
    brier: float
    chosen_change: Interval
    rejected_change: Interval
    rewardbench: dict[str, float] | None = None


def implicit_pairs(
    pairs: Sequence[Pair], policy: ModelRef, reference: ModelRef, *, beta: float, compute: Compute, stage: Stage
) -> ImplicitPairs:
    """Stage: both models over the pairs, one at a time in memory. Raises InputError when they are the same."""
    from prefloop.train.reference import logps_under

    check_different(policy, reference)
    items = [(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
    ours = np.array(logps_under(policy, items, compute=compute, part="policy", stage=stage))
    theirs = np.array(logps_under(reference, items, compute=compute, part="reference", stage=stage))
    return figures(pairs, ours - theirs, beta=beta)


def figures(pairs: Sequence[Pair], change: Floats, *, beta: float) -> ImplicitPairs:
    """From the change [pairs, 2] of the summed log-probability of chosen and rejected, in nats."""
    margins = beta * (change[:, 0] - change[:, 1])
    tokens = np.array([[pair.chosen.length_tokens, pair.rejected.length_tokens] for pair in pairs])
    categories = by_category(pairs, margins)
    per_token = change / tokens
    return ImplicitPairs(
        beta=beta,
        overall=ranking(margins),
        categories=categories if set(categories) != {"none"} else {},
        calibration_error=calibration_error(margins),
        brier=brier_score(margins),
        chosen_change=mean_interval(per_token[:, 0].tolist()),
        rejected_change=mean_interval(per_token[:, 1].tolist()),
        rewardbench=sections(categories),
    )


def ranking(margins: Floats) -> Ranking:
    return Ranking(pairs=len(margins), accuracy=accuracy(margins.tolist()), margin=mean_interval(margins.tolist()))


def by_category(pairs: Sequence[Pair], margins: Floats) -> dict[str, Ranking]:
    """Category of the prompt -> its ranking, the largest first; prompts without one are "none"."""
    rows: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        rows.setdefault(pair.prompt.category or "none", []).append(i)
    ordered = sorted(rows.items(), key=lambda item: -len(item[1]))
    return {name: ranking(margins[part]) for name, part in ordered}


def brier_score(margins: Floats) -> float:
    """Mean of (1 - sigmoid(margin))^2: the squared error of P(chosen is preferred). 1/4 where all margins are 0."""
    right = 1 / (1 + np.exp(-np.clip(margins, -500, 500)))
    return float(np.mean((1 - right) ** 2))


def calibration_error(margins: Floats) -> float:
    """Mean over pairs of |share right - confidence| of their bin; bins of equal width over confidences 1/2 to 1."""
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins == 0, 0.5, margins > 0)
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(np.sum(right[bins == b] - confidence[bins == b])) for b in range(BINS)]
    return float(np.sum(gaps) / len(margins))


def sections(categories: dict[str, Ranking]) -> dict[str, float] | None:
    """Scores of RewardBench's sections that have pairs, and their mean; None unless all categories are its subsets."""
    if not categories or not set(categories) <= {subset for subsets in SECTIONS.values() for subset in subsets}:
        return None

    def share(subsets: Sequence[str]) -> float | None:
        there = [categories[subset] for subset in subsets if subset in categories]
        total = sum(part.pairs for part in there)
        return sum(part.accuracy[0] * part.pairs for part in there) / total if total else None

    parts = {name: [share(subsets)] for name, subsets in SECTIONS.items()}
    parts["Reasoning"] = [share(("math-prm",)), share(CODE)]
    scores = {
        name: float(np.mean([score for score in found if score is not None]))
        for name, found in parts.items()
        if any(score is not None for score in found)
    }
    return {**scores, "average": float(np.mean(list(scores.values())))}
