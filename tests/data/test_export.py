"""Pairs written for other tools and read back."""

import json
import string
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.data.export import export_pairs
from prefloop.data.mapping import load_pairs
from prefloop.records import Pair, Prompt, Response
from tests.data.rows import answer, turns

TEXT = st.text(min_size=1, max_size=20).filter(lambda text: text.strip() != "")
STRIPPED = TEXT.map(str.strip)
CATEGORY = st.none() | st.text(string.ascii_lowercase, min_size=1, max_size=5)
SCORE = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    contents = draw(st.lists(TEXT, min_size=1, max_size=5).filter(lambda items: len(items) % 2 == 1))
    return turns(*contents, system=draw(st.none() | TEXT))


@st.composite
def pair_lists(draw: st.DrawFn) -> list[Pair]:
    """Pairs of which some share a prompt."""
    messages = draw(st.lists(conversations(), min_size=1, max_size=3, unique_by=json.dumps))
    prompts = [Prompt.of(turns, id=f"id {n}", category=draw(CATEGORY)) for n, turns in enumerate(messages)]
    pairs = []
    for prompt in draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=4)):
        chosen, rejected = draw(st.lists(STRIPPED, min_size=2, max_size=2, unique=True))
        numbers = {
            "p": draw(st.floats(0, 1)),
            "weight": draw(st.floats(0, 1e6)),
            "chosen_score": draw(SCORE),
            "rejected_score": draw(SCORE),
        }
        responses = {"chosen": Response(text=chosen), "rejected": Response(text=rejected)}
        pairs.append(Pair.model_validate({"prompt": prompt, **responses, **numbers}))
    return pairs


@settings(max_examples=40, deadline=None)
@given(pairs=pair_lists())
def test_pairs_come_back_equal(pairs: list[Pair]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        export_pairs(pairs, path)
        assert load_pairs(path).records == pairs


def test_rows_are_the_explicit_conversational_format(tmp_path: Path) -> None:
    first = Pair(prompt=Prompt.of("a", id="x"), chosen=Response(text="é"), rejected=Response(text="bad"))
    second = first.model_copy(update={"p": 0.75})
    export_pairs([first], tmp_path / "one.jsonl")
    row = {"id": "x", "prompt": turns("a"), "chosen": answer("é"), "rejected": answer("bad")}
    assert (tmp_path / "one.jsonl").read_text(encoding="utf-8") == json.dumps(row, ensure_ascii=False) + "\n"
    export_pairs([first, second], tmp_path / "two.jsonl")
    written = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert written == [{**row, "p": 1.0}, {**row, "p": 0.75}]


def test_datasets_reads_the_rows(tmp_path: Path) -> None:
    import datasets

    pair = Pair(prompt=Prompt.of("a", id="x"), chosen=Response(text="good"), rejected=Response(text="bad"))
    export_pairs([pair, pair.model_copy(update={"weight": 2.0})], tmp_path / "a.jsonl")
    read = datasets.Dataset.from_json(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(read, datasets.Dataset)
    assert read["chosen"][0] == answer("good")
    assert list(read["weight"]) == [1.0, 2.0]


def test_text_is_written_and_token_ids_are_not(tmp_path: Path) -> None:
    sampled = Response(text="good", token_ids=(1, 2), finish_reason="stop", policy_logp=-1.0)
    pair = Pair(prompt=Prompt.of("a", id="x"), chosen=sampled, rejected=Response(text="bad"), source="generated")
    export_pairs([pair], tmp_path / "a.jsonl")
    expected = pair.model_copy(update={"chosen": Response(text="good"), "source": "offline"})
    assert load_pairs(tmp_path / "a.jsonl").records == [expected]
