"""`make demo-all`: the others go on where one fails, and the table says the figure that matters."""

import json
from pathlib import Path

import pytest

from demo_all import log_of, main
from prefloop import cli
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    file = folder / "pairs.jsonl"
    rows = [{"prompt": f"Q{i}?", "chosen": f"yes {i}!", "rejected": f"no, {i}"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(save_tiny_model(folder / "tiny"))
    small = [
        "--train.steps",
        "1",
        "--train.warmup-steps",
        "0",
        "--train.validation-pairs",
        "0",
        "--compute.device",
        "cpu",
    ]
    return ["--policy", model, "--pairs", str(file), "--held-out", "", *small]


def test_one_that_fails_is_told_and_the_others_go_on(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(name: str, folder: Path) -> int:
        if name == "dpo":
            log_of(folder).write_text("prefloop: something is wrong\n\n")
            return 2
        return cli.main([name, "--preset", "demo", "--out", str(folder), *options, "--folds", "0"])

    assert main(["dpo", "reward-model", "--out", str(tmp_path)], start=start) == 1
    table = capsys.readouterr().out.split("demos")[-1]
    assert "FAILED (exit status 2): prefloop: something is wrong" in table
    assert "pairs ranked right" in table and str(tmp_path / "reward-model")[-12:] in table
    assert main(["reward-model", "--out", str(tmp_path)], start=start) == 0


def test_another_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "no recipe with a demo: nothing; there are dice, dpo, oaif" in capsys.readouterr().err
