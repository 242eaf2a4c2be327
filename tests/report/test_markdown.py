"""The report from a story made by hand: what it says when, and that a model's text stays text."""

from pathlib import Path

import pytest

from prefloop.errors import InputError
from prefloop.records import Group, Prompt, Response
from prefloop.report.card import model_card
from prefloop.report.costs import costs
from prefloop.report.markdown import write_report
from prefloop.report.story import Round, Story, read_story
from tests.report.runs import checkup, steps, write_run


def story(path: Path, *rounds: Round, **config: object) -> Story:
    stages = {"round-1/groups": {"counts": {"answers": 8}, "seconds": 2.5}}
    return Story(path, "dice", {"look_at": {"shown": 1}, **config}, {"torch": "2"}, stages, list(rounds))


def answer(text: str) -> Group:
    return Group(prompt=Prompt.of("Say # hello", id="p"), responses=(Response(text=text, finish_reason="stop"),))


def test_a_models_text_is_shown_and_never_takes_effect(tmp_path: Path) -> None:
    hostile = "# not a heading\n<script>alert(1)</script>\n\n| a | b |\u2028- item"
    told = story(tmp_path, Round("start", answers=[answer("before")]), Round("round-1", answers=[answer(hostile)]))
    report = write_report(told).read_text(encoding="utf-8")
    for line in ("# not a heading", "<script>alert(1)</script>", "| a | b |", "- item", "before", "Say # hello"):
        assert f"\n    {line}\n" in report, line
    assert report.count("\n# ") == 0 and report.startswith("# dice: ")


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({}, None),
        ({"chosen_change": -1.0, "rejected_change": -3.0}, "chosen and rejected both became less likely"),
        ({"accuracy": (0.55, 0.4, 0.7)}, "cannot be told from a coin"),
        ({"finished": 0.5}, "`--sampling.max-new-tokens` (higher)"),
    ],
)
def test_a_known_pattern_is_put_in_words_with_the_models_that_show_it(
    tmp_path: Path, figures: dict[str, object], said: str | None
) -> None:
    told = story(tmp_path, Round("round-1", checkup=checkup(**figures)), Round("round-2", checkup=checkup()))
    report = write_report(told).read_text(encoding="utf-8")
    assert ("## What it means" in report) == (said is not None)
    if said:
        (line,) = [line for line in report.splitlines() if said in line]
        assert line.startswith("- round-1: ")


def test_counts_and_times_are_tables(tmp_path: Path) -> None:
    report = write_report(story(tmp_path, Round("start"))).read_text(encoding="utf-8")
    assert "| round-1/groups | answers | 8 |" in report
    assert "| round-1/groups | 2.5 |" in report and "| **all stages** | **2.5** |" in report


@pytest.mark.parametrize(
    ("policy", "base"), [("org/model", True), ("runs/mine", True), ("/a/b/c", False), ("./x/y", False)]
)
def test_the_card_names_a_base_model_that_looks_like_a_hub_id(
    tmp_path: Path, policy: str, base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = story(tmp_path, Round("start"), policy=policy, seed=7)
    card = model_card(told)
    assert (f"base_model: {policy}" in card) == base
    assert "with seed 7" in card and str(tmp_path) not in card
    # A folder that is here was taken, whatever the hub has under its name.
    if base:
        (tmp_path / policy).mkdir(parents=True)
        assert "base_model:" not in model_card(told)


def test_a_folder_that_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run folder"):
        read_story(tmp_path)


def test_what_a_round_took_is_a_column_a_round(tmp_path: Path) -> None:
    counts = {
        "round-1/groups": {"answers": 20, "tokens": 400}, "round-1/stored": {"prompts with new answers": 10},
        "round-2/groups": {"answers": 10, "tokens": 200}, "round-2/strengths": {"comparisons": 3, "questions": 6},
    }  # fmt: skip
    training = {"round-1": steps(5, loss=0.5), "round-2": steps(5, loss=0.4)}
    labels, rows = costs(read_story(write_run(tmp_path, training=training, counts=counts)))
    assert labels == ["round-1", "round-2"]
    assert {name: values for name, *values in rows} == {
        "prompts with new answers": ["10", "-"],
        "answers sampled": ["20", "10"],
        "tokens sampled": ["400", "200"],
        "comparisons by the judge": ["-", "3"],
        "questions to the judge": ["-", "6"],
        "seconds of sampling": ["2.0", "2.0"],
        "seconds of scoring or judging": ["-", "2.0"],
        "seconds of training": ["2.0", "2.0"],
    }
