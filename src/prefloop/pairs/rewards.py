"""Scored answers to demonstrations: standardised rewards, and the weights of reward-weighted regression.

    standardised reward  r' = (r - mean) / std            over the whole data set, in float64, sample standard deviation

Offline alignment by supervised losses (arXiv 2308.12050). Legend: N answers.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from prefloop.errors import InputError
from prefloop.records import Demonstration, Group, Record
from prefloop.run import Stage

SAME = 1e-12
"""A range below this share of the largest reward is rounding: all rewards are the same."""


class RewardScale(Record):
    """What rewards were standardised with; saved beside a model as REWARD_SCALE, so that later rewards can be too.

    std: the sample standard deviation, 0 when all rewards are the same (each then has the standardised reward 0).
    reward: who gave them, in words.
    """

    reward: str
    n: int
    mean: float
    std: float

    def standardised(self, reward: float) -> float:
        """In standard deviations above the mean."""
        return (reward - self.mean) / self.std if self.std > 0 else 0.0


def reward_scale(groups: Sequence[Group], *, reward: str, stage: Stage | None = None) -> RewardScale:
    """The mean and the standard deviation of all scores. Raises InputError when there is none."""
    stage = stage or Stage.detached()
    scores = np.array(scores_of(groups), dtype=np.float64)
    if not len(scores):
        raise InputError("there are no rewards: no answer was scored; see the reasons counted where they were")
    mean = math.fsum(scores) / len(scores)
    std = 0.0
    if np.ptp(scores) > SAME * np.abs(scores).max():
        std = float(scores.std(ddof=1))
    else:
        stage.note(f"all {len(scores)} rewards are the same ({mean:g}): every answer has the standardised reward 0")
    stage.figure("mean reward", mean)
    stage.figure("standard deviation", std)
    return RewardScale(reward=reward, n=len(scores), mean=mean, std=std)


def standardise(groups: Sequence[Group], scale: RewardScale) -> list[Group]:
    """The groups with standardised scores."""
    return [
        group.model_copy(
            update={
                "responses": tuple(
                    response
                    if response.score is None
                    else response.model_copy(update={"score": scale.standardised(response.score)})
                    for response in group.responses
                )
            }
        )
        for group in groups
    ]


def demonstrations(groups: Sequence[Group]) -> list[Demonstration]:
    """Every response, in order, with weight 1."""
    return [Demonstration(prompt=group.prompt, response=response) for group in groups for response in group.responses]


def weighted(
    groups: Sequence[Group], *, temperature: float, clip: float | None, stage: Stage | None = None
) -> list[Demonstration]:
    """Every response, in order, with the weight of its (standardised) score (`weights`)."""
    stage = stage or Stage.detached()
    found = weights(scores_of(groups), temperature=temperature, clip=clip)
    if clip is not None:
        stage.count("weights clipped", sum(score / temperature > math.log(clip) for score in scores_of(groups)))
    stage.figure("effective sample size", effective_sample_size(found))
    stage.figure("effective share", effective_sample_size(found) / len(found))
    stage.figure("largest weight", float(found.max()))
    return [
        demonstration.model_copy(update={"weight": float(weight)})
        for demonstration, weight in zip(demonstrations(groups), found, strict=True)
    ]


def weights(rewards: Sequence[float], *, temperature: float, clip: float | None = None) -> Float[np.ndarray, " N"]:
    """w = min(exp(r / temperature), clip), divided by the mean of all: mean 1, so the scale of the loss stays.

    Computed as exp(r / temperature - m) with m the largest exponent, so that nothing overflows. clip None: not clipped.

    >>> weights([1.0, 1.0], temperature=0.5).tolist()
    [1.0, 1.0]
    """
    exponents = np.asarray(rewards, dtype=np.float64) / temperature
    if clip is not None:
        exponents = np.minimum(exponents, math.log(clip))
    relative = np.exp(exponents - exponents.max())
    return relative / (math.fsum(relative) / len(relative))


def effective_sample_size(weights: Float[np.ndarray, " N"]) -> float:
    """(sum w)^2 / sum w^2: N for equal weights, 1 where one answer has it all.

    >>> effective_sample_size(np.array([1.0, 1.0, 0.0, 0.0]))
    2.0
    """
    return float(weights.sum() ** 2 / np.square(weights).sum())


def scores_of(groups: Sequence[Group]) -> list[float]:
    """The scores of all responses that have one, in order."""
    return [response.score for group in groups for response in group.responses if response.score is not None]
