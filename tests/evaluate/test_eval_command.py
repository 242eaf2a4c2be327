"""`prefloop eval` from end to end on tiny models: figures, files, resume, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prefloop.cli import main
from prefloop.evaluate.evaluation import hard
from prefloop.evaluate.figures import Report, percent
from prefloop.run import HEADER
from tests.tiny import save_tiny_model

FAST = ["--sampling.max-new-tokens", "24", "--compute.device", "cpu", "--compute.sampling-dtype", "float32",
        "--engine", "transformers"]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(save_tiny_model(folder / "policy", seed=1)), str(save_tiny_model(folder / "reference", seed=2))


def lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def report(out: Path) -> Report:
    return Report.model_validate_json((out / "eval.json").read_text())


def answers(file: Path, *texts: str) -> str:
    rows = [{"instruction": f"Question {i}?", "output": text, "generator": "m"} for i, text in enumerate(texts)]
    file.write_text(json.dumps(rows))
    return str(file)


def test_files_against_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = answers(tmp_path / "ours.json", "longer here", "long enough", "b", "tie")
    theirs = answers(tmp_path / "theirs.json", "short", "brief", "longer", "tie")
    out = tmp_path / "eval"
    command = ["eval", "--policy", ours, "--against", theirs, "--annotator", "rule:long", "--out", str(out)]
    assert main(command) == 0
    found = report(out)
    assert found.win_rate and found.prompts == 4 and found.drift is None and found.implicit_reward is None
    overall = found.win_rate.overall
    assert (overall.wins, overall.losses, overall.ties, overall.abstained) == (2, 1, 1, 0)
    assert overall.rate and overall.rate[0] == 2.5 / 4
    assert overall.sign_test == 1.0
    assert found.win_rate.length_controlled is not None
    assert json.loads((out / "ours" / "model_outputs.json").read_text())[2]["output"] == "b"
    shown = capsys.readouterr().out
    assert percent(overall.rate) in shown and "2-1-1" in shown and "at equal length" in shown
    assert main(command) == 0
    assert "judgements: done before, reused" in capsys.readouterr().err


def test_models_on_questions_of_two_turns_and_pairs(tmp_path: Path, models: tuple[str, str]) -> None:
    questions = lines(
        tmp_path / "question.jsonl",
        [{"question_id": i, "category": "math", "turns": [f"Add {i}.", "More."]} for i in range(3)],
    )
    pairs = lines(
        tmp_path / "bench.jsonl",
        [{"prompt": f"P{i}", "chosen": f"yes {i}", "rejected": "no", "subset": "donotanswer"} for i in range(4)],
    )
    out = tmp_path / "eval"
    assert main(["eval", "--policy", models[0], "--against", models[1], "--annotator", "rule:long", "--prompts",
                 questions, "--pairs", pairs, "--out", str(out), *FAST]) == 0  # fmt: skip
    found = report(out)
    assert found.win_rate and found.win_rate.overall.judged == 3 and list(found.win_rate.categories) == ["math"]
    assert found.drift and found.drift.answers == 6 and found.drift.kl_per_token
    assert found.implicit_reward and found.implicit_reward.overall.pairs == 4
    assert found.implicit_reward.rewardbench == {
        "Safety": found.implicit_reward.overall.accuracy[0],
        "average": found.implicit_reward.overall.accuracy[0],
    }
    first = [json.loads(line) for line in (out / "ours" / "first.jsonl").read_text().splitlines()]
    second = [json.loads(line) for line in (out / "ours" / "second.jsonl").read_text().splitlines()]
    for before, after in zip(first, second, strict=True):
        assert after["prompt"]["messages"][1]["content"] == before["responses"][0]["text"]
    written = [json.loads(line) for line in (out / "ours" / "model_answer.jsonl").read_text().splitlines()]
    assert [row["choices"][0]["turns"][1] for row in written] == [row["responses"][0]["text"] for row in second]


def test_both_sides_draw_with_the_same_seeds(tmp_path: Path, models: tuple[str, str]) -> None:
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i}"} for i in range(3)])
    out = tmp_path / "eval"
    assert main(["eval", "--policy", models[0], "--against", models[0], "--annotator", "rule:long",
                 "--prompts", prompts, "--limit", "2", "--out", str(out), *FAST]) == 0  # fmt: skip
    found = report(out)
    assert found.prompts == 2 and found.win_rate and found.win_rate.overall.ties == 2
    assert (out / "ours" / "first.jsonl").read_text() == (out / "theirs" / "first.jsonl").read_text()


def test_a_run_against_its_start(tmp_path: Path, models: tuple[str, str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(models[0])
    (run / "config.yaml").write_text(f"{HEADER}dpo\npolicy: {models[1]}\n")
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": "Say 1"}])
    out = tmp_path / "eval"
    assert main(["eval", "--policy", str(run), "--against", "start", "--annotator", "rule:long",
                 "--prompts", prompts, "--out", str(out), *FAST]) == 0  # fmt: skip
    found = report(out)
    assert (found.policy, found.against) == (str(run), models[1])
    assert found.drift and found.drift.kl_per_token is not None


def test_refusals_are_one_clear_line(
    tmp_path: Path, models: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ours = answers(tmp_path / "ours.json", "a", "bb", "ccc")
    fewer = answers(tmp_path / "fewer.json", "a", "bb")
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": "Say 1"}])
    pairs = lines(tmp_path / "pairs.jsonl", [{"prompt": "P", "chosen": "yes", "rejected": "no"}])
    silent = lines(
        tmp_path / "judged.jsonl", [{"prompt": "Else?", "response_1": "x", "response_2": "y", "preference": 1}]
    )
    other = answers(tmp_path / "other.json", "x", "yy", "zzz")
    empty, unfinished = tmp_path / "empty", tmp_path / "unfinished"
    empty.mkdir()
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text(HEADER + "dpo\npolicy: x\n")
    judged = ["--annotator", "rule:long"]
    cases = [
        ([], "--policy is missing"),
        (["--policy", ours], "nothing to measure"),
        (["--policy", ours, "--against", fewer], "--against and --annotator go together"),
        (["--policy", ours, "--against", fewer, *judged], "fewer.json: 1 of 3 prompts have no answer there"),
        (["--policy", fewer, "--against", ours, *judged], "fewer.json: 1 of 3 prompts have no answer there"),
        (["--policy", ours, "--against", ours, "--prompts", prompts, *judged], "1 of 1 prompts have no answer there"),
        (["--policy", ours, "--against", "start", *judged], "ours.json is not a run folder"),
        (["--policy", str(empty), "--prompts", prompts], "neither a run folder (no config.yaml of prefloop in it)"),
        (["--policy", str(unfinished), "--prompts", prompts], "this run has no final model yet"),
        (["--policy", models[0], "--against", models[1], *judged], "--prompts is missing"),
        (["--policy", models[0], "--pairs", pairs], "--pairs needs a model as --policy and a --reference"),
        (["--policy", models[0], "--pairs", pairs, "--reference", models[0]], "have the same weights"),
        (["--policy", ours, "--against", other, "--annotator", f"file:{silent}"], "abstained on 3 of 3 comparisons"),
    ]
    for i, (options, expected) in enumerate(cases):
        assert main(["eval", *options, "--out", str(tmp_path / f"out-{i}")]) == 2
        said = capsys.readouterr().err.strip().split("\n")[-1]
        assert said.startswith("prefloop: ") and expected in said, said


def test_markup_in_categories_and_paths_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "[red]").mkdir()
    files = []
    for name, texts in (("ours", ["longer", "b"]), ("theirs", ["short", "brief"])):
        rows = [{"instruction": f"Q{i}", "output": text, "dataset": "[/x]"} for i, text in enumerate(texts)]
        files.append(tmp_path / "[red]" / f"{name}.json")
        files[-1].write_text(json.dumps(rows))
    out = tmp_path / "eval"
    assert main(["eval", "--policy", str(files[0]), "--against", str(files[1]), "--annotator", "rule:long",
                 "--feedback.labels", "hard", "--out", str(out)]) == 0  # fmt: skip
    assert "[/x]" in capsys.readouterr().out and (out / "report.html").is_file()
    # The folder under another name is the same evaluation.
    assert main(["eval", "--policy", str(files[0]), "--against", str(files[1]), "--annotator", "rule:long",
                 "--feedback.labels", "hard", "--out", f"{out}/"]) == 0  # fmt: skip
    assert "judgements: done before, reused" in capsys.readouterr().err


def test_labels_are_hard_where_asked() -> None:
    assert [hard(p) for p in (0.0, 0.4, 0.5, 0.51, 1.0)] == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_refusals_of_what_cannot_be_compared(
    tmp_path: Path, models: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = answers(tmp_path / "a.json", "one", "two"), answers(tmp_path / "b.json", "three", "four")
    out = tmp_path / "eval"
    assert main(["eval", "--policy", ours, "--against", theirs, "--annotator", "rule:long", "--out", str(out)]) == 0
    broken = tmp_path / "half.json"
    broken.write_text('[{"instruction": "Q", "output": "half \\ud800"}]')
    tokenizer = json.loads((Path(models[1]) / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<|another|>"] = tokenizer["model"]["vocab"].pop(
        next(iter(tokenizer["model"]["vocab"]))
    )
    other = tmp_path / "other"
    shutil.copytree(models[1], other)
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    pairs = lines(tmp_path / "pairs.jsonl", [{"prompt": "P", "chosen": "yes", "rejected": "no"}])
    for args, said in (
        (["--policy", str(out), "--against", theirs, "--annotator", "rule:long"], "is an evaluation; give what was"),
        (["--policy", ours, "--prompts", "seed:train"], "nothing to measure"),
        (["--policy", ours, "--against", str(broken), "--annotator", "rule:long"], "half of a character"),
        (["--policy", models[0], "--reference", str(other), "--pairs", pairs, *FAST], "have different tokenizers"),
    ):
        capsys.readouterr()
        assert main(["eval", *args, "--out", str(tmp_path / "refused")]) == 2
        err = capsys.readouterr().err
        assert said in err, err
        shutil.rmtree(tmp_path / "refused", ignore_errors=True)
