"""The bake-off (benchmarks/bake_off.py): its world and figures in closed form, and a small version of the whole."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bake_off
from bake import claims, figures, page, tally, world
from prefloop.feedback.annotator import Comparison
from prefloop.feedback.rule import load_rule
from prefloop.records import Prompt, Response
from prefloop.seeds import generator

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_truth_counts_facts_once_and_charges_for_words():
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


def test_padding_pays_with_the_annotator_and_loses_by_the_truth():
    prompt = Prompt.of("describe apple lantern river")
    short, long = Response(text="green"), Response(text="green" + " well" * 20)
    assert world.truth(prompt, long) - world.truth(prompt, short) == pytest.approx(-0.15 * 20)
    assert world.expected_score(prompt, long) - world.expected_score(prompt, short) == pytest.approx(0.05 * 20)


def test_the_annotator_prefers_with_the_bradley_terry_probability():
    prompt = Prompt.of("describe apple lantern river")
    won = [
        world.score(prompt, Response(text=f"green cheap unknown{i}")) > world.score(prompt, Response(text=f"green {i}"))
        for i in range(4000)
    ]
    # One fact more and one word more: 1.05 by what the annotator likes. Four standard errors.
    expected = 1 / (1 + math.exp(-1.05 / 0.5))
    assert abs(np.mean(won) - expected) < 4 * math.sqrt(expected * (1 - expected) / len(won))


def test_answers_end_within_the_limit():
    rng, asked = generator(0, "test"), world.questions(1, "test")[0]
    lengths = [len(world.answer(asked, rng).split()) for _ in range(3000)]
    assert max(lengths) <= world.MAX_NEW_TOKENS - 1
    # Geometric, cut at 23 words.
    assert np.mean(lengths) == pytest.approx((1 - 0.7**23) / 0.3, abs=4 * 2.8 / math.sqrt(3000))


def test_reward_at_a_kl_is_straight_over_its_root():
    points = [(0.0, 1.0), (1.0, 3.0), (9.0, 1.0)]
    assert [figures.at(kl, points) for kl in (0.25, 1.0, 4.0, 9.0, 10.0)] == [2.0, 3.0, 2.0, 1.0, None]


def test_claims_are_paired_over_seeds():
    start = {seed: {"kl": 0.0, "reward": float(seed), "words": 5.0, "win_rate": 0.5} for seed in range(3)}

    def runs(gain: float) -> figures.Runs:
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


def rows_of(gains: dict[int, float], **more: Any) -> figures.Runs:
    """Runs of a method that reaches 0.5 nats at its one strength, with a gain for every seed."""
    start = {seed: {"kl": 0.0, "reward": 0.0, "words": 5.0, "win_rate": 0.5} for seed in gains}
    rows = [
        {"seed": seed, "strength": 1, "kl": 0.5, "reward": gain, "words": 5.0, "win_rate": 0.5, "seconds": 1.0} | more
        for seed, gain in gains.items()
    ]
    return figures.Runs.of(rows, start)


def test_who_is_no_worse_by_a_margin_shows_and_says_the_margin():
    runs = {
        "optune-1": rows_of({1: 0.50, 2: 0.55, 3: 0.60}, tokens_trained=300),
        "optune-half": rows_of({1: 0.45, 2: 0.51, 3: 0.54}, tokens_trained=200),
    }
    same, best, saved = claims.judged(runs)
    assert same["figure"] == "true reward at equal KL, no worse than by 0.1"
    assert same["difference"][0] == pytest.approx(-0.05) and same["difference"][2] < 0
    assert (same["verdict"], best["verdict"]) == ("shows", "shows")
    assert (saved["difference"], saved["verdict"]) == ([1.5, 1.5, 1.5], "shows")


def test_advice_names_the_best_who_is_alike_and_none_that_is_below_the_start():
    runs = {
        "a": rows_of({1: 0.50, 2: 0.60, 3: 0.70}),
        "b": rows_of({1: 0.55, 2: 0.50, 3: 0.68}),
        "c": rows_of({1: 0.30, 2: 0.40, 3: 0.50}),
        "d": rows_of({1: -0.30, 2: 0.10, 3: 0.10}),
    }
    methods = {name: figures.summary(one) for name, one in runs.items()}
    said = {name: name.upper() for name in runs}
    assert page.advised(list(runs), methods, said, runs) == ("A: 0.60", "4", "B")
    assert page.advised(["c", "d"], methods, said, runs) == ("C: 0.40", "2", "none")
    best, of, _ = page.advised(["d"], methods, said, runs)
    assert (best, of) == ("none: the best (D: -0.03) is not told apart from the start model", "1")


def test_at_equal_tokens_a_row_has_as_many_labels_as_the_cost_of_oaif_buys():
    def row(method: str, seed: int, strength: int, trained: int) -> dict[str, Any]:
        return {"method": method, "seed": seed, "strength": strength, "tokens_trained": trained}

    rows = [row("oaif-dpo", seed, strength, 1000) for seed in (1, 2) for strength in (0, 1, 2)]
    rows += [row("dice", seed, 1, trained) for seed, trained in ((1, 1500), (2, 2500))]
    rows += [row("dice", seed, strength, 9) for seed in (1, 2) for strength in (0, 2)]
    rows += [row("ppo", 1, 1, 50_000), row("fa", 1, 1, 10), row("dpo", 1, 1, 800)]
    sizes = bake_off.sizes_at_equal_tokens(rows, ["oaif-dpo", "dice", "ppo", "fa", "dpo"], 960)
    # Batches of 6 * 16; between a quarter and twice as many.
    assert sizes == {"oaif-dpo": 960, "dice": 480, "ppo": 288, "fa": 1920, "dpo": 1152}


def test_strongest_effects_have_sides_and_an_error_rate():
    (dice, words, _), (ca, best, _) = bake_off.STRONGEST
    lines = [{"claim": dice, "figure": words, "by_seed": [0.5, 1.0, 1.5, 1.0]},
             {"claim": ca, "figure": best, "by_seed": [0.1, -0.2, 0.3, 0.2]}]  # fmt: skip
    shown, other = bake_off.strongest(lines).values()
    # Standard deviation 0.41, of a mean of three 0.24: 1.0 is 4.24 of them.
    assert shown["shows"] and shown["error_rate"] == pytest.approx(1.1e-5, abs=5e-6)
    assert not other["shows"] and other["error_rate"] > 0.5


def test_label_calls_are_counted():
    judge = load_rule("bake.world:score")
    prompt = Prompt.of("describe apple lantern river")
    a, b = Response(text="green"), Response(text="well")
    with tally.counted() as counts:
        judge.judge([Comparison(prompt, a, b), Comparison(prompt, a, a)])
        judge.score([(prompt, a), (prompt, b), (prompt, b)])
    judge.score([(prompt, a)])
    assert counts == {"label_calls": 1 + 3}


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
    for run in (found, again):
        for one in run["methods"].values():
            del one["seconds"]
    assert again == found
    before, after = json.loads(kept), json.loads(rows[0].read_text())
    assert {**before, "seconds": 0} == {**after, "seconds": 0}


@pytest.mark.slow
def test_every_comparison_runs_in_two_processes(tmp_path):
    """What several rows begin with is made once, whoever comes first."""
    command = [sys.executable, str(FOLDER / "bake_off.py"), "--methods", "oaif-dpo", "fa", "--n", "96", "--seeds", "2",
               "--strengths", "1", "--out", str(tmp_path / "bake"), "--docs", str(tmp_path / "page.md")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found["others"]) == ["equal tokens", "fair", "weak", "few"]
    for name, part in {"equal calls": found, **found["others"]}.items():
        assert set(part["methods"]) == ({"fa"} if name == "weak" else {"oaif-dpo", "fa"}), name
        assert part["methods"]["fa"]["seeds"] == 2
    assert found["methods"]["fa"]["label_calls"] == 96
    data = tmp_path / "bake/data"
    few, plain = (
        {json.loads(line)["prompt"] for line in (data / f"seed-1-{case}/pairs.jsonl").read_text().splitlines()[:960]}
        for case in ("few", "plain")
    )
    assert (len(few), len(plain)) == (120, 960)
    text = (tmp_path / "page.md").read_text()
    assert "## A weak judge" in text and "| few questions |" in text


@pytest.mark.slow
def test_counting_first_thing_in_a_process_leaves_the_proof_of_a_training_counted():
    imported = "from bake.tally import counted\nwith counted(): import prefloop.train.learner as learner\n"
    said = imported + "print(hasattr(learner.choose_path, '__wrapped__'))"
    done = subprocess.run([sys.executable, "-c", said], cwd=FOLDER, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
