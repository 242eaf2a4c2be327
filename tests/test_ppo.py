"""`prefloop ppo` end to end on a tiny real model: what is logged and reported, and the same bytes again."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import InputError
from prefloop.recipes import ppo as recipe
from prefloop.recipes.ppo import Ppo, PpoConfig, beta_of_step, ppo
from prefloop.recipes.steps import LookAt
from prefloop.report.page import page_of
from prefloop.report.story import read_story
from prefloop.run import Run
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.ppo import adapted
from tests.feedback.annotators import save_tiny_reward_model
from tests.sample.engines import stopping_folder

TRAIN = Train(steps=4, batch_size=6, learning_rate=3e-3, warmup_steps=1, validation_pairs=0, checkpoint_every=2)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> PpoConfig:
    folder = tmp_path_factory.mktemp("data")
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(30)))
    reward = save_tiny_reward_model(folder / "reward", template="chatml")
    return PpoConfig(
        policy=str(stopping_folder().path),
        prompts=str(file),
        annotator=f"reward-model:{reward}",
        evaluator="rule:long",
        ppo=Ppo(epochs=2, minibatches=2, kl_target=1.0, kl_horizon=50, missing_eos_penalty=0.5),
        sampling=Sampling(max_new_tokens=16),
        look_at=LookAt(answers=2, shown=1),
        train=TRAIN,
        compute=Compute(device="cpu", dtype="float32", sampling_dtype="float32", sequences_per_batch=16),
        engine="transformers",
    )


def run_ppo(cfg: PpoConfig, out: Path) -> Path:
    with Run.open(out, recipe="ppo", config=cfg) as run:
        ppo(cfg, run)
    return out


@pytest.fixture(scope="module")
def finished(cfg: PpoConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_ppo(cfg, tmp_path_factory.mktemp("ppo") / "run")


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "round-1/model/training_log.jsonl").read_text().splitlines()]


def test_a_line_a_step_with_all_figures(finished: Path, cfg: PpoConfig) -> None:
    rows = log_of(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["answers"] == 6 and row["unscored"] == {}
        assert {
            "reward",
            "kl",
            "entropy",
            "clip_fraction",
            "approx_kl",
            "policy_loss",
            "value_loss",
            "grad_norm",
        } <= set(row)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)  # the policy is its reference
    assert rows[0]["beta"] == cfg.beta and rows[0]["sampler_gap"] < 1e-4
    assert abs(rows[-1]["kl"]) > 1e-3
    for before, row in pairwise(rows):
        assert row["beta"] == adapted(before["beta"], before["kl"], target=1.0, horizon=50, answers=6)


def test_the_report_and_the_page_show_them(finished: Path) -> None:
    story = read_story(finished)
    page = page_of([story])
    titles = {chart.title for _, charts in page.charts for chart in charts}
    assert {"Reward of sampled answers", "Drift of sampled answers", "Entropy", "Clipped tokens", "Value loss",
            "Explained variance", "Reward of own answers"} <= titles  # fmt: skip
    report = (finished / "report.md").read_text()
    assert "| reward |" in report and "| KL / token |" in report
    assert story.stages["round-1/model"]["counts"]["answers"] == 24
    assert (finished / "model/model.safetensors").is_file()


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("kill_at", [3])
def test_a_killed_run_ends_in_the_same_bytes(
    cfg: PpoConfig, finished: Path, tmp_path: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = recipe.update, []

    def dying(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == kill_at + 1:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "update", dying)
        with pytest.raises(Killed):
            run_ppo(cfg, tmp_path / "run")
    run_ppo(cfg, tmp_path / "run")
    for name in ("model/model.safetensors", "round-1/model/training_log.jsonl", "round-1/answers.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_with_adapters_policy_reference_and_values_share_their_base(cfg: PpoConfig, tmp_path: Path) -> None:
    small = cfg.replace(
        train=TRAIN.replace(steps=2, lora=Lora(rank=2)).model_dump(), annotator="rule:short", evaluator=""
    )
    run = run_ppo(small, tmp_path / "run")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert any("policy, reference and values share a base" in event.get("text", "") for event in events)
    assert log_of(run)[0]["kl"] == pytest.approx(0.0, abs=1e-4) and log_of(run)[1]["kl"] != 0.0


def test_beta_stays_without_a_target(cfg: PpoConfig) -> None:
    fixed = cfg.replace(ppo__kl_target=None)
    assert beta_of_step(fixed, [{"beta": 0.3, "kl": 50.0, "answers": 6}]) == 0.3


@pytest.mark.parametrize("annotator", ["rule:short+rule:long", "rule:tests.feedback.annotators:prefers_a_vowel"])
def test_an_annotator_that_only_compares_is_refused(cfg: PpoConfig, tmp_path: Path, annotator: str) -> None:
    with pytest.raises(InputError, match="only says which of two answers is better"):
        run_ppo(cfg.replace(annotator=annotator), tmp_path / "run")
