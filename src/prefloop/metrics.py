"""Metrics to a tracker while a run goes on: TensorBoard, Weights & Biases or trackio, each an extra of its own.

The run folder stays the record. A tracker gets copies of the rows that also go to `events.jsonl`: steps, looks at the
validation pairs, evaluations. Figures only; no prompts and no answers. A run that is continued is another run of the
same group there, since no tracker can take back the steps that a kill undid.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from prefloop.config import free
from prefloop.errors import InputError

MetricsName = Annotated[
    Literal["", "tensorboard", "wandb", "trackio"],
    free(description="also stream figures to: tensorboard (into OUT/tensorboard), wandb or trackio, if installed"),
]

STREAMED = ("step", "validation", "evaluation")
"""Events that a tracker gets."""
NO_FIGURES = ("step", "answers", "preferred")
"""Fields of these events that are no figures: the place of a row, texts, and one value a prompt."""


class Tracker(Protocol):
    """Where figures go."""

    def log(self, label: str, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a round (`label`), after `step` of its steps; steps never fall within a round."""
        ...

    def close(self) -> None: ...


def open_tracker(name: str, folder: Path, config: Mapping[str, Any]) -> Tracker | None:
    """The tracker of that name for the run in `folder`; None for "". Raises InputError when it is not installed."""
    if not name:
        return None
    found = find_spec(name)
    if found is None or found.origin is None:  # a folder of that name, such as wandb makes, passes for a package
        raise InputError(f"metrics = {name}: it is not installed; pip install 'prefloop[{name}]', or leave it out")
    return TensorBoard(folder / "tensorboard") if name == "tensorboard" else Online(name, folder, config)


def figures(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The figures of an event by name; of [value, low, high] the value.

    >>> dict(figures({"step": 3, "loss": 0.5, "evaluation": {"rate": [0.7, 0.6, 0.8], "answers": []}}))
    {'loss': 0.5, 'evaluation/rate': 0.7}
    """
    for name, value in fields.items():
        if name in NO_FIGURES:
            continue
        if isinstance(value, Mapping):
            yield from figures(value, f"{prefix}{name}/")
        elif isinstance(value, list | tuple):
            yield prefix + name, float(value[0])
        elif isinstance(value, int | float):
            yield prefix + name, float(value)


class TensorBoard:
    """Event files; a tag is `round-1/loss`, its steps are those of the round."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(folder), flush_secs=10)

    def log(self, label: str, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(f"{label}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class Online:
    """Weights & Biases, or trackio, which has the same functions; set up as these packages are (`WANDB_MODE`, keys).

    Steps go on over the rounds, because they must not fall.
    """

    def __init__(self, package: str, folder: Path, config: Mapping[str, Any]) -> None:
        name = folder.resolve().name
        self.run = import_module(package).init(project="prefloop", name=name, group=name, config=dict(config))
        self.label, self.before, self.last = "", 0, 0

    def log(self, label: str, step: int, figures: Mapping[str, float]) -> None:
        if label != self.label:
            self.label, self.before = label, self.last
        self.last = self.before + step
        self.run.log({f"{label}/{name}": value for name, value in figures.items()}, step=self.last)

    def close(self) -> None:
        self.run.finish()
