"""Groups in: any file of prompts with one or several responses each."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from prefloop.data.files import read_rows
from prefloop.data.mapping import are_pairs, pairs_of_rows
from prefloop.errors import InputError
from prefloop.records import Group, Prompt, Response, content_id

ONE = ("response", "completion", "output", "answer")
"""Columns that hold one response; rows with the same prompt become one group."""

EXPECTED = (
    "a group as `prefloop sample` writes it, a pair, or a row with 'prompt' (text or messages) and 'responses' "
    f"(a list of texts) or one of {', '.join(repr(name) for name in ONE)}"
)


def read_groups(source: str) -> list[Group]:
    """Groups from a file of groups, of pairs, or of (prompt, responses) rows.

    Raises InputError with file, row number, what was seen and what was expected for the first row that does not fit.
    """
    rows = read_rows(source)
    if are_pairs(rows):
        pairs = pairs_of_rows(rows).records
        return [Group(prompt=pair.prompt, responses=(pair.chosen, pair.rejected)) for pair in pairs]
    responses: dict[str, list[Response]] = {}
    prompts: dict[str, Prompt] = {}
    for row in rows:
        try:
            group = _group(row.data)
        except (ValidationError, InputError, TypeError):
            group = None
        if group is None or not group.responses:
            seen = ", ".join(f"{key}: {type(value).__name__}" for key, value in row.data.items())
            raise InputError(f"{row.where}: a row with {{{seen}}}; expected {EXPECTED}")
        key = content_id(group.prompt.messages)
        prompts.setdefault(key, group.prompt)
        responses.setdefault(key, []).extend(group.responses)
    return [Group(prompt=prompt, responses=tuple(responses[key])) for key, prompt in prompts.items()]


def _group(row: Mapping[str, Any]) -> Group | None:
    prompt = row.get("prompt")
    if isinstance(prompt, dict) and "responses" in row:
        return Group.model_validate_json(_json(row))
    if not isinstance(prompt, str | list) or not prompt:
        return None
    texts = row.get("responses")
    if texts is None:
        texts = [row[name] for name in ONE if name in row]
    parsed = Prompt.of(prompt, category=row.get("category"))
    return Group(prompt=parsed, responses=tuple(Response(text=_text(text)) for text in texts))


def _text(value: Any) -> str:
    """A response's text: a string, or the content of a one-message list."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise TypeError("not a response")
    return value.strip()


def _json(row: Mapping[str, Any]) -> str:
    import json

    return json.dumps(row)
