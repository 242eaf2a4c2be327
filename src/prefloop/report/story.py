"""What a run folder holds, read into plain records: the one source of every table, page and model card.

Renderers (terminal, Markdown, the model card, later HTML) take a `Story` and read no files themselves.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prefloop.errors import InputError
from prefloop.evaluate.checkup import Checkup
from prefloop.pairs.length import LengthCoefficient
from prefloop.records import Group


@dataclass(frozen=True)
class Round:
    """One model of a run: `start`, `round-0` (the first policy), `round-1`, ..."""

    label: str
    checkup: Checkup | None = None
    length: LengthCoefficient | None = None
    training: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Group] = field(default_factory=list)


@dataclass(frozen=True)
class Story:
    """A run as a person wants to read it. `stages` are the manifest's entries: counts, figures
    and seconds by stage name.
    """

    path: Path
    recipe: str
    config: dict[str, Any]
    environment: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    rounds: list[Round]


def read_story(path: Path) -> Story:
    """Read a run folder. Raises InputError when it is not one."""
    if not (path / "manifest.json").is_file():
        raise InputError(f"{path} is not a run folder: it has no manifest.json")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    stages = manifest["stages"]
    labels = list(dict.fromkeys(name.split("/")[0] for name in stages if name.split("/")[0] not in ("data", "model")))
    return Story(
        path=path,
        recipe=manifest["recipe"],
        config=yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")),
        environment=manifest["environment"],
        stages=stages,
        rounds=[_read_round(path / label, label) for label in labels],
    )


def _read_round(folder: Path, label: str) -> Round:
    def text(name: str) -> str:
        file = folder / name
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    checkup, length = text("checkup.json"), text("length.json")
    return Round(
        label=label,
        checkup=Checkup.from_json(checkup) if checkup else None,
        length=LengthCoefficient.from_json(length) if length else None,
        training=[json.loads(line) for line in text("model/training_log.jsonl").splitlines()],
        answers=[Group.from_json(line) for line in text("answers.jsonl").split("\n")[:-1]],
    )
