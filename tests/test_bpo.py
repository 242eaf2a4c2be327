"""BPO end to end on a tiny real model."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import InputError
from prefloop.feedback.options import Feedback
from prefloop.recipes import bpo as recipe
from prefloop.recipes.bpo import BpoConfig, bpo, demo, estimate_feedback, paper, phase_length, phases_of
from prefloop.recipes.oaif import OaifConfig, oaif
from prefloop.recipes.steps import LookAt
from prefloop.run import Run
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Lora, Train
from tests.feedback.judge_server import JudgeServer
from tests.sample.engines import stopping_folder

TRAIN = Train(steps=5, batch_size=3, learning_rate=2e-3, warmup_steps=0, validation_pairs=0, checkpoint_every=3)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(24)))
    return {
        "policy": str(stopping_folder().path),
        "prompts": str(file),
        "annotator": "rule:short",
        "evaluator": "rule:long",
        "evaluate_every": 100,
        "sampling": Sampling(temperature=0.9, max_new_tokens=16),
        "look_at": LookAt(answers=2, shown=1),
        "train": TRAIN,
        "compute": Compute(device="cpu", dtype="float32", sampling_dtype="float32", sequences_per_batch=16),
        "engine": "transformers",
    }


@pytest.fixture(scope="module")
def cfg(options: dict[str, Any]) -> BpoConfig:
    adapter = TRAIN.replace(lora=Lora(rank=4, alpha=8).model_dump())
    return BpoConfig(**{**options, "train": adapter, "phases": 3, "members": 2})


def run_bpo(cfg: BpoConfig, out: Path) -> Path:
    with Run.open(out, recipe="bpo", config=cfg) as run:
        bpo(cfg, run)
    return out


@pytest.fixture(scope="module")
def finished(cfg: BpoConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_bpo(cfg, tmp_path_factory.mktemp("bpo") / "run")


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "round-1/model/training_log.jsonl").read_text().splitlines()]


def test_phases_and_both_drifts_are_logged(finished: Path) -> None:
    rows = log_of(finished)
    steps = [row for row in rows if "evaluation" not in row]
    # T = 5, F = 3: K = 2, taken at steps 0, 2 and 4.
    assert [row["phase"] for row in steps] == [1, 1, 2, 2, 3]
    # Two members: each begins a phase beside their mean, so only the very first loss is ln 2.
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    looks = [row["evaluation"] for row in rows if "evaluation" in row]
    [look] = looks
    # One step from the behaviour model, five from the start.
    assert 0 < abs(look["log_ratio_to_behaviour_per_token"][0]) < abs(look["log_ratio_per_token"][0])
    page = (finished / "report.html").read_text()
    assert "Drift in a phase" in page and (finished / "model/README.md").is_file()


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(
    cfg: BpoConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in step 3, which has taken the behaviour model anew before it asks, and leaves a checkpoint of that;
    killed in step 5, where the checkpoint after step 3 is in the middle of a phase.
    """
    real = recipe.preferences
    for at, how in ((3, KeyboardInterrupt), (3, Killed)):
        asked: list[int] = []

        def dying(*args: Any, asked: list[int] = asked, at: int = at, how: Any = how) -> Any:
            asked.append(1)
            if len(asked) == at:
                raise how
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(recipe, "preferences", dying)
            with pytest.raises(how):
                run_bpo(cfg, tmp_path / "run")
    run_bpo(cfg, tmp_path / "run")
    for name in ("model/model.safetensors", "round-1/model/training_log.jsonl", "round-1/answers.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_fixed_reference_one_member_and_a_phase_every_step_is_oaif(options: dict[str, Any], tmp_path: Path) -> None:
    options = {**options, "train": TRAIN.replace(steps=3), "look_at": LookAt(answers=0)}
    run_bpo(BpoConfig(**options, phases="all", members=1, reference="start"), tmp_path / "bpo")
    plain = OaifConfig(**options)
    with Run.open(tmp_path / "oaif", recipe="oaif", config=plain) as run:
        oaif(plain, run)
    ours, theirs = (tmp_path / name / "model/model.safetensors" for name in ("bpo", "oaif"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(("phases", "k", "there_are"), [(1, 10, 1), (2, 5, 2), (4, 3, 4), (7, 2, 5), ("all", 1, 10)])
def test_phases_are_as_long_as_the_steps_ask_for(phases: Any, k: int, there_are: int) -> None:
    cfg = BpoConfig(phases=phases, train=TRAIN.replace(steps=10))
    assert (phase_length(cfg), phases_of(cfg)) == (k, there_are)


def test_what_cannot_be_is_refused(cfg: BpoConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"phases = 11: expected 1 to 5 \(--train.steps\), or all"):
        run_bpo(cfg.replace(phases=11), tmp_path / "run")
    with pytest.raises(InputError, match=r"members = 2 needs an adapter .* --train.lora.rank, or --members 1"):
        run_bpo(cfg.replace(train__lora__rank=0), tmp_path / "run")
    with pytest.raises(InputError, match="nowhere"):
        run_bpo(cfg.replace(reference="nowhere"), tmp_path / "run")
    with pytest.raises(InputError, match="--annotator is missing"):  # before the reference is looked for
        run_bpo(cfg.replace(reference="nowhere", annotator=""), tmp_path / "run")
    said = r"train.validation_pairs = 4: an online recipe holds none .*--held-out .*, every --evaluate-every steps"
    with pytest.raises(InputError, match=said):
        run_bpo(cfg.replace(train__validation_pairs=4), tmp_path / "run")


def test_a_dry_run_refuses_what_the_run_would(cfg: BpoConfig) -> None:
    with pytest.raises(InputError, match="phases = 0: expected 1 to 5"):
        estimate_feedback(cfg.replace(phases=0))
    with pytest.raises(InputError, match="members = 2 needs an adapter"):
        estimate_feedback(cfg.replace(train__lora__rank=0))
    # It looks for no model: one with a hub id would be fetched.
    assert estimate_feedback(cfg.replace(reference="some/model"))[0] == "training: rule:short: no calls"


def test_the_moving_mean_says_how_far_it_comes(cfg: BpoConfig, tmp_path: Path) -> None:
    """Three phases move it twice: 1 - 0.75^2."""
    run_bpo(cfg.replace(reference="ema", ema=0.25, look_at__answers=0), tmp_path / "run")
    said = "the moving mean moves 2 times, 0.438 of the way to the behaviour models in all"
    assert said in (tmp_path / "run/events.jsonl").read_text()


def test_the_papers_settings_and_the_estimate(options: dict[str, Any]) -> None:
    assert (paper().train.steps, paper().train.batch_size, paper().members, paper().beta) == (625, 16, 5, 0.1)
    assert (paper().train.lora.rank, paper().train.learning_rate, paper().train.schedule) == (256, 5e-5, "linear")
    assert demo().members == 2
    with JudgeServer() as server:
        judge = {"annotator": "api:small", "feedback": Feedback(base_url=server.url)}
        training = estimate_feedback(BpoConfig(**{**options, **judge, "members": 1}))[0]
        assert server.requests == []
    # 5 steps of 3 questions, in both orders.
    assert training.startswith("training: api:small: 30 calls (0 of 30 questions are in the cache), about ")
