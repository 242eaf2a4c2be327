"""OAIF end to end on a tiny real model: what is asked, what is trained on, what is kept, and the same bytes again."""

import importlib
import json
import linecache
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from prefloop.cli import main
from prefloop.errors import BudgetReached, FeedbackError, InputError
from prefloop.feedback.annotator import Comparison, Judgement
from prefloop.feedback.chat_server import Patience
from prefloop.feedback.meter import usage_of
from prefloop.models import ModelRef
from prefloop.progress import Advance, ignore
from prefloop.recipes import oaif as recipe
from prefloop.recipes.oaif import (
    OaifConfig,
    counts_of,
    distinct,
    estimate_feedback,
    load_both,
    oaif,
    paper,
    preferences,
)
from prefloop.recipes.online import check_online
from prefloop.recipes.ppo import PpoConfig
from prefloop.recipes.steps import LookAt
from prefloop.records import Group, Prompt, Response
from prefloop.run import Run
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Train
from tests.feedback.judge_server import JudgeServer
from tests.sample.engines import CHAT, stopping_folder

COMPUTE = Compute(device="cpu", dtype="float32", sampling_dtype="float32", sequences_per_batch=16)
TRAIN = Train(steps=5, batch_size=3, learning_rate=2e-3, warmup_steps=1, validation_pairs=0, checkpoint_every=2)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> OaifConfig:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(24)))
    return OaifConfig(
        policy=str(stopping_folder().path),
        prompts=str(file),
        annotator="rule:short",
        evaluator="rule:long",
        evaluate_every=3,
        sampling=Sampling(temperature=0.9, max_new_tokens=24),
        look_at=LookAt(answers=2, shown=1),
        train=TRAIN,
        compute=COMPUTE,
        engine="transformers",
    )


def run_oaif(cfg: OaifConfig, out: Path) -> Path:
    with Run.open(out, recipe="oaif", config=cfg) as run:
        oaif(cfg, run)
    return out


@pytest.fixture(scope="module")
def finished(cfg: OaifConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_oaif(cfg, tmp_path_factory.mktemp("oaif") / "run")


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "round-1/model/training_log.jsonl").read_text().splitlines()]


