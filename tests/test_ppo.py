"""`prefloop ppo` end to end on a tiny real model: what is logged and reported, and the same bytes again."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from prefloop.errors import FeedbackError, InputError
from prefloop.feedback.registry import load_annotator
from prefloop.feedback.reward_model import RewardModel
from prefloop.models import resolve
from prefloop.recipes import ppo as recipe
from prefloop.recipes.ppo import Ppo, PpoConfig, beta_of_step, ppo
from prefloop.recipes.steps import LookAt
from prefloop.records import Prompt, Response
from prefloop.report.page import page_of
from prefloop.report.story import read_story
from prefloop.run import Run, Stage
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.logprobs import response_logps
from prefloop.train.packing import TokenGroup
from prefloop.train.ppo import (
    ActorCritic,
    PolicyObjective,
    Rollout,
    ValueObjective,
    adapted,
    advantages,
    token_rewards,
)
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
    assert "| reward |" in report and "| KL / token |" in report and "- evaluator: `rule:long`" in report
    assert "Held out: a tenth of the data." in (finished / "model/README.md").read_text()
    assert story.stages["round-1/model"]["counts"]["answers"] == 24
    assert (finished / "model/model.safetensors").is_file()


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_run_ends_in_the_same_bytes(
    cfg: PpoConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Interrupted while the last step's answers are scored, where the model stands still; then killed in its update."""
    if rank:
        cfg = cfg.replace(train__lora__rank=rank)
        finished = run_ppo(cfg, tmp_path / "whole")
    for where, what, at, how in ((RewardModel, "score", 4, KeyboardInterrupt), (recipe, "update", 1, Killed)):
        real, seen = getattr(where, what), []

        def dying(*args: Any, real: Any = real, seen: list[int] = seen, at: int = at, how: Any = how) -> Any:
            seen.append(1)
            if len(seen) == at:
                raise how
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(where, what, dying)
            with pytest.raises(how):
                run_ppo(cfg, tmp_path / "run")
        assert [file.name for file in (tmp_path / "run/round-1/model.partial").glob("checkpoint-*")] == ["checkpoint-3"]
    run_ppo(cfg, tmp_path / "run")
    for name in ("model/model.safetensors", "round-1/model/training_log.jsonl", "round-1/model/feedback.jsonl",
                 "round-1/answers.jsonl"):  # fmt: skip
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_every_answer_is_on_record_with_its_score(finished: Path, cfg: PpoConfig) -> None:
    rows = [json.loads(line) for line in (finished / "round-1/model/feedback.jsonl").read_text().splitlines()]
    for logged in log_of(finished):
        scores = [row["score"] for row in rows if row["step"] == logged["step"]]
        assert len(scores) == 6 and sum(scores) / 6 == pytest.approx(logged["reward"])
    annotator: Any = load_annotator(cfg.annotator, cfg.feedback, compute=cfg.compute)
    again = annotator.score([(Prompt.model_validate(row["prompt"]), Response(text=row["answer"])) for row in rows[:3]])
    assert again == pytest.approx([row["score"] for row in rows[:3]], abs=1e-5)
    finish_reasons = [row["finish_reason"] for row in rows if row["step"] == 1]
    assert finish_reasons.count("stop") / 6 == log_of(finished)[0]["finished"]


def test_answers_without_a_score_are_counted_and_none_at_all_ends_the_run(cfg: PpoConfig, tmp_path: Path) -> None:
    some = cfg.replace(annotator=f"rule:{__name__}:likes_short_ones", evaluator="rule:long", train__steps=2)
    run = run_ppo(some, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "round-1/model/feedback.jsonl").read_text().splitlines()]
    unscored = [row for row in rows if row["outcome"] == "unscored"]
    assert 0 < len(unscored) < 12 and {row["reason"] for row in unscored} == {"the rule gave no answer"}
    counts = read_story(run).stages["round-1/model"]["counts"]
    assert counts == {"answers": 12 - len(unscored), "answers without a score: the rule gave no answer": len(unscored)}
    with pytest.raises(FeedbackError, match=r"no answer with a score \(6 the rule gave no answer\); try another"):
        run_ppo(some.replace(annotator=f"rule:{__name__}:likes_none"), tmp_path / "none")


def likes_short_ones(prompt: Prompt, response: Response) -> float | None:
    return None if response.finish_reason == "length" else -float(response.length_chars)


