"""The gap between the sampler's log-probabilities and the trainer's, against the definition."""

import numpy as np
import pytest

from prefloop.errors import CheckFailed
from prefloop.records import Group, Response
from prefloop.sample.handover import Gap, check, measure
from tests.sample.engines import CHAT, PROMPTS, plain_logps, stopping_folder, stopping_llama


def group(prompt: int, texts: list[str], logps: list[tuple[float, ...]] | None = None) -> Group:
    ids = [tuple(CHAT.response_ids(text)) for text in texts]
    given = logps or [None] * len(texts)
    responses = [Response(text=t, token_ids=i, sampling_logps=p) for t, i, p in zip(texts, ids, given, strict=True)]
    return Group(prompt=PROMPTS[prompt], responses=tuple(responses))


def trainer_logps(groups: list[Group]) -> list[tuple[float, ...]]:
    """Per token, from the summed log-probabilities of every prefix by a plain forward."""
    found = []
    for one in groups:
        for response in one.responses:
            ids = response.token_ids or ()
            prefixes = tuple(Response(text="", token_ids=ids[:n]) for n in range(1, len(ids) + 1))
            sums = plain_logps(stopping_llama(), [one.model_copy(update={"responses": prefixes})])
            found.append(tuple(np.diff([0.0, *sums]).tolist()))
    return found


def claimed(offsets: list[float]) -> list[Group]:
    """Groups whose sampler claims the trainer's log-probabilities plus an offset, alternating along the tokens."""
    plain = [group(0, ["red", "blue green"]), group(3, ["tea"])]
    logps = [tuple(x + offsets[i % len(offsets)] for i, x in enumerate(row)) for row in trainer_logps(plain)]
    return [group(0, ["red", "blue green"], logps[:2]), group(3, ["tea"], logps[2:])]


def test_the_gap_is_that_of_every_token() -> None:
    gap = measure(stopping_folder(), [claimed([0.3, -0.1])], budget=64, device="cpu", answers=10, seed=0)
    assert gap is not None
    # "red" and end, "blue green" and end, "tea" and end: 4, 11 and 4 tokens, the first of each off by 0.3.
    offsets = [0.3, -0.1] * 2 + [0.3, -0.1] * 5 + [0.3] + [0.3, -0.1] * 2
    assert gap.tokens == 19
    assert gap.mean == pytest.approx(np.mean(np.abs(offsets)), abs=1e-4)
    assert gap.shift == pytest.approx(np.mean(offsets), abs=1e-4)
    assert gap.p99 == pytest.approx(0.3, abs=1e-4)


def test_no_more_answers_than_asked_for_are_looked_at() -> None:
    gap = measure(stopping_folder(), [claimed([0.0])], budget=64, device="cpu", answers=1, seed=0)
    assert gap is not None and gap.tokens in (8, 15) and gap.mean < 1e-5  # two answers at least


def test_an_engine_without_log_probabilities_has_no_gap() -> None:
    assert measure(stopping_folder(), [[group(0, ["red"])]], budget=64, device="cpu", answers=9, seed=0) is None


@pytest.mark.parametrize("worst", [0.021, float("nan")])
def test_beyond_the_tolerance_in_any_part_the_run_stops(worst: float) -> None:
    check(Gap(0.02, 0.1, 0.02, 0.0, 7), 0.02, engine="openvino", policy="m")
    with pytest.raises(CheckFailed, match=r"'openvino' does not sample from m: .* in 7 tokens, at most 0.02 expected"):
        check(Gap(0.001, 0.1, worst, 0.0, 7), 0.02, engine="openvino", policy="m")


def test_one_part_that_is_off_is_not_diluted_by_the_others() -> None:
    parts = [claimed([0.0])] * 9 + [claimed([0.3])]
    gap = measure(stopping_folder(), parts, budget=64, device="cpu", answers=9, seed=0)
    assert gap is not None
    assert gap.worst == pytest.approx(0.3, abs=1e-4) and gap.mean < 0.1
