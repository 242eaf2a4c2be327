"""Groups in: answers to prompts, scored or not, from every format that users have them in.

    groups        as `prefloop sample` and `score` write them
    pairs         any format of `load_pairs`; both answers, with their scores (`rejected=False`: the chosen one)
    rows          a prompt with one answer (one of the columns in ONE) or a list of them (MANY), rewards beside them
    conversations whose last message is the answer

Rows with the same prompt become one group. Rewards are numbers in one of the columns in REWARDS: one for one answer, a
list for a list of answers; in a list of objects, each may have its own. They become the responses' scores.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefloop.data.files import Row, Rows
from prefloop.data.mapping import (
    PROMPT_COLUMNS,
    Found,
    Loaded,
    OnBadRow,
    are_pairs,
    convert_rows,
    csv_hint,
    identified,
    is_own,
    load_rows,
    pairs_of_rows,
    prompt_column,
    prompt_turns,
    quoted,
    with_ids,
)
from prefloop.data.turns import BadRow, check_prompt, form_of, read_response
from prefloop.errors import InputError
from prefloop.records import Group, Message, Pair, Response

ONE = ("response", "completion", "output", "answer")
"""Columns that hold one answer."""
MANY = ("responses", "completions", "outputs", "answers")
"""Columns that hold a list of answers: texts, messages, or objects with one of ONE."""
REWARDS = ("reward", "score", "rewards", "scores", "overall_score")
"""Columns that hold rewards, higher is better."""
CONVERSATIONS = ("messages", "conversation", "conversations")
"""Prompt columns whose last message may be the answer."""


def load_groups(
    source: str | Path, *, split: str | None = None, on_bad_row: OnBadRow = "error", rejected: bool = True
) -> Loaded[Group]:
    """Answers from a file, folder, hub data set, or `seed`, `seed:train`, `seed:held_out` (the packaged pairs).

    One group a prompt, in the order of first appearance; an answer that stands in several pairs of a prompt counts
    once. `rejected`: of pairs, whether the rejected answers are taken too. Raises InputError as `load_prompts` does.
    """
    rows = load_rows(source, split, seed_file="pairs")
    return replace(
        groups_of_rows(rows, on_bad_row=on_bad_row, rejected=rejected),
        source=f"{source}:{split}" if split else str(source),
    )


def read_groups(source: str) -> list[Group]:
    """The groups of a source, all of whose rows must fit."""
    return load_groups(source).records


def groups_of_rows(rows: Rows, *, on_bad_row: OnBadRow = "error", rejected: bool = True) -> Loaded[Group]:
    """`load_groups` on rows that are already read."""
    if are_pairs(rows):
        pairs = pairs_of_rows(rows, on_bad_row=on_bad_row)
        notes = (*pairs.mapping.notes, "both answers of a pair" if rejected else "the chosen answers of the pairs")
        groups = merged([_group_of_pair(pair, rejected) for pair in pairs.records], once=True)
        return Loaded(groups, replace(pairs.mapping, notes=notes), pairs.bad_rows, pairs.source)
    columns = rows.columns
    column = prompt_column(columns)
    if column is None or not (set(columns) & {*ONE, *MANY} or column in CONVERSATIONS):
        missing = "a prompt" if column is None else "an answer"
        raise InputError(
            f"{rows.source}: no column holds {missing}; columns: {quoted(columns)}; expected a prompt in one of "
            f"{quoted(PROMPT_COLUMNS)} and an answer in one of {quoted((*ONE, *MANY))}, conversations that "
            f"end with the answer, groups, or pairs with 'chosen' and 'rejected'{csv_hint(rows)}"
        )
    found = Found(columns)
    groups, bad_rows = convert_rows(rows, lambda row: _group(row, column, found), on_bad_row)
    prompts = with_ids([group.prompt for group in groups], found)
    groups = [group.model_copy(update={"prompt": prompt}) for group, prompt in zip(groups, prompts, strict=True)]
    return Loaded(merged(groups), found.mapping(), bad_rows, rows.source)


def groups_of_pairs(pairs: Sequence[Pair]) -> list[Group]:
    """Both answers of pairs with their scores, one group a prompt, each answer once."""
    return merged([_group_of_pair(pair, True) for pair in pairs], once=True)


def merged(groups: Sequence[Group], *, once: bool = False) -> list[Group]:
    """One group a prompt id, in the order of first appearance. `once`: of equal answers the first counts."""
    answers: dict[str, list[Response]] = {}
    for group in groups:
        known = answers.setdefault(group.prompt.id, [])
        known += [r for r in group.responses if not once or not any(r.same_as(other) for other in known)]
    prompts = {group.prompt.id: group.prompt for group in reversed(groups)}
    return [Group(prompt=prompts[id], responses=tuple(found)) for id, found in answers.items()]


def _group_of_pair(pair: Pair, rejected: bool) -> Group:
    def scored(response: Response, score: float | None) -> Response:
        return response if score is None else response.model_copy(update={"score": score})

    chosen, other = scored(pair.chosen, pair.chosen_score), scored(pair.rejected, pair.rejected_score)
    return Group(prompt=pair.prompt, responses=(chosen, other) if rejected else (chosen,))


def _group(row: Row, column: str, found: Found) -> Group:
    """A row of a file of answers."""
    data = row.data
    if is_own(row) and "responses" in data:
        found.note("groups as prefloop writes them", *data)
        group = Group.model_validate(data)
        check_prompt(group.prompt.messages)
        if not group.responses:
            raise BadRow("the group has no responses; expected at least one")
        return group
    turns = prompt_turns(data, column, found)
    answer = next((name for name in (*MANY, *ONE) if data.get(name) is not None), None)
    if answer is not None:
        responses = _answers(turns, data, answer, found)
    elif column in CONVERSATIONS:
        turns, responses = _last_answer(turns, data, column, found)
    else:
        raise BadRow(f"there is no answer; expected one in {quoted((*ONE, *MANY))}")
    check_prompt(turns)
    return Group(prompt=identified(data, turns, found), responses=tuple(responses))


def _last_answer(
    turns: list[Message], data: dict[str, Any], column: str, found: Found
) -> tuple[list[Message], list[Response]]:
    """A conversation's turns before its last answer, and that answer."""
    if len(turns) < 2 or turns[-1].role != "assistant":
        ends = f"ends with {turns[-1].role}" if turns else "is empty"
        raise BadRow(f"the conversation in column {column!r} {ends}; expected it to end with the assistant's answer")
    if not turns[-1].content.strip():
        raise BadRow(f"the last answer in column {column!r} is empty; expected text")
    found.add("answer", column, "the last message")
    return turns[:-1], [_response(turns[-1].content.strip(), *_rewards(data, 1, found))]


