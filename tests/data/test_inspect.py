"""What `prefloop inspect` shows, in plain text and in colours, and its figures."""

import io
from pathlib import Path

from rich.console import Console

from prefloop.data.chat import ChatFormat
from prefloop.data.inspect import Spread, Summary, inspect_rows
from prefloop.records import Pair, Prompt, Response
from tests.data.rows import turns, write_rows
from tests.tiny import tiny_tokenizer

PAIRS = [
    {"id": "x", "prompt": "hi", "chosen": "good", "rejected": "bad"},
    {"id": "y", "prompt": turns("a", "b", "é"), "chosen": "éé", "rejected": "no, not at all"},
    {"id": "z", "prompt": "hi?", "chosen": "same", "rejected": "same"},
]
# ChatML's frame of one user turn and the opening: <|im_start|>user\n ... <|im_end|>\n<|im_start|>assistant\n
FRAME = 1 + 5 + 1 + 1 + 1 + 10


def shown(path: Path, *, n: int = 3, colour: bool = False, chat: ChatFormat | None = None) -> tuple[str, Summary]:
    output = io.StringIO()
    # Wide enough that no temporary path, however long, wraps.
    console = Console(file=output, width=400, force_terminal=colour, color_system="standard" if colour else None)
    chat = chat or ChatFormat(tiny_tokenizer("chatml"))
    summary = inspect_rows(path, chat, console, n, on_bad_row="skip")
    return output.getvalue(), summary


def test_pairs_in_plain_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", *PAIRS)
    text, _ = shown(path, n=1)
    assert [line.rstrip() for line in text.splitlines()] == [
        f"{path}: prompt <- column 'prompt' (text or messages); chosen <- column 'chosen' (text); rejected <- column "
        "'rejected' (text); id <- column 'id'",
        "tokens: chat template of the tokenizer, begins with <|im_start|>, end of turn <|im_end|> (258)",
        "legend: ‹prompt›  «response»  ▏end token▕  special tokens",
        "",
        "row 1  x",
        f"prompt: {FRAME + 2} tokens",
        "‹<|im_start|>user",
        "hi<|im_end|>",
        "<|im_start|>assistant",
        "›",
        "chosen: 4 tokens and the end token",
        "«good»▏<|im_end|>▕",
        "rejected: 3 tokens and the end token",
        "«bad»▏<|im_end|>▕",
        "",
        "rows             2, 1 skipped",
        "prompt tokens    21 min, 32.5 median, 44 max",
        "chosen tokens    5 min, 5 median, 5 max",
        "rejected tokens  4 min, 9.5 median, 15 max",
        "BOS              2 of 2 prompts begin with exactly one <|im_start|> (257)",
        "end of turn      4 of 4 responses end with the one end token",
        "length bias      chosen is longer in 50% of pairs; chosen less rejected is -5.5 characters on average",
    ]


def test_figures_over_the_file(tmp_path: Path) -> None:
    _, summary = shown(write_rows(tmp_path / "a.jsonl", *PAIRS), n=0)
    # The second prompt: two user turns, one assistant turn (1 + 10 + 1 + 1 + 1), é is two bytes.
    second = FRAME + 2 + (1 + 5 + 1 + 1) + 1 + (1 + 10 + 1 + 1) + 1
    assert (FRAME + 2, second) == (21, 44)
    assert summary == Summary(
        rows=2,
        skipped=1,
        duplicates=0,
        prompt_tokens=Spread(21, 32.5, 44),
        one_bos=2,
        chosen_tokens=Spread(5, 5.0, 5),
        rejected_tokens=Spread(4, 9.5, 15),
        one_end=4,
        longer_chosen=0.5,
        extra_chars=(1 - 12) / 2,
    )


def test_prompts_have_no_figures_of_responses(tmp_path: Path) -> None:
    text, summary = shown(write_rows(tmp_path / "a.jsonl", {"prompt": "hi"}, {"prompt": "hi"}, {"prompt": "ho!"}))
    assert summary == Summary(rows=2, skipped=0, duplicates=1, prompt_tokens=Spread(21, 21.5, 22), one_bos=2)
    assert "rows           2, 1 duplicates" in text
    assert "«response»" in text and "length bias" not in text and "chosen" not in text


def test_each_part_has_its_colour(tmp_path: Path) -> None:
    text, _ = shown(write_rows(tmp_path / "a.jsonl", PAIRS[0]), colour=True)
    assert "\x1b[1;36m<|im_start|>\x1b[0m\x1b[36muser" in text
    assert "\x1b[32m«good»\x1b[0m" in text
    assert "\x1b[1;37;41m<|im_end|>" in text


def test_marks_in_text_are_not_markup(tmp_path: Path) -> None:
    row = {"prompt": "[bold]hi[/bold]", "chosen": "[red]x", "rejected": "y [/]"}
    text, _ = shown(write_rows(tmp_path / "a.jsonl", row))
    assert "[bold]hi[/bold]<|im_end|>" in text and "«[red]x»" in text and "«y [/]»" in text


def test_long_parts_are_cut_in_the_middle(tmp_path: Path) -> None:
    row = {"prompt": "hi", "chosen": "a" * 1000 + "b" * 1000, "rejected": "y"}
    text, summary = shown(write_rows(tmp_path / "a.jsonl", row))
    assert (summary.longer_chosen, summary.extra_chars) == (1.0, 1999.0)
    joined = text.replace("\n", "")
    # The opening mark is one of the characters that are shown.
    assert "«" + "a" * 799 + " [... 801 characters ...] " + "b" * 400 + "»" in joined


def test_cut_response_shows_no_end_token_and_a_missing_bos_is_counted(tmp_path: Path) -> None:
    pair = Pair(
        prompt=Prompt.of("hi"), chosen=Response(text="good", finish_reason="length"), rejected=Response(text="bad")
    )
    path = tmp_path / "a.jsonl"
    path.write_text(pair.to_json())
    text, summary = shown(path, chat=ChatFormat(tiny_tokenizer("zephyr")))
    assert "chosen: 4 tokens and no end token\n«good»\nrejected: 3 tokens and the end token\n«bad»▏</s>▕\n" in text
    assert (summary.one_end, summary.one_bos) == (1, 0)
    assert "0 of 1 prompts begin with exactly one <s> (257)" in text
    text, _ = shown(path, chat=ChatFormat(tiny_tokenizer(None)))
    assert "BOS              the tokenizer has none" in text
