"""Recipes end to end on tiny real models: the right model in every role, the counts, the bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from prefloop.data.chat import ChatFormat
from prefloop.errors import InputError
from prefloop.models import ModelRef, load_tokenizer
from prefloop.recipes.dice import DiceConfig, Filters, demo, dice, paper
from prefloop.recipes.dpo import DpoConfig, dpo
from prefloop.recipes.steps import LookAt, offline_and_held_out, run_in_folder
from prefloop.records import Group, Pair, Response
from prefloop.report.story import read_story
from prefloop.run import Run
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Train
from prefloop.train.reference import logps_under
from tests.tiny import save_tiny_model

COMPUTE = Compute(device="cpu", dtype="float32", sampling_dtype="float32", sequences_per_batch=16)
TRAIN = Train(steps=3, batch_size=2, learning_rate=2e-3, warmup_steps=1, validation_pairs=1, validate_every=2,
              checkpoint_every=1)  # fmt: skip
ANSWERS = ["Yes.", "It is blue, I think.", "No, never on a Sunday.", "Two or three.", "Ask me later, please."]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("start") / "tiny", seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, numbers: range) -> str:
        rows = [
            {"prompt": f"Question {i}?", "chosen": ANSWERS[i % 5], "rejected": ANSWERS[(i + 2) % 5]} for i in numbers
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    return {"pairs": write("pairs.jsonl", range(12)), "held_out": write("held_out.jsonl", range(20, 26))}


@pytest.fixture(scope="module")
def cfg(start: Path, data: dict[str, str]) -> DiceConfig:
    return DiceConfig(
        policy=str(start),
        **data,
        k=6,
        sampling=Sampling(max_new_tokens=160),
        filters=Filters(min_valid=2),
        look_at=LookAt(answers=3, shown=1),
        start=TRAIN,
        train=TRAIN,
        compute=COMPUTE,
        seed=1,
    )


def run_dice(cfg: DiceConfig, out: Path) -> Path:
    with Run.open(out, recipe="dice", config=cfg) as run:
        dice(cfg, run)
    return out


@pytest.fixture(scope="module")
def finished(cfg: DiceConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_dice(cfg, tmp_path_factory.mktemp("dice") / "run")


def groups(file: Path) -> list[Group]:
    return [Group.from_json(line) for line in file.read_text().splitlines()]


def pairs(file: Path) -> list[Pair]:
    return [Pair.from_json(line) for line in file.read_text().splitlines()]


def logps(model: Path, group: Group) -> list[float]:
    return logps_under(ModelRef.of(model), [(group.prompt, group.responses)], compute=COMPUTE)[0]


@pytest.mark.parametrize(
    ("t", "numerator", "denominator"), [(1, "round-0/model", None), (2, "round-1/model", "round-0/model")]
)
def test_the_reward_of_round_t_is_the_change_of_the_round_before(
    finished: Path, start: Path, t: int, numerator: str, denominator: str | None
) -> None:
    scored = groups(finished / f"round-{t}/feedback.jsonl")
    assert len(scored) >= 4
    for group in scored[:3]:
        above = logps(finished / numerator, group)
        below = logps(finished / denominator if denominator else start, group)
        for response, a, b in zip(group.responses, above, below, strict=True):
            assert response.policy_logp == pytest.approx(a, abs=1e-3)
            assert response.score == pytest.approx(a - b, abs=2e-3)


@pytest.mark.parametrize("t", [1, 2])
def test_the_training_reference_of_round_t_is_the_round_start_policy(finished: Path, t: int) -> None:
    reference = ModelRef.of(finished / f"round-{t - 1}/model")
    ready = pairs(finished / f"round-{t}/training_pairs.jsonl")
    assert {pair.source for pair in ready} == {"generated", "offline"}
    scored = {group.prompt.id: group for group in groups(finished / f"round-{t}/feedback.jsonl")}
    for pair in ready:
        assert pair.reference == reference.fingerprint
        found = logps_under(reference, [(pair.prompt, (pair.chosen, pair.rejected))], compute=COMPUTE)[0]
        assert pair.reference_logps == pytest.approx(found, abs=1e-3)
        if pair.source == "generated":
            # The scorer's own figures, bit for bit: nothing was computed twice.
            known = {response.token_ids: response.policy_logp for response in scored[pair.prompt.id].responses}
            assert pair.reference_logps == (known[pair.chosen.token_ids], known[pair.rejected.token_ids])
    counts = json.loads((finished / "manifest.json").read_text())["stages"][f"round-{t}/training_pairs"]["counts"]
    assert counts == {
        "reference log-probabilities already known from scoring": sum(p.source == "generated" for p in ready),
        "reference log-probabilities computed": sum(p.source == "offline" for p in ready),
    }


@pytest.mark.parametrize("t", [1, 2])
def test_each_prompt_occurs_once_and_best_beats_worst(finished: Path, t: int) -> None:
    mixed = pairs(finished / f"round-{t}/mixed.jsonl")
    assert len({pair.prompt.id for pair in mixed}) == len(mixed)
    for pair in pairs(finished / f"round-{t}/pairs.jsonl"):
        assert pair.chosen_score is not None and pair.rejected_score is not None
        assert pair.chosen_score > pair.rejected_score
        assert pair.chosen.token_ids != pair.rejected.token_ids
        assert pair.chosen.finish_reason == "stop"


def test_the_length_gap_is_smaller_at_alpha_star(finished: Path) -> None:
    for t in (1, 2):
        length = json.loads((finished / f"round-{t}/length.json").read_text())
        assert abs(length["gap"]) <= abs(length["gap_at_zero"])
        assert length["unit"] == "chars" and length["beta_inside"] is False


def test_every_model_is_looked_at_and_the_final_one_loads(finished: Path) -> None:
    story = read_story(finished)
    assert [round.label for round in story.rounds] == ["start", "round-0", "round-1", "round-2"]
    checkups = [round.checkup for round in story.rounds]
    assert all(checkup is not None and checkup.pairs == 6 and checkup.answers == 3 for checkup in checkups)
    first = checkups[0]
    assert first is not None and first.accuracy is not None and first.kl_per_token is not None
    # The start model beside itself: no margin, so every pair is a tie, and no drift.
    assert first.accuracy[0] == 0.5 and first.kl_per_token[0] == 0.0
    assert (finished / "model/model.safetensors").read_bytes() == (
        finished / "round-2/model/model.safetensors"
    ).read_bytes()
    AutoModelForCausalLM.from_pretrained(finished / "model")
    card = (finished / "model/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "seed 1" in card and "| held-out accuracy |" in card


def test_the_report_says_what_happened(finished: Path) -> None:
    report = (finished / "report.md").read_text()
    for heading in ("Figures by round", "Curves", "Before and after", "Kept and dropped", "Time"):
        assert f"## {heading}" in report
    for plot in ("alpha.png", "training.png"):
        assert plot in report and (finished / plot).read_bytes().startswith(b"\x89PNG")


def artifacts(run: Path) -> dict[str, bytes]:
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    files = []
    for entry in stages.values():
        path = run / entry["artifact"]["path"]
        files += [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_the_same_command_again_computes_nothing(cfg: DiceConfig, finished: Path) -> None:
    before = (finished / "manifest.json").read_bytes()
    run_dice(cfg, finished)
    assert (finished / "manifest.json").read_bytes() == before


@pytest.mark.slow
def test_same_seed_same_bytes_other_seed_other_answers(cfg: DiceConfig, finished: Path, tmp_path: Path) -> None:
    one = cfg.replace(rounds=1)
    again, other = run_dice(one, tmp_path / "again"), run_dice(one.replace(seed=2), tmp_path / "other")
    mine, theirs = artifacts(finished), artifacts(again)
    same = [name for name in theirs if not name.startswith("model/")]
    assert len(same) > 15
    assert [name for name in same if mine[name] != theirs[name]] == []
    assert (other / "round-1/groups.jsonl").read_bytes() != (again / "round-1/groups.jsonl").read_bytes()


@pytest.mark.slow
def test_killed_three_times_it_ends_in_the_same_bytes(cfg: DiceConfig, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_text(cfg.to_yaml())
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "prefloop.cli", "dice", "--config", str(tmp_path / "cfg.yaml"), "--out", str(out)]

    def seen(stage: str, event: str) -> bool:
        file = out / "events.jsonl"
        wanted = (f'"event": "{event}"', f'"stage": "{stage}"')
        return file.is_file() and any(all(part in line for part in wanted) for line in file.read_text().splitlines())

    for stage, event in [("round-0/model", "step"), ("round-1/groups", "started"), ("round-2/model", "saving")]:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not seen(stage, event):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    run_dice(cfg, out)
    mine, theirs = artifacts(finished), artifacts(out)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert not list(out.rglob("*.partial")) and not list(out.rglob(".tmp-*"))


@pytest.mark.slow
def test_given_a_policy_and_its_reference_no_first_round_is_trained(
    cfg: DiceConfig, finished: Path, start: Path, tmp_path: Path
) -> None:
    given = cfg.replace(policy=str(finished / "round-0/model"), reference=str(start), rounds=1)
    out = run_dice(given, tmp_path / "run")
    assert not (out / "round-0/model").exists()
    # The same models in the same roles as in the run that trained its first policy itself.
    assert (out / "round-1/feedback.jsonl").read_bytes() == (finished / "round-1/feedback.jsonl").read_bytes()
    assert (out / "model/model.safetensors").read_bytes() == (finished / "round-1/model/model.safetensors").read_bytes()


def test_gamma_1_trains_on_offline_pairs_and_samples_nothing(cfg: DiceConfig, start: Path, tmp_path: Path) -> None:
    """And the baseline of a reference that stays: every pair's is the start model."""
    out = run_dice(cfg.replace(rounds=1, replay_fraction=1.0, training_reference="start"), tmp_path / "run")
    assert not (out / "round-1/groups.jsonl").exists()
    mixed = pairs(out / "round-1/mixed.jsonl")
    assert len(mixed) == 12 and {pair.source for pair in mixed} == {"offline"}
    assert {pair.reference for pair in pairs(out / "round-1/training_pairs.jsonl")} == {ModelRef.of(start).fingerprint}