def _answers(turns: list[Message], data: dict[str, Any], column: str, found: Found) -> list[Response]:
    """The answers in a column of ONE or MANY."""
    value = data[column]
    if column in ONE:
        found.add("answer", column, form_of(value) or "")
        return [_response(read_response(value, column, turns), *_rewards(data, 1, found))]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow(f"column {column!r} is of type {type(value).__name__}; expected a list of at least one answer")
    found.add("answers", column, "list")
    rewards = _rewards(data, len(value), found)
    responses = []
    for item, reward in zip(value, rewards, strict=True):
        name = next((name for name in ONE if isinstance(item, dict) and name in item), None)
        text = read_response(item[name] if name else item, column, turns)
        responses.append(_response(text, *(_rewards(item, 1, found, inside=column) if name else [reward])))
    return responses


def _rewards(data: dict[str, Any], n: int, found: Found, *, inside: str = "") -> list[float | None]:
    """The rewards of a row's `n` answers; None where there is none. `inside`: the column that holds `data`."""
    name = next((name for name in REWARDS if data.get(name) is not None), None)
    if name is None:
        return [None] * n
    found.add("reward", inside or name, f"{name} of each" if inside else "")
    value = data[name]
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(values) != n:
        raise BadRow(f"column {name!r} has {len(values)} rewards for {n} answers; expected as many")
    return [None if item is None else _number(item, name) for item in values]


def _number(value: Any, column: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"column {column!r} is {value!r}; expected a finite number as the reward")
    return number


def _response(text: str, reward: float | None) -> Response:
    return Response(text=text, score=reward)
