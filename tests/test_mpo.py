"""MPO: the split and its limits, and both stages end to end on a tiny real model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import CheckFailed, InputError
from prefloop.pairs.margins import Split, find_split
from prefloop.recipes import ppo
from prefloop.recipes.dpo import DpoConfig, dpo
from prefloop.recipes.mpo import Easy, MpoConfig, mpo
from prefloop.recipes.ppo import Ppo, PpoConfig
from prefloop.recipes.steps import LookAt
from prefloop.records import Pair, Prompt, Response
from prefloop.run import Run
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Train
from tests.feedback.annotators import save_tiny_reward_model
from tests.sample.engines import stopping_folder

DELTAS = [-2.0, -0.5, 0.1, 0.4, 1.0, 1.5, 3.0, 4.0]


def pairs_of(deltas: list[float], shift: float = 0.0, scale: float = 1.0) -> list[Pair]:
    return [
        Pair(
            prompt=Prompt.of(f"Q{i}"),
            chosen=Response(text="a"),
            rejected=Response(text="b"),
            chosen_score=scale * (delta + shift * i),
            rejected_score=scale * shift * i,
        )
        for i, delta in enumerate(deltas)
    ]


def easy_of(pairs: list[Pair], **options: Any) -> list[int]:
    split = find_split(pairs, **{"threshold": None, "easy": 0.5, "margin": "signed", **options})
    easy = [i for i, pair in enumerate(pairs) if split.is_easy(pair)]
    assert split.easy == len(easy) and split.easy + split.hard == len(pairs)
    return easy


def test_the_split_is_above_the_threshold() -> None:
    pairs = pairs_of(DELTAS)
    assert easy_of(pairs) == [4, 5, 6, 7]
    assert easy_of(pairs, margin="abs") == [0, 5, 6, 7]  # a label that the scores contradict clearly
    assert easy_of(pairs, threshold=0.0) == [2, 3, 4, 5, 6, 7]
    std = (sum((d - sum(DELTAS) / 8) ** 2 for d in DELTAS) / 8) ** 0.5
    assert find_split(pairs, threshold=1.0, easy=0.5, margin="signed").std == pytest.approx(std)
    assert easy_of(pairs, threshold=1.0) == [i for i, d in enumerate(DELTAS) if d > std] == [6, 7]


def test_the_limits_of_the_threshold() -> None:
    pairs = pairs_of(DELTAS)
    assert easy_of(pairs, threshold=-math.inf) == list(range(8)) and easy_of(pairs, threshold=math.inf) == []
    sizes = [len(easy_of(pairs, threshold=t)) for t in (-3.0, -1.0, 0.0, 0.5, 1.0, 2.0)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 3


@pytest.mark.parametrize("margin", ["signed", "abs"])
def test_the_limits_of_the_share(margin: str) -> None:
    for scale in (1.0, 0.1, 0.3, 7.0):
        pairs = pairs_of(DELTAS, scale=scale)
        assert (
            easy_of(pairs, easy=1.0, margin=margin) == list(range(8)) and easy_of(pairs, easy=0.0, margin=margin) == []
        )
        # Where the cut is a pair's own margin, the pair is hard, however the division by std rounds.
        assert [len(easy_of(pairs, easy=i / 7, margin=margin)) for i in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(CheckFailed, match="no pair has a score for both answers"):
        find_split([], threshold=None, easy=0.5, margin="signed")


def test_shifts_of_a_prompts_rewards_and_the_scale_of_all_change_nothing() -> None:
    plain = easy_of(pairs_of(DELTAS), threshold=0.7)
    assert easy_of(pairs_of(DELTAS, shift=5.0), threshold=0.7) == plain
    assert easy_of(pairs_of(DELTAS, scale=100.0), threshold=0.7) == plain
    assert easy_of(pairs_of([1.0, 1.0]), threshold=0.5) == [0, 1]  # no spread: units of 1


def test_a_split_reads_back() -> None:
    split = find_split(pairs_of(DELTAS), threshold=None, easy=0.65, margin="abs")
    assert Split.from_json(split.to_json()) == split


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> MpoConfig:
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, first: int, n: int) -> str:
        rows = [
            {"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, {i}.", "chosen_score": float(i % 4),
             "rejected_score": 1.0}
            for i in range(first, first + n)
        ]  # fmt: skip
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    train = Train(steps=2, batch_size=4, learning_rate=1e-3, warmup_steps=0, validation_pairs=0, checkpoint_every=1)
    return MpoConfig(
        policy=str(stopping_folder().path),
        pairs=write("pairs.jsonl", 0, 12),
        held_out=write("held_out.jsonl", 50, 3),
        annotator="rule:short",
        threshold=0.0,
        easy=Easy(train=train),
        ppo=Ppo(epochs=1),
        train=train,
        sampling=Sampling(max_new_tokens=12),
        look_at=LookAt(answers=2, shown=1),
        compute=Compute(device="cpu", dtype="float32", sampling_dtype="float32"),
        engine="transformers",
    )


def run_mpo(cfg: MpoConfig, out: Path) -> tuple[Path, dict[str, Any]]:
    with Run.open(out, recipe="mpo", config=cfg) as run:
        mpo(cfg, run)
    return out, json.loads((out / "manifest.json").read_text())["stages"]


@pytest.fixture(scope="module")
def finished(cfg: MpoConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return run_mpo(cfg, tmp_path_factory.mktemp("mpo") / "run")


def test_ppo_goes_on_from_the_dpo_model_and_is_measured_against_both(finished: tuple[Path, dict[str, Any]]) -> None:
    run, stages = finished
    counts = stages["data/split"]["counts"]
    assert counts == {"easy pairs": 6, "hard pairs": 6, "pairs whose label the scores contradict": 3}
    rows = [json.loads(line) for line in (run / "round-2/model/training_log.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)  # from pi_DPO, where it begins
    assert abs(rows[0]["kl_start"]) > 1e-2  # from pi_SFT
    assert rows[1]["kl"] != 0.0
    assert "round-1/checkup" in stages and "round-2/checkup" in stages

    def prompts_in(name: str) -> set[str]:
        found = [json.loads(line)["prompt"]["messages"][0]["content"] for line in (run / name).read_text().splitlines()]
        return set(found)

    # The score of pair i is i % 4 against 1.
    assert prompts_in("round-1/training_pairs.jsonl") == {f"Question {i}?" for i in (2, 3, 6, 7, 10, 11)}
    hard = {f"Question {i}?" for i in (0, 1, 4, 5, 8, 9)}
    assert prompts_in("round-2/model/feedback.jsonl") == hard  # two batches of four of six


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(
    cfg: MpoConfig, finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second step of PPO: what it goes on from, and the reference, are still pi_DPO."""
    real, seen = ppo.update, []

    def dying(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == 2:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "update", dying)
        with pytest.raises(Killed):
            run_mpo(cfg, tmp_path / "run")
    run_mpo(cfg, tmp_path / "run")
    for name in ("model/model.safetensors", "round-2/model/training_log.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (finished[0] / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["dpo", "ppo"])
def test_at_its_limits_it_is_dpo_or_ppo_to_the_bit(cfg: MpoConfig, tmp_path: Path, limit: str) -> None:
    cfg = cfg.replace(threshold=-99.0 if limit == "dpo" else 99.0, beta=0.3, easy__beta=0.2, ppo__clip=0.1)
    run, stages = run_mpo(cfg, tmp_path / "mpo")
    shared = {name: getattr(cfg, name) for name in ("policy", "sampling", "look_at", "compute", "engine", "held_out")}
    if limit == "dpo":
        assert "round-1/model" in stages and "round-2/model" not in stages
        alone = DpoConfig(**shared, pairs=cfg.pairs, beta=0.2, train=cfg.easy.train)
        with Run.open(tmp_path / "alone", recipe="dpo", config=alone) as other:
            dpo(alone, other)
    else:
        assert "round-2/model" in stages and "round-1/model" not in stages
        rows = [json.loads(line) for line in (run / "round-2/model/training_log.jsonl").read_text().splitlines()]
        assert rows[1]["kl"] == rows[1]["kl_start"] != 0.0  # its reference is the start
        prompts = tmp_path / "prompts.jsonl"
        lines = [json.loads(line)["prompt"] for line in Path(cfg.pairs).read_text().splitlines()]
        prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in lines))
        held_out = tmp_path / "held_out.jsonl"
        held_out.write_text(json.dumps({"prompt": "Another?"}) + "\n")
        plain = PpoConfig(**{**shared, "held_out": str(held_out)}, prompts=str(prompts), annotator=cfg.annotator,
                          beta=0.3, ppo=cfg.ppo, train=cfg.train)  # fmt: skip
        with Run.open(tmp_path / "alone", recipe="ppo", config=plain) as other:
            ppo.ppo(plain, other)
    found, expected = (tmp_path / name / "model/model.safetensors" for name in ("mpo", "alone"))
    assert found.read_bytes() == expected.read_bytes()


def test_what_cannot_be_is_refused_before_anything_is_computed(cfg: MpoConfig, tmp_path: Path) -> None:
    other = save_tiny_reward_model(tmp_path / "other", template="zephyr")
    for options, message in (
        ({"annotator": ""}, "--annotator is missing"),
        ({"train__validation_pairs": 4}, "train.validation_pairs = 4: an online recipe holds none of its pairs out"),
        ({"value": str(other)}, "--value .*other and --policy .* have different tokenizers"),
    ):
        with pytest.raises(InputError, match=message):
            run_mpo(cfg.replace(**options), tmp_path / "run")
        assert not (tmp_path / "run/start").exists()
