"""Records in: finds how the columns of a source make `Prompt`s and `Pair`s, says so, and converts every row.

    prompts    one of the columns in PROMPT_COLUMNS, as text or as a conversation, whose last answer is left out
    pairs      an explicit prompt with two answers, or two whole conversations that share all but the last answer
    answers    an explicit prompt, a completion, and a label that says whether it is good

Optional columns: `system`; `input` (Alpaca: goes below `instruction`); `id` or `prompt_id`; `category` or `subset`; for
pairs `p`, `weight`, the two scores and `reference_sample`; for answers `weight`. What prefloop itself writes (prompts,
groups, pairs) is read back too. A row that does not fit stops the load with file, row, what was seen and what was
expected, or is left out and listed (`on_bad_row="skip"`).
"""

import importlib.resources
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import ValidationError

from prefloop.config import first_problem
from prefloop.data.files import Row, Rows, choose_split, read_rows
from prefloop.data.turns import BadRow, check_prompt, form_of, read_response, read_turns, split_conversations
from prefloop.errors import InputError, did_you_mean
from prefloop.records import Answer, Message, Pair, Prompt, Response, content_id

PROMPT_COLUMNS = ("prompt", "instruction", "question", "messages", "conversation", "conversations")
ID_COLUMNS = ("prompt_id", "id")
CATEGORY_COLUMNS = ("category", "subset")
ANSWER_COLUMNS = ("completion", "response")
SCORES = {"chosen_score": ("chosen_score", "score_chosen"), "rejected_score": ("rejected_score", "score_rejected")}

OnBadRow = Literal["error", "skip"]
R = TypeVar("R", Prompt, Pair, Answer)


