"""`prefloop reward-model` end to end on a tiny real model: folds, figures, the same bytes, and its use as annotator."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefloop.cli import main
from prefloop.data.chat import ChatFormat
from prefloop.errors import BudgetReached, InputError
from prefloop.evaluate.reward_pairs import RewardPairs, reward_pairs
from prefloop.feedback.annotator import Comparison, sigmoid
from prefloop.feedback.meter import usage_of
from prefloop.feedback.options import Feedback
from prefloop.feedback.registry import load_annotator
from prefloop.feedback.reward_model import conversation_ids
from prefloop.models import ModelRef, load_tokenizer
from prefloop.recipes import reward_model as recipe
from prefloop.recipes.reward_model import RewardModelConfig, deal, demo, reward_model
from prefloop.records import Group, Pair, Prompt, Response
from prefloop.report.page import page_of, render
from prefloop.report.story import read_story
from prefloop.run import Round, Run, Stage
from prefloop.train.config import Compute, EpochTrain, Train
from prefloop.train.learner import Learner
from prefloop.train.optim import learning_rate
from tests.feedback.judge_server import JudgeServer
from tests.tiny import save_tiny_model

COMPUTE = Compute(device="cpu", dtype="float32")


def write_pairs(file: Path, first: int, n: int) -> str:
    """Pairs whose chosen answer is the one with an exclamation mark."""
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"Yes {i}!", "rejected": f"No, {i}.."} for i in range(first, first + n)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> RewardModelConfig:
    folder = tmp_path_factory.mktemp("data")
    return RewardModelConfig(
        policy=str(save_tiny_model(folder / "tiny", seed=3)),
        pairs=write_pairs(folder / "pairs.jsonl", 0, 12),
        held_out=write_pairs(folder / "held_out.jsonl", 100, 6),
        folds=2,
        train=EpochTrain(
            steps=3, batch_size=4, learning_rate=3e-3, warmup_steps=0, validation_pairs=2, validate_every=3,
            checkpoint_every=2,
        ),
        compute=COMPUTE,
    )  # fmt: skip


def run_recipe(cfg: RewardModelConfig, out: Path) -> Path:
    with Run.open(out, recipe="reward-model", config=cfg) as run:
        reward_model(cfg, run)
    return out


@pytest.fixture(scope="module")
def trained_on() -> dict[str, set[str]]:
    """The prompts that each model of `finished` was trained on, by the model's part of the run."""
    return {}


@pytest.fixture(scope="module")
def finished(cfg: RewardModelConfig, tmp_path_factory: pytest.TempPathFactory, trained_on: dict[str, set[str]]) -> Path:
    real = recipe.train_on

    def told(round: Round, start: ModelRef, pairs: list[Pair], *args: Any, **kwargs: Any) -> ModelRef:
        trained_on[round.label] = {pair.prompt.id for pair in pairs}
        return real(round, start, pairs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "train_on", told)
        return run_recipe(cfg, tmp_path_factory.mktemp("run") / "run")


def pairs_in(file: Path) -> list[Pair]:
    return [Pair.from_json(line) for line in file.read_text().splitlines()]


def training_log(model: Path) -> list[dict[str, Any]]:
    """The optimiser steps of a trained model."""
    rows = map(json.loads, (model / "training_log.jsonl").read_text().splitlines())
    return [row for row in rows if "validation" not in row]


def notes(run: Path) -> list[str]:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event["text"] for event in events if event["event"] == "note"]


