"""The bake-off (benchmarks/bake_off.py): its world and figures in closed form, and a small version of the whole."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from prefloop.records import Prompt, Response
from prefloop.seeds import generator

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def world() -> Iterator[ModuleType]:
    yield from _module("bake.world")


@pytest.fixture(scope="module")
def figures() -> Iterator[ModuleType]:
    yield from _module("bake.figures")


@pytest.fixture(scope="module")
def claims() -> Iterator[ModuleType]:
    yield from _module("bake.claims")


def _module(name: str) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield import_module(name)


def test_truth_counts_facts_once_and_charges_for_words(world):
    prompt = Prompt.of("describe apple lantern river")

    def reward(text: str) -> float:
        return world.truth(prompt, Response(text=text))

    green, cheap = world.FACTS_OF["apple"]
    wrong = next(fact for fact in world.FACTS if fact not in world.asked_for("describe apple lantern river"))
    assert reward(green) == pytest.approx(0.85)
    assert reward(f"{green} {green} well") == pytest.approx(1 - 0.45)
    assert reward(f"{green} {cheap} {wrong}") == pytest.approx(2 - 1 - 0.45)
    assert reward("") == -1
    assert reward(world.best_answer("describe apple lantern river")) == pytest.approx(6 * 0.85)


def test_padding_pays_with_the_annotator_and_loses_by_the_truth(world):
    prompt = Prompt.of("describe apple lantern river")
    short, long = Response(text="green"), Response(text="green" + " well" * 20)
    assert world.truth(prompt, long) - world.truth(prompt, short) == pytest.approx(-0.15 * 20)
    assert world.expected_score(prompt, long) - world.expected_score(prompt, short) == pytest.approx(0.05 * 20)


def test_the_annotator_prefers_with_the_bradley_terry_probability(world):
    prompt = Prompt.of("describe apple lantern river")
    won = [
        world.score(prompt, Response(text=f"green cheap unknown{i}")) > world.score(prompt, Response(text=f"green {i}"))
        for i in range(4000)
    ]
    # One fact more and one word more: 1.05 by what the annotator likes. Four standard errors.
    expected = 1 / (1 + math.exp(-1.05 / 0.5))
    assert abs(np.mean(won) - expected) < 4 * math.sqrt(expected * (1 - expected) / len(won))


def test_answers_end_within_the_limit(world):
    rng, asked = generator(0, "test"), world.questions(1, "test")[0]
    lengths = [len(world.answer(asked, rng).split()) for _ in range(3000)]
    assert max(lengths) <= world.MAX_NEW_TOKENS - 1
    # Geometric, cut at 23 words.
    assert np.mean(lengths) == pytest.approx((1 - 0.7**23) / 0.3, abs=4 * 2.8 / math.sqrt(3000))


def test_reward_at_a_kl_is_straight_over_its_root(figures):
    points = [(0.0, 1.0), (1.0, 3.0), (9.0, 1.0)]
    assert [figures.at(kl, points) for kl in (0.25, 1.0, 4.0, 9.0, 10.0)] == [2.0, 3.0, 2.0, 1.0, None]


def test_claims_are_paired_over_seeds(claims, figures):
    start = {seed: {"kl": 0.0, "reward": float(seed), "words": 5.0, "win_rate": 0.5} for seed in range(3)}

    def runs(gain: float) -> object:
        rows = [
            {"seed": seed, "strength": 0, "kl": 9.0, "reward": seed + gain + 0.01 * seed, "words": 5.0, "win_rate": 0.5}
            for seed in range(3)
        ]
        return figures.Runs.of(rows, start)

    # Seeds differ by more than the methods do: only their differences tell these apart.
    lines = claims.judged({"oaif-dpo": runs(0.5), "dpo": runs(0.3)})
    online = {line["figure"]: line for line in lines if line["claim"].startswith("OAIF")}
    assert online["best true reward of the strengths"]["difference"] == [0.2, 0.2, 0.2]
    assert online["true reward at equal KL"]["difference"][0] == pytest.approx(
        0.2 * math.sqrt(figures.KL) / 3, abs=1e-3
    )
    assert {line["verdict"] for line in online.values()} == {"shows"}


def small(out: Path) -> dict[str, Any]:
    """The last line of the small version, as JSON."""
    done = subprocess.run([sys.executable, str(FOLDER / "bake_off.py"), "--small", "--out", str(out)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_small_bake_off_shows_the_strongest_effects_and_can_be_run_again(tmp_path):
    found = small(tmp_path / "bake")
    assert [one["shows"] for one in found["strongest"].values()] == [True, True], found["strongest"]
    for one in found["methods"].values():
        assert {"true_reward_at_kl", "kl", "label_calls", "tokens_sampled", "seconds"} <= one.keys()
    rows = sorted((tmp_path / "bake" / "rows").iterdir())
    kept = rows[0].read_text()
    rows[0].unlink()
    again = small(tmp_path / "bake")
    for figures in (found, again):
        for one in figures["methods"].values():
            del one["seconds"]
    assert again == found
    before, after = json.loads(kept), json.loads(rows[0].read_text())
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
