"""What votes say, by hand; and votes as an annotator that eval and OAIF really use."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from scipy.optimize import brentq
from scipy.special import expit

from prefloop.arena.matches import side_1
from prefloop.arena.results import ArenaResults, agreement_of, counts_of, results_of
from prefloop.arena.votes import Arena, Choice, Vote
from prefloop.cli import main
from prefloop.evaluate.figures import Report
from prefloop.feedback.judgement_file import JudgementFile
from prefloop.recipes.oaif import OaifConfig, oaif
from prefloop.recipes.steps import LookAt
from prefloop.records import Group
from prefloop.run import Run
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Train
from tests.arena.arenas import answers, files, make_arena, serving, vote_all
from tests.sample.engines import stopping_folder

Said = Literal["a", "b", "tie", "both bad", "skip"]


def say(arena: Arena, rater: str, *said: Said) -> None:
    """Vote for the first or the second model's answer, on whatever side it is, or otherwise; match after match."""
    for match, what in enumerate(said, start=1):
        first_is_1 = side_1(arena.about.seed, match, rater) == 1
        choice: Choice = ("1" if (what == "a") == first_is_1 else "2") if what in ("a", "b") else what
        arena.vote(rater, match, choice)


def figures(arena: Arena) -> ArenaResults:
    return results_of(arena.about, arena.matches(), arena.votes())


def test_a_match_counts_once_and_what_does_not_decide_is_apart(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "a", "b"))
    say(arena, "Ann", "a", "a", "a", "a", "both bad", "skip")
    say(arena, "Bo", "a", "b", "tie")
    found = figures(arena)
    [pair] = found.pairs
    assert (pair.rate.wins, pair.rate.losses, pair.rate.ties, pair.rate.abstained) == (3, 0, 1, 2)
    assert pair.rate.rate and pair.rate.rate[0] == (1 + 0.5 + 0.75 + 1) / 4
    assert pair.counts == found.counts
    assert (found.counts.votes, found.counts.preferred, found.counts.ties) == (9, 6, 1)
    assert (found.counts.both_bad, found.counts.skipped) == (1, 1)
    # Four matches, a win rate of 0.8125 (see test_bradley_terry).
    difference = brentq(lambda d: 4 * (0.8125 - expit(d)) - d / 50, 0, 5)
    assert found.scores and found.scores["a"][0] == pytest.approx(difference / 2, abs=1e-4)
    assert found.scores["a"][1] < found.scores["a"][0] < found.scores["a"][2]
    # Three matches by two raters: a and a, a and b, a and tie. In both orders: 5 labels a, 5 labels b, 2 ties.
    assert (found.agreement.matches, found.agreement.share) == (3, pytest.approx(1 / 3))
    assert found.agreement.alpha == pytest.approx(1 - (2 / 3) / (1 - (5 * 4 + 5 * 4 + 2 * 1) / (12 * 11)))
    assert found.raters_agreement == {"Ann and Bo": found.agreement}
    assert found.raters["Ann"].preferred == 4 and found.raters["Bo"].votes == 3


def test_side_1_is_of_what_was_shown() -> None:
    def vote(match: int, choice: Choice) -> Vote:
        return Vote(rater="Ann", match=match, side_1=1 if match % 2 else 2, choice=choice)

    counts = counts_of([*(vote(i, "1") for i in range(6)), vote(7, "2"), vote(8, "2"), vote(9, "tie")])
    assert counts.side_1 and counts.side_1[0] == 6 / 8 and counts.side_1[1] == pytest.approx(0.4093, abs=1e-4)


def test_agreement_counts_every_match_in_both_orders(tmp_path: Path) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "a", "b"))
    say(arena, "Ann", *["a"] * 6)
    say(arena, "Bo", *["a"] * 6)
    # The same model wins every time: raters who toss coins, blind, could not agree on that.
    assert agreement_of(arena.votes()).model_dump() == {"matches": 6, "share": 1.0, "alpha": 1.0}
    say(arena, "Cy", "a", "a", "a", "b", "b", "both bad")
    cy_and_ann = figures(arena).raters_agreement["Ann and Cy"]
    # 3 of 6 the same. In both orders: 11 labels a, 11 labels b, 2 "both bad".
    assert cy_and_ann.alpha == pytest.approx(1 - 0.5 / (1 - (11 * 10 + 11 * 10 + 2) / (24 * 23)))