def longest_wins(groups: Sequence[Group]) -> list[list[float | None]]:
    """A scorer of a user's own; it has no score for answers that begin with a vowel."""
    return [
        [None if r.text[:1].lower() in "aeiou" else float(r.length_chars) for r in group.responses] for group in groups
    ]


@pytest.mark.slow
def test_gamma_0_trains_on_generated_pairs_alone_here_by_a_scorer_of_ones_own(cfg: DiceConfig, tmp_path: Path) -> None:
    own = cfg.replace(rounds=1, replay_fraction=0.0, scorer="tests.test_recipes:longest_wins", alpha=0.0)
    out = run_dice(own, tmp_path / "run")
    made, mixed = pairs(out / "round-1/pairs.jsonl"), pairs(out / "round-1/mixed.jsonl")
    assert {pair.source for pair in mixed} == {"generated"} and len(mixed) == len(made)
    assert made
    assert all(pair.chosen.length_chars > pair.rejected.length_chars for pair in made)
    assert all(pair.chosen_score == pair.chosen.length_chars for pair in made)


def test_dpo_trains_looks_and_exports(start: Path, data: dict[str, str], tmp_path: Path) -> None:
    cfg = DpoConfig(policy=str(start), **data, train=TRAIN, compute=COMPUTE, sampling=Sampling(max_new_tokens=40),
                    look_at=LookAt(answers=2, shown=1))  # fmt: skip
    with Run.open(tmp_path / "run", recipe="dpo", config=cfg) as run:
        model = dpo(cfg, run)
    assert model.weights != ModelRef.of(start).weights
    story = read_story(tmp_path / "run")
    assert [round.label for round in story.rounds] == ["start", "round-1"]
    assert [row["step"] for row in story.rounds[1].training if "loss" in row] == [1, 2, 3]


