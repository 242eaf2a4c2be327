"""The page as data and as HTML: its figures, what of a run is on it, and that nothing in a run takes effect."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from prefloop.atomic import write_atomically
from prefloop.cli import main
from prefloop.errors import InputError
from prefloop.pairs.length import LengthCoefficient
from prefloop.records import Pair, Prompt, Response
from prefloop.report.page import page_of, render, write_page
from prefloop.report.samples import embedded, samples
from prefloop.report.story import read_story
from tests.report.runs import answers, checkup, evaluation, pair, steps, write_run

HOSTILE = '</script><script>alert("owned")</script><!--<script>\u2028<img src=x onerror=alert(1)>'


CURVE = ((0.0, 30.0), (0.001, 1.0), (0.003, -8.0), (0.9, -20.0))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A DICE run of one round, with something of everything."""
    scored = pair(0, "good", "bad", chosen_score=2.0, rejected_score=-1.0, source="generated")
    watched = {"step": 20, "validation": {"loss": 0.5, "margin": 1.0}}
    length = LengthCoefficient(alpha=0.002, gap_at_zero=30.0, gap=1.0, mean_abs_gap=9.0, n_prompts=2, curve=CURVE)
    return write_run(
        tmp_path / "mine",
        checkups={"start": checkup(accuracy=(0.5, 0.4, 0.6)), "round-1": checkup(kl_per_token=(0.2, 0.1, 0.3))},
        answers={"start": answers(["one two", "same"]), "round-1": answers(["one three", "same"], "length")},
        pairs={"round-1": [scored, pair(1, "better", "worse", p=0.8)]},
        training={"round-1": [*steps(20, loss=0.6, margin=2.0), watched]},
        lengths={"round-1": length},
        counts={
            "round-1/valid": {"prompts kept": 2},
            "start/answers": {"answers": 2},
            "round-1/answers": {"answers": 2},
        },
        events=[
            {"event": "engine", "name": "openvino", "device": "cpu", "dtype": "bfloat16"},
            {"event": "row skipped", "row": 7},
        ],
    )


def test_the_figures_of_a_run_are_on_its_page(run: Path) -> None:
    page = page_of([read_story(run)])
    assert page.title == "dice: mine" and page.final is None
    (part,) = page.runs
    figures = {row[0]: row[1:] for row in part.figures.rows}
    assert figures["held-out accuracy"] == ("0.50 [0.40, 0.60]", "0.90 [0.80, 0.95]")
    assert figures["KL / token"] == ("0.0500", "0.2000") and figures["length gap"][1] == "+30.0 to +1.0 chars"
    assert "win rate" not in figures  # nobody has one
    assert "1 round of training; held-out accuracy 0.90 [0.80, 0.95]" in part.summary
    facts = dict(part.facts)
    assert facts["sampled with"] == "openvino on cpu, bfloat16" and facts["rows skipped"] == "1"
    assert facts["versions"] == "prefloop 0.1.0, python 3.11" and facts["time"] == "16 s"
    assert part.counts.head == ("stage", "what", "start", "round-1")
    assert set(part.counts.rows) == {("valid", "prompts kept", "", "2"), ("answers", "answers", "2", "2")}
    assert part.stages.rows[-1][4] == "16.0" and {row[5] for row in part.stages.rows[:-1]} == {"12 %"}
    assert page.samples["models"] == [["start", "round-1"]]


def test_the_charts_hold_the_numbers_of_the_run(run: Path) -> None:
    charts = {chart.title: chart for _, group in page_of([read_story(run)]).charts for chart in group}
    accuracy = charts["Held-out accuracy"]
    assert accuracy.ticks == ("start", "round-1") and accuracy.level == 0.5
    assert accuracy.series[0].points == [(0.0, 0.5), (1.0, 0.9)]
    assert accuracy.series[0].intervals == [(0.4, 0.6), (0.8, 0.95)]
    assert charts["Reward against drift"].series[0].points == [(0.05, 0.5), (0.2, 0.5)]
    line, dots = charts["Loss"].series
    assert line.points[-1] == (20.0, 0.6) and len(line.points) == 20 and dots.points == [(20.0, 0.5)]
    swept, used = charts["Length gap against alpha"].series
    assert swept.points == [(0.0, 30.0), (0.001, 1.0), (0.003, -8.0)] and used.points == [(0.002, 1.0)]
    before, after = charts["Length gap before and after"].series
    assert (before.points, after.points) == ([(0.0, 30.0)], [(0.0, 1.0)])
    assert all(chart.caption and chart.x and chart.y for chart in charts.values())


