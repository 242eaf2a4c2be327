"""Known patterns in the figures of a run, in plain words, with the options that help.

A reading is a statement about figures that are in the report, never a guess at their cause; docs/report.md lists the
thresholds. Markdown and HTML show the same readings.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from prefloop.evaluate.reward_accuracy import wilson_interval
from prefloop.merge.distance import UNLIKELY
from prefloop.report.story import Round, Story

FINISHED = 0.7
"""A smaller share of finished answers is told."""
FOLLOWS_SLOT = 0.25
"""A share of pairs, lower end of its 95 % interval, above which a judge is said to follow the slot."""
ABSTAINS = 0.2
"""A larger share of abstentions is told."""
DRIFTED = 1.0
"""Nats a token, lower end of the 95 % interval of the KL divergence, above which a model has left its start."""
CARRIED = 0.1
"""A smaller effective share of weighted answers is told."""
USABLE = 0.5
"""A smaller share of prompts that became pairs is told."""
SATURATED = {"dpo": 3.0, "slic": 1.0}
"""Mean margin from which a loss has next to no gradient left: sigmoid(-3) = 0.047 for DPO, none at all for SLiC."""


@dataclass(frozen=True)
class Reading:
    """What shows, where (labels of models), and what may be done: (option, what it does there)."""

    where: tuple[str, ...]
    text: str
    remedies: tuple[tuple[str, str], ...] = ()


def read(story: Story) -> list[Reading]:
    """The patterns that a run shows, in a fixed order."""
    found = (_both_fall, _length_grows, _drifted, _saturated, _overfitted_judge, _follows_slot, _abstains, _unfinished,
             _few_pairs, _few_carry, _deaf, _coin, _extrapolated)  # fmt: skip
    return [reading for find in found for reading in find(story)]


def tail_mean(round: Round, name: str, share: float = 0.1) -> float | None:
    """Mean of a figure over the last tenth of the steps that have it, at least five of them or all there are.

    >>> tail_mean(Round("r", training=[{"step": i, "loss": float(i)} for i in range(1, 101)]), "loss")
    95.5
    """
    values = [row[name] for row in round.steps if name in row]
    return fmean(values[-max(5, math.ceil(share * len(values))) :]) if values else None


def judge_counts(story: Story) -> dict[str, int]:
    """What an annotator said over all online steps, or in all rounds: pairs, ties, abstentions, slots followed; only
    what was counted.
    """
    names = ("pairs", "decided", "identical", "unfinished", "tie", "abstained", "consistent", "first_slot",
             "second_slot")  # fmt: skip
    rows = [row for round in story.rounds for row in round.steps]
    rows += [entry.get("counts") or {} for name, entry in story.stages.items() if name.endswith("/strengths")]
    return {name: sum(row.get(name, 0) for row in rows) for name in names if any(name in row for row in rows)}


def slot_share(counts: dict[str, int]) -> tuple[float, float, float] | None:
    """Share of the questions decided in both orders that follow the slot, [value, low, high] at 95 %."""
    followed = counts.get("first_slot", 0) + counts.get("second_slot", 0)
    both = followed + counts.get("consistent", 0)
    return (followed / both, *wilson_interval(followed, both)) if both else None


def _both_fall(story: Story) -> Iterator[Reading]:
    held_out = [
        r.label for r in story.rounds if r.checkup and _falls(r.checkup.chosen_change, r.checkup.rejected_change)
    ]
    looked_at = any(r.checkup and r.checkup.chosen_change is not None for r in story.rounds)
    trained = [
        r.label
        for r in ([] if looked_at else story.rounds)
        if _falls(tail_mean(r, "chosen_change"), tail_mean(r, "rejected_change"))
    ]
    remedies = [("--train.steps", "fewer"), *_pull(story)]
    if story.recipe in ("oaif", "bpo"):
        remedies.append(("--loss ipo", "its margin has a target, beyond which nothing is pushed down"))
    if held_out or trained:
        yield Reading(
            tuple(held_out or trained),
            "chosen and rejected both became less likely, rejected more so. A preference loss trains their difference, "
            "so this is expected; it is a fault where the fall of chosen is large, or answers get worse.",
            tuple(remedies),
        )


def _pull(story: Story) -> list[tuple[str, str]]:
    """The remedy of a larger beta, where the loss has a reference to be pulled to."""
    loss = str(story.config.get("loss", "dpo"))
    if loss != "dpo":
        from prefloop.train.losses import parse_loss

        if not parse_loss(loss).referenced:
            return []
    return [("--beta", "higher: a stronger pull to the reference")]


def _falls(chosen: float | None, rejected: float | None) -> bool:
    return chosen is not None and rejected is not None and rejected < chosen < 0


def _length_grows(story: Story) -> Iterator[Reading]:
    measured = [(r.label, r.checkup.length_chars) for r in story.rounds if r.checkup and r.checkup.length_chars]
    grown = [(label, length) for label, length in measured[1:] if length[1] > measured[0][1][2]]
    if not grown:
        return
    label, length = grown[-1]
    by_recipe = {
        "dice": [("--alpha auto", "finds the length coefficient at which winners are as long as losers"),
                 ("--length-unit tokens", "measures length as the model pays for it")],
        "oaif": [("--feedback.instruction helpfulness-short", "asks a judge for the shorter of two that are close"),
                 *_pull(story)],
        "osp": [("--feedback.instruction helpfulness-short", "asks the judge for the shorter of two that are close"),
                *_pull(story)],
        "optune": [("--annotator", "one whose scores do not grow with length"),
                   *_pull(story)],
        "bpo": [("--feedback.instruction helpfulness-short", "asks a judge for the shorter of two that are close"),
                ("--phases", "fewer: the reference stays near the start for longer")],
        "sail": [("--mixture", "lower: more of the data's own pairs"),
                 *_pull(story)],
        "ppo": [("--annotator", "one whose scores do not grow with length"), *_pull(story)],
        "mpo": [("--annotator", "one whose scores do not grow with length"),
                ("--beta", "higher: a stronger pull to the DPO model")],
        "dpo": [("prefloop dice --alpha auto", "makes pairs whose winners are as long as their losers"),
                *_pull(story)],
    }  # fmt: skip
    yield Reading(
        tuple(label for label, _ in grown),
        f"answers grew, from {measured[0][1][0]:.0f} characters to {length[0]:.0f} ({label}), beyond both 95 % "
        "intervals. A win rate or reward that rises with them may be a taste for length.",
        tuple(by_recipe.get(story.recipe, [])),
    )


def _drifted(story: Story) -> Iterator[Reading]:
    looked = [(r.label, r.checkup.kl_per_token) for r in story.rounds if r.checkup]
    gone = [(label, kl) for label, kl in looked if kl and kl[1] > DRIFTED]
    if gone:
        label, kl = gone[-1]
        yield Reading(
            tuple(label for label, _ in gone),
            f"the model has left its start: each token of its own answers is on average {math.exp(kl[0]):.1f} times "
            f"likelier than under the start model ({label}). Read some answers: they may have lost their sense.",
            (("--alpha", "smaller"),)
            if story.recipe == "expo"
            else (
                ("--train.learning-rate", "lower"),
                ("--train.steps", "fewer"),
                *(_pull(story) if "beta" in story.config else []),
            ),
        )


def _saturated(story: Story) -> Iterator[Reading]:
    loss = str(story.config.get("loss", "dpo"))
    limit = SATURATED.get(loss)
    if limit is None:
        return
    means = [(r.label, tail_mean(r, "margin")) for r in story.rounds]
    labels = tuple(label for label, mean in means if mean is not None and mean >= limit)
    rewards, prefix = story.recipe == "reward-model", "easy." if story.recipe == "mpo" else ""
    by_epochs = story.config.get("train", {}).get("steps") == 0
    if labels:
        yield Reading(
            labels,
            f"margins are saturated: their mean over the last steps is {limit:g} or more, where the loss has next to "
            "no gradient left. Further steps mostly repeat what is learned.",
            (
                (f"--{prefix}train.{'epochs' if by_epochs else 'steps'}", "fewer"),
                *(
                    ()
                    if rewards
                    else (
                        ("prefloop oaif", "asks about the current model's own answers, which stay hard to tell apart"),
                    )
                ),
                (f"--{prefix}train.learning-rate", "lower, where this happened within a few steps"),
            ),
        )


def _overfitted_judge(story: Story) -> Iterator[Reading]:
    """The annotator that trains sees the model win, one that does not sees it lose."""
    annotator, evaluator = story.config.get("annotator"), story.config.get("evaluator")
    for r in story.rounds:
        if not r.evaluations:
            continue
        step, last = r.evaluations[-1]
        if evaluator in (None, "", annotator):
            yield Reading(
                (r.label,),
                f"the win rates are judged by the annotator that trains the model ({annotator}), which flatters it.",
                (("--evaluator", "another annotator than the one that trains"),),
            )
            continue
        trained, judged = last["against_start_by_the_annotator"]["rate"], last["against_start"]["rate"]
        if trained and judged and trained[1] > 0.5 > judged[2]:
            yield Reading(
                (f"{r.label}, step {step}",),
                f"the annotator that trains sees the model win ({trained[0]:.2f}), the evaluator sees it lose "
                f"({judged[0]:.2f}): the model learned the annotator's taste, not what both value.",
                (
                    ("--annotator A+B", "votes of several annotators are harder to please for the wrong reason"),
                    *_pull(story),
                    ("--train.steps", "fewer; the chart of win rates shows where they part"),
                ),
            )


def _follows_slot(story: Story) -> Iterator[Reading]:
    share = slot_share(judge_counts(story))
    if share and share[1] > FOLLOWS_SLOT:
        yield Reading(
            (str(story.config.get("annotator", "")),),
            f"the judge follows the slot: in {100 * share[0]:.0f} % of the questions [{100 * share[1]:.0f}, "
            f"{100 * share[2]:.0f}] it preferred the same place after the two answers had changed places. Both orders "
            "are averaged, so its labels are weak rather than biased.",
            (
                ("prefloop judge check", "measures this against known pairs before a run"),
                ("--feedback.labels soft", "gives the loss the judge's probability instead of its choice"),
                ("--annotator", "a stronger judge, or several joined by +"),
            ),
        )


def _abstains(story: Story) -> Iterator[Reading]:
    counts = judge_counts(story)
    asked = sum(counts.get(name, 0) for name in ("pairs", "decided", "tie", "abstained"))
    if asked and counts.get("abstained", 0) / asked > ABSTAINS:
        yield Reading(
            (str(story.config.get("annotator", "")),),
            f"the annotator gave no answer to {counts['abstained']} of {asked} questions; these became no pairs.",
            (
                ("prefloop judge check", "counts abstentions by reason"),
                ("--feedback.instruction", "another instruction, or one of your own"),
                ("--annotator", "another judge"),
            ),
        )


def _unfinished(story: Story) -> Iterator[Reading]:
    looked = [(r.label, r.checkup.finished) for r in story.rounds if r.checkup and r.checkup.finished is not None]
    labels = tuple(label for label, finished in looked if finished < FINISHED)
    if labels:
        remedies = [("--sampling.max-new-tokens", "higher")]
        if story.recipe in ("oaif", "bpo"):
            remedies.append(("--on-unfinished penalise", "a cut answer loses to a finished one"))
        if story.recipe in ("ppo", "mpo"):
            remedies.append(("--ppo.missing-eos-penalty", "higher: a cut answer costs reward"))
        yield Reading(
            labels,
            f"over {100 * (1 - FINISHED):.0f} % of the answers hit the limit of new tokens. In DICE unfinished answers "
            "never become pairs; elsewhere the model is judged by half answers.",
            tuple(remedies),
        )


def _few_pairs(story: Story) -> Iterator[Reading]:
    few: list[tuple[str, int, int]] = []
    for r in story.rounds:
        counts: dict[str, int] = story.stages.get(f"{r.label}/valid", {}).get("counts", {})
        kept = counts.get("prompts kept", 0)
        drawn = kept + sum(n for reason, n in counts.items() if reason.startswith("prompts dropped"))
        if drawn and kept / drawn < USABLE:
            few.append((r.label, kept, drawn))
    if few:
        said = ", ".join(f"{kept} of {drawn} in {label}" for label, kept, drawn in few)
        yield Reading(
            tuple(label for label, _, _ in few),
            f"less than half of the prompts had enough valid answers to become pairs ({said}).",
            (
                ("--sampling.max-new-tokens", "higher, where most are dropped as unfinished"),
                ("--k", "more answers a prompt"),
                ("--filters.min-valid", "lower: fewer valid answers are enough"),
            ),
        )


def _few_carry(story: Story) -> Iterator[Reading]:
    shares = [(r.label, r.figures["effective share"]) for r in story.rounds if "effective share" in r.figures]
    few = [(label, share) for label, share in shares if share < CARRIED]
    if few:
        yield Reading(
            tuple(label for label, _ in few),
            f"few answers carry the weight: the effective sample size is {100 * few[-1][1]:.0f} % of the answers. The "
            "model learns those few by heart.",
            (("--temperature", "higher: weights that differ less"), ("--clip", "lower: a smaller largest weight")),
        )


def _deaf(story: Story) -> Iterator[Reading]:
    """A conditional model whose answers do not follow the reward that it is asked for."""
    for r in story.rounds:
        known = [(row.target, row.reward) for row in r.asked if row.reward]
        if len(known) < 2:
            continue
        (low, lowest), (high, highest) = known[0], known[-1]
        if highest[1] <= lowest[2]:
            yield Reading(
                (r.label,),
                f"the model hardly listens to the reward that it is asked for: asked for {low:g} its answers have "
                f"{lowest[0]:.2f}, asked for {high:g} {highest[0]:.2f} standard deviations, and the 95 % intervals "
                "overlap.",
                (
                    ("--train.steps", "more: the condition is learned late"),
                    ("--look-at.answers", "more answers narrow the intervals"),
                    ("--condition.target", "within the rewards of the data"),
                ),
            )


def _coin(story: Story) -> Iterator[Reading]:
    looked = [(r.label, r.checkup.accuracy) for r in story.rounds if r.checkup and r.label != "start"]
    labels = tuple(label for label, accuracy in looked if accuracy and accuracy[1] <= 0.5 <= accuracy[2])
    if labels:
        yield Reading(
            labels,
            "the interval of the held-out accuracy contains 1/2, so with these held-out pairs the implicit reward "
            "cannot be told from a coin.",
            (("--held-out", "more pairs narrow the interval"), ("--train.steps", "more")),
        )


def _extrapolated(story: Story) -> Iterator[Reading]:
    """ExPO: what the search over alpha, and the distance of the two models, say."""
    if story.distance and story.distance.relative > UNLIKELY:
        yield Reading(
            ("aligned",),
            f"the aligned model is {story.distance.relative:.2g} of the base's norm away from it, which is far for an "
            "alignment: the base may not be the model that it was trained from.",
            (("BASE", "the very checkpoint that the alignment started from"),),
        )
    at = {one.alpha: one for one in story.tried}
    if not at:
        return
    base, annotated = at.get(-1.0), bool(story.config.get("annotator"))
    if base and base.rate and annotated and base.rate[1] > 0.5:
        yield Reading(
            ("alpha = -1",),
            f"the annotator prefers the base to the aligned model ({base.rate[0]:.2f}): what was learned in between is "
            "not what it likes, and more of it will not please it.",
            (("--annotator", "one that wants what the alignment was for"),),
        )
    if story.alpha == 0:
        yield Reading(
            ("expo",),
            "nothing that the guard let pass was judged better than the aligned model, so the model of this run is the "
            "aligned model.",
            (("--search.limit", "more prompts tell smaller differences"), ("--guard", "see its limits in --help")),
        )
        return
    if story.alpha == max(one.alpha for one in story.tried):
        yield Reading(
            ("expo",),
            f"the largest alpha that was tried ({story.alpha:g}) is the best, so a larger one may be better.",
            (("--search.largest", "larger"),),
        )
    held_out = next((r.candidate for r in story.rounds[::-1] if r.candidate), None)
    if held_out and annotated and held_out.rate and held_out.rate[1] <= 0.5 <= held_out.rate[2]:
        yield Reading(
            ("expo",),
            "on held-out prompts the interval of the win rate over the aligned model contains 1/2: that the "
            "extrapolation is better cannot be told with these prompts.",
            (("--held-out", "more prompts"), ("--look-at.answers", "more of them"), ("--search.limit", "higher")),
        )


def markdown(readings: Sequence[Reading]) -> str:
    """The section of report.md; empty without readings."""
    lines = [f"- {', '.join(reading.where)}: {reading.text}{_remedies(reading)}" for reading in readings]
    return "\n".join(["## What it means", "", *lines]) if lines else ""


def _remedies(reading: Reading) -> str:
    said = "; ".join(f"`{option}` ({what})" for option, what in reading.remedies)
    return f" Remedies: {said}." if said else ""