def test_scores_of_three_models_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arena = make_arena(tmp_path, files(tmp_path, "a", "b", "c"))
    with serving(arena) as url:
        vote_all(url, "Ann", lambda a, b: "1" if a < b else "2")
        vote_all(url, "Bo", lambda a, b: "tie")
    out, votes = tmp_path / "results.json", tmp_path / "votes.jsonl"
    command = ["arena", "results", str(arena.path), "--out", str(out), "--judgements", str(votes)]
    assert main(command) == 0
    found = ArenaResults.from_json(out.read_text())
    assert [pair.rate.rate and pair.rate.rate[0] for pair in found.pairs] == [0.75, 0.75, 0.75]
    assert found.scores and list(found.scores) == ["a", "b", "c"]
    assert found.scores["b"][0] == pytest.approx(0, abs=1e-6) and found.scores["a"][0] == -found.scores["c"][0] > 0.7
    shown = capsys.readouterr().out
    assert "a against b" in shown and "6-0-0" in shown and "Bradley-Terry" in shown and f"figures {out}" in shown
    assert "36 votes" in shown and len(votes.read_text().splitlines()) == 36
    assert main(command) == 2 and "results.json exists already" in capsys.readouterr().err
    assert JudgementFile(votes).conflicts == 18


def test_eval_uses_the_votes_of_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {f"Question {i}?": text for i, text in enumerate(["red", " blue\n", "\n\nHuman: x", "same", "", "five"])}
    mine = answers(tmp_path / "mine.json", texts)
    theirs = answers(tmp_path / "theirs.json", {**{prompt: "no" for prompt in texts}, "Question 3?": "same"})
    arena = make_arena(tmp_path, [theirs, mine])
    assert len(arena.matches()) == 5 and arena.about.identical == 1
    with serving(arena) as url:
        vote_all(url, "Ann", lambda a, b: "both bad" if "five" in (a, b) else "1" if b == "no" else "2")
        vote_all(url, "Bo", lambda a, b: "1" if "red" in (a, b) and a == "no" else "2" if "red" in (a, b) else "skip")
    votes, out = str(tmp_path / "votes.jsonl"), tmp_path / "eval"
    assert main(["arena", "results", str(arena.path), "--judgements", votes]) == 0
    assert "4 votes, for --annotator" in capsys.readouterr().out
    assert main(["eval", "--policy", mine, "--against", theirs, "--annotator", f"file:{votes}", "--out", str(out)]) == 0
    found = Report.model_validate_json((out / "eval.json").read_text()).win_rate
    # red: one for it, one against; blue and Human: won; same: a tie; the empty one and five: not in the file.
    assert found and (found.overall.wins, found.overall.ties, found.overall.abstained) == (2, 2, 2)
    assert found.overall.rate and found.overall.rate[0] == (0.5 + 1 + 1 + 0.5) / 4


@pytest.mark.slow
def test_oaif_trains_on_the_votes_of_people(tmp_path: Path) -> None:
    """Answers that an offline run has asked a rule about, judged by people who prefer what the rule does not."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(6)))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "Another?"}) + "\n")
    cfg = OaifConfig(
        policy=str(stopping_folder().path), prompts=str(prompts), held_out=str(held_out), annotator="rule:short",
        evaluator="rule:long", offline=True, sampling=Sampling(temperature=0.9, max_new_tokens=24),
        look_at=LookAt(answers=0, shown=0), engine="transformers",
        train=Train(steps=2, batch_size=3, learning_rate=2e-3, warmup_steps=1, validation_pairs=0),
        compute=Compute(device="cpu", dtype="float32", sampling_dtype="float32"),
    )  # fmt: skip

    def asked(cfg: OaifConfig, out: Path) -> list[dict[str, Any]]:
        with Run.open(out, recipe="oaif", config=cfg) as run:
            oaif(cfg, run)
        return [json.loads(line) for line in (out / "round-1/model/feedback.jsonl").read_text().splitlines()]

    before = asked(cfg, tmp_path / "rule")
    groups = {
        row["prompt"]["id"]: Group.model_validate(
            {"prompt": row["prompt"], "responses": [{"text": row["a"]}, {"text": row["b"]}]}
        )
        for row in before
        if row["outcome"] in ("pair", "tie") and row["a"].strip() and row["b"].strip()
    }
    assert len(groups) >= 3
    (tmp_path / "groups.jsonl").write_text("".join(group.to_json() + "\n" for group in groups.values()))
    arena = make_arena(tmp_path, [str(tmp_path / "groups.jsonl")])
    with serving(arena) as url:
        vote_all(url, "Ann", lambda a, b: "1" if (len(a.strip()), a) > (len(b.strip()), b) else "2")
    votes = str(tmp_path / "votes.jsonl")
    assert main(["arena", "results", str(arena.path), "--judgements", votes]) == 0
    after = asked(cfg.replace(annotator=f"file:{votes}"), tmp_path / "people")
    decided = 0
    for row in after:
        if row["prompt"]["id"] in groups:
            a, b = row["a"], row["b"]
            assert row["outcome"] == "pair" and row["p"] == float((len(a.strip()), a) > (len(b.strip()), b))
            decided += 1
        else:
            assert row["outcome"] != "pair"
    assert decided >= 3