def test_no_pair_is_scored_by_a_model_that_was_trained_on_its_prompt(
    finished: Path, trained_on: dict[str, set[str]]
) -> None:
    scored = [pairs_in(finished / f"fold-{i}/scored.jsonl") for i in (1, 2)]
    prompts = [{pair.prompt.id for pair in part} for part in scored]
    assert len(prompts[0]) == len(prompts[1]) == 6 and not prompts[0] & prompts[1]
    assert trained_on == {"fold-1": prompts[1], "fold-2": prompts[0], "round-1": prompts[0] | prompts[1]}
    together = pairs_in(finished / "cross-fit/pairs.jsonl")
    assert [pair.prompt.messages[0].content for pair in together] == [f"Question {i}?" for i in range(12)]
    assert sorted(p.chosen_score or 0 for p in together) == sorted(p.chosen_score or 0 for part in scored for p in part)
    groups = [Group.from_json(line) for line in (finished / "cross-fit/groups.jsonl").read_text().splitlines()]
    assert [r.score for g in groups for r in g.responses] == [
        s for p in together for s in (p.chosen_score, p.rejected_score)
    ]
    # A fold's own model gives its pairs the scores on file; the model of the other fold, which has seen them, does not.
    pair = scored[0][0]
    for fold, same in ((1, True), (2, False)):
        annotator: Any = load_annotator(f"reward-model:{finished}/fold-{fold}/model", Feedback(), compute=COMPUTE)
        [found] = annotator.score([(pair.prompt, pair.chosen)])
        assert (abs(found - (pair.chosen_score or 0)) < 1e-4) == same


def test_figures_of_scored_pairs() -> None:
    def pair(chosen: float, rejected: float) -> Pair:
        a, b = Response(text="a"), Response(text="b")
        return Pair(prompt=Prompt.of("Q"), chosen=a, rejected=b, chosen_score=chosen, rejected_score=rejected)

    found = reward_pairs([pair(1.0, 0.0), pair(0.0, 2.0), pair(1.0, 1.0), pair(3.0, 0.0)])
    margins = [1.0, -2.0, 0.0, 3.0]
    assert found.overall.accuracy[0] == 2.5 / 4 and found.overall.margin[0] == 0.5
    assert found.log_loss == pytest.approx(np.mean([math.log(1 + math.exp(-m)) for m in margins]))
    assert found.brier == pytest.approx(np.mean([(1 - sigmoid(m)) ** 2 for m in margins]))
    assert found.mean == 1.0 and found.std == pytest.approx(np.std([1, 0, 0, 2, 1, 1, 3, 0]))
    with pytest.raises(InputError, match="no scored pairs"):
        reward_pairs([])


def test_the_report_the_page_and_the_card_tell_how_good_it_is(finished: Path) -> None:
    ranking = RewardPairs.from_json((finished / "round-1/ranking.json").read_text())
    scored = pairs_in(finished / "round-1/scored.jsonl")
    assert ranking.overall.accuracy[0] == np.mean([(p.chosen_score or 0) > (p.rejected_score or 0) for p in scored])
    story = read_story(finished)
    assert [r.label for r in story.rounds if r.ranking] == ["fold-1", "fold-2", "cross-fit", "round-1"]
    card, report = (finished / "model/README.md").read_text(), (finished / "report.md").read_text()
    for text in (card, report):
        assert "| pairs ranked right |" in text and "| calibration error |" in text and "| Brier score |" in text
    assert "text-classification" in card and "AutoModelForSequenceClassification" in card
    page = page_of([story])
    assert f"pairs ranked right {ranking.overall.accuracy[0]:.2f} [" in page.runs[
        0
    ].summary and "Pairs ranked right" in render(page)
    assert "Rewards" in [chart.title for _, charts in page.charts for chart in charts]


