"""Intervals against textbook values; a checkup against independent arithmetic on a tiny model."""

from pathlib import Path

import numpy as np
import pytest

from prefloop.data.chat import ChatFormat
from prefloop.evaluate.checkup import checkup
from prefloop.evaluate.reward_accuracy import accuracy, mean_interval, wilson_interval
from prefloop.models import ModelRef, load_tokenizer
from prefloop.records import Group, Pair, Prompt, Response
from prefloop.train.config import Compute
from prefloop.train.reference import logps_under, with_reference_logps
from tests.tiny import save_tiny_model

COMPUTE = Compute(device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_interval(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_of_nothing_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_mean_interval_is_196_standard_errors_wide() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    error = np.std([1, 2, 3, 4], ddof=1) / 2
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - 1.959964 * error, 2.5 + 1.959964 * error))
    assert mean_interval([7.0]) == (7.0, 7.0, 7.0)


def test_ties_count_one_half() -> None:
    assert accuracy([1.0, -1.0, 0.0, 2.0])[0] == pytest.approx(2.5 / 4)


def test_a_checkup_against_arithmetic_by_hand(tmp_path: Path) -> None:
    start, model = (ModelRef.of(save_tiny_model(tmp_path / str(seed), seed=seed)) for seed in (1, 2))
    chat = ChatFormat(load_tokenizer(start))
    texts = ["red", "green or so", "blue, blue, blue", "no"]
    held_out = [
        Pair(
            prompt=Prompt.of(f"Which colour, {i}?"),
            chosen=chat.with_token_ids(Response(text=texts[i])),
            rejected=chat.with_token_ids(Response(text=texts[(i + 1) % 4])),
        )
        for i in range(4)
    ]
    held_out = with_reference_logps(held_out, start, compute=COMPUTE)
    answers = [
        Group(prompt=Prompt.of("Hello?"), responses=(chat.with_token_ids(Response(text="Hi.", finish_reason="stop")),)),
        Group(
            prompt=Prompt.of("And?"),
            responses=(chat.with_token_ids(Response(text="Nothing more", finish_reason="length")),),
        ),
    ]

    found = checkup(model, start, held_out, answers, beta=0.2, compute=COMPUTE)

    def logps(ref: ModelRef) -> tuple[np.ndarray, np.ndarray]:
        pairs = logps_under(ref, [(p.prompt, (p.chosen, p.rejected)) for p in held_out], compute=COMPUTE)
        own = logps_under(ref, [(g.prompt, g.responses) for g in answers], compute=COMPUTE)
        return np.array(pairs), np.array(own)[:, 0]

    (new, new_own), (old, old_own) = logps(model), logps(start)
    margins = 0.2 * ((new - old)[:, 0] - (new - old)[:, 1])
    assert found.accuracy and found.margin and found.kl_per_token and found.length_chars
    assert found.accuracy[0] == (margins > 0).mean()
    assert found.margin[0] == pytest.approx(margins.mean(), abs=1e-4)
    lengths = np.array([[p.chosen.length_tokens, p.rejected.length_tokens] for p in held_out])
    for per_token, referenced in ((True, True), (True, False), (False, False)):
        rewards = (new - old * referenced) / lengths**per_token
        margins = 0.2 * (rewards[:, 0] - rewards[:, 1])
        look = checkup(model, start, held_out, [], beta=0.2, per_token=per_token, referenced=referenced,
                       compute=COMPUTE)  # fmt: skip
        assert look.margin and look.margin[0] == pytest.approx(margins.mean(), abs=1e-4)
        assert look.accuracy and look.accuracy[0] == (margins > 0).mean()
        assert look.chosen_change == found.chosen_change
    assert found.chosen_change == pytest.approx((new - old)[:, 0].mean(), abs=1e-3)
    assert found.rejected_change == pytest.approx((new - old)[:, 1].mean(), abs=1e-3)
    # One byte is one token: 3 + 11 + 16 + 2 bytes of chosen text, and an end token each.
    assert found.chosen_nll_per_token == pytest.approx(-new[:, 0].sum() / (32 + 4), abs=1e-4)
    assert found.kl_per_token[0] == pytest.approx(((new_own - old_own) / [4, 12]).mean(), abs=1e-4)
    assert found.length_chars[0] == (3 + 12) / 2
    assert found.length_tokens == (4 + 12) / 2
    assert found.finished == 0.5
    assert found.pairs == 4 and found.answers == 2
