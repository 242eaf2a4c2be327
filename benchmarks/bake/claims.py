"""What the papers claim, each as a paired difference over seeds: between two methods, at equal label calls."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bake.figures import Runs, paired
from intervals import interval

Figure = Callable[[Runs, int], "float | None"]


def reward(runs: Runs, seed: int) -> float | None:
    """True reward at the KL divergence of comparison."""
    return runs.at_kl(seed)


def best(runs: Runs, seed: int) -> float | None:
    """The best true reward at any strength."""
    return runs.best(seed)


def shorter(runs: Runs, seed: int) -> float | None:
    """Minus the words of an answer at that KL divergence."""
    words = runs.at_kl(seed, "words")
    return None if words is None else -words


def at_middle(runs: Runs, seed: int) -> float | None:
    """True reward at the middle strength, whatever the KL divergence."""
    return runs.middle(seed, "reward")


FIGURES: dict[str, tuple[Figure, str]] = {
    "reward": (reward, "true reward at equal KL"),
    "best": (best, "best true reward of the strengths"),
    "middle": (at_middle, "true reward at the middle rate"),
    "shorter": (shorter, "words saved at equal KL"),
}


@dataclass(frozen=True)
class Claim:
    """`ours` is said to be better than `theirs` by the figures named, or no worse than by `margin`."""

    said: str
    ours: str
    theirs: str
    figures: tuple[str, ...] = ("reward", "best")
    margin: float = 0.0


CLAIMS = (
    Claim("OAIF: online beats offline (DPO)", "oaif-dpo", "dpo"),
    Claim("OAIF: online beats offline (IPO)", "oaif-ipo", "ipo"),
    Claim("OAIF: online beats offline (SLiC)", "oaif-slic", "slic"),
    Claim("OAIF: online DPO beats RLHF", "oaif-dpo", "ppo"),
    Claim("our own: online DPO over PPO on the same annotator's scores", "oaif-dpo", "ppo-scored"),
    Claim("DICE: bootstrapping goes beyond its DPO model", "dice", "dpo"),
    Claim("DICE: the length term keeps answers short", "dice", "dice-no-length", ("shorter", "reward", "best")),
    Claim("DICE: replay protects", "dice", "dice-no-replay"),
    Claim("BPO: the behaviour model as reference helps, F = 2", "bpo-2", "iterative-2"),
    Claim("BPO: the behaviour model as reference helps, F = 5", "bpo-5", "iterative-5"),
    Claim("BPO: a second phase helps: F = 2 over F = 1", "bpo-2", "bpo-1"),
    Claim("BPO: and suffices: F = 2 no worse than every step", "bpo-2", "bpo-all", margin=0.1),
    Claim("BPO: five members over one", "bpo-2-lora-5", "bpo-2-lora"),
    Claim("OPTune: half of the answers give the same reward", "optune-half", "optune-1", margin=0.1),
    Claim("OSP: soft labels withstand label noise", "osp", "osp-hard"),
    Claim("ExPO: extrapolation lifts a part-trained model", "expo-part", "dpo-part", ("middle", "reward", "best")),
    Claim("ExPO: and a trained one", "expo", "dpo"),
    Claim("our own: scores of single answers over comparisons (FA, OAIF)", "fa", "oaif-dpo"),
    Claim("MPO: over DPO alone", "mpo", "dpo"),
    Claim("MPO: over PPO alone", "mpo", "ppo"),
    Claim("CA over FA", "ca", "fa"),
    Claim("CA over RWR", "ca", "rwr"),
    Claim("CA over FA, four passes each", "ca-4", "fa-4"),
    Claim("SAIL (DP) over DPO", "sail-dp", "dpo"),
    Claim("SAIL (PP) over DPO", "sail-pp", "dpo"),
    Claim("SAIL (PR) over plain online DPO", "sail-pr", "oaif-dpo"),
)


def verdict(found: list[float] | None, margin: float = 0.0) -> str:
    """Of the interval of a difference that is said to be above 0, or above -margin.

    >>> [verdict([mean, mean - 1, mean + 1]) for mean in (2, 0, -2)], verdict([0, -1, 1], margin=2), verdict(None)
    (['shows', 'does not show', 'the other way'], 'shows', 'cannot be told')
    """
    if found is None:
        return "cannot be told"
    _, low, high = found
    return "shows" if low > -margin else "the other way" if high < -margin else "does not show"


def judged(methods: Mapping[str, Runs], *, costs: bool = True) -> list[dict[str, Any]]:
    """Every claim whose methods are there, one line a figure. costs: also what is said of costs, where these are not
    what was made equal.
    """
    lines: list[dict[str, Any]] = []
    for claim in CLAIMS:
        if claim.ours not in methods or claim.theirs not in methods:
            continue
        ours, theirs = methods[claim.ours], methods[claim.theirs]
        for name in claim.figures:
            figure, said = FIGURES[name]
            values = paired([figure(ours, seed) for seed in ours.rows], [figure(theirs, seed) for seed in ours.rows])
            found = interval(values) if len(values) > 1 else None
            lines.append(
                {"claim": claim.said, "ours": claim.ours, "theirs": claim.theirs,
                 "figure": said + (f", no worse than by {claim.margin:g}" if claim.margin else ""), "difference": found,
                 "seeds": len(values), "by_seed": [round(value, 4) for value in values],
                 "verdict": verdict(found, claim.margin)}
            )  # fmt: skip
    if costs and {"optune-1", "optune-half"} <= methods.keys():
        lines.append(saving(methods["optune-1"], methods["optune-half"]))
    return lines


PUBLISHED = (1.27, 1.56)
"""OPTune's speed-ups."""


def saving(full: Runs, half: Runs) -> dict[str, Any]:
    """How many times less the run with half of the answers new costs, beside what was published."""
    ratios = [full.middle(seed, "cost") / half.middle(seed, "cost") for seed in full.rows]
    found = interval(ratios) if len(ratios) > 1 else None
    return {"claim": "OPTune: 1.27 to 1.56 times less work", "ours": "optune-half", "theirs": "optune-1",
            "figure": "weighted tokens, times less", "difference": found, "seeds": len(ratios),
            "by_seed": [round(ratio, 4) for ratio in ratios],
            "verdict": beside_published(found)}  # fmt: skip


def beside_published(found: list[float] | None) -> str:
    """Of the interval of a speed-up.

    >>> [beside_published([mean, mean - 0.1, mean + 0.1]) for mean in (0.8, 1.1, 1.3, 2.0)]
    ['the other way', 'less than published', 'shows', 'more than published']
    """
    if found is None:
        return "cannot be told"
    _, low, high = found
    if high < 1.0:
        return "the other way"
    return "less than published" if high < PUBLISHED[0] else "more than published" if low > PUBLISHED[1] else "shows"
