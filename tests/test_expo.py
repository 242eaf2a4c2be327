"""ExPO as a recipe: what is tried, what is chosen, what is left behind, and the same bytes after an interruption."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from prefloop.cli import main
from prefloop.errors import OutOfRange
from prefloop.evaluate.candidate import Candidate, Guard
from prefloop.evaluate.win_rate import WinRate
from prefloop.models import ModelRef
from prefloop.recipes import expo as recipe
from prefloop.recipes.expo import ExpoConfig, Search, best, expo, next_alphas
from prefloop.recipes.steps import LookAt
from prefloop.records import Group
from prefloop.report.markdown import write_report
from prefloop.report.page import page_of
from prefloop.report.readings import read
from prefloop.report.story import read_story
from prefloop.report.table import ALPHAS, alphas
from prefloop.run import Run
from prefloop.sample.sampling import Sampling
from prefloop.sample.stage import sample
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Train
from prefloop.train.reference import logps_under
from tests.merge.test_extrapolate import WEIGHTS, adapter_on
from tests.sample.engines import ids_of, stopping_folder
from tests.test_recipes import artifacts

COMPUTE = Compute(device="cpu", dtype="float32", sampling_dtype="float32", sequences_per_batch=16)


def shorter(groups: Sequence[Group]) -> list[list[float | None]]:
    return [[-float(response.length_chars) for response in group.responses] for group in groups]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and a model that ends its answers sooner: along their line answers get shorter."""
    base, aligned = stopping_folder().path, tmp_path_factory.mktemp("aligned") / "tiny"
    shutil.copytree(base, aligned)
    tensors = load_file(base / WEIGHTS)
    tensors["model.embed_tokens.weight"][258] *= 1.2  # the end token
    save_file(tensors, aligned / WEIGHTS, metadata={"format": "pt"})
    return base, aligned


@pytest.fixture(scope="module")
def cfg(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> ExpoConfig:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(20)))
    return ExpoConfig(
        base=str(models[0]),
        aligned=str(models[1]),
        alpha="auto",
        prompts=str(file),
        annotator="rule:short",
        search=Search(grid=(0.5,), largest=1.0, limit=8),
        guard=Guard(length_ratio=50, finished_drop=1.0, distinct_ratio=0.0, perplexity_ratio=50, repetition_rise=1.0),
        sampling=Sampling(max_new_tokens=24),
        look_at=LookAt(answers=2, shown=1),
        compute=COMPUTE,
        engine="transformers",
    )


def run_expo(cfg: ExpoConfig, out: Path) -> Path:
    with Run.open(out, recipe="expo", config=cfg) as run:
        expo(cfg, run)
    return out


