"""A reward model on pairs whose preference is known: does it rank them right, and is it as sure as it should be?

    margin = r(chosen) - r(rejected)        P(chosen is preferred) = sigmoid(margin)

What is scored keeps its scores: pairs with `chosen_score` and `rejected_score`, groups with a score for every response.
"""

from collections.abc import Sequence

import numpy as np

from prefloop.errors import InputError
from prefloop.evaluate.implicit_pairs import Ranking, brier_score, by_category, calibration_error, ranking
from prefloop.models import ModelRef
from prefloop.records import Group, Pair, Record
from prefloop.run import Stage
from prefloop.train.config import Compute


class RewardPairs(Record):
    """All about some scored pairs.

    overall: accuracy (ties 1/2) and mean margin, each [value, low, high] at 95 %. log_loss: mean of
    -log sigmoid(margin), ln 2 for a model that knows nothing. calibration_error, brier: of sigmoid(margin) (see
    `prefloop.evaluate.implicit_pairs`). mean, std: of the rewards of all responses.
    """

    overall: Ranking
    categories: dict[str, Ranking]
    log_loss: float
    calibration_error: float
    brier: float
    mean: float
    std: float


def reward_pairs(pairs: Sequence[Pair]) -> RewardPairs:
    """Stage: the figures of scored pairs. Raises InputError where there are none."""
    if not pairs:
        raise InputError(
            "there are no scored pairs to look at; the counts of earlier stages say where they were dropped"
        )
    scores = np.array([[pair.chosen_score, pair.rejected_score] for pair in pairs], dtype=float)
    margins = scores[:, 0] - scores[:, 1]
    categories = by_category(pairs, margins)
    return RewardPairs(
        overall=ranking(margins),
        categories=categories if set(categories) != {"none"} else {},
        log_loss=float(np.mean(np.logaddexp(0.0, -margins))),
        calibration_error=calibration_error(margins),
        brier=brier_score(margins),
        mean=float(scores.mean()),
        std=float(scores.std()),
    )


def score_pairs(pairs: Sequence[Pair], model: ModelRef, *, compute: Compute, stage: Stage | None = None) -> list[Pair]:
    """Stage: the pairs with the rewards of their responses; one that cannot be scored leaves and is counted."""
    from prefloop.feedback.reward_model import RewardModel
    from prefloop.feedback.scorer import score_by

    stage = stage or Stage.detached()
    annotator = RewardModel(model, compute=compute)
    scored: list[Pair] = []
    groups = [Group(prompt=pair.prompt, responses=(pair.chosen, pair.rejected)) for pair in pairs]
    for pair, group in zip(pairs, score_by(groups, annotator, stage=stage), strict=True):
        chosen, rejected = (response.score for response in group.responses)
        if chosen is not None and rejected is not None:
            scored.append(pair.model_copy(update={"chosen_score": chosen, "rejected_score": rejected}))
    return scored
