"""Accuracy, calibration and RewardBench's sections against arithmetic by hand."""

import numpy as np
import pytest

from prefloop.evaluate.implicit_pairs import SECTIONS, Ranking, calibration_error, figures, sections
from prefloop.records import Pair, Prompt, Response


def pair(category: str | None, chosen: int, rejected: int) -> Pair:
    """A pair whose answers have so many tokens."""
    return Pair(
        prompt=Prompt.of(f"{category}", category=category),
        chosen=Response(text="a", token_ids=(1,) * chosen),
        rejected=Response(text="b", token_ids=(2,) * rejected),
    )


def score(n: int, right: float) -> Ranking:
    return Ranking(pairs=n, accuracy=(right, 0.0, 1.0), margin=(0.0, 0.0, 0.0))


def test_figures_by_hand() -> None:
    pairs = [pair("maths", 2, 4), pair("maths", 5, 1), pair("code", 1, 2), pair("maths", 1, 1)]
    change = np.array([[2.0, -4.0], [-5.0, 0.0], [1.0, 1.0], [3.0, 0.0]])
    found = figures(pairs, change, beta=0.5)
    margins = np.array([3.0, -2.5, 0.0, 1.5])
    assert found.overall.accuracy[0] == 2.5 / 4 and found.overall.margin[0] == margins.mean()
    assert {name: part.accuracy[0] for name, part in found.categories.items()} == {"maths": 2 / 3, "code": 0.5}
    assert found.chosen_change[0] == pytest.approx((1 - 1 + 1 + 3) / 4)
    assert found.rejected_change[0] == pytest.approx((-1 + 0 + 0.5 + 0) / 4)
    right = 1 / (1 + np.exp(-margins))
    assert found.brier == pytest.approx(((1 - right) ** 2).mean())
    assert found.rewardbench is None
    assert figures([pair(None, 1, 1)], np.zeros((1, 2)), beta=1).categories == {}


def test_the_calibration_error_is_the_gap_of_each_bin() -> None:
    # Confidences 0.9 (margin ln 9) and 0.6 (ln 1.5): of ten pairs each, eight and six are ranked right.
    margins = np.r_[np.log(9) * np.where(np.arange(10) < 8, 1, -1), np.log(1.5) * np.where(np.arange(10) < 6, 1, -1)]
    assert calibration_error(margins) == pytest.approx(0.1 / 2)
    assert calibration_error(np.zeros(3)) == 0.0


def test_sure_and_wrong_is_the_worst_calibration() -> None:
    assert calibration_error(np.full(4, -800.0)) == pytest.approx(1.0)


def test_rewardbench_sections_weigh_pairs_but_mathematics_like_code() -> None:
    parts = {"alpacaeval-easy": score(100, 0.9), "mt-bench-med": score(50, 0.6), "llmbar-natural": score(10, 0.5)}
    parts |= {
        "donotanswer": score(20, 0.7),
        "math-prm": score(400, 0.8),
        "hep-go": score(30, 0.4),
        "hep-cpp": score(10, 0.8),
    }
    found = sections(parts)
    assert found == pytest.approx(
        {
            "Chat": 0.8,
            "Chat Hard": 0.5,
            "Safety": 0.7,
            "Reasoning": (0.8 + 0.5) / 2,
            "average": (0.8 + 0.5 + 0.7 + 0.65) / 4,
        }
    )
    assert sections({"donotanswer": score(5, 1.0)}) == {"Safety": 1.0, "average": 1.0}
    assert sections({**parts, "mine": score(1, 1.0)}) is None
    assert sum(map(len, SECTIONS.values())) == 23