def likes_none(prompt: Prompt, response: Response) -> float | None:
    return None


def test_with_adapters_policy_reference_and_values_share_their_base(cfg: PpoConfig, tmp_path: Path) -> None:
    small = cfg.replace(
        train=TRAIN.replace(steps=2, lora=Lora(rank=2)).model_dump(), annotator="rule:short", evaluator=""
    )
    run = run_ppo(small, tmp_path / "run")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert any("policy, reference and values share" in event.get("text", "") for event in events)
    assert log_of(run)[0]["kl"] == pytest.approx(0.0, abs=1e-4) and log_of(run)[1]["kl"] != 0.0
    assert not any("fewer than --train.batch-size" in event.get("text", "") for event in events)


def test_fewer_prompts_than_a_batch_are_told(cfg: PpoConfig, tmp_path: Path) -> None:
    few = tmp_path / "prompts.jsonl"
    few.write_text("".join(Path(cfg.prompts).read_text().splitlines(keepends=True)[:4]))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "Another?"}) + "\n")
    own = cfg.replace(prompts=str(few), held_out=str(held_out), train__steps=1, look_at__answers=0)
    run = run_ppo(own, tmp_path / "run")
    said = [json.loads(line).get("text", "") for line in (run / "events.jsonl").read_text().splitlines()]
    assert "4 prompts, fewer than --train.batch-size 6: each is answered once a step" in said
    assert any("no held-out prompts, so no rewards of own answers" in text for text in said)
    assert log_of(run)[0]["answers"] == 4


def test_steps_by_hand(cfg: PpoConfig) -> None:
    """An answer that was cut pays, one without a score is left out, and the schedule counts optimiser steps."""
    linear = cfg.replace(train__schedule="linear", train__warmup_steps=0)
    start = resolve(cfg.policy)
    online = ActorCritic(*recipe.learners(start, start, linear, Stage.detached()))
    prompts = [Prompt.of(f"Question {i}?") for i in range(8)]
    groups = [
        group.model_copy(update={"responses": (group.responses[0].model_copy(update={"finish_reason": reason}),)})
        for group, reason in zip(
            online.sample(prompts, k=1, sampling=cfg.sampling, seed=1), ["stop", "length"] * 4, strict=True
        )
    ]
    rollouts = recipe.experience(groups, ["no score", *map(float, range(7))], online, linear, beta=0.1)
    assert [(r.score, r.penalty) for r in rollouts] == [(float(i), 0.0 if i % 2 else 0.5) for i in range(7)]
    rates = [recipe.update(online, rollouts, step, linear)["learning_rate"] for step in range(4)]
    assert rates == pytest.approx([3e-3 * (1 - (4 * step + 1.5) / 16) for step in range(4)])  # 4 in each of 4 steps


