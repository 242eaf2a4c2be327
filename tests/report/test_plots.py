"""What the lines of the report's plots hold."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefloop.report import plots
from prefloop.report.plots import plot_training
from prefloop.report.story import read_story
from tests.report.runs import steps, write_run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn, in place of files."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: figures.append(figure))
    return figures


def plotted(tmp_path: Path, drawn: list[Any], rows: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """The values of every line, by the title of its plot."""
    story = read_story(write_run(tmp_path / "run", training={"round-1": rows}))
    assert plot_training(story, tmp_path / "training.png")
    axes = drawn[-1].axes
    lines = {axis.get_title(): [[float(y) for y in line.get_ydata()] for line in axis.lines] for axis in axes}
    return {title: [line for line in found if line] for title, found in lines.items()}


def test_pairs_that_come_after_the_first_step_have_their_margin_plotted(tmp_path: Path, drawn: list[Any]) -> None:
    """SAIL's first step may train on nothing whose label is from outside, and so have no margin."""
    first, *others = steps(3, loss=0.6, margin=3.0, chosen_change=-0.3, rejected_change=-0.9)
    found = plotted(tmp_path, drawn, [{"step": 1, "loss": first["loss"]}, *others])
    assert list(found) == [
        "Loss (squares: validation)",
        "Implicit-reward margin",
        "Log-probability change in the round",
    ]
    [margin] = found["Implicit-reward margin"]
    assert np.isnan(margin[0]) and margin[1:] == pytest.approx([2.0, 3.0])
    assert [line[1:] for line in found["Log-probability change in the round"]] == [
        pytest.approx([-0.2, -0.3]), pytest.approx([-0.6, -0.9]),
    ]  # fmt: skip


def test_a_preference_loss_stands_in_the_place_of_a_surrogate(tmp_path: Path, drawn: list[Any]) -> None:
    rows = steps(2, loss=-8.0, preference_loss=0.6)
    assert plotted(tmp_path, drawn, rows) == {"Preference loss": [pytest.approx([0.3, 0.6])]}
    plain = [{"step": row["step"], "loss": 0.7} for row in rows]
    assert plotted(tmp_path / "plain", drawn, plain) == {"Loss (squares: validation)": [[0.7, 0.7]]}
