"""What each round took: answers, tokens and judgements that were made, and where its seconds went."""

from collections.abc import Callable
from typing import Any

from prefloop.report.story import Story

Entries = dict[str, dict[str, Any]]
"""The manifest's entries of one round, by the stage's own name."""

SAMPLING, SCORING, REFERENCE = (
    ("groups", "baselines"),
    ("feedback", "strengths", "scored"),
    ("training_pairs", "reference"),
)


def _count(stage: str, *reasons: str) -> Callable[[Entries], float | None]:
    def read(entries: Entries) -> float | None:
        counts = entries.get(stage, {}).get("counts") or {}
        return next((counts[reason] for reason in reasons if reason in counts), None)

    return read


def _seconds(*stages: str) -> Callable[[Entries], float | None]:
    def read(entries: Entries) -> float | None:
        found = [entries[name]["seconds"] for name in stages if name in entries]
        return sum(found) if found else None

    return read


ROWS: list[tuple[str, str, Callable[[Entries], float | None]]] = [
    ("prompts with new answers", "{:.0f}", _count("stored", "prompts with new answers")),
    ("answers sampled", "{:.0f}", _count("groups", "answers")),
    ("tokens sampled", "{:.0f}", _count("groups", "tokens")),
    ("comparisons by the judge", "{:.0f}", _count("strengths", "comparisons")),
    ("questions to the judge", "{:.0f}", _count("strengths", "questions")),
    ("pairs", "{:.0f}", _count("pairs", "pairs made")),
    ("seconds of sampling", "{:.1f}", _seconds(*SAMPLING)),
    ("seconds of scoring or judging", "{:.1f}", _seconds(*SCORING)),
    ("seconds of reference log-probabilities", "{:.1f}", _seconds(*REFERENCE)),
    ("seconds of training", "{:.1f}", _seconds("model")),
]


def costs(story: Story) -> tuple[list[str], list[list[str]]]:
    """(the rounds' labels, a row a figure that any of them has: its name and a value a round).

    Of a stage that was stopped, the seconds are those of the process that finished it.
    """
    rounds = {
        round.label: {
            name.removeprefix(round.label + "/"): entry
            for name, entry in story.stages.items()
            if name.startswith(round.label + "/")
        }
        for round in story.rounds
        if round.training
    }
    table = [[read(entries) for entries in rounds.values()] for _, _, read in ROWS]
    return list(rounds), [
        [name, *("-" if value is None else pattern.format(value) for value in values)]
        for (name, pattern, _), values in zip(ROWS, table, strict=True)
        if any(value is not None for value in values)
    ]
