"""The command line as its user meets it: help, presets and files, and the single steps one after another."""

import json
from pathlib import Path

import pytest
import yaml

from prefloop.cli import COMMANDS, load, main, option_names, overview
from prefloop.records import Group, Pair
from tests.tiny import save_tiny_model

SMALL = {
    "train": {"steps": 2, "batch_size": 1, "validation_pairs": 0, "checkpoint_every": 1, "warmup_steps": 0},
    "look_at": {"answers": 0, "shown": 0},
    "compute": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(save_tiny_model(folder / "policy", seed=1)), str(save_tiny_model(folder / "reference", seed=2))


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [{"prompt": f"Q{i}?", "chosen": f"yes {i}", "rejected": f"no, {i}"} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "pairs.jsonl")


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").split("\n")[:-1]


def test_the_overview_has_a_line_for_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0 and main(["--help"]) == 0
    assert capsys.readouterr().out == 2 * (overview() + "\n")
    for name, command in COMMANDS.items():
        assert f"  {name:<15}{command.line}" in overview()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_lists_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    config = load(COMMANDS[name].config)
    for option in option_names(config):
        if option not in ("--out", "--preset", "--config") or COMMANDS[name].is_recipe:
            assert option in out, option
    assert all(field.description for field in config.model_fields.values() if field.annotation in (str, int, float))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bpo", "--phases", "2.5"], "--phases 2.5: expected a whole number or all"),
        (["pairs", "x", "--alpha", "abc"], "--alpha abc: expected a number or auto"),
        (["sail", "--mixture", "x"], "--mixture x: expected None or a number"),
    ],
)
def test_an_option_of_several_kinds_says_them(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    assert capsys.readouterr().err == f"prefloop: {message}\n"


@pytest.mark.parametrize(("name", "preset"), [(n, p) for n, c in COMMANDS.items() for p in c.presets])
def test_every_preset_can_be_made_and_written(name: str, preset: str) -> None:
    cfg = load(COMMANDS[name].config.split(":")[0] + ":" + preset)()
    assert type(cfg).model_validate(yaml.safe_load(cfg.to_yaml())) == cfg


def test_an_option_wins_over_a_file_and_a_file_over_a_preset(
    tmp_path: Path, models: tuple[str, str], data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    file = tmp_path / "mine.yaml"
    file.write_text(
        yaml.safe_dump({**SMALL, "policy": models[0], "pairs": data, "held_out": "", "beta": 0.2, "seed": 3})
    )
    command = ["dpo", "--preset", "demo", "--config", str(file), "--seed", "4", "--out", str(out)]
    assert main(command) == 0
    cfg = yaml.safe_load((out / "config.yaml").read_text())
    assert (cfg["beta"], cfg["seed"], cfg["sampling"]["temperature"]) == (0.2, 4, 0.7)
    assert "report" in capsys.readouterr().out
    # The run folder's own config.yaml continues the run, and nothing is computed again.
    before = (out / "manifest.json").read_bytes()
    assert main(["dpo", "--config", str(out / "config.yaml"), "--out", str(out)]) == 0
    assert (out / "manifest.json").read_bytes() == before
    assert "done before, reused" in capsys.readouterr().err


def test_the_steps_one_after_another(
    tmp_path: Path, models: tuple[str, str], data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, reference = models
    drawn, scored, made = (str(tmp_path / name) for name in ("groups.jsonl", "scored.jsonl", "made.jsonl"))
    assert main(["sample", "--policy", policy, "--prompts", data, "--k", "6", "--out", drawn,
                 "--sampling.max-new-tokens", "200", "--compute.sampling-dtype", "float32"]) == 0  # fmt: skip
    assert main(["score", drawn, "--policy", policy, "--reference", reference, "--out", scored]) == 0
    assert main(["pairs", scored, "--out", made, "--offline", data, "--replay-fraction", "0.5"]) == 0
    sampled = [Group.from_json(line) for line in lines(Path(drawn))]
    judged = [Group.from_json(line) for line in lines(Path(scored))]
    assert len(sampled) == len(judged) == 6 and all(len(group.responses) == 6 for group in judged)
    for before, after in zip(sampled, judged, strict=True):
        assert [r.token_ids for r in before.responses] == [r.token_ids for r in after.responses]
        for response in after.responses:
            assert response.policy_logp is not None and response.reference_logp is not None
            assert response.score == response.policy_logp - response.reference_logp
    mixed = [Pair.from_json(line) for line in lines(Path(made))]
    assert {pair.source for pair in mixed} == {"generated", "offline"}
    length = json.loads(Path(made + ".length.json").read_text())
    assert length["unit"] == "chars" and length["alpha"] >= 0
    assert not list(tmp_path.glob("*.work"))
    assert f"{made}: {len(mixed)} rows" in capsys.readouterr().out


def test_scores_of_a_users_own_file_under_any_two_models(tmp_path: Path, models: tuple[str, str], data: str) -> None:
    rows = [
        {"prompt": "One?", "responses": ["a", "bb"]},
        {"prompt": [{"role": "user", "content": "Two?"}], "response": "first"},
        {"prompt": "Two?", "completion": "second"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scored.jsonl"
    assert main(["score", str(file), "--policy", models[1], "--reference", models[0], "--out", str(out)]) == 0
    groups = [Group.from_json(line) for line in lines(out)]
    assert [[r.text for r in group.responses] for group in groups] == [["a", "bb"], ["first", "second"]]
    # A file of pairs is scored as groups of two.
    assert (
        main(["score", data, "--policy", models[1], "--reference", models[0], "--out", str(tmp_path / "p.jsonl")]) == 0
    )
    assert [r.text for r in Group.from_json(lines(tmp_path / "p.jsonl")[0]).responses] == ["yes 0", "no, 0"]


def test_answers_of_one_model_can_be_scored_under_others(tmp_path: Path, models: tuple[str, str], data: str) -> None:
    third = str(save_tiny_model(tmp_path / "third", seed=9))
    drawn, scored = str(tmp_path / "groups.jsonl"), str(tmp_path / "scored.jsonl")
    assert main(["sample", "--policy", third, "--prompts", data, "--k", "2", "--out", drawn,
                 "--sampling.max-new-tokens", "20"]) == 0  # fmt: skip
    assert main(["score", drawn, "--policy", models[0], "--reference", models[1], "--out", scored]) == 0


def test_inspect_shows_prompt_response_and_end(
    models: tuple[str, str], data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", data, "--model", models[0], "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "«yes 0»" in out and "<|im_end|>" in out and "chosen tokens" in out


def test_rows_that_do_not_fit_can_be_skipped_and_are_listed(
    tmp_path: Path, models: tuple[str, str], data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path(data).open("a") as handle:
        handle.write(json.dumps({"prompt": "Bad?", "chosen": "same", "rejected": "same"}) + "\n")
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "policy": models[0], "pairs": data, "on_bad_row": "skip"}))
    assert main(["dpo", "--config", str(file), "--out", str(tmp_path / "run")]) == 0
    err = capsys.readouterr().err
    assert "1 rows skipped" in err and "are the same text" in err
    events = [json.loads(line) for line in lines(tmp_path / "run/events.jsonl")]
    assert [event["row"] for event in events if event["event"] == "row skipped"] == [7]


def test_interrupted_says_how_to_continue(
    tmp_path: Path,
    models: tuple[str, str],
    data: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prefloop.train.learner import Learner

    def interrupt(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "step", interrupt)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "policy": models[0], "pairs": data}))
    assert main(["dpo", "--config", str(file), "--out", str(tmp_path / "run")]) == 130
    assert "interrupted in round-1/model; run the same command again to continue" in capsys.readouterr().err
