"""Judgements already made, by people say, from a file: found by content, whatever the order of the two answers.

    {"prompt": "Name a colour.", "response_1": "Red.", "response_2": "No.", "preference": 1}

`prompt` is text or a conversation; the answers are columns `response_1` and `response_2` (or a pair of `ANSWERS`); a
preference is 1 or "a" for the first, 2 or "b" for the second, "tie", or P(the first is preferred) with a decimal point.
A row without a preference is no judgement. Files of pairs (`chosen`, `rejected`, perhaps `p`) are read too. Several
judgements of the same two answers are votes: their mean is the p.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefloop.data.files import Row, Rows, read_rows
from prefloop.data.mapping import PROMPT_COLUMNS, are_pairs, pairs_of_rows
from prefloop.data.turns import BadRow, check_prompt, read_response, read_turns
from prefloop.errors import InputError
from prefloop.feedback.annotator import Comparison, Judgement, abstention, around_half, ask_different
from prefloop.fingerprints import sha256
from prefloop.progress import Advance, ignore
from prefloop.records import Prompt, Response, content_id

ANSWERS = (("response_1", "response_2"), ("response_a", "response_b"), ("a", "b"), ("output_1", "output_2"))
"""Names of the two answers' columns; the first pair that is there counts."""

WORDS = {"1": 1.0, "1.0": 1.0, "a": 1.0, "2": 0.0, "2.0": 0.0, "b": 0.0, "tie": 0.5}
"""A preference in words -> P(the first is preferred). 1.0 is 1 both as a choice and as a probability."""

Key = tuple[str, str, str]


class JudgementFile:
    """Judges by what a file says; what it does not hold is an abstention. Raises InputError for a file that no
    judgement can be read from, with row, what was seen and what was expected.

    `conflicts` counts comparisons whose judgements in the file differ, `unjudged` rows without a preference.
    """

    def __init__(self, path: str | Path) -> None:
        rows = read_rows(path)
        votes: dict[Key, list[float]] = {}
        self.unjudged = 0
        for comparison, p in _pairs(rows) if are_pairs(rows) else _judgements(rows):
            if p is None:
                self.unjudged += 1
                continue
            key, flipped = _key(comparison)
            votes.setdefault(key, []).append(0.5 - p if flipped else p - 0.5)
        self.conflicts = sum(len(set(halves)) > 1 for halves in votes.values())
        self.halves = {key: math.fsum(halves) / len(halves) for key, halves in votes.items()}
        self.name = f"file:{path}"
        self.identity = f"file:{sha256(json.dumps(sorted(self.halves.items())))}"

    @property
    def description(self) -> str:
        """`file:people.jsonl: judgements of 40 comparisons; 2 of them differ between rows, the mean counts`."""
        said = [f"{self.name}: judgements of {len(self.halves)} comparisons"]
        if self.conflicts:
            said.append(f"those of {self.conflicts} differ between rows, and their mean counts")
        if self.unjudged:
            said.append(f"{self.unjudged} rows have no preference")
        return "; ".join(said)

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        def ask(different: Sequence[Comparison]) -> list[Judgement]:
            advance(len(different))
            return [self._look_up(comparison) for comparison in different]

        return ask_different(ask, comparisons, advance)

    def _look_up(self, comparison: Comparison) -> Judgement:
        key, flipped = _key(comparison)
        half = self.halves.get(key)
        if half is None:
            return abstention("the file has no judgement of these two answers")
        return Judgement(p=around_half(-half if flipped else half))


def _key(comparison: Comparison) -> tuple[Key, bool]:
    """The content of a comparison with its answers in an order of their own, and whether b comes first in it."""
    a, b = comparison.a.text.strip(), comparison.b.text.strip()
    return (content_id(comparison.prompt.messages), min(a, b), max(a, b)), b < a


def _pairs(rows: Rows) -> list[tuple[Comparison, float | None]]:
    return [(Comparison(pair.prompt, pair.chosen, pair.rejected), pair.p) for pair in pairs_of_rows(rows).records]


def _judgements(rows: Rows) -> list[tuple[Comparison, float | None]]:
    columns = rows.columns
    prompt = next((column for column in PROMPT_COLUMNS if column in columns), None)
    answers = next((two for two in ANSWERS if {*two} <= {*columns}), None)
    if prompt is None or answers is None or "preference" not in columns:
        raise InputError(
            f"{rows.source}: columns {', '.join(map(repr, columns))}; judgements need 'prompt', 'response_1', "
            "'response_2' and 'preference', or pairs with 'chosen' and 'rejected'"
        )
    return [_judgement(row, prompt, answers) for row in rows]


def _judgement(row: Row, prompt_column: str, answers: tuple[str, str]) -> tuple[Comparison, float | None]:
    try:
        turns = read_turns(_messages(row.data.get(prompt_column)), prompt_column)
        check_prompt(turns)
        a, b = (Response(text=read_response(row.data.get(column), column, turns)) for column in answers)
        return Comparison(Prompt(id=content_id(tuple(turns)), messages=tuple(turns)), a, b), read_preference(row.data)
    except BadRow as error:
        raise InputError(f"{row.where}: {error}; fix the row, or leave it out") from None


def _messages(value: Any) -> Any:
    """The conversation of a prompt that prefloop wrote; any other value as it is."""
    return value["messages"] if isinstance(value, dict) and "messages" in value else value


def read_preference(data: dict[str, Any]) -> float | None:
    """P(the first is preferred) in column `preference`; None where there is none. Raises BadRow.

    A whole 0 is refused: in some files it means the first answer, in others the probability 0.
    """
    value = data.get("preference")
    word = "" if value is None else str(value).strip().lower()
    if not word:
        return None
    if word in WORDS:
        return WORDS[word]
    try:
        p = float(word)
    except ValueError:
        p = math.nan
    if word.isdigit() or not 0 <= p <= 1:
        raise BadRow(
            f"preference is {value!r}; expected 1 or 'a' (the first answer), 2 or 'b' (the second), 'tie', or a "
            "probability with a decimal point"
        )
    return p