def test_without_held_out_a_tenth_of_the_pairs_is_held_out(start: Path, data: dict[str, str], tmp_path: Path) -> None:
    cfg = DpoConfig(policy=str(start), pairs=data["pairs"], train=TRAIN, compute=COMPUTE,
                    look_at=LookAt(answers=0, shown=0))  # fmt: skip
    with Run.open(tmp_path / "run", recipe="dpo", config=cfg) as run:
        dpo(cfg, run)
    held_out = {pair.prompt.id for pair in pairs(tmp_path / "run/start/held_out.jsonl")}
    trained = {pair.prompt.id for pair in pairs(tmp_path / "run/round-1/training_pairs.jsonl")}
    assert len(held_out) == 1 and len(trained) == 11 and not held_out & trained


def test_prompts_that_are_held_out_are_not_trained_on(start: Path, data: dict[str, str], tmp_path: Path) -> None:
    lines = (Path(data["pairs"]).read_text() + Path(data["held_out"]).read_text()).splitlines(keepends=True)
    (tmp_path / "both.jsonl").write_text("".join(lines))
    cfg = DpoConfig(policy=str(start), pairs=str(tmp_path / "both.jsonl"), held_out=data["held_out"], compute=COMPUTE)
    with Run.open(tmp_path / "run", recipe="dpo", config=cfg) as run:
        offline, held_out = offline_and_held_out(cfg, run, ModelRef.of(start))
        with pytest.raises(InputError, match="all 6 rows to train on have prompts that are held out too"):
            offline_and_held_out(cfg.replace(pairs=data["held_out"]), run, ModelRef.of(start))
    assert len(offline) == 12 and not {pair.prompt.id for pair in offline} & {pair.prompt.id for pair in held_out}
    assert "6 rows left out of training: held-out prompts" in (tmp_path / "run/events.jsonl").read_text()


