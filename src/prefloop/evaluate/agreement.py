"""How far people who judged the same things agree, beyond chance."""

from collections import Counter
from collections.abc import Hashable, Sequence


def krippendorff(units: Sequence[Sequence[Hashable]]) -> tuple[float | None, float | None]:
    """(observed agreement, Krippendorff's alpha) of nominal labels: one sequence a thing that was judged, one label a
    rater, in any order; things with fewer than two labels do not enter (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability").

        observed = (1 / n) sum over things u of sum over labels c of n_uc (n_uc - 1) / (n_u - 1)
        chance   = sum over c of n_c (n_c - 1) / (n (n - 1))
        alpha    = 1 - (1 - observed) / (1 - chance)

    For two raters the observed agreement is the share of things with the same label. None where nothing was judged
    twice; alpha is None where all labels are the same.

    >>> krippendorff([("a", "a"), ("a", "b")])
    (0.5, 0.0)
    """
    counts = [Counter(unit) for unit in units if len(unit) > 1]
    labels = sum(counts, Counter())
    n = labels.total()
    if n == 0:
        return None, None
    observed = sum(same * (same - 1) / (unit.total() - 1) for unit in counts for same in unit.values()) / n
    chance = sum(m * (m - 1) for m in labels.values()) / (n * (n - 1))
    return observed, 1 - (1 - observed) / (1 - chance) if chance < 1 else None