def answered(cfg: PpoConfig, value: str = "") -> tuple[ActorCritic, list[Rollout]]:
    """Both learners, and scored answers to eight prompts."""
    start = resolve(cfg.policy)
    online = ActorCritic(*recipe.learners(start, resolve(value) if value else start, cfg, Stage.detached()))
    prompts = [Prompt.of(f"Question {i}?" * (1 + i % 3)) for i in range(8)]
    groups = online.sample(prompts, k=1, sampling=cfg.sampling, seed=1)
    return online, recipe.experience(groups, [float(i % 5) for i in range(8)], online, cfg, beta=cfg.beta)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_one_minibatch_kappa_is_exactly_one(cfg: PpoConfig, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision too, where another layout of the same answers may round otherwise: the rows are the same."""
    one = cfg.replace(ppo__epochs=1, ppo__minibatches=1, compute__dtype=dtype, compute__tokens_per_forward=150)
    laid_out: list[list[TokenGroup]] = []

    def recorded(model: Any, groups: list[TokenGroup], **options: Any) -> Any:
        laid_out.append(groups)
        return response_logps(model, groups, **options)

    monkeypatch.setattr("prefloop.train.ppo.response_logps", recorded)
    online, rollouts = answered(one)
    n = len(laid_out) // 2  # log pi_old, log pi_ref
    row = recipe.update(online, rollouts, 0, one)
    assert n > 2 and laid_out[:n] == laid_out[2 * n :]
    assert (row["clip_fraction"], row["approx_kl"]) == (0.0, 0.0)
    assert row["policy_loss"] == pytest.approx(-np.concatenate([r.advantages for r in rollouts]).mean(), abs=1e-6)
    for _, weight in [*online.learner.trained, *online.values.trained]:
        assert weight.grad is None  # a set of gradients is as large as a model


@pytest.mark.parametrize("rank", [0, 2])
def test_a_reward_model_gives_the_values_to_begin_with(cfg: PpoConfig, tmp_path: Path, rank: int) -> None:
    """--value: V_old of the first step is what that model says of every state, over its own trunk, and not 0."""
    cfg = cfg.replace(train__lora__rank=rank)
    reward = save_tiny_reward_model(tmp_path / "value", template="chatml")
    online, rollouts = answered(cfg, str(reward))
    model = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    for rollout in rollouts[:3]:
        prompt = online.values.chat.prompt_ids(rollout.prompt)
        ids = torch.tensor([[*prompt, *(rollout.response.token_ids or ())]])
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
            expected = model.score(hidden)[:, 0].tolist()
        assert list(rollout.values) == pytest.approx(expected, abs=1e-5) and max(map(abs, expected)) > 0.01
    run = run_ppo(cfg.replace(value=str(reward), train__steps=1, look_at__answers=0), tmp_path / "run")
    assert log_of(run)[0]["explained_variance"] != 0.0


def test_every_option_arrives_where_it_is_used(cfg: PpoConfig) -> None:
    options = {"clip": 0.31, "value_clip": 0.42, "gamma": 0.9, "lam": 0.5, "value_learning_rate": 7e-4}
    own = cfg.replace(**{f"ppo__{name}": value for name, value in options.items()}, ppo__whiten=False)
    online, rollouts = answered(own)
    policy, values = online.learner.objective, online.values.objective
    assert isinstance(policy, PolicyObjective) and isinstance(values, ValueObjective)
    assert (policy.clip, values.clip, online.values.config.learning_rate) == (0.31, 0.42, 7e-4)
    assert online.learner.config.learning_rate == TRAIN.learning_rate
    for rollout in rollouts:
        rewards = token_rewards(rollout, beta=own.beta)
        expected = advantages(rewards, np.array(rollout.values), gamma=0.9, lam=0.5)
        assert list(rollout.advantages) == pytest.approx(expected.tolist())


def test_beta_stays_without_a_target(cfg: PpoConfig) -> None:
    fixed = cfg.replace(ppo__kl_target=None)
    assert beta_of_step(fixed, [{"beta": 0.3, "kl": 50.0, "answers": 6}]) == 0.3


def test_what_cannot_be_is_refused_before_anything_is_computed(cfg: PpoConfig, tmp_path: Path) -> None:
    other = save_tiny_reward_model(tmp_path / "other", template="zephyr")
    for options, message in (
        ({"annotator": ""}, "--annotator is missing"),
        ({"value": str(other)}, "--value .*other and --policy .* have different tokenizers"),
        ({"beta": 0.0}, "ppo.kl_target = 1 with beta = 0: beta is steered by factors"),
        ({"sampling__max_new_tokens": 5000}, "with 5000 new ones it does not fit the model's context"),
    ):
        with pytest.raises(InputError, match=message):
            run_ppo(cfg.replace(**options), tmp_path / "run")
        assert not (tmp_path / "run").exists(), message


def test_samples_that_are_not_of_the_policy_are_told(cfg: PpoConfig, tmp_path: Path) -> None:
    notes: list[str] = []
    with Run.open(tmp_path / "run", recipe="ppo", config=cfg) as run:
        run.note = lambda text, stage=None: notes.append(text)
        recipe.check_options(cfg, run)
        assert not notes
        recipe.check_options(cfg.replace(sampling__temperature=0.7, sampling__top_p=0.9), run)
    assert len(notes) == 1 and "answers are sampled with temperature 0.7, top_p 0.9" in notes[0]


@pytest.mark.parametrize("annotator", ["rule:short+rule:long", "rule:tests.feedback.annotators:prefers_a_vowel"])
def test_an_annotator_that_only_compares_is_refused(cfg: PpoConfig, tmp_path: Path, annotator: str) -> None:
    with pytest.raises(InputError, match="only says which of two answers is better"):
        run_ppo(cfg.replace(annotator=annotator), tmp_path / "run")
