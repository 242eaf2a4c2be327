"""Helpers of the data tests: small files, one-line errors, records in short."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import InputError
from prefloop.records import Pair, Prompt


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def message_of(call: Callable[[], object]) -> str:
    """The message of the InputError that `call` raises; it must be one line."""
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    made = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return made if system is None else [{"role": "system", "content": system}, *made]


def answer(content: str) -> list[dict[str, str]]:
    """A list of one assistant message."""
    return [{"role": "assistant", "content": content}]


def share_gpt(*contents: str) -> list[dict[str, str]]:
    """The same in ShareGPT's way."""
    speakers = ["human", "gpt"] * len(contents)
    return [{"from": speaker, "value": content} for speaker, content in zip(speakers, contents, strict=False)]


def said(prompt: Prompt) -> list[tuple[str, str]]:
    """(role, content) of every message."""
    return [(message.role, message.content) for message in prompt.messages]


def in_short(pair: Pair) -> tuple[list[str], str, str]:
    """(contents of the prompt, chosen text, rejected text)."""
    return [message.content for message in pair.prompt.messages], pair.chosen.text, pair.rejected.text
