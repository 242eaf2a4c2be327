"""What a run folder holds, read into plain records: the one source of every table, page and model card.

Renderers (terminal, Markdown, HTML, the model card) take a `Story` and read no files themselves. Preference pairs,
which may be many, are read when they are asked for: `training_pairs`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefloop.config import read_yaml
from prefloop.errors import InputError
from prefloop.evaluate.candidate import Candidate
from prefloop.evaluate.checkup import Checkup
from prefloop.evaluate.figures import COMPARED, FIGURES, Report
from prefloop.evaluate.reward_pairs import RewardPairs
from prefloop.evaluate.targets import Asked
from prefloop.feedback.meter import Tally, usage_of
from prefloop.merge.distance import Distance
from prefloop.pairs.length import LengthCoefficient
from prefloop.records import Group, Pair, Prompt, Response
from prefloop.run import recipe_of

Interval = tuple[float, float, float]
TOLD = re.compile(r'"event": "(?:engine|row skipped)"')
"""Events that a report tells; the steps, most of the log, are in the training log too."""

FEEDBACK = "model/feedback.jsonl"
"""In a round's folder: every question of an online method, asked of an annotator or not."""
NO_MODELS = ("data", "search")
"""Folders of a run that are none of its models."""


@dataclass(frozen=True)
class Round:
    """One model of a run: `start`, `round-0` (the first policy), `round-1`, ...; or a side of an evaluation.

    preferred: P(the answer is preferred over the other side's), where an evaluation asked.
    win_rate: of its `answers` against the start's.
    asked: of a conditional model, what came of asking for several rewards. figures: what its stages measured.
    candidate: of ExPO, its figures on held-out prompts.
    ranking: of a reward model, on pairs that it was not trained on.
    """

    label: str
    checkup: Checkup | None = None
    length: LengthCoefficient | None = None
    training: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Group] = field(default_factory=list)
    preferred: list[float | None] = field(default_factory=list)
    win_rate: Interval | None = None
    asked: list[Asked] = field(default_factory=list)
    ranking: RewardPairs | None = None
    figures: dict[str, float] = field(default_factory=dict)
    candidate: Candidate | None = None

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
    and seconds by stage name. `events` are those that `TOLD` names. `usage`: what
    annotators have used, by annotator. `evaluation`: what `prefloop eval` found.
    `tried`: what ExPO chose among, by alpha, and
    `alpha` what it chose; both empty elsewhere. `distance`: of the aligned model from its base.
    """

    path: Path
    recipe: str
    config: dict[str, Any]
    environment: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    rounds: list[Round]
    events: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Tally] = field(default_factory=dict)
    evaluation: Report | None = None
    tried: list[Candidate] = field(default_factory=list)
    alpha: float | None = None
    distance: Distance | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(entry["seconds"] for entry in self.stages.values())


def read_story(path: Path) -> Story:
    """Read a run folder. Raises InputError when it is not one, or not a whole one."""
    if not (path / "manifest.json").is_file():
        missing = "it has no manifest.json" if path.is_dir() else "there is no such folder"
        raise InputError(f"{path} is not a run folder: {missing}; name one that a recipe or prefloop eval has made")
    if recipe_of(path / "config.yaml") == "eval" and not (path / FIGURES).is_file():
        raise InputError(f"{path}: this evaluation has not ended, there is no {FIGURES}; run its command again")
    config = read_yaml(path / "config.yaml")
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        stages = manifest["stages"]
        labels = dict.fromkeys(name.split("/")[0] for name in stages if "/" in name)
        evaluated = manifest["recipe"] == "eval"
        return Story(
            path=path,
            recipe=manifest["recipe"],
            config=config,
            environment=manifest["environment"],
            stages=stages,
            rounds=_read_sides(path, config)
            if evaluated
            else [_read_round(path / label, label, stages) for label in labels if label not in NO_MODELS],
            events=_read_events(path / "events.jsonl"),
            usage=usage_of(path),
            evaluation=Report.from_json((path / FIGURES).read_text(encoding="utf-8")) if evaluated else None,
            tried=_read_tried(path / "search"),
            alpha=_read_alpha(path / "choice.json"),
            distance=_read_distance(path / "distance.json"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
        raise InputError(
            f"{path} is damaged ({what}); run the command that made it again, which mends what is missing"
        ) from None


def training_pairs(story: Story, round: Round) -> tuple[str, list[Pair]]:
    """The pairs that a round was trained on, and the file they are in; none for the start.

    Those of an online method are the questions that its annotator made pairs of, with what it said as `p`.
    """
    mixed, computed, online = (
        f"{round.label}/mixed.jsonl",
        f"{round.label}/training_pairs.jsonl",
        f"{round.label}/{FEEDBACK}",
    )
    for name in (mixed, computed, online, *(["data/pairs.jsonl"] if round.training else [])):
        file = story.path / name
        if file.is_file():
            lines = file.read_text(encoding="utf-8").split("\n")[:-1]
            try:
                return name, _online_pairs(lines) if name == online else [Pair.from_json(line) for line in lines]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{file} is damaged: a line is no preference pair; run the command again") from None
    return "", []


def _online_pairs(lines: Sequence[str]) -> list[Pair]:
    """Of the record of an online method, the questions that an annotator made pairs of."""
    rows = map(json.loads, lines)
    # Before 2026-11-21 the record had the prompt's id alone.
    return [_pair_of(row) for row in rows if row["outcome"] == "pair" and not isinstance(row["prompt"], str)]


def _pair_of(row: dict[str, Any]) -> Pair:
    a, b = (Response(text=row[side]) for side in "ab")
    chosen, rejected = (a, b) if row["p"] > 0.5 else (b, a)
    prompt = Prompt.model_validate(row["prompt"])
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, p=max(row["p"], 1 - row["p"]), source="generated")


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a person reads it: its text, with the roles where it has several messages."""
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)


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