def test_every_step_is_one_batch_of_fresh_answers(finished: Path) -> None:
    steps = [row for row in log_of(finished) if "evaluation" not in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    for row in steps:
        assert row["pairs"] + row["identical"] + row["tie"] + row["abstained"] + row["unfinished"] == 3
        assert row["chosen_chars"] <= row["rejected_chars"]  # the annotator is rule:short
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert len({row["length_chars"] for row in steps}) > 1


def test_the_model_is_looked_at_every_n_steps_and_at_the_end(finished: Path) -> None:
    rows = [row for row in log_of(finished) if "evaluation" in row]
    assert [row["step"] for row in rows] == [3, 5]
    for row in rows:
        found = row["evaluation"]
        ours, trained = found["against_start"], found["against_start_by_the_annotator"]
        # rule:long and rule:short are opposites.
        assert ours["rate"][0] == pytest.approx(1 - trained["rate"][0])
        assert found["agreement"] in (0.0, None)
        assert found["sampler_gap"] < 1e-4
        assert fmean(found["preferred"]) == pytest.approx(ours["rate"][0])
    first, second = (row["evaluation"] for row in rows)
    assert first["against_previous"] == first["against_start"]

    def longer(one: list[Any], other: list[Any]) -> float:
        chars = [[len(g["responses"][0]["text"].strip()) for g in groups] for groups in (one, other)]
        return sum((a > b) + 0.5 * (a == b) for a, b in zip(*chars, strict=True)) / len(one)

    # The evaluator is rule:long, and the one before is the first evaluation, not the start.
    assert second["against_previous"]["rate"][0] == longer(second["answers"], first["answers"])
    start = [json.loads(line) for line in (finished / "start/answers.jsonl").read_text().splitlines()]
    assert second["against_start"]["rate"][0] == longer(second["answers"], start)


def test_the_manifest_has_the_counts_and_the_gap_of_the_start(finished: Path) -> None:
    entry = json.loads((finished / "manifest.json").read_text())["stages"]["round-1/model"]
    steps = [row for row in log_of(finished) if "evaluation" not in row]
    assert entry["counts"]["pairs"] == sum(row["pairs"] for row in steps)
    assert entry["figures"]["sampler gap at the start, mean nats a token"] < 1e-4
    assert (finished / "model/model.safetensors").is_file() and (finished / "report.md").is_file()
    assert (finished / "report.html").is_file()


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("kill_at", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_run_ends_in_the_same_bytes(
    cfg: OaifConfig, finished: Path, tmp_path: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = recipe.preferences

    def dying(*args: Any) -> Any:
        asked.append(1)
        if len(asked) == kill_at + 1:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "preferences", dying)
        with pytest.raises(Killed):
            run_oaif(cfg, tmp_path / "run")
    run_oaif(cfg, tmp_path / "run")
    for name in ("model/model.safetensors", "round-1/model/training_log.jsonl", "round-1/answers.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.slow
def test_a_budget_that_is_used_up_leaves_a_run_that_goes_on(
    cfg: OaifConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = recipe.preferences
    steps: list[int] = []

    def poor(*args: Any) -> Any:
        if len(steps) == 3:
            raise BudgetReached("the budget of 18 calls is used up")
        steps.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "preferences", poor)
        with pytest.raises(BudgetReached):
            run_oaif(cfg, tmp_path / "run")
    # It goes on where it was, under a larger budget: three steps are not asked for again.
    richer = cfg.replace(feedback__budget_calls=1000)
    again: list[int] = []
    monkeypatch.setattr(recipe, "preferences", lambda *args: again.append(1) or real(*args))
    run_oaif(richer, tmp_path / "run")
    assert len(again) == 2
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (
        finished / "model/model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_budget_that_ends_in_an_evaluation_loses_no_step(
    cfg: OaifConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poor(*args: Any) -> Any:
        raise BudgetReached("the budget of 18 calls is used up")

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "evaluate", poor)
        with pytest.raises(BudgetReached):
            run_oaif(cfg, tmp_path / "run")
    again: list[int] = []
    real = recipe.preferences
    monkeypatch.setattr(recipe, "preferences", lambda *args: again.append(1) or real(*args))
    run_oaif(cfg, tmp_path / "run")
    assert len(again) == 2  # the evaluation after step 3 stopped it
    for name in ("model/model.safetensors", "round-1/model/training_log.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_the_same_annotator_as_evaluator_is_warned_about(cfg: OaifConfig, tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", recipe="oaif", config=cfg) as run:
        oaif(cfg.replace(evaluator="", train__steps=1), run)
    assert (
        "the win rates are judged by the annotator that trains the model" in (tmp_path / "run/events.jsonl").read_text()
    )


@pytest.mark.parametrize(
    ("missing", "message"), [("annotator", "--annotator is missing"), ("prompts", "--prompts is missing")]
)
def test_what_is_missing_is_named(cfg: OaifConfig, tmp_path: Path, missing: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_oaif(cfg.replace(**{missing: ""}), tmp_path / "run")


def test_data_to_watch_the_loss_with_are_refused(cfg: OaifConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.validation_pairs = 576: .*--look-at.answers, every --evaluate-every"):
        run_oaif(cfg.replace(train__validation_pairs=576), tmp_path / "run")
    scored = PpoConfig(annotator="rule:short", train=Train(validation_pairs=4))
    with pytest.raises(InputError, match=r"train.validation_pairs = 4: .*--held-out with --look-at.answers\)$"):
        check_online(scored)


@pytest.mark.slow
def test_a_judge_whose_server_dies_is_paid_once_for_every_question(
    cfg: OaifConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patience, "wait", lambda self, failures: 0.001)

    def judged_by(server: JudgeServer, name: str) -> Path:
        monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / f"cache of {name}"))
        api = cfg.replace(annotator="api:small", evaluator="rule:long", feedback__base_url=server.url)
        return run_oaif(api, tmp_path / name)

    with JudgeServer() as healthy:
        whole = judged_by(healthy, "whole")
    # 5 steps of 3 pairs and 2 evaluations of 2, in both orders; fewer where two answers were the same.
    assert 20 < len(healthy.answered) <= 38
    for dies_at in (1, 12, len(healthy.answered)):
        with JudgeServer(misbehave=lambda n, body, reply, d=dies_at: replace(reply, cut=n >= d)) as dying:
            with pytest.raises(FeedbackError, match="kept: run the same command again"):
                judged_by(dying, f"dies at {dies_at}")
        first = usage_of(tmp_path / f"dies at {dies_at}")["api:small"]
        with JudgeServer() as again:
            run = judged_by(again, f"dies at {dies_at}")
        for name in ("model/model.safetensors", "round-1/model/training_log.jsonl"):
            assert (run / name).read_bytes() == (whole / name).read_bytes(), name
        asked = [json.dumps(body, sort_keys=True) for body in dying.answered + again.answered]
        assert sorted(asked) == sorted(json.dumps(body, sort_keys=True) for body in healthy.answered)
        assert first.faults["connection"] >= 7 and first.calls == len(dying.answered) == dies_at - 1
        # The second process goes on counting where the first one stopped.
        second = usage_of(run)["api:small"]
        assert second.faults == first.faults and second.calls == len(asked)


def test_a_budget_is_the_runs_and_not_the_processs(
    cfg: OaifConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint and an evaluation at the same step, where a stop writes the checkpoint that is there."""
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    asked: list[int] = []
    real = recipe.preferences
    monkeypatch.setattr(recipe, "preferences", lambda *args: asked.append(1) or real(*args))
    with JudgeServer() as server:
        api = cfg.replace(annotator="api:small", feedback__base_url=server.url, feedback__budget_calls=13,
                          feedback__concurrency=1, evaluate_every=2)  # fmt: skip
        for _ in range(3):
            with pytest.raises(BudgetReached, match="the budget of 13 calls is used up"):
                run_oaif(api, tmp_path / "run")
            # Two steps of six calls, and one in the evaluation after them; then, nothing more.
            assert len(server.answered) <= 13
        assert [file.name for file in (tmp_path / "run/round-1/model.partial").glob("checkpoint-*")] == ["checkpoint-2"]
        assert len(asked) == 2
        run_oaif(api.replace(feedback__budget_calls=1000), tmp_path / "run")
    assert len(asked) == 5
    used = usage_of(tmp_path / "run")["api:small"]
    assert used.calls == len(server.answered) == server.most_asked() * len({json.dumps(b) for b in server.answered})


def test_an_annotator_that_never_answers_stops_the_run(cfg: OaifConfig, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(FeedbackError, match=r"^the first 3 steps have given no pair; .*3 .*judge check"):
            run_oaif(cfg.replace(annotator="rule:format"), tmp_path / "run")


@pytest.mark.slow
def test_an_annotator_that_was_edited_does_not_go_on_with_the_old_ones_steps(
    cfg: OaifConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "own_rule_of_oaif.py"
    source.write_text("def score(prompt, response):\n    return float(len(response.text))\n")
    own = cfg.replace(annotator="rule:own_rule_of_oaif:score", train__steps=2)
    run_oaif(own, tmp_path / "run")
    first = (tmp_path / "run/model/model.safetensors").read_bytes()
    source.write_text("def score(prompt, response):\n    return -float(len(response.text))\n")
    sys.modules.pop("own_rule_of_oaif")
    importlib.invalidate_caches()
    linecache.checkcache()
    run_oaif(own, tmp_path / "run")
    assert (tmp_path / "run/model/model.safetensors").read_bytes() != first


def test_without_held_out_prompts_there_are_no_win_rates(cfg: OaifConfig, tmp_path: Path) -> None:
    run_oaif(cfg.replace(look_at__answers=0, train__steps=2), tmp_path / "run")
    assert not any("evaluation" in row for row in log_of(tmp_path / "run"))
    assert "no held-out prompts, so no win rates" in (tmp_path / "run/events.jsonl").read_text()


def test_every_question_is_on_record(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "round-1/model/feedback.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step in range(1, 6) for _ in range(3)]
    for row in rows:
        a, b = (len(row[side].strip()) for side in "ab")
        assert row["p"] == (a < b) + 0.5 * (a == b)
        assert row["outcome"] == ("pair" if a != b else "identical" if row["a"].strip() == row["b"].strip() else "tie")


def test_prompts_that_are_held_out_are_not_trained_on(cfg: OaifConfig, tmp_path: Path) -> None:
    lines = Path(cfg.prompts).read_text().splitlines(keepends=True)
    (tmp_path / "held_out.jsonl").write_text("".join(lines[:4]))
    with Run.open(tmp_path / "run", recipe="oaif", config=cfg) as run:
        own, held_out = load_both(cfg.replace(held_out=str(tmp_path / "held_out.jsonl")), run)
    assert (len(own), len(held_out)) == (20, 4)
    assert not {prompt.messages for prompt in own} & {prompt.messages for prompt in held_out}


OTHERS: list[dict[str, Any]] = [
    {"loss": "ipo", "train__lora__rank": 4},
    {"loss": "slic", "feedback__labels": "soft", "feedback__scale": 20.0},
    {"offline": True},
]


@pytest.mark.parametrize("options", OTHERS)
def test_other_losses_labels_and_an_adapter(cfg: OaifConfig, tmp_path: Path, options: dict[str, Any]) -> None:
    run_oaif(cfg.replace(**options), tmp_path / "run")
    steps = [row for row in log_of(tmp_path / "run") if "evaluation" not in row]
    records = [json.loads(line) for line in (tmp_path / "run/round-1/model/feedback.jsonl").read_text().splitlines()]
    first = [max(row["p"], 1 - row["p"]) for row in records if row["step"] == 1 and row["outcome"] == "pair"]
    # At h = 0: DPO has ln 2, IPO 1 / (4 beta^2) with beta 1, SLiC 1, with soft labels too.
    expected = {"ipo": 0.25, "slic": 1.0}.get(str(options.get("loss")), 0.693147)
    assert steps[0]["loss"] == pytest.approx(expected, abs=1e-4)
    if options.get("feedback__labels") == "soft":
        assert all(0.5 < p < 1 for p in first)


@pytest.mark.slow
@pytest.mark.parametrize("options", OTHERS)
def test_others_give_the_same_bytes_again(cfg: OaifConfig, tmp_path: Path, options: dict[str, Any]) -> None:
    first, again = (run_oaif(cfg.replace(**options), tmp_path / name) for name in ("run", "again"))
    assert (again / "model/model.safetensors").read_bytes() == (first / "model/model.safetensors").read_bytes()


@pytest.mark.slow
def test_offline_a_prompt_has_one_pair_of_answers(cfg: OaifConfig, tmp_path: Path) -> None:
    small = tmp_path / "prompts.jsonl"
    small.write_text("".join(Path(cfg.prompts).read_text().splitlines(keepends=True)[:13]))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "Another?"}) + "\n")
    for offline in (True, False):
        own = cfg.replace(prompts=str(small), held_out=str(held_out), offline=offline)
        run = run_oaif(own, tmp_path / f"run {offline}")
        rows = [json.loads(line) for line in (run / "round-1/model/feedback.jsonl").read_text().splitlines()]
        answers: dict[str, set[tuple[str, str]]] = {}
        for row in rows:
            answers.setdefault(row["prompt"]["id"], set()).add((row["a"], row["b"]))
        twice = [prompt for prompt in answers if sum(row["prompt"]["id"] == prompt for row in rows) > 1]
        assert twice and all((len(answers[prompt]) == 1) == offline for prompt in twice)


def test_a_dry_run_counts_every_question_and_asks_none(cfg: OaifConfig, tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("small: {input: 1.0, output: 2.0}\n")
    with JudgeServer() as server:
        api = cfg.replace(annotator="api:small", feedback__base_url=server.url, feedback__prices=str(prices))
        training, looks, evaluator = estimate_feedback(api)
        assert server.requests == []
    # 5 steps of 3 pairs, and 2 evaluations of 2 answers, in both orders.
    assert training.startswith("training: api:small: 30 calls (0 of 30 questions are in the cache), about ")
    assert looks.startswith("win rates: api:small: 8 calls (0 of 8 ")
    assert evaluator == "win rates: rule:long: no calls"
    found = re.search(r"about (\d+) \+ at most (\d+) tokens, about money ([\d.]+)", training)
    assert found
    tokens_in, tokens_out, money = map(float, found.groups())
    assert money == pytest.approx((tokens_in + 2 * tokens_out) / 1e6, rel=1e-3)
    # Each question has two answers of 24 words of three letters, and the instruction.
    assert 30 * 48 < tokens_in < 30 * 1000 and tokens_out == 30 * 16


@pytest.mark.parametrize("how", [["--dry-run"], ["--dry-run", "true"], ["--dry-run=True"]])
def test_a_dry_run_by_command_makes_no_folder(
    cfg: OaifConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    options = ["--policy", cfg.policy, "--prompts", cfg.prompts, *how, "--annotator", "rule:short"]
    assert main(["oaif", *options, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "training: rule:short: no calls"
    assert not (tmp_path / "run").exists()


# Steps 2 and 3


class Fixed:
    """Prefers by a table of texts; None abstains."""

    name = identity = "fixed"

    def __init__(self, better: dict[tuple[str, str], float | None]) -> None:
        self.better = better
        self.asked: list[tuple[str, str]] = []

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        self.asked += [(c.a.text, c.b.text) for c in comparisons]
        found = [self.better[c.a.text, c.b.text] for c in comparisons]
        return [Judgement(reason="does not say") if p is None else Judgement(p=p) for p in found]


def question(a: str, b: str, id: str = "q") -> Group:
    def response(text: str) -> Response:
        cut = text.endswith("...")
        ids = CHAT.response_ids(text, finished=not cut)
        return Response(text=text, token_ids=tuple(ids), finish_reason="length" if cut else "stop")

    return Group(prompt=Prompt.of("Q", id=id), responses=(response(a), response(b)))


def test_identical_answers_ties_and_abstentions_make_no_pair() -> None:
    annotator = Fixed({("a", "b"): 0.9, ("a", "c"): 0.5, ("b", "c"): None, ("c", "a"): 0.2})
    groups = [question("a", "b"), question("a", "a"), question("a", "c"), question("b", "c"), question("c", "a")]
    pairs, labelled = preferences(groups, annotator, OaifConfig())
    counts = counts_of(labelled)
    assert [(pair.chosen.text, pair.rejected.text, pair.p) for pair in pairs] == [("a", "b", 1.0), ("a", "c", 1.0)]
    outcomes = {"identical": 1, "unfinished": 0, "tie": 1, "abstained": 1, "pairs": 2}
    assert counts == {**outcomes, "abstentions": {"does not say": 1}}
    assert [one.question.a.text + one.question.b.text for one in labelled] == ["ab", "aa", "ac", "bc", "ca"]
    assert ("a", "a") not in annotator.asked
    # O16, O17: the ids that were sampled, with an end token exactly where the answer ended
    assert pairs[0].chosen == groups[0].responses[0]


class Slots(Fixed):
    """Says how each of the two orders was answered: P(the first slot)."""

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        said = {"a": (0.9, 0.2), "b": (0.9, 0.8), "c": (0.1, 0.2), "d": (0.5, 0.1)}
        return [Judgement(p=0.6, q_ab=said[c.a.text][0], q_ba=said[c.a.text][1]) for c in comparisons]


def test_what_a_judge_with_slots_follows_is_counted() -> None:
    groups = [question(text, "x") for text in "abcd"]
    assert counts_of(preferences(groups, Slots({}), OaifConfig())[1]) == {
        "identical": 0, "unfinished": 0, "consistent": 1, "first_slot": 1, "second_slot": 1, "tie": 0, "abstained": 0,
        "pairs": 4,
    }  # fmt: skip


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_o7_exchanging_the_answers_flips_the_label_and_nothing_else(labels: str) -> None:
    cfg = OaifConfig().replace(feedback__labels=labels)
    group = question("a", "b")
    swapped = group.model_copy(update={"responses": group.responses[::-1]})
    annotator = Fixed({("a", "b"): 0.8, ("b", "a"): 1 - 0.8})
    (one, [here]), (other, [there]) = (preferences([g], annotator, cfg) for g in (group, swapped))
    assert one == other and one[0].chosen.text == "a"
    assert here.outcome == there.outcome and here.judgement.swapped == there.judgement


def test_soft_labels_keep_the_probability() -> None:
    annotator = Fixed({("a", "b"): 0.9, ("c", "a"): 0.2})
    cfg = OaifConfig().replace(feedback__labels="soft")
    pairs, _ = preferences([question("a", "b"), question("c", "a")], annotator, cfg)
    assert [(pair.chosen.text, pair.p) for pair in pairs] == [("a", 0.9), ("a", 0.8)]


@pytest.mark.parametrize(
    ("policy", "chosen", "asked", "unfinished"),
    [
        ("keep", ["a...", "a...", "a"], 3, 0),
        ("drop", ["a"], 1, 2),
        ("penalise", ["a...", "b", "a"], 2, 0),
    ],
)
def test_an_unfinished_answer(policy: Any, chosen: list[str], asked: int, unfinished: int) -> None:
    annotator = Fixed({("a...", "b..."): 0.9, ("a...", "b"): 0.9, ("a", "b"): 0.9})
    groups = [question("a...", "b..."), question("a...", "b"), question("a", "b")]
    pairs, labelled = preferences(groups, annotator, OaifConfig(on_unfinished=policy))
    counts = counts_of(labelled)
    assert sorted(pair.chosen.text for pair in pairs) == sorted(chosen)
    assert len(annotator.asked) == asked and counts["unfinished"] == unfinished
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            assert ((response.token_ids or ())[-1] in CHAT.stop_token_ids) == (not response.text.endswith("..."))


def test_a_prompt_that_is_in_a_batch_twice_is_sampled_once() -> None:
    a, b = Prompt.of("a"), Prompt.of("b")
    assert distinct([a, b, a]) == [a, b]


def test_the_papers_settings() -> None:
    cfg = paper()
    assert (cfg.sampling.temperature, cfg.train.batch_size, cfg.train.warmup_steps) == (0.9, 128, 150)
    assert (cfg.train.optimizer, cfg.train.learning_rate) == ("adafactor", 5e-7)
    betas = {loss: recipe.beta_of(loss, None) for loss in ("dpo", "ipo", "slic")}
    assert betas == {"dpo": 0.1, "ipo": 1.0, "slic": 0.002}
    assert recipe.beta_of("ipo", 0.3) == 0.3


def test_the_final_model_is_an_ordinary_one(finished: Path) -> None:
    assert ModelRef.of(finished / "model").weights != stopping_folder().weights
