"""Scored groups to pairs: `best_vs_worst(debias_length(scored, coefficient))`."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from prefloop.errors import CheckFailed
from prefloop.pairs.length import LengthCoefficient
from prefloop.pairs.tables import best_and_worst, length_of, score_table
from prefloop.records import Group, Pair, Response
from prefloop.run import Stage

SAME_SCORE = 1e-4
"""Largest difference, in nats, by which two fp32 passes of one model over one response may differ."""


def debias_length(groups: Sequence[Group], coefficient: LengthCoefficient) -> list[Group]:
    """Groups whose scores are s - alpha |y| (DICE Eq. 5); all else is as it was.

    The coefficient must be in the unit of these scores: with beta inside one exactly when with beta inside the other.
    """
    length = length_of(coefficient.unit)

    def penalised(response: Response) -> Response:
        if response.score is None:
            return response
        return response.model_copy(update={"score": response.score - coefficient.alpha * length(response)})

    return [Group(prompt=group.prompt, responses=tuple(map(penalised, group.responses))) for group in groups]


def best_vs_worst(
    groups: Sequence[Group],
    *,
    source: Literal["offline", "generated"] = "generated",
    reference: str | None = None,
    stage: Stage | None = None,
) -> list[Pair]:
    """One pair per prompt: the highest score against the lowest, of equal ones the first; no margin is asked for.

    A prompt whose best and worst are the same answer, by token ids or stripped text, is dropped and counted.
    `reference` is the fingerprint of the model whose log-probabilities the responses carry as `policy_logp`. In DICE
    that is pi(t-1), which is also the reference of the training round that follows, so the pairs carry them on.
    Raises InputError for a prompt with fewer than two scores.
    """
    stage = stage or Stage.detached()
    pairs: list[Pair] = []
    for group, best, worst in _extremes(groups):
        if not best.same_as(worst):
            pairs.append(
                Pair(
                    prompt=group.prompt,
                    chosen=best,
                    rejected=worst,
                    source=source,
                    chosen_score=best.score,
                    rejected_score=worst.score,
                    **_known_reference(best, worst, reference),
                )
            )
    if len(pairs) < len(groups):
        stage.count("prompts dropped: best and worst are the same answer", len(groups) - len(pairs))
    stage.count("pairs made", len(pairs))
    return pairs


def check_score_spread(groups: Sequence[Group], *, tolerance: float = SAME_SCORE) -> None:
    """Raise CheckFailed when no prompt's scores differ by more than `tolerance`, as between a model and itself.

    Selection would then go by the order of the responses, and with a length penalty by shortness alone.
    """
    scores = score_table(groups)
    spread = float((np.nanmax(scores, axis=1) - np.nanmin(scores, axis=1)).max())
    if spread <= tolerance:
        raise CheckFailed(
            f"the responses to each of {len(groups)} prompts all score the same (largest spread {spread:.3g}, expected "
            f"over {tolerance:g}): the policy and the reference of the implicit reward are probably the "
            "same model; give the model that the policy was trained from as the reference"
        )


def _extremes(groups: Sequence[Group]) -> list[tuple[Group, Response, Response]]:
    """Every group with its best and its worst response."""
    if not groups:
        return []
    best, worst = best_and_worst(score_table(groups))
    return [
        (group, group.responses[b], group.responses[w])
        for group, b, w in zip(groups, best.tolist(), worst.tolist(), strict=True)
    ]


def _known_reference(chosen: Response, rejected: Response, reference: str | None) -> dict:
    """The pair's `reference_logps` and whose they are, where both responses carry them."""
    if chosen.policy_logp is None or rejected.policy_logp is None:
        return {}
    return {"reference_logps": (chosen.policy_logp, rejected.policy_logp), "reference": reference}
