"""Agreement against the published example, and by hand."""

import pytest

from prefloop.evaluate.agreement import krippendorff


def test_the_published_example() -> None:
    """Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability": four observers, twelve units, nominal data."""
    observers = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    units = [[label for label in unit if label != "."] for unit in zip(*(o.split() for o in observers), strict=True)]
    assert krippendorff(units)[1] == pytest.approx(0.743, abs=5e-4)


def test_two_raters_by_hand() -> None:
    # 8 of 10 units the same; a 12 times and b 8 times of 20: chance (12 * 11 + 8 * 7) / (20 * 19).
    share, alpha = krippendorff(["aa"] * 5 + ["bb"] * 3 + ["ab", "ba"])
    assert share == pytest.approx(0.8)
    assert alpha == pytest.approx(1 - 0.2 / (1 - 188 / 380))


def test_what_says_nothing() -> None:
    assert krippendorff([]) == (None, None) and krippendorff(["a", "b"]) == (None, None)
    assert krippendorff(["aa", "aaa"]) == (1.0, None)
    assert krippendorff(["ab", "ba", "a"]) == pytest.approx((0.0, -0.5))
