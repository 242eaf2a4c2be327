"""Conversations in: the values that users' columns hold, read as turns.

    text          "Name a colour."                                            one user turn
    messages      [{"role": "user", "content": "Name a colour."}, ...]
    ShareGPT      [{"from": "human", "value": "Name a colour."}, ...]
    transcript    "\\n\\nHuman: Name a colour.\\n\\nAssistant: Red."               Anthropic's HH-RLHF

Every function raises `BadRow` with what was found and what was expected; the caller knows the file and the row.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

from prefloop.records import Message

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
"""Role names that data sets use -> our role."""

FOLLOWS = {
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
"""Role -> the roles that may come next; None is the beginning."""

Form = Literal["text", "messages", "ShareGPT turns", "transcript"]


class BadRow(Exception):
    """A row does not fit: what is wrong with it, and what was expected."""


def form_of(value: Any) -> Form | None:
    """How a conversation is written, or None when it is none of the known ways."""
    if isinstance(value, str):
        return "transcript" if value.startswith("\n\nHuman:") else "text"
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, Sequence) and all(isinstance(turn, dict) for turn in value):
        return "ShareGPT turns" if value and "from" in value[0] else "messages"
    return None


def read_turns(value: Any, column: str) -> list[Message]:
    """The turns of a conversation in any known form; text is one user turn, one message is a list of one."""
    form = form_of(value)
    if form == "text":
        return [Message(role="user", content=value)]
    if form == "transcript":
        return _read_transcript(value)
    if form is None:
        kind = type(value).__name__
        raise BadRow(f"column {column!r} is of type {kind}; expected text or a list of messages (role and content)")
    return [_read_message(turn, column, n) for n, turn in enumerate([value] if isinstance(value, dict) else value, 1)]


def _read_message(turn: dict[str, Any], column: str, number: int) -> Message:
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role, content = turn.get(role_key), turn.get(content_key)
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise BadRow(f"message {number} of column {column!r} has {role_key} {role!r}; expected one of {known}")
    if not isinstance(content, str):
        kind = type(content).__name__
        raise BadRow(f"message {number} of column {column!r} has {content_key} of type {kind}; expected text")
    return Message.model_validate({"role": ROLES[role], "content": content})


def _read_transcript(text: str) -> list[Message]:
    """Turns of an Anthropic transcript, each without surrounding whitespace."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    roles = [ROLES[speaker.lower()] for speaker in parts[::2]]
    return [Message.model_validate({"role": role, "content": said.strip()})
            for role, said in zip(roles, parts[1::2], strict=True)]  # fmt: skip


def check_prompt(turns: Sequence[Message]) -> None:
    """Raises BadRow unless a model can answer: system first only, user and assistant in turn, the end not its own."""
    if not turns:
        raise BadRow("the prompt is empty; expected text or at least one message")
    previous = None
    for number, turn in enumerate(turns, start=1):
        if turn.role not in FOLLOWS[previous]:
            after = f"after {previous}" if previous else "first"
            expected = " or ".join(sorted(FOLLOWS[previous]))
            raise BadRow(f"message {number} of the prompt is {turn.role} {after}; expected {expected}")
        if turn.role == "user" and not turn.content.strip():
            raise BadRow(f"message {number} of the prompt is empty; expected text from the user")
        previous = turn.role
    if previous not in ("user", "tool"):
        raise BadRow(f"the prompt ends with {previous}; expected it to end with user")


def read_response(value: Any, column: str, prompt: Sequence[Message]) -> str:
    """The response in `value`, stripped: text, one assistant message, or a conversation that begins with `prompt`."""
    if form_of(value) == "text":
        return _stripped(value, column)
    turns = read_turns(value, column)
    if len(turns) > 1:
        before, turns = turns[:-1], turns[-1:]
        if not _same_turns(before, prompt):
            raise BadRow(
                f"column {column!r} is a conversation of {len(before) + 1} messages that does not begin with the row's "
                "prompt; expected the prompt's messages and one answer"
            )
    if not turns:
        raise BadRow(f"column {column!r} is an empty list; expected an answer")
    if turns[0].role != "assistant":
        raise BadRow(f"column {column!r} ends with {turns[0].role}; expected it to end with an assistant message")
    return _stripped(turns[0].content, column)


def _stripped(text: str, column: str) -> str:
    if not text.strip():
        raise BadRow(f"the response in column {column!r} is empty; expected text")
    return text.strip()


def _same_turns(a: Sequence[Message], b: Sequence[Message]) -> bool:
    """Equal up to surrounding whitespace; a system message that only the second has does not count."""
    if len(b) == len(a) + 1 and b[0].role == "system":
        b = b[1:]
    return [(turn.role, turn.content.strip()) for turn in a] == [(turn.role, turn.content.strip()) for turn in b]


def split_conversations(chosen: Any, rejected: Any) -> tuple[list[Message], str, str]:
    """(prompt, chosen response, rejected response) of two whole conversations that share all but the last answer.

    The prompt is what they share, right before the first assistant message that differs.
    """
    left, right = read_turns(chosen, "chosen"), read_turns(rejected, "rejected")
    for column, turns in (("chosen", left), ("rejected", right)):
        if len(turns) < 2:
            raise BadRow(
                f"there is no prompt, and {column!r} is only an answer; "
                "expected a column 'prompt', or whole conversations in 'chosen' and 'rejected'"
            )
    shared = 0
    while shared < min(len(left), len(right)) and left[shared] == right[shared]:
        shared += 1
    if shared == len(left) == len(right):
        raise BadRow("'chosen' and 'rejected' are the same conversation; expected two different answers")
    if shared == min(len(left), len(right)):
        raise BadRow("one of 'chosen' and 'rejected' is the beginning of the other; expected one answer in each")
    if {left[shared].role, right[shared].role} != {"assistant"}:
        raise BadRow(
            f"'chosen' and 'rejected' first differ at message {shared + 1}, which is not an assistant message in both; "
            "expected the same prompt in both"
        )
    longer = max(len(left), len(right)) - shared - 1
    if longer:
        raise BadRow(
            f"'chosen' and 'rejected' differ from message {shared + 1} on, with up to {longer} more after it; "
            "expected only the last answer to differ"
        )
    return left[:shared], _stripped(left[shared].content, "chosen"), _stripped(right[shared].content, "rejected")
