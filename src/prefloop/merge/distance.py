"""How far two models of one architecture are from each other."""

from prefloop.records import Record

UNLIKELY = 0.5
"""A relative distance above which a base is hardly what the aligned model was trained from: alignment moves weights by
some hundredths at most, models that share nothing but their architecture are at about 1.4 (the square root of 2)."""


class Distance(Record):
    """How far an aligned model is from its base. Norms are Euclidean, over all weights.

    relative: |theta_1 - theta_0| / |theta_0|. farthest: the weight with the largest such figure of its own.
    weights, changed: how many weight tensors there are, and how many differ in any number.
    """

    relative: float
    farthest: str
    farthest_relative: float
    weights: int
    changed: int