def test_it_judges_wherever_an_annotator_is_named(
    finished: Path, cfg: RewardModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotator = load_annotator(f"reward-model:{finished}/model", Feedback(), compute=COMPUTE)
    [pair, *_] = scored = pairs_in(finished / "round-1/scored.jsonl")
    [judged] = annotator.judge([Comparison(pair.prompt, pair.chosen, pair.rejected)])
    assert judged.p == pytest.approx(sigmoid((pair.chosen_score or 0) - (pair.rejected_score or 0)), abs=1e-5)
    out = tmp_path / "check.json"
    command = [
        "judge",
        "check",
        "--annotator",
        f"reward-model:{finished}/model",
        "--gold",
        cfg.held_out,
        "--out",
        str(out),
    ]
    assert main([*command, "--compute.device", "cpu"]) == 0
    assert json.loads(out.read_text())["agreement"][0] == reward_pairs(scored).overall.accuracy[0]


class Killed(BaseException):
    """What a kill looks like from inside."""


def killed_at(step: int, cfg: RewardModelConfig, out: Path) -> None:
    """Run until the training step of that number, over all trainings, would begin."""
    real: Any = Learner.step
    seen: list[int] = []

    def dying(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == step:
            raise Killed
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", dying)
        with pytest.raises(Killed):
            run_recipe(cfg, out)


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(cfg: RewardModelConfig, finished: Path, tmp_path: Path) -> None:
    killed_at(6, cfg, tmp_path / "run")
    run_recipe(cfg, tmp_path / "run")
    for name in (
        "model/model.safetensors",
        "model/README.md",
        "cross-fit/pairs.jsonl",
        "round-1/model/training_log.jsonl",
    ):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.slow
def test_a_killed_run_with_adapters_ends_in_the_same_bytes(cfg: RewardModelConfig, tmp_path: Path) -> None:
    adapted = cfg.replace(folds=0, train__steps=5, train__lora__rank=2)
    whole = run_recipe(adapted, tmp_path / "whole")
    killed_at(4, adapted, tmp_path / "run")
    resumed = run_recipe(adapted, tmp_path / "run")
    assert "continuing from the checkpoint after step 2" in (resumed / "events.jsonl").read_text()
    for name in ("model/model.safetensors", "model/training_log.jsonl", "round-1/scored.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    rows = training_log(whole / "model")
    assert rows[0]["loss"] == pytest.approx(math.log(2)) and rows[-1]["loss"] < 0.9 * rows[0]["loss"]


def test_an_annotator_labels_own_answers(cfg: RewardModelConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(8)))
    own = cfg.replace(
        pairs="", prompts=str(prompts), annotator="rule:long", held_out="", folds=0, train__steps=1,
        sampling__max_new_tokens=8, engine="transformers",
    )  # fmt: skip
    out = run_recipe(own, tmp_path / "run")
    card = (out / "model/README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card and "pipeline_tag: text-classification" in card
    assert "- reward-model" in card and "# reward model made from" in card and "Held out: nothing." in card
    labelled = pairs_in(out / "data/labelled.jsonl")
    assert labelled and all(pair.chosen.length_chars > pair.rejected.length_chars for pair in labelled)
    assert {pair.prompt.id for pair in pairs_in(out / "data/pairs.jsonl")} <= {pair.prompt.id for pair in labelled}
    with pytest.raises(InputError, match="--prompts needs an --annotator"):
        run_recipe(own.replace(annotator=""), tmp_path / "other")
    with pytest.raises(InputError, match="folds = 9: there are 8 prompts"):
        run_recipe(own.replace(folds=9), tmp_path / "many")
    assert not (tmp_path / "many/data/answers.jsonl").exists()


def test_an_annotator_labels_pairs_anew(cfg: RewardModelConfig, tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", recipe="reward-model", config=cfg) as run:
        again = recipe.preferences(cfg.replace(annotator="rule:long"), run, ModelRef.of(Path(cfg.policy)))
    assert [pair.chosen.text for pair in again] == [f"No, {i}.." for i in range(12)]
    with (
        Run.open(tmp_path / "many", recipe="reward-model", config=cfg) as run,
        pytest.raises(InputError, match="folds = 13: there are 12 prompts"),
    ):
        recipe.preferences(cfg.replace(annotator="rule:long", folds=13), run, ModelRef.of(Path(cfg.policy)))
    assert not (tmp_path / "many/data/labelled.jsonl").exists()


def test_a_budget_of_labels_is_the_runs(
    cfg: RewardModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))

    def labels(cfg: RewardModelConfig) -> list[Pair]:
        with Run.open(tmp_path / "run", recipe="reward-model", config=cfg) as run:
            return recipe.preferences(cfg, run, ModelRef.of(Path(cfg.policy)))

    with JudgeServer() as server:
        api = cfg.replace(annotator="api:small", feedback__base_url=server.url, feedback__budget_calls=5,
                          feedback__concurrency=1)  # fmt: skip
        for _ in range(2):
            with pytest.raises(BudgetReached, match="the budget of 5 calls is used up"):
                labels(api)
            assert len(server.answered) == 5
        labels(api.replace(feedback__budget_calls=100))
    assert usage_of(tmp_path / "run")["api:small"].calls == len(server.answered) == 24


def test_a_soft_label_is_in_the_loss(cfg: RewardModelConfig, tmp_path: Path) -> None:
    """One pair, so that every line of the log can be recomputed by hand."""
    file = tmp_path / "pair.jsonl"
    file.write_text(json.dumps({"prompt": "Q", "chosen": "Yes!", "rejected": "No, not at all."}) + "\n")
    soft = cfg.replace(
        pairs=str(file), held_out="", folds=0, train__steps=6, annotator="rule:long", feedback__labels="soft",
        feedback__scale=10.0,
    )  # fmt: skip
    out = run_recipe(soft, tmp_path / "run")
    [pair] = pairs_in(out / "data/pairs.jsonl")
    p = 1 / (1 + math.exp(-11 / 10))  # 15 characters and 4
    assert pair.chosen.text == "No, not at all." and pair.p == pytest.approx(p) == pytest.approx(0.7503, abs=1e-4)
    rows = training_log(out / "model")
    for row in rows:
        d, total = row["chosen_reward"] - row["rejected_reward"], row["chosen_reward"] + row["rejected_reward"]
        expected = p * math.log1p(math.exp(-d)) + (1 - p) * math.log1p(math.exp(d)) + 0.01 * total**2
        assert row["loss"] == pytest.approx(expected, abs=1e-6)
    assert len(rows) == 6 and rows[-1]["margin"] > 0.1


@pytest.mark.parametrize(
    ("options", "n", "steps"),
    [({}, 1000, 16), ({}, 1, 1), ({}, 64, 1), ({}, 65, 2), ({"epochs": 2}, 1000, 32), ({"epochs": 0.5}, 1000, 8),
     ({"steps": 7}, 1000, 7)],
)  # fmt: skip
def test_steps_are_those_of_an_epoch_unless_they_are_given(options: dict[str, Any], n: int, steps: int) -> None:
    train = RewardModelConfig().replace(**{f"train__{name}": value for name, value in options.items()}).train.over(n)
    assert train.steps == steps
    assert learning_rate(train, 0) == 9e-6 and learning_rate(train, steps) == 0.0
    assert learning_rate(train, steps // 2) < 9e-6 or steps == 1


def test_steps_and_epochs_are_not_given_both() -> None:
    with pytest.raises(ValueError, match="steps = 16 and epochs = 3 both say how long; give one"):
        demo().replace(train__epochs=3)
    assert demo().replace(train__epochs=3, train__steps=0).train.over(8).steps == 6
    with pytest.raises(ValueError, match="finite"):
        EpochTrain(epochs=math.inf)


def test_a_plain_train_says_how_many_steps() -> None:
    given = RewardModelConfig(train=Train(steps=7, batch_size=2)).train
    assert given == EpochTrain(steps=7, batch_size=2) and given.over(1000) == Train(steps=7, batch_size=2)


def test_by_default_every_training_is_one_epoch_and_the_folds_look_at_every_pair(
    cfg: RewardModelConfig, tmp_path: Path
) -> None:
    out = run_recipe(cfg.replace(held_out="", train__steps=0), tmp_path / "run")
    # 12 pairs less 2 to watch, and 6 less 1, in batches of 4.
    steps = {part: len(training_log(out / part / "model")) for part in ("round-1", "fold-1", "fold-2")}
    assert steps == {"round-1": 3, "fold-1": 2, "fold-2": 2}
    told = notes(out)
    assert "round-1: 3 steps of 4 are 1.2 times over 10 pairs" in told
    assert "fold-1: 2 steps of 4 are 1.6 times over 5 pairs" in told
    assert not [note for note in told if "no held-out pairs" in note]
    together = pairs_in(out / "cross-fit/pairs.jsonl")
    assert [pair.prompt.messages[0].content for pair in together] == [f"Question {i}?" for i in range(12)]
    ranking = RewardPairs.from_json((out / "cross-fit/ranking.json").read_text())
    assert ranking.overall.accuracy[0] == np.mean([(p.chosen_score or 0) > (p.rejected_score or 0) for p in together])
    card = (out / "model/README.md").read_text()
    assert "Held out: every pair in turn, from models that were trained without its prompt." in card
    assert "| pairs ranked right |" in card


def test_without_folds_a_tenth_is_set_aside(cfg: RewardModelConfig, tmp_path: Path) -> None:
    alone = cfg.replace(held_out="", folds=0)
    with Run.open(tmp_path / "run", recipe="reward-model", config=alone) as run:
        pairs, held_out = recipe.load_both(alone, run, ModelRef.of(Path(cfg.policy)))
    assert (len(pairs), len(held_out)) == (11, 1)
    assert not {pair.prompt.id for pair in pairs} & {pair.prompt.id for pair in held_out}


def test_folds_are_dealt_by_prompt() -> None:
    pairs = [
        Pair(prompt=Prompt.of(f"Q{i % 5}"), chosen=Response(text=f"a{i}"), rejected=Response(text=f"b{i}"))
        for i in range(15)
    ]
    folds = deal(pairs, 3, seed=1)
    assert sorted(pair.chosen.text for fold in folds for pair in fold) == sorted(pair.chosen.text for pair in pairs)
    assert sorted(len({pair.prompt.id for pair in fold}) for fold in folds) == [1, 2, 2]
    assert sum(len({pair.prompt.id for pair in fold}) for fold in folds) == 5
    assert deal(pairs, 0, seed=1) == []
    with pytest.raises(InputError, match="folds = 6: there are 5 prompts"):
        deal(pairs, 6, seed=1)


def test_one_fold_is_refused(cfg: RewardModelConfig) -> None:
    with pytest.raises(InputError, match="folds = 1: a model that has not seen"):
        cfg.replace(folds=1)


def test_what_cannot_be_trained_on_is_refused_before_anything_is_computed(
    cfg: RewardModelConfig, tmp_path: Path
) -> None:
    file = tmp_path / "system.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q"}],
                                "chosen": "a", "rejected": "b"}) + "\n")  # fmt: skip
    picky = save_tiny_model(tmp_path / "picky", seed=3)
    template = (picky / "chat_template.jinja").read_text()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (picky / "chat_template.jinja").write_text(refusal + template)
    for options, message in (
        ({"margin": 0.5}, "margin = 0.5: the pair of prompt .* has no scores"),
        ({"margin": 0.5, "annotator": "rule:long"}, "margin = 0.5: an --annotator's labels come without the scores"),
        ({"policy": str(picky), "pairs": str(file)}, "has a system message, which the model's chat template does not"),
    ):
        with pytest.raises(InputError, match=message):
            run_recipe(cfg.replace(**options), tmp_path / "run")
        assert not list((tmp_path / "run").rglob("model*")), message


