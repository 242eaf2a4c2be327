"""Run folders made by hand, with figures that tests know."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from prefloop.evaluate.checkup import Checkup
from prefloop.pairs.length import LengthCoefficient
from prefloop.records import Group, Pair, Prompt, Response

CONFIG = {"policy": "small", "pairs": "seed:train", "seed": 3, "beta": 0.1, "train": {"steps": 20}}


def checkup(**figures: Any) -> Checkup:
    """A checkup of 40 held-out pairs; nothing in it is a known pattern."""
    known = {
        "accuracy": (0.9, 0.8, 0.95),
        "margin": (0.5, 0.4, 0.6),
        "chosen_change": 1.0,
        "rejected_change": -2.0,
        "length_chars": (100.0, 90.0, 110.0),
        "finished": 1.0,
        "kl_per_token": (0.05, 0.04, 0.06),
    }
    return Checkup.model_validate({"model": "m", "pairs": 40, "answers": 1, **known, **figures})


def prompt(i: int, text: str = "", category: str | None = None) -> Prompt:
    return Prompt.of(text or f"Question {i}?", id=f"p{i}", category=category)


def answers(texts: Sequence[str], finish_reason: Any = "stop", **of_prompt: Any) -> list[Group]:
    return [
        Group(prompt=prompt(i, **of_prompt), responses=(Response(text=text, finish_reason=finish_reason),))
        for i, text in enumerate(texts)
    ]


def pair(i: int, chosen: str, rejected: str, **fields: Any) -> Pair:
    return Pair(prompt=prompt(i, category=fields.pop("category", None)), chosen=Response(text=chosen),
                rejected=Response(text=rejected), **fields)  # fmt: skip


def steps(n: int, **figures: float) -> list[dict[str, Any]]:
    """n rows of a training log; a figure grows evenly from 0 to what is given."""
    return [{"step": i, **{name: value * i / n for name, value in figures.items()}} for i in range(1, n + 1)]


def evaluation(
    rate: float, annotators: float, *, drift: float = 0.1, groups: Sequence[Group] = (), preferred: Sequence[Any] = ()
) -> dict[str, Any]:
    def around(value: float) -> dict[str, Any]:
        return {"rate": [value, value - 0.1, value + 0.1], "judged": 10, "ties": 0, "abstained": 0}

    return {
        "against_start": around(rate),
        "at_equal_length": around(rate - 0.1)["rate"],
        "against_start_by_the_annotator": around(annotators),
        "against_previous": around(0.5),
        "length_chars": [100.0, 90.0, 110.0],
        "log_ratio_per_token": [drift, drift - 0.01, drift + 0.01],
        "answers": [json.loads(group.to_json()) for group in groups],
        "preferred": list(preferred),
    }


def write_run(
    folder: Path,
    *,
    recipe: str = "dice",
    config: dict[str, Any] | None = None,
    checkups: dict[str, Checkup] | None = None,
    answers: dict[str, list[Group]] | None = None,
    pairs: dict[str, list[Pair]] | None = None,
    training: dict[str, list[dict[str, Any]]] | None = None,
    lengths: dict[str, LengthCoefficient] | None = None,
    counts: dict[str, dict[str, int]] | None = None,
    events: Sequence[dict[str, Any]] = (),
) -> Path:
    """A run folder as a run leaves it, without models. Every mapping is by label (counts: by stage)."""
    stages: dict[str, dict[str, Any]] = {}

    def write(name: str, text: str) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        stage = name.removesuffix("/training_log.jsonl").split(".")[0]
        stages[stage] = {
            "key": "k",
            "artifact": {"path": name, "kind": "records", "sha256": "ab" * 32, "bytes": len(text.encode())},
            "counts": (counts or {}).get(stage, {}),
            "figures": {},
            "seconds": 2.0,
        }

    def lines(records: Sequence[Any]) -> str:
        return "".join((json.dumps(r) if isinstance(r, dict) else r.to_json()) + "\n" for r in records)

    for label in dict.fromkeys(label for part in (answers, checkups, pairs, training, lengths) for label in part or {}):
        for name, part in (("answers.jsonl", answers), ("mixed.jsonl", pairs), ("model/training_log.jsonl", training)):
            if part and label in part:
                write(f"{label}/{name}", lines(part[label]))
        for name, part in (("checkup.json", checkups), ("length.json", lengths)):
            if part and label in part:
                write(f"{label}/{name}", part[label].to_json())
    for stage in counts or {}:
        if stage not in stages:
            write(f"{stage}.jsonl", "")
    (folder / "config.yaml").write_text(f"# prefloop {recipe}\n" + yaml.safe_dump(config or CONFIG), encoding="utf-8")
    (folder / "events.jsonl").write_text(lines(events), encoding="utf-8")
    environment = {"prefloop": "0.1.0", "python": "3.11", "platform": "Linux", "cpus": 2}
    manifest = {"recipe": recipe, "version": "0.1.0", "environment": environment, "stages": stages}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder
