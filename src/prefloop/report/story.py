"""What a run folder holds, read into plain records: the one source of every table, page and model card.

Renderers (terminal, Markdown, HTML, the model card) take a `Story` and read no files themselves. Preference pairs,
which may be many, are read when they are asked for: `training_pairs`.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefloop.config import read_yaml
from prefloop.errors import InputError
from prefloop.evaluate.checkup import Checkup
from prefloop.evaluate.reward_pairs import RewardPairs
from prefloop.evaluate.targets import Asked
from prefloop.pairs.length import LengthCoefficient
from prefloop.records import Group, Pair, Prompt

TOLD = re.compile(r'"event": "(?:engine|feedback|row skipped)"')
"""Events that a report tells; the steps, most of the log, are in the training log too."""


@dataclass(frozen=True)
class Round:
    """One model of a run: `start`, `round-0` (the first policy), `round-1`, ...

    asked: of a conditional model, what came of asking for several rewards. ranking: of a reward model, on pairs that it
    was not trained on. figures: what its stages measured.
    """

    label: str
    checkup: Checkup | None = None
    length: LengthCoefficient | None = None
    training: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Group] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    ranking: RewardPairs | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The optimiser steps of the training log, in order."""
        return [row for row in self.training if "evaluation" not in row and "validation" not in row]

    @property
    def evaluations(self) -> list[tuple[int, dict[str, Any]]]:
        """The evaluations of an online method, by step."""
        return [(row["step"], row["evaluation"]) for row in self.training if "evaluation" in row]


@dataclass(frozen=True)
class Story:
    """A run as a person wants to read it. `stages` are the manifest's entries: counts, figures
    and seconds by stage name. `events` are those that `TOLD` names.
    """

    path: Path
    recipe: str
    config: dict[str, Any]
    environment: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    rounds: list[Round]
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(entry["seconds"] for entry in self.stages.values())

    @property
    def usage(self) -> dict[str, dict[str, Any]]:
        """What annotators used, by annotator: calls, tokens, money and faults, of all processes that ran.

        `money` is None when the price of a model is unknown.
        """
        used: dict[str, dict[str, Any]] = {}
        for event in self.events:
            if event["event"] != "feedback":
                continue
            for name, tally in event.items():
                if isinstance(tally, dict):
                    used[name] = _added(used[name], tally) if name in used else tally
        return used


def read_story(path: Path) -> Story:
    """Read a run folder. Raises InputError when it is not one, or not a whole one."""
    if not (path / "manifest.json").is_file():
        missing = "it has no manifest.json" if path.is_dir() else "there is no such folder"
        raise InputError(f"{path} is not a run folder: {missing}; name one that a recipe of prefloop has made")
    config = read_yaml(path / "config.yaml")
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        stages = manifest["stages"]
        labels = dict.fromkeys(name.split("/")[0] for name in stages if "/" in name)
        return Story(
            path=path,
            recipe=manifest["recipe"],
            config=config,
            environment=manifest["environment"],
            stages=stages,
            rounds=[_read_round(path / label, label, stages) for label in labels if label != "data"],
            events=_read_events(path / "events.jsonl"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
        raise InputError(
            f"{path} is damaged ({what}); run the command that made it again, which mends what is missing"
        ) from None


def training_pairs(story: Story, round: Round) -> tuple[str, list[Pair]]:
    """The pairs that a round was trained on, and the file they are in; none for the start, or an online method."""
    candidates = [f"{round.label}/{name}.jsonl" for name in ("mixed", "training_pairs")]
    for name in [*candidates, *(["data/pairs.jsonl"] if round.training else [])]:
        file = story.path / name
        if file.is_file():
            try:
                return name, [Pair.from_json(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
            except ValueError:
                raise InputError(f"{file} is damaged: a line is no preference pair; run the command again") from None
    return "", []


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a person reads it: its text, with the roles where it has several messages."""
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two tallies of the meter as one."""
    total = {}
    for name in one:
        a, b = one[name], other[name]
        if isinstance(a, dict):
            total[name] = {kind: a.get(kind, 0) + b.get(kind, 0) for kind in {**a, **b}}
        else:
            total[name] = None if a is None or b is None else a + b
    return total


def _read_events(file: Path) -> list[dict[str, Any]]:
    """The told events; a half line that a kill left is passed over."""
    events = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        if TOLD.search(line):
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return events


def _read_round(folder: Path, label: str, stages: dict[str, dict[str, Any]]) -> Round:
    def text(name: str) -> str:
        file = folder / name
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    own = [entry.get("figures") or {} for name, entry in stages.items() if name.startswith(f"{label}/")]
    figures = {name: value for found in own for name, value in found.items()}
    checkup, length, ranking = text("checkup.json"), text("length.json"), text("ranking.json")
    return Round(
        label=label,
        checkup=Checkup.from_json(checkup) if checkup else None,
        length=LengthCoefficient.from_json(length) if length else None,
        training=[json.loads(line) for line in text("model/training_log.jsonl").splitlines()],
        answers=[Group.from_json(line) for line in text("answers.jsonl").split("\n")[:-1]],
        asked=[Asked.from_json(line) for line in text("targets.jsonl").split("\n")[:-1]],
        ranking=RewardPairs.from_json(ranking) if ranking else None,
        figures=figures,
    )