def test_held_out_prompts_are_not_trained_on(cfg: RewardModelConfig, tmp_path: Path) -> None:
    both = cfg.replace(held_out=write_pairs(tmp_path / "held_out.jsonl", 9, 6))
    with Run.open(tmp_path / "run", recipe="reward-model", config=both) as run:
        pairs, held_out = recipe.load_both(both, run, ModelRef.of(Path(cfg.policy)))
    assert [pair.prompt.messages[0].content for pair in pairs] == [f"Question {i}?" for i in range(9)]
    assert len(held_out) == 6


def test_what_does_not_fit_is_dropped_and_counted(cfg: RewardModelConfig, tmp_path: Path) -> None:
    chat = ChatFormat(load_tokenizer(ModelRef.of(Path(cfg.policy))))
    room = 1024 - len(conversation_ids(chat, Prompt.of("Q"), ""))
    pairs = [
        Pair(prompt=Prompt.of("Q"), chosen=Response(text="x" * 2000), rejected=Response(text="b")),
        Pair(prompt=Prompt.of("Q"), chosen=Response(text="b "), rejected=Response(text="b")),
        Pair(prompt=Prompt.of("Q"), chosen=Response(text="x" * (room + 1)), rejected=Response(text="b")),
        Pair(prompt=Prompt.of("Q"), chosen=Response(text="x" * room), rejected=Response(text="b")),
        Pair(prompt=Prompt.of("Q"), chosen=Response(text="a"), rejected=Response(text="b")),
    ]
    stage = Stage.detached()
    assert recipe.whole_pairs(pairs, ModelRef.of(Path(cfg.policy)), stage=stage) == pairs[3:]
    assert stage.counts == {
        "pairs dropped: longer than the context of 1024 tokens": 2,
        "pairs dropped: the same conversation twice": 1,
        "pairs kept": 2,
    }