def test_a_surrogate_is_told_from_a_loss(run: Path, tmp_path: Path) -> None:
    rows = steps(4, loss=-3.0, preference_loss=0.5)
    sail = write_run(tmp_path / "sail", recipe="sail", training={"round-1": rows})

    def charts(*folders: Path) -> dict[str, Any]:
        found = page_of([read_story(folder) for folder in folders]).charts
        return {chart.title: chart for _, group in found for chart in group}

    known = {"plain": charts(run), "sail": charts(sail), "both": charts(run, sail)}
    assert "Preference loss" not in known["plain"]
    [line] = known["sail"]["Preference loss"].series
    assert line.points == [(1.0, 0.125), (2.0, 0.25), (3.0, 0.375), (4.0, 0.5)]
    assert known["sail"]["Preference loss"].y == "nats"
    said = {name: found["Loss"].caption for name, found in known.items()}
    assert {name: "surrogate" in text for name, text in said.items()} == {"plain": False, "sail": True, "both": True}
    assert {name: "above zero" in text for name, text in said.items()} == {"plain": True, "sail": False, "both": True}


def test_samples_are_answers_side_by_side_and_pairs_with_scores(run: Path) -> None:
    data = samples([read_story(run)])
    assert [row[2] for row in data["answers"]] == [
        [["one two", 0, None], ["one three", 1, None]],
        [["same", 0, None], ["same", 1, None]],
    ]
    assert data["pairs"] == [
        [0, "round-1", 0, "good", "bad", 2.0, -1.0, 1.0, 1],
        [0, "round-1", 1, "better", "worse", None, None, 0.8, 0],
    ]
    assert data["prompts"] == [["Question 0?", ""], ["Question 1?", ""]]
    assert data["files"] == {"0 round-1": "round-1/mixed.jsonl"} and data["of"] == [2, 2]


def test_answers_of_an_online_run_come_with_who_was_preferred(tmp_path: Path) -> None:
    now = answers(["after"])
    rows = [*steps(2, loss=1.0), {"step": 2, "evaluation": evaluation(0.7, 0.9, groups=now, preferred=[0.75])}]
    config = {"policy": "small", "prompts": "mine", "annotator": "rule:a", "evaluator": "rule:b"}
    usage = {"calls": 4, "cache_hits": 1, "tokens_in": 90, "tokens_out": 4, "money": 0.5, "calls_without_usage": 0}
    for n, role in enumerate(("feedback", "evaluation"), start=1):
        counted = {"money": 0.5, "tallies": {"api:j": {**usage, "faults": {"timeout": n}}}}
        write_atomically(tmp_path / "run/usage" / f"{role}.json", json.dumps(counted))
    told = read_story(
        write_run(
            tmp_path / "run",
            recipe="oaif",
            config=config,
            answers={"start": answers(["before"])},
            training={"round-1": rows},
        )
    )
    data = samples([told])
    assert data["models"] == [["start", "round-1, step 2"]] and data["judged"] == ["rule:b"]
    assert data["answers"] == [[0, 0, [["before", 0, None], ["after", 0, 0.75]]]]
    # One judge in two roles, each with its own budget: what it used is added up.
    used = told.usage["api:j"]
    assert (used.calls, used.money, used.faults) == (8, 1.0, {"timeout": 3})
    (part,) = page_of([told]).runs
    assert ("fault: timeout", "3") in part.judge and ("money", "1") in part.judge
    assert part.win_rates.rows[0][:4] == ("2", "0.70 [0.60, 0.80]", "0.60 [0.50, 0.70]", "0.90 [0.80, 1.00]")
    charts = {chart.title: chart for _, group in page_of([told]).charts for chart in group}
    assert [s.points for s in charts["Win rate against drift"].series] == [[(0.1, 0.7)], [(0.1, 0.6)], [(0.1, 0.9)]]