@pytest.fixture(scope="module")
def finished(cfg: ExpoConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_expo(cfg, tmp_path_factory.mktemp("expo") / "run")


def groups(file: Path) -> list[Group]:
    return [Group.from_json(line) for line in file.read_text().split("\n")[:-1]]


def test_the_figures_of_every_alpha_are_of_its_own_answers(finished: Path, models: tuple[Path, Path]) -> None:
    tried = read_story(finished).tried
    assert {-1.0, 0.0, 0.5, 1.0} <= {one.alpha for one in tried}
    own = groups(finished / "search/alpha-0/answers.jsonl")
    for one in tried:
        answers = groups(finished / f"search/alpha-{one.alpha:g}/answers.jsonl")
        assert [group.prompt for group in answers] == [group.prompt for group in own]
        pairs = [(a.responses[0].length_chars, b.responses[0].length_chars) for a, b in zip(answers, own, strict=True)]
        wins = sum(1.0 if a < b else 0.5 if a == b else 0.0 for a, b in pairs)
        assert one.rate and one.rate[0] == pytest.approx(wins / len(pairs))
        logps = logps_under(ModelRef.of(models[1]), [(g.prompt, g.responses) for g in answers], compute=COMPUTE)
        tokens = sum(group.responses[0].length_tokens for group in answers)
        assert one.perplexity
        assert one.perplexity[0] == pytest.approx(math.exp(-sum(row[0] for row in logps) / tokens), rel=1e-4)


@pytest.mark.parametrize(("alpha", "which"), [("-1", 0), ("0", 1)])
def test_alpha_0_and_minus_1_answer_as_the_two_models_do(
    cfg: ExpoConfig, finished: Path, models: tuple[Path, Path], alpha: str, which: int
) -> None:
    """The same seeds at every alpha: answers change because weights do."""
    found = groups(finished / f"search/alpha-{alpha}/answers.jsonl")
    prompts = [group.prompt for group in found]
    drawn = sample(ModelRef.of(models[which]), prompts, k=1, sampling=cfg.sampling, seed=derive_seed(0, "answers"),
                   compute=COMPUTE, engine="transformers")  # fmt: skip
    assert len(prompts) == 8 and ids_of(found) == ids_of(drawn)


def test_the_best_is_chosen_and_is_the_model_of_the_run(finished: Path, models: tuple[Path, Path]) -> None:
    story = read_story(finished)
    top = max(story.tried, key=lambda one: (one.rate[0] if one.rate else 0, -one.alpha))
    assert story.alpha == top.alpha > 0
    theta_0, theta_1 = (load_file(model / WEIGHTS)["model.embed_tokens.weight"] for model in models)
    found = load_file(finished / "model" / WEIGHTS)["model.embed_tokens.weight"]
    torch.testing.assert_close(found, theta_1 + top.alpha * (theta_1 - theta_0), rtol=1e-6, atol=0)
    assert f"alpha = {top.alpha}" in (finished / "model/README.md").read_text()
    assert not (finished / "model/training_log.jsonl").exists()


def test_the_models_that_were_tried_are_gone(finished: Path) -> None:
    assert {file.parent.name for file in finished.rglob("*.safetensors")} == {"model"}
    assert not list((finished / "search").rglob("*.safetensors"))


def test_every_table_has_every_alpha(finished: Path) -> None:
    story = read_story(finished)
    rows = alphas(story)
    assert [row[0].split()[0] for row in rows[:-2]] == [f"{one.alpha:g}" for one in story.tried]
    assert sum("(chosen)" in row[0] for row in rows) == 1
    assert rows[-2][0] == "0 (aligned), held out" and rows[-1][0] == f"{story.alpha:g} (expo), held out"
    report = write_report(story).read_text()
    page = page_of([story])
    assert all("| " + " | ".join(row) + " |" in report for row in rows)
    assert page.runs[0].alphas.head == ALPHAS and page.runs[0].alphas.rows == [tuple(row) for row in rows]
    (charts,) = [found for name, found in page.charts if name == "Search over alpha"]
    assert charts[0].series[0].points == [(i, one.rate[0]) for i, one in enumerate(story.tried) if one.rate]
    assert [round.label for round in story.rounds] == ["aligned", "expo"]


@pytest.fixture(scope="module")
def by_scorer(cfg: ExpoConfig) -> ExpoConfig:
    return cfg.replace(annotator="", scorer="tests.test_expo:shorter", search__largest=0.5, search__keep_models=True,
                       look_at__answers=0)  # fmt: skip


@pytest.fixture(scope="module")
def scored(by_scorer: ExpoConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_expo(by_scorer, tmp_path_factory.mktemp("expo") / "run")


def test_a_scorer_counts_by_its_mean_and_models_can_be_kept(scored: Path) -> None:
    story = read_story(scored)
    assert [one.alpha for one in story.tried] == [-1.0, 0.0, 0.5] and story.alpha in (0.0, 0.5)
    for one in story.tried:
        answers = groups(scored / f"search/alpha-{one.alpha:g}/answers.jsonl")
        scores = [-group.responses[0].length_chars for group in answers]
        assert one.score and one.score[0] == pytest.approx(sum(scores) / len(scores))
    kept = scored / f"search/alpha-{story.alpha:g}/model" / WEIGHTS
    assert kept.read_bytes() == (scored / "model" / WEIGHTS).read_bytes()


def test_an_interrupted_search_ends_in_the_same_bytes(
    by_scorer: ExpoConfig, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = recipe.sample, iter(range(100))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(recipe, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_expo(by_scorer, tmp_path / "run")
    # The model of that alpha is there still, and is not made again.
    assert (tmp_path / "run/search/alpha-0.5/answers.partial/model" / WEIGHTS).is_file()
    run_expo(by_scorer, tmp_path / "run")
    mine, theirs = artifacts(scored), artifacts(tmp_path / "run")
    assert mine.keys() == theirs.keys() and [name for name in mine if mine[name] != theirs[name]] == []
    assert not list(tmp_path.rglob("*.partial"))
    before = (tmp_path / "run/manifest.json").read_bytes()
    run_expo(by_scorer, tmp_path / "run")
    assert (tmp_path / "run/manifest.json").read_bytes() == before


def test_an_alpha_that_overflows_is_refused_and_the_search_goes_on(
    by_scorer: ExpoConfig, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 a number ends at 65504; an engine may store weights in it that the model has in float32."""
    real = recipe.sample

    def stored(model: ModelRef, *args: Any, **kwargs: Any) -> Any:
        if model.name == "alpha = 1":
            raise OutOfRange("too large for the engine")
        return real(model, *args, **kwargs)

    monkeypatch.setattr(recipe, "sample", stored)
    base, aligned = tmp_path / "base", tmp_path / "aligned"
    for theta, folder, factor in ((models[0], base, 1.0), (models[1], aligned, 1.5)):
        shutil.copytree(theta, folder)
        tensors = {name: value.half() for name, value in load_file(folder / WEIGHTS).items()}
        tensors["model.norm.weight"][0] *= factor
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    out = run_expo(
        by_scorer.replace(base=str(base), aligned=str(aligned), search__grid=(0.5, 1.0, 1e12)), tmp_path / "run"
    )
    story = read_story(out)
    assert [(one.alpha, one.answers) for one in story.tried] == [(-1.0, 8), (0.0, 8), (0.5, 8), (1.0, 0), (1e12, 0)]
    assert story.tried[3].refused == "too large for the engine"
    assert story.alpha is not None and story.alpha < 1.0
    assert "alpha = 1e+12 takes model." in (why := story.tried[-1].refused or "") and why.endswith("lower it")
    assert why in (out / "report.md").read_text() and (out / "search/alpha-1e12/figures.json").is_file()


def simulated(
    value: Any, *, grid: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5), largest: float = 32.0
) -> list[Candidate]:
    """A whole search, whose candidates score `value(alpha)`; None is refused."""
    found: list[Candidate] = []
    while new := next_alphas(found, grid=grid, largest=largest):
        for alpha in new:
            score = value(alpha)
            found.append(Candidate(alpha=alpha, answers=1, score=None if score is None else (score, score, score),
                                   refused="broken" if score is None else None))  # fmt: skip
    return found


def test_a_best_alpha_inside_the_grid_ends_the_search() -> None:
    found = simulated(lambda a: -((a - 0.3) ** 2))
    assert [one.alpha for one in found] == [0.0, -1.0, 0.1, 0.2, 0.3, 0.4, 0.5] and best(found).alpha == 0.3


@pytest.mark.parametrize("top", [0.8, 2.5, 8.0, 25.0])
def test_the_alphas_of_the_paper_for_short_trainings_are_found_beyond_the_grid(top: float) -> None:
    found = simulated(lambda a: -abs(math.log(max(a, 1e-3) / top)))
    assert best(found).alpha == pytest.approx(top, rel=0.25)
    assert len(found) <= 7 + 7 + 6


def test_where_the_guard_stops_it_the_search_goes_back() -> None:
    found = simulated(lambda a: a if a < 5 else None)
    assert best(found).alpha == pytest.approx(5, rel=0.25) and best(found).alpha < 5
    assert [one.alpha for one in simulated(lambda a: a, grid=(0.5,), largest=2)][:5] == [0.0, -1.0, 0.5, 1.0, 2.0]


def test_when_nothing_is_better_the_aligned_model_comes_out() -> None:
    assert best(simulated(lambda a: -abs(a))).alpha == 0.0
    assert best(simulated(lambda a: 1.0)).alpha == 0.0  # of equals the smaller
    assert best(simulated(lambda a: None if a > 0 else 5.0 - a)).alpha == 0.0  # never theta_0


def test_two_models_without_names_on_the_command_line(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, aligned = map(str, models)
    assert main(["expo", base, aligned, "--alpha", "0.5", "--out", str(tmp_path / "run")]) == 0
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (config["base"], config["aligned"], config["alpha"]) == (base, aligned, 0.5)
    assert f"model   {tmp_path / 'run/model'}" in capsys.readouterr().out
    assert "alpha = 0.5" in (tmp_path / "run/model/README.md").read_text()
    for args, message in [
        ([base], "expected two models, prefloop expo BASE ALIGNED"),
        ([base, base], "have the same weights: there is nothing to extrapolate"),
        ([base, aligned, "--alpha", "auto", "--prompts", "seed:train"], "--alpha auto needs --annotator"),
        ([base, aligned, "--alpha", "auto"], "--prompts is missing"),
        ([base, aligned, "--pairs", "seed:train"], "the pairs are for making the aligned model"),
        ([base, aligned, "--alpha", "nan"], "expected auto, or a finite number"),
        ([base, aligned, "--search.grid", "0.5", "0.1"], "expected numbers above 0, ascending"),
    ]:
        assert main(["expo", *args, "--out", str(tmp_path / "refused")]) == 2, args
        err = capsys.readouterr().err
        assert message in err.splitlines()[-1], (args, err)


def test_an_adapter_comes_out_as_a_model_and_as_an_adapter(tmp_path: Path, models: tuple[Path, Path]) -> None:
    base = ModelRef.of(models[0])
    adapter = adapter_on(base, tmp_path / "adapter")
    out = run_expo(ExpoConfig(base=str(models[0]), aligned=str(adapter), alpha=1.0), tmp_path / "run")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, out / "adapter"))
    for name in before:
        torch.testing.assert_close(after[name], before[name] * (2 if "lora_B" in name else 1))
    assert ModelRef.of(out / "model").weights != base.weights
    with pytest.raises(recipe.InputError, match=r"adapter .* is on .*, not on base"):
        run_expo(ExpoConfig(base=str(models[1]), aligned=str(adapter)), tmp_path / "other")


def test_pairs_make_the_aligned_model_first(models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i}?", "chosen": f"yes {i}", "rejected": f"no, {i}"} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = Train(steps=2, batch_size=2, learning_rate=2e-3, warmup_steps=0, validation_pairs=0, checkpoint_every=2)
    cfg = ExpoConfig(base=str(models[0]), pairs=str(tmp_path / "pairs.jsonl"), alpha=2.0, train=train, compute=COMPUTE)
    out = run_expo(cfg, tmp_path / "run")
    theta_0, theta_1 = (load_file(f / WEIGHTS) for f in (models[0], out / "aligned/model"))
    found = load_file(out / "model" / WEIGHTS)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 3 * theta_1[name] - 2 * theta_0[name], rtol=1e-5, atol=1e-6)
    assert read_story(out).rounds[0].steps[-1]["step"] == 2


def test_the_readings_say_what_a_search_shows(finished: Path) -> None:
    from dataclasses import replace

    story = read_story(finished)
    said = [reading.text for reading in read(replace(story, alpha=0.0))]
    assert any("nothing that the guard let pass" in text for text in said)
    largest = max(one.alpha for one in story.tried)
    said = [reading.text for reading in read(replace(story, alpha=largest))]
    assert any(f"the largest alpha that was tried ({largest:g}) is the best" in text for text in said)
    won = WinRate(rate=(0.8, 0.6, 1.0), judged=8, wins=6, losses=1, ties=1, abstained=0)
    base = [one.model_copy(update={"preferred": won}) for one in story.tried[:1]]
    assert any("prefers the base" in reading.text for reading in read(replace(story, tried=base + story.tried[1:])))
    assert story.distance is not None
    far = replace(story, distance=story.distance.model_copy(update={"relative": 1.3}))
    assert any("far for an alignment" in reading.text for reading in read(far))


def test_a_head_that_the_files_hold_apart_is_no_tied_one(tmp_path: Path) -> None:
    """The configuration says tied, and the files hold two tensors: transformers takes both, and so does alpha = 0."""
    from prefloop.merge.extrapolate import extrapolate
    from tests.tiny import save_tiny_model

    base, aligned = (save_tiny_model(tmp_path / name, seed=seed) for name, seed in (("base", 1), ("aligned", 2)))
    config = json.loads((aligned / "config.json").read_text())
    (aligned / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    file = aligned / "model.safetensors"
    weights = load_file(file)
    embedding = next(name for name in weights if "embed" in name or "wte" in name)
    weights["lm_head.weight"] = weights[embedding] + 1
    save_file(weights, file, metadata={"format": "pt"})
    extrapolate(ModelRef.of(base), ModelRef.of(aligned), 0.0, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["lm_head.weight"], weights["lm_head.weight"])
