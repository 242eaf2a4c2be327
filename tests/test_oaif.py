"""OAIF end to end on a tiny real model: what is asked, what is trained on, what is kept, and the same bytes again."""

import json
import re
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
from prefloop.models import ModelRef
from prefloop.progress import Advance, ignore
from prefloop.recipes import oaif as recipe
from prefloop.recipes.oaif import OaifConfig, demo, distinct, estimate_feedback, oaif, paper, preferences
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
    assert rows[0]["evaluation"]["against_previous"] == rows[0]["evaluation"]["against_start"]


def test_the_manifest_has_the_counts_and_the_gap_of_the_start(finished: Path) -> None:
    entry = json.loads((finished / "manifest.json").read_text())["stages"]["round-1/model"]
    steps = [row for row in log_of(finished) if "evaluation" not in row]
    assert entry["counts"]["pairs"] == sum(row["pairs"] for row in steps)
    assert entry["figures"]["sampler gap at the start, mean nats a token"] < 1e-4
    assert (finished / "model/model.safetensors").is_file() and (finished / "report.md").is_file()
    assert (finished / "report.html").is_file()


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("kill_at", [1, 4])
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


def feedback_events(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row["api:small"] for row in rows if row["event"] == "feedback"]


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
        with JudgeServer() as again:
            run = judged_by(again, f"dies at {dies_at}")
        for name in ("model/model.safetensors", "round-1/model/training_log.jsonl"):
            assert (run / name).read_bytes() == (whole / name).read_bytes(), name
        asked = [json.dumps(body, sort_keys=True) for body in dying.answered + again.answered]
        assert sorted(asked) == sorted(json.dumps(body, sort_keys=True) for body in healthy.answered)
        first, second = feedback_events(run)
        assert first["faults"]["connection"] >= 7 and first["calls"] == len(dying.answered) == dies_at - 1
        assert second["faults"] == {} and second["calls"] == len(again.answered)


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
    # Each question has two answers of 24 tokens, four characters each, and the instruction.
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
    pairs, counts = preferences(groups, annotator, OaifConfig())
    assert [(pair.chosen.text, pair.rejected.text, pair.p) for pair in pairs] == [("a", "b", 1.0), ("a", "c", 1.0)]
    assert counts == {"identical": 1, "unfinished": 0, "tie": 1, "abstained": 1, "pairs": 2}
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
    assert preferences(groups, Slots({}), OaifConfig())[1] == {
        "identical": 0, "unfinished": 0, "consistent": 1, "first_slot": 1, "second_slot": 1, "tie": 0, "abstained": 0,
        "pairs": 4,
    }  # fmt: skip


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_o7_exchanging_the_answers_flips_the_label_and_nothing_else(labels: str) -> None:
    cfg = OaifConfig().replace(feedback__labels=labels)
    group = question("a", "b")
    swapped = group.model_copy(update={"responses": group.responses[::-1]})
    annotator = Fixed({("a", "b"): 0.8, ("b", "a"): 1 - 0.8})
    (one, counts), (other, same) = (preferences([g], annotator, cfg) for g in (group, swapped))
    assert one == other and counts == same and one[0].chosen.text == "a"


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
        ("penalise", ["a...", "b", "a"], 2, 1),
    ],
)
def test_an_unfinished_answer(policy: Any, chosen: list[str], asked: int, unfinished: int) -> None:
    annotator = Fixed({("a...", "b..."): 0.9, ("a...", "b"): 0.9, ("a", "b"): 0.9})
    groups = [question("a...", "b..."), question("a...", "b"), question("a", "b")]
    pairs, counts = preferences(groups, annotator, OaifConfig(on_unfinished=policy))
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
    betas = {loss: recipe.beta_of(OaifConfig(loss=loss)) for loss in ("dpo", "ipo", "slic")}
    assert betas == {"dpo": 0.1, "ipo": 1.0, "slic": 0.002}
    assert recipe.beta_of(OaifConfig(loss="ipo", beta=0.3)) == 0.3
    assert isinstance(demo(), OaifConfig)


def test_the_final_model_is_an_ordinary_one(finished: Path) -> None:
    assert ModelRef.of(finished / "model").weights != stopping_folder().weights
