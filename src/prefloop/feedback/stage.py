"""Comparisons to pairs: what an annotator prefers becomes `chosen`. What it does not judge never becomes a label."""

from collections.abc import Sequence
from typing import Literal

from prefloop.errors import InputError
from prefloop.feedback.annotator import Annotator, Comparison, Judgement
from prefloop.feedback.votes import Votes
from prefloop.records import Group, Pair
from prefloop.run import Stage

Labels = Literal["hard", "soft"]


def annotate(
    questions: Sequence[Group | Comparison],
    annotator: Annotator,
    *,
    labels: Labels = "hard",
    stage: Stage | None = None,
) -> list[Pair]:
    """A pair for every question that the annotator decides: two answers to a prompt, as a group of two or a comparison.

    Two identical answers are never asked about. They, ties and abstentions make no pair; each is counted by its reason.
    Responses go into the pairs as they are. Raises InputError for a group of other than two.
    """
    stage = stage or Stage.detached()
    comparisons = [comparison_of(question) for question in questions]
    different = [comparison for comparison in comparisons if not comparison.identical]
    _count(stage, "questions dropped: identical answers", len(comparisons) - len(different))
    return label(different, ask(different, annotator, stage=stage), labels=labels, stage=stage)


def comparison_of(question: Group | Comparison) -> Comparison:
    """The comparison of a group's two responses. Raises InputError for a group of other than two."""
    if isinstance(question, Comparison):
        return question
    if len(question.responses) != 2:
        raise InputError(
            f"prompt {question.prompt.id!r} has {len(question.responses)} responses; an annotator compares two (k = 2)"
        )
    return Comparison(question.prompt, *question.responses)


def ask(comparisons: Sequence[Comparison], annotator: Annotator, *, stage: Stage | None = None) -> list[Judgement]:
    """The judgements of an annotator, with progress, and how far the members of a vote agree."""
    stage = stage or Stage.detached()
    with stage.progress(len(comparisons), unit="comparisons", description=f"judged by {annotator.name}") as advance:
        judgements = annotator.judge(comparisons, advance=advance)
    if isinstance(annotator, Votes):
        for agreement in annotator.agreements:
            stage.event("agreement", said=agreement.describe(), share=agreement.share, kappa=agreement.kappa)
    return judgements


def label(
    comparisons: Sequence[Comparison],
    judgements: Sequence[Judgement],
    *,
    labels: Labels = "hard",
    stage: Stage | None = None,
) -> list[Pair]:
    """Pairs of judged comparisons, the likelier response chosen; ties and abstentions are counted and leave.

    "hard" labels have p = 1 (OAIF), "soft" ones P(chosen is preferred), which is over 1/2.
    """
    stage = stage or Stage.detached()
    pairs: list[Pair] = []
    for (prompt, a, b), judgement in zip(comparisons, judgements, strict=True):
        if judgement.p is None:
            stage.count(f"questions dropped: abstained, {judgement.reason}")
        elif judgement.p == 0.5:
            stage.count("questions dropped: tie")
        else:
            chosen, rejected = (a, b) if judgement.p > 0.5 else (b, a)
            p = 1.0 if labels == "hard" else max(judgement.p, 1.0 - judgement.p)
            pairs.append(Pair(prompt=prompt, chosen=chosen, rejected=rejected, source="generated", p=p))
    stage.count("pairs made", len(pairs))
    return pairs


def _count(stage: Stage, reason: str, n: int) -> None:
    if n:
        stage.count(reason, n)
