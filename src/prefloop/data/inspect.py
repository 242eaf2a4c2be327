"""Rows as the model will see them: prompt, response and end tokens in colours and in marks, and figures over the file.

prompt: ‹...›    response: «...»    end token: ▏...▕    special tokens: bold
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefloop.data.chat import ChatFormat, special_ids
from prefloop.data.mapping import Loaded, OnBadRow, are_pairs, load_rows, pairs_of_rows, prompts_of_rows
from prefloop.records import Pair, Prompt

STYLES = {"prompt": "cyan", "response": "green", "end": "white on red"}
MARKS = {"prompt": "‹›", "response": "«»", "end": "▏▕"}
LONGEST = 1200
"""Characters of one part that are shown; of a longer one, its beginning and its end."""


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some token counts."""

    min: int
    median: float
    max: int

    @classmethod
    def of(cls, counts: Sequence[int]) -> "Spread":
        return cls(min(counts), statistics.median(counts), max(counts))


@dataclass(frozen=True)
class Summary:
    """Figures over a whole file. Lengths in tokens; those of responses include the end token.

    `one_bos`: prompts that begin with exactly one BOS. `one_end`: responses with exactly one end token, the last.
    `longer_chosen`: share of pairs whose chosen response has more characters; `extra_chars`: by how many, in the mean.
    What a prompts file has no answer to is None.
    """

    rows: int
    skipped: int
    duplicates: int
    prompt_tokens: Spread
    one_bos: int
    chosen_tokens: Spread | None = None
    rejected_tokens: Spread | None = None
    one_end: int | None = None
    longer_chosen: float | None = None
    extra_chars: float | None = None


def inspect_rows(
    source: str | Path,
    chat: ChatFormat,
    console: Console,
    n: int = 3,
    *,
    split: str | None = None,
    on_bad_row: OnBadRow = "error",
) -> Summary:
    """Print the first `n` rows of a prompts or pairs source, and figures over all of it.

    `seed` are the packaged pairs. Raises InputError as `load_prompts` and `load_pairs` do.
    """
    rows = load_rows(source, split, seed_file="pairs")
    loaded = (pairs_of_rows if are_pairs(rows) else prompts_of_rows)(rows, on_bad_row=on_bad_row)
    console.print(Text(f"{loaded.source}: {loaded.mapping.describe()}"))
    console.print(Text(f"tokens: {chat.description}"))
    console.print(_legend())
    for number, record in enumerate(loaded.records[:n], start=1):
        console.print()
        console.print(render(record, chat, number))
    summary = summarise(loaded, chat)
    console.print()
    console.print(_table(summary, chat))
    return summary


def render(record: Prompt | Pair, chat: ChatFormat, number: int) -> Text:
    """One row with the number of tokens of each part."""
    prompt = record if isinstance(record, Prompt) else record.prompt
    prompt_ids = chat.prompt_ids(prompt)
    text = Text(f"row {number}  {prompt.id}\n", style="bold")
    text.append_text(_heading(f"prompt: {_count(len(prompt_ids))}"))
    text.append_text(_part("prompt", prompt_ids, chat))
    if isinstance(record, Pair):
        for name, response in (("chosen", record.chosen), ("rejected", record.rejected)):
            ids = list(chat.with_token_ids(response).token_ids or ())
            ended = ids[-1:] == [chat.end_token_id]
            body = ids[:-1] if ended else ids
            text.append("\n")
            end = "the end token" if ended else "no end token"
            text.append_text(_heading(f"{name}: {_count(len(body))} and {end}"))
            text.append_text(_part("response", body, chat))
            if ended:
                text.append_text(_part("end", ids[-1:], chat))
    return text


def _count(tokens: int) -> str:
    return f"{tokens} token{'' if tokens == 1 else 's'}"


def _heading(text: str) -> Text:
    return Text(text + "\n", style="not bold dim")