def test_questions_of_an_online_run_that_became_pairs_are_in_the_browser(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "online", recipe="oaif", training={"round-1": steps(2, loss=0.5)})
    question = {"step": 1, "prompt": {"id": "p1", "messages": [{"role": "user", "content": "Why?"}]}}
    rows = [
        {**question, "a": "first", "b": "second", "p": 0.2, "outcome": "pair"},
        {**question, "a": "same", "b": "same", "p": 0.5, "outcome": "identical"},
        {**question, "a": "one", "b": "other", "reason": "the policy labels it", "outcome": "unlabelled"},
        {**question, "prompt": "p1", "a": "of an", "b": "older version", "p": 0.2, "outcome": "pair"},
    ]
    (folder / "round-1/model/feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = samples([read_story(folder)])
    assert found["pairs"] == [[0, "round-1", 0, "second", "first", None, None, 0.8, 1]]
    assert found["prompts"] == [["Why?", ""]] and found["files"] == {"0 round-1": "round-1/model/feedback.jsonl"}


def test_an_evaluation_is_a_page_of_its_own_and_beside_runs(run: Path, tmp_path: Path) -> None:
    for name, texts in (("ours", ["long one", "b"]), ("theirs", ["short", "brief"])):
        rows = [{"instruction": f"Question {i}?", "output": text} for i, text in enumerate(texts)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    out = tmp_path / "eval"
    assert main(["eval", "--policy", str(tmp_path / "ours.json"), "--against", str(tmp_path / "theirs.json"),
                 "--annotator", "rule:long", "--out", str(out)]) == 0  # fmt: skip
    assert (out / "report.html").is_file()
    page = page_of([read_story(out)])
    (part,) = page.runs
    ((title, table),) = part.evaluation
    assert "judged by rule:long" in title and table.rows[0][:3] == ("all", "50.0 [0.0, 100.0]", "1-1-0")
    assert "wins 50.0 [0.0, 100.0] % against" in part.summary and "at equal length" in part.summary
    assert page.samples["answers"] == [
        [0, 0, [["short", 0, None], ["long one", 0, 1.0]]],
        [0, 1, [["brief", 0, None], ["b", 0, 0.0]]],
    ]
    both = page_of([read_story(run), read_story(out)])
    assert both.final is not None and both.final.head == ("", "mine")
    assert "judged by rule:long" in render(both)
    assert not page.read and "What it means" not in render(page)  # patterns are of training
    (out / "judgements.jsonl").write_text("")
    with pytest.raises(InputError, match="damaged"):
        read_story(out)
    (out / "eval.json").unlink()
    with pytest.raises(InputError, match="this evaluation has not ended"):
        read_story(out)


def test_samples_beyond_the_budget_are_left_out_evenly(tmp_path: Path) -> None:
    pairs = [pair(i, f"chosen {i} {'x' * 100}", f"rejected {'y' * 100}") for i in range(1000)]
    told = read_story(write_run(tmp_path / "run", answers={"start": answers(["a"])}, pairs={"round-1": pairs}))
    data = samples([told], budget=100_000)
    kept = [int(row[3].split()[1]) for row in data["pairs"]]
    assert 300 < len(kept) < 400 and data["of"] == [1, 1000] and len(data["answers"]) == 1
    assert len(embedded(data)) < 101_000
    gaps = {b - a for a, b in pairwise(kept)}
    assert gaps <= {2, 3, 4} and kept[0] == 0 and kept[-1] > 990
    assert len(samples([told])["pairs"]) == 1000


def test_json_in_the_page_cannot_close_its_element() -> None:
    text = embedded({"a": HOSTILE, "b": ["&amp;", "ä", None]})
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"a": HOSTILE, "b": ["&amp;", "ä", None]}


class Elements(HTMLParser):
    """Counts elements and keeps attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_nothing_that_a_run_holds_becomes_mark_up(tmp_path: Path) -> None:
    bad = Prompt.of(HOSTILE, id="p", category=HOSTILE)
    config = {"policy": HOSTILE, "pairs": HOSTILE, HOSTILE: HOSTILE, "annotator": HOSTILE}
    folder = write_run(
        tmp_path / "run",
        config=config,
        checkups={"start": checkup(), "round-1": checkup(finished=0.1)},
        answers={"start": answers([HOSTILE], text=HOSTILE)},
        pairs={"round-1": [Pair(prompt=bad, chosen=Response(text=HOSTILE), rejected=Response(text="no"))]},
        training={"round-1": steps(5, loss=1.0)},
        counts={"round-1/valid": {HOSTILE: 1}},
        events=[{"event": "engine", "name": HOSTILE, "device": "cpu", "dtype": "x"}],
    )
    html = render(page_of([read_story(folder)]))
    found = Elements(html)
    assert found.tags.count("script") == 2 and "img" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert html.count("</script>") == 2 and "alert(" in html
    assert not [value for name, value in found.attributes if name in ("src", "href") and not str(value).startswith("#")]
    # Nothing is fetched, and scripts other than the page's own are not run.
    assert (
        "default-src &#39;none&#39;; script-src &#39;sha256-" in html
        and "unsafe" not in html
        and "http://" not in html
        and "https://" not in html
    )


def test_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = write_run(
        tmp_path / "other",
        config={"policy": "small", "pairs": "seed:train", "seed": 3, "beta": 0.5, "train": {"steps": 20}},
        checkups={"start": checkup(), "round-1": checkup(accuracy=(0.7, 0.6, 0.8))},
        training={"round-1": steps(4, loss=0.4)},
    )
    page = page_of([read_story(run), read_story(other)])
    assert page.title == "2 runs side by side" and page.final is not None
    assert page.final.head == ("", "mine", "other")
    assert ("held-out accuracy", "0.90 [0.80, 0.95]", "0.70 [0.60, 0.80]") in page.final.rows
    assert [option for option in page.options if option[2]] == [("beta", ["0.1", "0.5"], True)]
    charts = {chart.title: chart for _, group in page.charts for chart in group}
    assert [s.name for s in charts["Loss"].legend] == ["mine", "other"]
    assert [s.points[-1] for s in charts["Held-out accuracy"].series] == [(1.0, 0.9), (1.0, 0.7)]


def test_the_command_writes_one_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    before = (run / "report.html").read_bytes()
    assert before.startswith(b"<!doctype html>")
    assert main(["report", str(run)]) == 0 and (run / "report.html").read_bytes() == before
    both = tmp_path / "both.html"
    assert main(["report", str(run), str(run), "--out", str(both)]) == 0 and both.is_file()
    assert main(["report", str(run), "--out", str(both)]) == 2
    assert "exists already" in capsys.readouterr().err


def damage(run: Path, name: str, text: str | None) -> None:
    (run / name).unlink() if text is None else (run / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("manifest.json", None, "is not a run folder: it has no manifest.json"),
        ("manifest.json", '{"recipe": "dice", "sta', "is damaged (JSONDecodeError"),
        ("manifest.json", "[]", "is damaged (TypeError"),
        ("config.yaml", None, "config file not found"),
        ("round-1/checkup.json", "{}", "is damaged (ValidationError"),
        ("start/answers.jsonl", "no json\n", "is damaged (ValidationError"),
        ("round-1/mixed.jsonl", "{}\n", "mixed.jsonl is damaged: a line is no preference pair"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(
    run: Path, name: str, text: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run, name, text)
    assert main(["report", str(run)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "--runs is missing: run folders"),
        (["nowhere"], "nowhere is not a run folder: there is no such folder; name one"),
    ],
)
def test_a_missing_run_is_named(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *args]) == 2
    assert said in capsys.readouterr().err


def test_a_half_event_of_a_kill_is_passed_over(run: Path) -> None:
    with (run / "events.jsonl").open("a") as log:
        log.write('{"event": "engine", "na')
    assert len(read_story(run).events) == 2


def test_a_page_that_cannot_be_written_says_so(run: Path) -> None:
    (run / "blocked").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_page([read_story(run)], run / "blocked/report.html")


def test_an_unfinished_run_has_a_page_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", counts={"data/pairs": {"pairs kept": 4}})
    page: Any = page_of([read_story(folder)])
    assert page.charts == [] and page.samples["answers"] == []
    assert "None of the patterns" in render(page)
