"""Models that are chosen among by their answers: what each scored, and a guard against scores not worth having.

A score can be gained by length, or by text that is no longer language. So every candidate's answers are held against
those of the model it was made from, to the same prompts with the same seeds.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from prefloop.config import Config
from prefloop.evaluate.drift import Interval, answer_figures, ratio
from prefloop.evaluate.reward_accuracy import mean_interval
from prefloop.evaluate.win_rate import WinRate, win_rate
from prefloop.feedback.annotator import Judgement
from prefloop.records import Group, Record, Response


class Guard(Config):
    """What the answers of a candidate may lose, against those of the aligned model, before it is refused."""

    length_ratio: float = Field(default=2.0, gt=1, description="mean tokens: at most so many times as many, or as few")
    finished_drop: float = Field(
        default=0.2, ge=0, le=1, description="share of finished answers: at most so much lower"
    )
    repetition_rise: float = Field(
        default=0.1, ge=0, le=1, description="share of repeated runs of four words: at most so much higher"
    )
    distinct_ratio: float = Field(
        default=0.5, ge=0, le=1, description="share of different pairs of words: at least so much of it"
    )
    perplexity_ratio: float = Field(
        default=2.0, ge=1, description="perplexity of the answers under the aligned model: at most so many times"
    )


class Candidate(Record):
    """One alpha and its answers; intervals are [value, low, high] at 95 %. Without answers there are no figures.

    preferred: how often an annotator prefers its answers to those of the aligned model (alpha = 0).
    score: the mean of a scorer. perplexity: of its answers under the aligned model, exp(-log pi_1 / tokens).
    length_tokens, finished, repetition, distinct_1, distinct_2: as in `Drift`.
    refused: why it is not to be chosen, whatever it scored.
    """

    alpha: float
    answers: int
    preferred: WinRate | None = None
    score: Interval | None = None
    scored: int | None = None
    length_tokens: Interval | None = None
    length_chars: Interval | None = None
    finished: float | None = None
    repetition: Interval | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    perplexity: Interval | None = None
    refused: str | None = None

    @property
    def rate(self) -> Interval | None:
        """What it is chosen by: the win rate, or the mean score."""
        return self.preferred.rate if self.preferred else self.score

    @property
    def judged(self) -> int:
        """How many answers were judged."""
        return self.preferred.judged if self.preferred else self.scored or 0


def candidate(
    alpha: float,
    answers: Sequence[Group],
    logps: Sequence[Sequence[float]],
    verdicts: Sequence[Judgement] | Sequence[Group],
) -> Candidate:
    """The figures of one alpha. `logps`: of every answer under the aligned model, summed, in nats.

    `verdicts`: judgements of (its answer, the aligned model's), or its answers with scores.
    """
    responses = [response for group in answers for response in group.responses]
    tokens = np.array([response.length_tokens for response in responses], dtype=float)
    nll = ratio(-np.array([value for row in logps for value in row]), tokens)
    return Candidate(
        alpha=alpha,
        answers=len(responses),
        length_chars=mean_interval([response.length_chars for response in responses]),
        perplexity=(math.exp(nll[0]), math.exp(nll[1]), math.exp(nll[2])),
        **answer_figures(responses),
        **verdict(verdicts),
    )


def verdict(verdicts: Sequence[Judgement] | Sequence[Group]) -> dict[str, Any]:
    judgements = [one for one in verdicts if isinstance(one, Judgement)]
    if judgements:
        return {"preferred": win_rate(judgements)}
    responses: list[Response] = [r for group in verdicts if isinstance(group, Group) for r in group.responses]
    scores = [response.score for response in responses if response.score is not None]
    return {"score": mean_interval(scores) if scores else None, "scored": len(scores)}


def refusal(one: Candidate, aligned: Candidate, guard: Guard) -> str | None:
    """Why `one` is not to be chosen, beside the aligned model's own figures; None when the guard lets it pass."""
    if not one.answers:
        return one.refused
    if 2 * one.judged < one.answers:
        return f"only {one.judged} of {one.answers} answers were judged"
    assert one.length_tokens and one.repetition and one.perplexity and one.finished is not None
    assert aligned.length_tokens and aligned.repetition and aligned.perplexity and aligned.finished is not None
    assert one.distinct_2 is not None and aligned.distinct_2 is not None
    longer = one.length_tokens[0] / aligned.length_tokens[0]
    stranger = one.perplexity[0] / aligned.perplexity[0]
    if not 1 / guard.length_ratio <= longer <= guard.length_ratio:
        return f"answers are {longer:.2f} times as long"
    if aligned.finished - one.finished > guard.finished_drop:
        return f"{one.finished:.2f} of the answers finish, {aligned.finished:.2f} at alpha = 0"
    if one.repetition[0] - aligned.repetition[0] > guard.repetition_rise:
        return f"{one.repetition[0]:.2f} of runs of four words are repeated, {aligned.repetition[0]:.2f} at alpha = 0"
    if one.distinct_2 < guard.distinct_ratio * aligned.distinct_2:
        return f"{one.distinct_2:.2f} of pairs of words are different, {aligned.distinct_2:.2f} at alpha = 0"
    if stranger > guard.perplexity_ratio:
        return f"perplexity under the aligned model is {stranger:.2f} times as high"
    return None