def _read_tried(folder: Path) -> list[Candidate]:
    found = [Candidate.from_json(file.read_text(encoding="utf-8")) for file in folder.glob("*/figures.json")]
    return sorted(found, key=lambda one: one.alpha)


def _read_alpha(file: Path) -> float | None:
    return float(json.loads(file.read_text(encoding="utf-8"))["alpha"]) if file.is_file() else None


def _read_distance(file: Path) -> Distance | None:
    return Distance.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def _read_sides(path: Path, config: dict[str, Any]) -> list[Round]:
    """The two sides of an evaluation, theirs first; none where no answers were compared."""
    if not (path / COMPARED).is_file():
        return []
    groups = [Group.from_json(line) for line in (path / COMPARED).read_text(encoding="utf-8").split("\n")[:-1]]
    judged = [json.loads(line) for line in (path / "judgements.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    if len(groups) != len(judged):
        raise ValueError(f"{COMPARED} has {len(groups)} rows and judgements.jsonl {len(judged)}")
    ours, theirs = ([Group(prompt=g.prompt, responses=(g.responses[i],)) for g in groups] for i in (0, 1))
    return [
        Round(f"against: {config['against']}", answers=theirs),
        Round(f"policy: {config['policy']}", answers=ours, preferred=[row.get("p") for row in judged]),
    ]


def _read_round(folder: Path, label: str, stages: dict[str, dict[str, Any]]) -> Round:
    def text(name: str) -> str:
        file = folder / name
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    own = [entry.get("figures") or {} for name, entry in stages.items() if name.startswith(f"{label}/")]
    figures = {name: value for found in own for name, value in found.items()}
    checkup, length, candidate = text("checkup.json"), text("length.json"), text("figures.json")
    ranking = text("ranking.json")
    rate = json.loads(text("win_rate.json") or "{}").get("rate")
    return Round(
        label=label,
        checkup=Checkup.from_json(checkup) if checkup else None,
        length=LengthCoefficient.from_json(length) if length else None,
        training=[json.loads(line) for line in text("model/training_log.jsonl").splitlines()],
        answers=[Group.from_json(line) for line in text("answers.jsonl").split("\n")[:-1]],
        win_rate=tuple(rate) if rate else None,
        asked=[Asked.from_json(line) for line in text("targets.jsonl").split("\n")[:-1]],
        ranking=RewardPairs.from_json(ranking) if ranking else None,
        figures=figures,
        candidate=Candidate.from_json(candidate) if candidate else None,
    )
