"""Pairs out: the explicit conversational preference format that TRL and others read."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefloop.atomic import write_atomically
from prefloop.records import Pair

EXTRAS: dict[str, tuple[Callable[[Pair], Any], Any]] = {
    "category": (lambda pair: pair.prompt.category, None),
    "p": (lambda pair: pair.p, 1.0),
    "weight": (lambda pair: pair.weight, 1.0),
    "chosen_score": (lambda pair: pair.chosen_score, None),
    "rejected_score": (lambda pair: pair.rejected_score, None),
}
"""Column -> how it is read off a pair, and the value that says nothing."""


def export_pairs(pairs: Sequence[Pair], path: str | Path) -> None:
    """Write pairs as JSON lines: `prompt`, `chosen` and `rejected` as lists of messages, and the prompt's `id`.

    `category`, `p`, `weight` and the scores are columns too where any pair has one that says something, so all rows
    have the same columns. `load_pairs` reads back an equal pair as far as text goes; token ids and log-probabilities
    belong to a model and are not written.
    """
    columns = [name for name, (read, default) in EXTRAS.items() if any(read(pair) != default for pair in pairs)]
    rows = [
        {
            "id": pair.prompt.id,
            "prompt": [message.model_dump() for message in pair.prompt.messages],
            "chosen": [{"role": "assistant", "content": pair.chosen.text}],
            "rejected": [{"role": "assistant", "content": pair.rejected.text}],
            **{name: EXTRAS[name][0](pair) for name in columns},
        }
        for pair in pairs
    ]
    write_atomically(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
