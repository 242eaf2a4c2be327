"""Figures of a run as the trackers themselves read them back; a tracker that is not installed is skipped."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefloop.config import Config
from prefloop.errors import InputError
from prefloop.metrics import MetricsName, figures, open_tracker
from prefloop.recipes.dice import DiceConfig
from prefloop.recipes.dpo import DpoConfig
from prefloop.recipes.oaif import OaifConfig
from prefloop.run import Run


class Small(Config):
    metrics: MetricsName = ""
    beta: float = 0.1


def rounds_of_two(run: Run) -> None:
    """Two rounds of two steps; the second ends with an evaluation."""
    for label in ("round-1", "round-2"):
        for step in (1, 2):
            run.event("step", f"{label}/model", step=step, loss=step / 4)
    found = {"against_start": {"rate": [0.7, 0.6, 0.8]}, "answers": [{"text": "secret"}], "preferred": [1.0, 0.5, 0.0]}
    run.event("evaluation", "round-2/model", step=2, evaluation=found)
    run.note("not a figure")


def test_figures_are_numbers_and_the_values_of_intervals() -> None:
    fields = {
        "step": 4,
        "pairs": 8,
        "loss": 0.5,
        "rate": (0.7, 0.6, 0.8),
        "none": None,
        "text": "a",
        "preferred": [1.0],
    }
    nested = {"evaluation": {"against": {"rate": [0.25, 0.2, 0.3], "abstained": 1}, "answers": ["text"]}}
    assert dict(figures({**fields, **nested})) == {
        "pairs": 8.0, "loss": 0.5, "rate": 0.7, "evaluation/against/rate": 0.25, "evaluation/against/abstained": 1.0,
    }  # fmt: skip


def test_tensorboard_reads_what_a_run_streamed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Run.open(tmp_path / "run", recipe="small", config=Small(metrics="tensorboard")) as run:
        rounds_of_two(run)
    read = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    tags = ["round-1/loss", "round-2/evaluation/against_start/rate", "round-2/loss"]
    assert sorted(read.Tags()["scalars"]) == tags
    rows = {tag: [(event.step, round(event.value, 6)) for event in read.Scalars(tag)] for tag in tags}
    assert rows["round-1/loss"] == rows["round-2/loss"] == [(1, 0.25), (2, 0.5)]
    assert rows["round-2/evaluation/against_start/rate"] == [(2, 0.7)]
    assert not any(b"secret" in file.read_bytes() for file in (tmp_path / "run/tensorboard").iterdir())


STREAM = """
import sys
from pathlib import Path
from prefloop.run import Run
from tests.test_metrics import Small, rounds_of_two
with Run.open(Path(sys.argv[1]) / "run", recipe="small", config=Small(metrics=sys.argv[2])) as run:
    rounds_of_two(run)
"""


def streamed(folder: Path, tracker: str, **environment: str) -> None:
    """In a process of its own: both packages start threads and services."""
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(folder), tracker], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(folder), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_wandb_takes_what_a_run_streams(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    streamed(tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    (log,) = tmp_path.rglob("*.wandb")
    data = log.read_bytes()
    assert b"round-1/loss" in data and b"round-2/evaluation/against_start/rate" in data and b"secret" not in data


def test_trackio_reads_what_a_run_streamed(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="needs the extra trackio")
    import sqlite3

    streamed(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "store"))
    (file,) = (tmp_path / "store").glob("prefloop*.db")
    rows: list[Any] = sqlite3.connect(file).execute("select step, metrics from metrics order by id").fetchall()
    assert [step for step, _ in rows] == [1, 2, 3, 4, 4]  # the steps of a round go on after those of the one before
    assert "round-2/evaluation/against_start/rate" in str(rows[-1][1]) and "secret" not in str(rows)


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefloop.metrics.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"metrics = wandb: it is not installed; pip install 'prefloop\[wandb\]'"):
        with Run.open(tmp_path / "run", recipe="small", config=Small(metrics="wandb")):
            raise AssertionError("the run began")
    assert not (tmp_path / "run").exists()
    assert open_tracker("", tmp_path, {}) is None


@pytest.mark.parametrize("config", [DiceConfig, DpoConfig, OaifConfig])
def test_a_run_may_go_on_with_another_tracker(config: type[Config]) -> None:
    assert "metrics" in config.free_options() and config.model_fields["metrics"].default == ""