def test_run_in_folder_prints_the_table_and_the_places(
    start: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = DpoConfig(policy=str(start), **data, train=TRAIN, compute=COMPUTE, look_at=LookAt(answers=0, shown=0))

    def method(cfg: Any, run: Run) -> ModelRef:
        return dpo(cfg, run)

    run_in_folder("dpo", method, cfg, tmp_path / "run")
    out = capsys.readouterr().out
    assert "held-out" in out and f"report  {tmp_path / 'run/report.html'}" in out and "model   " in out


def test_presets_hold_what_their_pages_say() -> None:
    published = paper()
    assert (published.k, published.rounds, published.replay_fraction, published.beta) == (16, 2, 0.5, 0.1)
    assert (published.sampling.temperature, published.sampling.top_p, published.sampling.max_new_tokens) == (
        0.7,
        0.9,
        2048,
    )
    train = published.train
    assert (train.steps, train.batch_size, train.learning_rate, train.warmup_steps) == (300, 32, 5e-7, 50)
    assert (train.validation_pairs, published.filters.min_valid) == (576, 8)
    assert (published.filters.min_chars, published.filters.max_chars, published.length_unit) == (3, 6700, "chars")
    assert demo().policy == "smollm2-135m" and demo().rounds == 2


def test_token_ids_of_another_tokenizer_are_not_believed(start: Path) -> None:
    chat = ChatFormat(load_tokenizer(ModelRef.of(start)))
    own = chat.with_token_ids(Response(text="yes"))
    assert chat.own_ids(own) == own
    for foreign in ((1, 2, 3), (10_000,), ()):
        assert chat.own_ids(own.model_copy(update={"token_ids": foreign})) == own