@dataclass(frozen=True)
class Mapping:
    """Which columns became what. `parts`: (field, column, form); `notes`: what was done besides; `unused` columns."""

    parts: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: `prompt <- column 'instruction' (text); chosen <- column 'chosen' (messages, last answer)`."""
        said = [f"{field} <- column {column!r}{f' ({form})' if form else ''}" for field, column, form in self.parts]
        unused = [f"not used: {', '.join(self.unused)}"] if self.unused else []
        return "; ".join([*said, *self.notes, *unused])


@dataclass(frozen=True)
class SkippedRow:
    """A row that was left out: its 1-based number in the file, and why, in one line that begins with the place."""

    number: int
    reason: str


@dataclass(frozen=True)
class Loaded(Generic[R]):
    """What a source held. `duplicates` counts prompts that were there again and are kept once (0 for pairs)."""

    records: list[R]
    mapping: Mapping
    bad_rows: list[SkippedRow]
    source: str
    duplicates: int = 0


def load_prompts(
    source: str | Path, *, split: str | None = None, on_bad_row: OnBadRow = "error", limit: int | None = None
) -> Loaded[Prompt]:
    """Prompts from a file, folder, hub data set, or `seed`, `seed:train`, `seed:held_out` (the packaged ones).

    Equal prompts are kept once; of a source of pairs, the prompts are taken. `limit` keeps the first ones.
    Raises InputError in one line, for a row with its number, what was seen and what was expected.

        >>> load_prompts("seed:held_out", limit=1).mapping.describe()
        "prompt <- column 'messages' (messages); category <- column 'category'; id <- column 'id'; not used: split"
    """
    loaded = prompts_of_rows(load_rows(source, split, seed_file="prompts"), on_bad_row=on_bad_row, limit=limit)
    return replace(loaded, source=f"{source}:{split}" if split else str(source))


def load_pairs(
    source: str | Path, *, split: str | None = None, on_bad_row: OnBadRow = "error", limit: int | None = None
) -> Loaded[Pair]:
    """Preference pairs from a file, folder, hub data set, or `seed`, `seed:train`, `seed:held_out`.

    Raises InputError as `load_prompts` does.
    """
    loaded = pairs_of_rows(load_rows(source, split, seed_file="pairs"), on_bad_row=on_bad_row, limit=limit)
    return replace(loaded, source=f"{source}:{split}" if split else str(source))


def load_answers(
    source: str | Path, *, split: str | None = None, on_bad_row: OnBadRow = "error", limit: int | None = None
) -> Loaded[Answer]:
    """Single answers that were called good or bad, from a file, folder or hub data set.

    Raises InputError as `load_prompts` does.
    """
    loaded = answers_of_rows(load_rows(source, split, seed_file="pairs"), on_bad_row=on_bad_row, limit=limit)
    return replace(loaded, source=f"{source}:{split}" if split else str(source))


def load_rows(source: str | Path, split: str | None, *, seed_file: Literal["prompts", "pairs"]) -> Rows:
    """The rows of a source; `seed` is always the packaged data (`seed_file` of it); a file of that name is `./seed`."""
    name, _, seed_split = str(source).partition(":")
    if name != "seed":
        return read_rows(source, split=split)
    packaged = importlib.resources.files("prefloop.data") / "seed" / f"{seed_file}.jsonl"
    with importlib.resources.as_file(packaged) as path:
        rows = read_rows(path)
    rows = Rows(name, tuple(replace(row, source=name) for row in rows))
    chosen = seed_split or split
    return choose_split(rows, chosen) if chosen else rows


def are_pairs(rows: Rows) -> bool:
    """Whether rows are preference pairs: they have both answers."""
    return {"chosen", "rejected"} <= set(rows.columns)


def are_answers(rows: Rows) -> bool:
    """Whether rows are single answers with a label."""
    return not are_pairs(rows) and "label" in rows.columns and _answer_column(rows.columns) is not None


def _answer_column(columns: Iterable[str]) -> str | None:
    return next((column for column in ANSWER_COLUMNS if column in columns), None)


def prompts_of_rows(rows: Rows, *, on_bad_row: OnBadRow = "error", limit: int | None = None) -> Loaded[Prompt]:
    """`load_prompts` on rows that are already read."""
    if are_pairs(rows):
        pairs = pairs_of_rows(rows, on_bad_row=on_bad_row)
        prompts, mapping, bad_rows = [pair.prompt for pair in pairs.records], pairs.mapping, pairs.bad_rows
    else:
        columns = rows.columns
        column = _prompt_column(columns)
        if column is None:
            raise InputError(
                f"{rows.source}: no column holds a prompt; columns: {_quoted(columns)}; "
                f"expected one of {_quoted(PROMPT_COLUMNS)}{_csv_hint(rows)}"
            )
        found = _Found(columns)
        prompts, bad_rows = _convert(rows, lambda row: _prompt(row, column, found), on_bad_row)
        prompts = _with_ids(prompts, found)
        mapping = found.mapping()
    unique: dict[str, Prompt] = {}
    for prompt in prompts:
        unique.setdefault(prompt.id, prompt)
    return Loaded(list(unique.values())[:limit], mapping, bad_rows, rows.source, len(prompts) - len(unique))


def pairs_of_rows(rows: Rows, *, on_bad_row: OnBadRow = "error", limit: int | None = None) -> Loaded[Pair]:
    """`load_pairs` on rows that are already read."""
    columns = rows.columns
    for needed in ("chosen", "rejected"):
        if needed not in columns:
            raise InputError(
                f"{rows.source}: there is no column {needed!r}; columns: {_quoted(columns)}; pairs need 'chosen', "
                f"'rejected' and a prompt, or whole conversations{_csv_hint(rows)}.{did_you_mean(needed, columns)}"
            )
    found = _Found(columns)
    column = _prompt_column(columns)
    pairs, bad_rows = _convert(rows, lambda row: _pair(row, column, found), on_bad_row)
    prompts = _with_ids([pair.prompt for pair in pairs], found)
    pairs = [pair.model_copy(update={"prompt": prompt}) for pair, prompt in zip(pairs, prompts, strict=True)]
    return Loaded(pairs[:limit], found.mapping(), bad_rows, rows.source)


def answers_of_rows(rows: Rows, *, on_bad_row: OnBadRow = "error", limit: int | None = None) -> Loaded[Answer]:
    """`load_answers` on rows that are already read."""
    columns = rows.columns
    prompt, answer = _prompt_column(columns), _answer_column(columns)
    if prompt is None or answer is None or "label" not in columns:
        raise InputError(
            f"{rows.source}: answers need a prompt, a column of {_quoted(ANSWER_COLUMNS)} and 'label'; columns: "
            f"{_quoted(columns)}{_csv_hint(rows)}"
        )
    found = _Found(columns)
    answers, bad_rows = _convert(rows, lambda row: _answer(row, prompt, answer, found), on_bad_row)
    prompts = _with_ids([one.prompt for one in answers], found)
    answers = [one.model_copy(update={"prompt": prompt}) for one, prompt in zip(answers, prompts, strict=True)]
    return Loaded(answers[:limit], found.mapping(), bad_rows, rows.source)


class _Found:
    """Collects, row by row, which column became which field in which form."""

    def __init__(self, columns: list[str]) -> None:
        self.columns = columns
        self.forms: dict[tuple[str, str], dict[str, None]] = {}
        self.notes: dict[str, None] = {}
        self.used: set[str] = set()

    def add(self, field: str, column: str, form: str = "") -> None:
        self.forms.setdefault((field, column), {})[form] = None
        self.used.add(column)

    def note(self, text: str, *columns: str) -> None:
        self.notes[text] = None
        self.used.update(columns)

    def mapping(self) -> Mapping:
        return Mapping(
            parts=tuple((field, column, " or ".join(forms)) for (field, column), forms in self.forms.items()),
            notes=tuple(self.notes),
            unused=tuple(column for column in self.columns if column not in self.used),
        )


def _convert(rows: Rows, convert: Callable[[Row], R], on_bad_row: OnBadRow) -> tuple[list[R], list[SkippedRow]]:
    if on_bad_row not in ("error", "skip"):
        raise InputError(f"on_bad_row = {on_bad_row!r}: expected 'error' or 'skip'")
    records: list[R] = []
    bad_rows: list[SkippedRow] = []
    for row in rows:
        try:
            records.append(convert(row))
        except (BadRow, ValidationError) as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
            reason = f"{row.place}: {problem}; seen: {_seen(row.data)}"
            if on_bad_row == "error":
                fix = "fix the row, or leave such rows out (on_bad_row: skip)"
                raise InputError(f"{rows.source} {reason}; {fix}") from None
            bad_rows.append(SkippedRow(row.number, reason))
    if not records:
        raise InputError(f"{rows.source}: none of {len(bad_rows)} rows fits; the first: {bad_rows[0].reason}")
    return records, bad_rows


def _prompt(row: Row, column: str, found: _Found) -> Prompt:
    """A row of a prompts file: the conversation, less its last answer when it ends with one."""
    if _is_own(row):
        found.note("prompts as prefloop writes them", "prompt")
        prompt = Prompt.model_validate(row.data["prompt"])
        check_prompt(prompt.messages)
        return prompt
    turns = _prompt_turns(row.data, column, found)
    if len(turns) > 1 and turns[-1].role == "assistant":
        turns = turns[:-1]
        found.note("the last answer of a conversation is left out")
    check_prompt(turns)
    return _identified(row.data, turns, found)


def _pair(row: Row, column: str | None, found: _Found) -> Pair:
    """A row of a pairs file."""
    data = row.data
    if _is_own(row):
        found.note("pairs as prefloop writes them", *data)
        pair = Pair.model_validate(data)
        check_prompt(pair.prompt.messages)
        return _checked(pair)
    for needed in ("chosen", "rejected"):
        if data.get(needed) is None:
            raise BadRow(f"there is no {needed!r}; expected an answer")
    if column is not None and data.get(column) is not None:
        turns = _prompt_turns(data, column, found)
        check_prompt(turns)
        chosen, rejected = (read_response(data[name], name, turns) for name in ("chosen", "rejected"))
    else:
        turns, chosen, rejected = split_conversations(data["chosen"], data["rejected"])
        turns = _with_system(turns, data, found)
        check_prompt(turns)
        found.add("prompt", "chosen", "what both conversations share")
    for name in ("chosen", "rejected"):
        form = form_of(data[name])
        found.add(name, name, form if form == "text" else f"{form}, last assistant turn")
    numbers = {name: _number(data, name, (name,), found) for name in ("p", "weight")}
    numbers |= {name: _number(data, name, columns, found) for name, columns in SCORES.items()}
    given = {name: value for name, value in numbers.items() if value is not None}
    if side := _text(data, "reference_sample"):
        found.add("reference_sample", "reference_sample")
        given["reference_sample"] = side
    prompt = _identified(data, turns, found)
    responses = {"chosen": Response(text=chosen), "rejected": Response(text=rejected)}
    return _checked(Pair.model_validate({"prompt": prompt, **responses, **given}))


GOOD = {True: 1.0, False: 0.0, "true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}
"""What a label may be: true and false, 1 and 0, also as text."""


def _answer(row: Row, column: str, answer: str, found: _Found) -> Answer:
    """A row of a file of answers."""
    data = row.data
    turns = _prompt_turns(data, column, found)
    check_prompt(turns)
    if data.get(answer) is None:
        raise BadRow(f"there is no {answer!r}; expected an answer")
    response = read_response(data[answer], answer, turns)
    label = data.get("label")
    known = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(known, bool | int | str) or known not in GOOD:
        raise BadRow(f"label = {label!r}: expected true or false")
    found.add("response", answer, form_of(data[answer]) or "")
    found.add("p", "label", "good or bad")
    weight = _number(data, "weight", ("weight",), found)
    given = {} if weight is None else {"weight": weight}
    prompt = _identified(data, turns, found)
    return Answer.model_validate({"prompt": prompt, "response": Response(text=response), "p": GOOD[known], **given})


def _checked(pair: Pair) -> Pair:
    for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not response.text.strip():
            raise BadRow(f"the response in column {name!r} is empty; expected text")
    if pair.chosen.text.strip() == pair.rejected.text.strip():
        raise BadRow("'chosen' and 'rejected' are the same text; expected two different answers")
    return pair


def _is_own(row: Row) -> bool:
    """Whether the row is a group or a pair that prefloop wrote."""
    prompt = row.data.get("prompt")
    return isinstance(prompt, dict) and "messages" in prompt


def _prompt_turns(data: dict[str, Any], column: str, found: _Found) -> list[Message]:
    value = data.get(column)
    if value is None:
        raise BadRow(f"there is no prompt in column {column!r}; expected text or a list of messages")
    found.add("prompt", column, form_of(value) or "")
    if column == "instruction" and isinstance(value, str) and _text(data, "input"):
        value = f"{value}\n\n{data['input']}"
        found.add("prompt, after a blank line", "input", "text")
    turns = read_turns(value, column)
    return _with_system(turns, data, found)


def _with_system(turns: list[Message], data: dict[str, Any], found: _Found) -> list[Message]:
    """The turns behind the system message of column `system`, when the row has one."""
    system = _text(data, "system")
    if not system:
        return turns
    message = Message(role="system", content=system)
    found.add("system", "system", "text")
    if turns and turns[0].role == "system":
        if turns[0] != message:
            raise BadRow("column 'system' and the conversation's system message differ; expected one of them")
        return turns
    return [message, *turns]


def _identified(data: dict[str, Any], turns: list[Message], found: _Found) -> Prompt:
    category = None
    for column in CATEGORY_COLUMNS:
        if category is None and (category := _text(data, column)):
            found.add("category", column)
    id = None
    for column in ID_COLUMNS:
        if id is None and (id := _text(data, column)):
            found.add("id", column)
    return Prompt(id=id or content_id(tuple(turns)), messages=tuple(turns), category=category)


def _text(data: dict[str, Any], column: str) -> str | None:
    """An optional text column; a number is written out, a blank one is None."""
    value = data.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(f"column {column!r} is of type {type(value).__name__}; expected text")
    return str(value)


def _number(data: dict[str, Any], field: str, columns: Iterable[str], found: _Found) -> Any:
    """An optional number, not yet checked."""
    for column in columns:
        if data.get(column) is not None:
            found.add(field, column)
            return data[column]
    return None


def _with_ids(prompts: list[Prompt], found: _Found) -> list[Prompt]:
    """The prompts with ids that are equal exactly when the conversations are.

    A conversation keeps the first id that was given to it, unless another conversation has that id too.
    """
    hashes = [content_id(prompt.messages) for prompt in prompts]
    first: dict[str, str] = {}
    owners: dict[str, set[str]] = defaultdict(set)
    for prompt, content in zip(prompts, hashes, strict=True):
        owners[first.setdefault(content, prompt.id)].add(content)
    if any(len(contents) > 1 for contents in owners.values()):
        found.note("ids that several prompts share are replaced by a hash of the prompt")
    ids = [first[content] if len(owners[first[content]]) == 1 else content for content in hashes]
    return [prompt.model_copy(update={"id": id}) for prompt, id in zip(prompts, ids, strict=True)]


def _prompt_column(columns: Iterable[str]) -> str | None:
    return next((column for column in PROMPT_COLUMNS if column in columns), None)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _csv_hint(rows: Rows) -> str:
    return " (the first line of a CSV file names the columns)" if ".csv" in rows.source else ""


def _seen(data: dict[str, Any]) -> str:
    """A row in short: `prompt = 'Name a col...' (str), chosen = [] (list)`."""
    shown = [f"{key} = {_short(value)} ({type(value).__name__})" for key, value in list(data.items())[:6]]
    return ", ".join([*shown, *(["..."] if len(data) > 6 else [])]) or "no columns"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
