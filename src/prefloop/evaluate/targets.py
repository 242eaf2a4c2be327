"""Does a conditional model follow the reward that it is asked for?"""

from collections.abc import Sequence

import numpy as np

from prefloop.evaluate.reward_accuracy import mean_interval
from prefloop.pairs.rewards import RewardScale
from prefloop.records import Group, Record


class Asked(Record):
    """What a conditional model answered when it was asked for a reward.

    target, reward: in standard deviations above the mean of the training data; reward: [value, low, high] at 95 %.
    """

    target: float
    answers: int
    reward: tuple[float, float, float] | None = None
    length_chars: float


def by_target(targets: Sequence[float], answers: Sequence[Sequence[Group]], scale: RewardScale) -> list[Asked]:
    """One row a target, in ascending order; `answers`: of every target, scored."""
    rows = []
    for target, groups in sorted(zip(targets, answers, strict=True), key=lambda row: row[0]):
        responses = [response for group in groups for response in group.responses]
        rewards = [scale.standardised(r.score) for r in responses if r.score is not None]
        rows.append(
            Asked(
                target=target,
                answers=len(responses),
                reward=mean_interval(rewards) if rewards else None,
                length_chars=float(np.mean([response.length_chars for response in responses])),
            )
        )
    return rows
