"""The packaged data is what its card says."""

import json
import statistics
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest

from prefloop.data.mapping import load_pairs, load_prompts
from prefloop.records import content_id

SEED = files("prefloop.data") / "seed"


@pytest.mark.parametrize(
    ("load", "name", "splits"),
    [(load_prompts, "prompts.jsonl", {"train": 192, "held_out": 64}),
     (load_pairs, "pairs.jsonl", {"train": 128, "held_out": 32})],
)  # fmt: skip
def test_counts_ids_and_fields(load: Callable[[str], Any], name: str, splits: dict[str, int]) -> None:
    rows = [json.loads(line) for line in (SEED / name).read_text(encoding="utf-8").splitlines()]
    own = {"prompts.jsonl": {"messages"}, "pairs.jsonl": {"flaw", "prompt", "chosen", "rejected"}}
    assert {frozenset(row) for row in rows} == {frozenset({"id", "category", "split"} | own[name])}
    assert Counter(row["split"] for row in rows) == splits
    assert len({row["id"] for row in rows}) == len(rows)
    for split, count in splits.items():
        assert len(load(f"seed:{split}").records) == count
    loaded = load("seed")
    prompts = [getattr(record, "prompt", record) for record in loaded.records]
    assert [prompt.id for prompt in prompts] == [row["id"] for row in rows]
    assert (loaded.bad_rows, loaded.duplicates) == ([], 0)


def test_no_prompt_is_there_twice() -> None:
    prompts = [*load_prompts("seed").records, *(pair.prompt for pair in load_pairs("seed").records)]
    assert len({content_id(prompt.messages) for prompt in prompts}) == len(prompts)
    assert len({prompt.messages[-1].content.strip().lower() for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize("source", ["seed:train", "seed:held_out"])
def test_preference_is_not_length(source: str) -> None:
    extra = [pair.chosen.length_chars - pair.rejected.length_chars for pair in load_pairs(source).records]
    assert 0.4 <= statistics.fmean(more > 0 for more in extra) <= 0.6
    assert abs(statistics.fmean(extra)) < 10


def test_card_names_every_category_and_licence() -> None:
    card = (SEED / "README.md").read_text(encoding="utf-8")
    categories = {prompt.category for prompt in load_prompts("seed").records}
    categories |= {pair.prompt.category for pair in load_pairs("seed").records}
    assert all(f"`{category}`" in card for category in categories)
    assert "Apache-2.0" in card