def _part(kind: str, ids: Sequence[int], chat: ChatFormat) -> Text:
    """Ids as text between the marks of their kind. Runs of ids are decoded together: a character may span tokens."""
    opening, closing = MARKS[kind]
    style = f"not bold not dim {STYLES[kind]}"
    special = special_ids(chat.tokenizer)
    text = Text(opening, style=style)
    for is_special, run in groupby(ids, key=special.__contains__):
        decoded = str(chat.tokenizer.decode(list(run), clean_up_tokenization_spaces=False))
        text.append(decoded, style="bold" if is_special else "")
    if len(text) > LONGEST:
        left_out = len(text) - LONGEST
        middle = Text(f" [... {left_out} characters ...] ", style="dim")
        text = text[: LONGEST * 2 // 3] + middle + text[-LONGEST // 3 :]
    return text.append(closing)


def _legend() -> Text:
    text = Text("legend: ")
    for kind, (opening, closing) in MARKS.items():
        name = "end token" if kind == "end" else kind
        text.append(f"{opening}{name}{closing}", style=STYLES[kind]).append("  ")
    return text.append("special tokens", style="bold")


def summarise(loaded: Loaded[Prompt] | Loaded[Pair], chat: ChatFormat) -> Summary:
    """The figures of `Summary` over everything that was loaded."""
    pairs = [record for record in loaded.records if isinstance(record, Pair)]
    prompts = [pair.prompt for pair in pairs] or [record for record in loaded.records if isinstance(record, Prompt)]
    prompt_ids = [chat.prompt_ids(prompt) for prompt in prompts]
    counts = {
        "rows": len(loaded.records),
        "skipped": len(loaded.bad_rows),
        "duplicates": loaded.duplicates,
        "prompt_tokens": Spread.of([len(ids) for ids in prompt_ids]),
        "one_bos": sum(ids[:1] == [chat.bos_token_id] != ids[1:2] for ids in prompt_ids),
    }
    if not pairs:
        return Summary(**counts)
    chosen, rejected = (
        [chat.with_token_ids(response).token_ids or () for response in responses]
        for responses in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    )
    extra = [pair.chosen.length_chars - pair.rejected.length_chars for pair in pairs]
    return Summary(
        **counts,
        chosen_tokens=Spread.of([len(ids) for ids in chosen]),
        rejected_tokens=Spread.of([len(ids) for ids in rejected]),
        one_end=sum(
            ids.count(chat.end_token_id) == 1 and ids[-1:] == (chat.end_token_id,) for ids in chosen + rejected
        ),
        longer_chosen=sum(more > 0 for more in extra) / len(extra),
        extra_chars=statistics.fmean(extra),
    )


def _table(summary: Summary, chat: ChatFormat) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    dropped = [(summary.skipped, "skipped"), (summary.duplicates, "duplicates")]
    table.add_row("rows", str(summary.rows) + "".join(f", {n} {what}" for n, what in dropped if n))
    spreads = {"prompt": summary.prompt_tokens, "chosen": summary.chosen_tokens, "rejected": summary.rejected_tokens}
    for name, spread in spreads.items():
        if spread is not None:
            table.add_row(f"{name} tokens", f"{spread.min} min, {spread.median:g} median, {spread.max} max")
    table.add_row("BOS", _bos_line(summary, chat))
    if summary.one_end is not None and summary.longer_chosen is not None and summary.extra_chars is not None:
        table.add_row("end of turn", f"{summary.one_end} of {2 * summary.rows} responses end with the one end token")
        table.add_row(
            "length bias",
            f"chosen is longer in {summary.longer_chosen:.0%} of pairs; "
            f"chosen less rejected is {summary.extra_chars:+.1f} characters on average",
        )
    return table


def _bos_line(summary: Summary, chat: ChatFormat) -> str:
    if chat.bos_token_id is None:
        return "the tokenizer has none"
    return f"{summary.one_bos} of {summary.rows} prompts begin with exactly one {chat.token(chat.bos_token_id)}"
