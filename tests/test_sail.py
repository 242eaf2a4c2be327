"""SAIL end to end on a tiny real model: routes, whose answers and labels, and the same bytes again."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefloop.errors import FeedbackError, InputError
from prefloop.recipes import sail as recipe
from prefloop.recipes.online import check_there_are_pairs, counts_of
from prefloop.recipes.sail import (
    Drawn,
    SailConfig,
    baseline_of,
    corrected,
    counted,
    estimate_feedback,
    per_kind,
    routed,
    sail,
    tell_fallen_back,
    tell_sign_changes,
    unlabelled,
)
from prefloop.recipes.steps import LookAt
from prefloop.records import Group, Pair, Prompt, Response
from prefloop.report.story import read_story, training_pairs
from prefloop.run import Run, Stage
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Train
from prefloop.train.learner import Learner
from prefloop.train.sail import RoutedPair
from tests.feedback.judge_server import JudgeServer
from tests.sample.engines import CHAT, ids_of, stopping_folder, transformers

SAMPLING = Sampling(temperature=0.9, max_new_tokens=16)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> SailConfig:
    rows = [{"prompt": f"Question {i}?", "chosen": f"yes {i}", "rejected": f"no, never {i}"} for i in range(24)]
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SailConfig(
        policy=str(stopping_folder().path),
        pairs=str(file),
        annotator="rule:short",
        evaluator="rule:long",
        mixture=0.6,
        sample_every=2,
        evaluate_every=100,
        sampling=SAMPLING,
        look_at=LookAt(answers=2, shown=1),
        train=Train(steps=2, batch_size=4, learning_rate=2e-3, warmup_steps=1, validation_pairs=0, checkpoint_every=3),
        compute=Compute(device="cpu", dtype="float32", sampling_dtype="float32", sequences_per_batch=16),
        engine="transformers",
    )


def run_sail(cfg: SailConfig, out: Path) -> Path:
    with Run.open(out, recipe="sail", config=cfg) as run:
        sail(cfg, run)
    return out


def log_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "round-1/model/training_log.jsonl").read_text().splitlines()]
    return [row for row in rows if "evaluation" not in row]


@pytest.fixture(scope="module")
def trained_on() -> list[list[RoutedPair]]:
    """What `finished` was trained on, step by step."""
    return []


@pytest.fixture(scope="module")
def finished(cfg: SailConfig, tmp_path_factory: pytest.TempPathFactory, trained_on: list[list[RoutedPair]]) -> Path:
    real = Learner.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", lambda self, items, step: trained_on.append(items) or real(self, items, step))
        return run_sail(cfg, tmp_path_factory.mktemp("sail") / "run")


def test_the_steps_make_up_for_the_routed_examples(cfg: SailConfig, finished: Path) -> None:
    """2 / (1 - 0.6) = 5."""
    rows = log_of(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["preference_loss"] == pytest.approx(0.693147, abs=1e-5)
    # b = F = -ln 2 at the start, so nothing of the response term.
    assert rows[0]["loss"] < 0.693147
    assert corrected(cfg.replace(mixture=0.3, train__steps=700)).train.steps == 1000
    assert corrected(cfg.replace(mixture=0.0, train__steps=700)).train.steps == 700


def test_the_reference_is_asked_about_the_drawn_pairs_alone(cfg: SailConfig, finished: Path) -> None:
    known = [Pair.from_json(line) for line in (finished / "start/pairs.jsonl").read_text().splitlines()]
    drawn = {i for step in range(5) for i in Drawn.at(corrected(cfg), step, 22).indices}
    assert len(known) == len(drawn) < 22 and all(pair.reference_logps for pair in known)


def test_answers_are_those_of_their_own_prompts(cfg: SailConfig, trained_on: list[list[RoutedPair]]) -> None:
    """Each prompt of the first two steps alone gives the very answers that it was trained on with."""
    engine, own = transformers(4), [item for items in trained_on[:2] for item in items if item.route == "pp"]
    assert len(own) >= 3
    for item in own:
        alone = engine.sample([item.prompt], k=2, sampling=SAMPLING, seed=recipe.derive_seed(0, "step", 0))
        assert ids_of(alone) == ids_of([Group(prompt=item.prompt, responses=item.responses)])
    given = {item.prompt.messages: item.chosen.text for items in trained_on for item in items if item.route == "plain"}
    assert given and all(text == f"yes {prompt[0].content[9:-1]}" for prompt, text in given.items())


def test_what_the_policy_labels_is_on_record_and_no_annotators_pair(finished: Path) -> None:
    questions = [json.loads(line) for line in (finished / "round-1/model/feedback.jsonl").read_text().splitlines()]
    rows = log_of(finished)
    asked = [row["step"] for row in rows for _ in range(row.get("pairs", 0) + row.get("identical", 0))]
    assert [row["step"] for row in questions] == asked and {*asked} == {1, 3, 5}
    kept = [row for row in questions if row["outcome"] == "unlabelled"]
    assert len(kept) == sum(row.get("pairs", 0) for row in rows) > 3 and not any("p" in row for row in kept)
    assert not any("chosen_chars" in row for row in rows)
    story = read_story(finished)
    assert training_pairs(story, story.rounds[-1]) == ("round-1/model/feedback.jsonl", [])
    counts = story.stages["round-1/model"]["counts"]
    assert counts["examples on the route"] == sum(row["routed"] for row in rows) > counts["examples that fell back"]


def test_answers_that_are_all_cut_stop_a_run_that_would_be_plain_dpo(cfg: SailConfig, tmp_path: Path) -> None:
    with pytest.raises(
        FeedbackError, match=r"^the first 5 steps .*: 2 unfinished.*\. Nobody was asked .*--on-unfinished"
    ):
        run_sail(cfg.replace(on_unfinished="drop", sampling__max_new_tokens=1), tmp_path / "run")


def test_without_held_out_answers_there_is_a_warning(cfg: SailConfig, tmp_path: Path) -> None:
    run_sail(cfg.replace(variant="dp", look_at__answers=0, train__steps=1), tmp_path / "run")
    assert "no held-out prompts, so no win rates" in (tmp_path / "run/events.jsonl").read_text()


class Killed(BaseException):
    """What a kill looks like from inside."""


def die_in(step: int, cfg: SailConfig, out: Path) -> None:
    """Run until so many steps are done, and be killed in the next."""
    real = recipe.routed

    def dying(pairs: Any, drawn: Drawn, *args: Any, **kwargs: Any) -> Any:
        if drawn == Drawn.at(cfg, step, len(pairs)):
            raise Killed
        return real(pairs, drawn, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "routed", dying)
        with pytest.raises(Killed):
            run_sail(cfg, out)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["pp", "pr"])
def test_a_killed_run_ends_in_the_same_bytes(cfg: SailConfig, finished: Path, tmp_path: Path, variant: str) -> None:
    """Killed in step 4, whose answers were sampled before step 3: the checkpoint after it holds them."""
    cfg = cfg.replace(variant=variant)
    whole = finished if variant == "pp" else run_sail(cfg, tmp_path / "whole")
    die_in(3, cfg, tmp_path / "run")
    run_sail(cfg, tmp_path / "run")
    for name in ("model/model.safetensors", "round-1/model/training_log.jsonl", "round-1/model/feedback.jsonl",
                 "round-1/answers.jsonl"):  # fmt: skip
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_the_sampler_is_checked_where_a_process_first_samples(cfg: SailConfig, tmp_path: Path) -> None:
    """With this seed, 0, 2 and 1 examples of the three steps go the route. Killed in step 2, whose answers were sampled
    and not yet trained on, and in step 3.
    """
    quiet = cfg.replace(mixture=0.3, sample_every=1, seed=4, train__checkpoint_every=1)
    whole = run_sail(quiet, tmp_path / "whole")
    assert ["sampler_gap" in row for row in log_of(whole)] == [False, True, False]
    figures = read_story(whole).stages["round-1/model"]["figures"]
    assert 0 < figures["sampler gap at the start, mean nats a token"] == log_of(whole)[1]["sampler_gap"] < 1e-4
    for step in (1, 2):
        die_in(step, quiet, tmp_path / "run")
    run_sail(quiet, tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    checked = [one["step"] for one in events if one["event"] == "sampler_gap" and one["stage"] == "round-1/model"]
    assert checked == [2, 2, 3]
    name = "round-1/model/training_log.jsonl"
    assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("variant", "options"), [("pr", {"response_term": "released", "train__lora__rank": 4}), ("dp", {"annotator": ""})]
)
def test_the_other_variants(cfg: SailConfig, tmp_path: Path, variant: str, options: dict[str, Any]) -> None:
    run = run_sail(cfg.replace(variant=variant, **options), tmp_path / "run")
    rows = log_of(run)
    assert sum(row["routed"] for row in rows) > 3
    questions = (run / "round-1/model/feedback.jsonl").read_text().splitlines()
    if variant == "dp":
        assert not questions and not any("length_chars" in row for row in rows)
        assert all(row["labelled"] == 1.0 and row["own_answers"] == 0.0 for row in rows)
    else:
        assert questions and sum(row.get("pairs", 0) for row in rows) > 0
        routed_share = sum(row["own_answers"] for row in rows) / len(rows)
        assert routed_share == pytest.approx(sum(row["routed"] for row in rows) / (4 * len(rows)))


# Single steps


def response(text: str, *, cut: bool = False) -> Response:
    ids = tuple(CHAT.response_ids(text, finished=not cut))
    return Response(text=text, token_ids=ids, finish_reason="length" if cut else "stop")


def pair(i: int, said: str = "given") -> Pair:
    prompt = Prompt.of(f"Q{i}", id=f"q{i}")
    return Pair(
        prompt=prompt, chosen=response(f"{said} {i}"), rejected=response(f"other {i}"), reference_logps=(-1, -2)
    )


def test_a_prompt_finds_its_own_answers_and_falls_back_without_them() -> None:
    offline = [pair(i) for i in range(4)]
    pool = [pair(i, "sampled").to_json() for i in (3, 0, 1)]  # in another order than the batch, and none of prompt 2
    drawn = Drawn([0, 1, 2, 3, 0], [True, False, True, True, False], [0.1, 0.2, 0.3, 0.4, 0.5])
    batch, missing = routed(offline, drawn, pool, SailConfig(variant="pr"), baseline=-0.3)
    assert missing == 1
    assert [item.route for item in batch] == ["pr", "plain", "plain", "pr", "plain"]
    assert [item.chosen.text for item in batch] == ["sampled 0", "given 1", "given 2", "sampled 3", "given 0"]
    assert [item.u for item in batch] == drawn.u and {item.baseline for item in batch} == {-0.3}


def test_routes_come_as_often_as_asked_for() -> None:
    for variant, share in (("dp", 0.4), ("pp", 0.3), ("pr", 0.3)):
        cfg = SailConfig(variant=variant, train=Train(batch_size=10))
        taken = [on for step in range(400) for on in Drawn.at(cfg, step, 50).on_route]
        assert sum(taken) / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)
    assert not any(Drawn.at(SailConfig(mixture=0.0), 0, 50).on_route)


def test_answers_without_a_label_are_counted_and_kept_in_their_order() -> None:
    prompt = Prompt.of("Q")
    groups = [
        Group(prompt=prompt, responses=(response("a"), response("b"))),
        Group(prompt=prompt, responses=(response("a"), response("a"))),
        Group(prompt=prompt, responses=(response("a", cut=True), response("b"))),
    ]
    annotator: Any = None  # nobody is asked
    pairs, labelled = unlabelled(groups, annotator, SailConfig(on_unfinished="drop"))
    assert [(one.chosen.text, one.rejected.text) for one in pairs] == [("a", "b")]
    assert [one.outcome for one in labelled] == ["unlabelled", "identical", "unfinished"]
    assert counts_of(labelled) == {"pairs": 1, "identical": 1, "tie": 0, "abstained": 0, "unfinished": 1}
    pairs, labelled = unlabelled(groups, annotator, SailConfig(on_unfinished="keep"))
    assert [one.chosen for one in pairs] == [groups[0].responses[0], groups[2].responses[0]]
    assert counts_of(labelled)["pairs"] == 2


def test_steps_that_ask_nothing_do_not_end_the_run() -> None:
    """Where few examples are routed, the first question may come late and be a tie."""
    quiet, tie = {"step": 1, "loss": 0.7}, {"step": 2, "pairs": 0, "tie": 1}
    check_there_are_pairs([], [], [quiet] * 6 + [tie], step=7)
    with pytest.raises(FeedbackError, match=r"the first 8 steps have given no pair.* by `prefloop judge check`"):
        check_there_are_pairs([], [], [quiet] * 5 + [tie] * 2, step=7)
    nobody = {"step": 2, "pairs": 0, "tie": 0, "identical": 1}
    with pytest.raises(FeedbackError, match=r"Nobody was asked about them: change --sampling .* or --on-unfinished"):
        check_there_are_pairs([], [], [quiet] * 5 + [nobody] * 2, step=7)


class Told(Stage):
    """A stage that keeps its notes."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_more_examples_that_fell_back_than_went_the_route_are_warned_about() -> None:
    rows = [{"routed": 2, "fell_back": 1, "pairs": 2, "tie": 1}, {"routed": 0, "fell_back": 0},
            {"routed": 1, "fell_back": 3, "pairs": 1, "identical": 2, "unfinished": 1}]  # fmt: skip
    found = counted(rows)
    assert (found["examples on the route"], found["examples that fell back"], found["pairs"]) == (3, 4, 3)
    stage = Told()
    tell_fallen_back(rows[:2], SailConfig(variant="pr"), stage)
    assert not stage.notes  # 2 against 1
    tell_fallen_back(rows, SailConfig(variant="pr"), stage)
    [said] = stage.notes
    assert "4 examples fell back to plain DPO and only 3 went the route pr" in said
    assert "(questions: 2 identical, 1 tie, 1 unfinished)" in said and "--annotator" in said
    tell_fallen_back(rows, SailConfig(variant="pp"), stage)
    assert "--on-unfinished" in stage.notes[1] and "--annotator" not in stage.notes[1]


def test_labels_whose_gradient_turned_round_are_warned_about() -> None:
    cfg, stage = SailConfig(variant="dp", beta=0.1), Told()  # c = 0.2: -4.993 / 0.1
    tell_sign_changes([{"sign_changed": 0.0}, {}], cfg, stage)
    assert not stage.notes
    tell_sign_changes([{"sign_changed": 0.25}, {"sign_changed": 0.0}, {"sign_changed": 1.0}], cfg, stage)
    assert "in 2 steps the policy drew a label with h < -49.9 nats, where the term of coefficient 0.2" in stage.notes[0]


def test_the_baseline_is_a_running_mean_of_earlier_steps() -> None:
    assert baseline_of([]) == pytest.approx(-0.693147, abs=1e-6)
    log = [{"own_answers": 0.5, "log_sigmoid": -1.0}, {"own_answers": 0.0}, {"own_answers": 0.5, "log_sigmoid": -0.2}]
    assert baseline_of(log) == pytest.approx(0.9 * (0.9 * -0.693147 - 0.1) - 0.02, abs=1e-6)


def test_means_are_over_the_pairs_that_they_are_about() -> None:
    figures = dict.fromkeys(("correct", "margin", "chosen_change", "rejected_change"), 0.3)
    found = per_kind({**figures, "labelled": 0.5, "own_answers": 0.25, "log_sigmoid": -0.2, "loss": 1.0})
    assert (found["correct"], found["margin"], found["log_sigmoid"], found["loss"]) == (0.6, 0.6, -0.8, 1.0)
    none = per_kind({**figures, "labelled": 0.0, "own_answers": 0.0, "log_sigmoid": 0.0, "loss": 1.0})
    assert "correct" not in none and "log_sigmoid" not in none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "pr", "annotator": ""}, "--annotator is missing: --variant pr asks one"),
        ({"variant": "pp", "evaluator": ""}, "--evaluator is missing: --variant pp labels by"),
        ({"variant": "pp", "on_unfinished": "penalise"}, "on_unfinished = 'penalise' labels a pair"),
        ({"train__validation_pairs": 4}, "train.validation_pairs = 4: .*--held-out with --look-at.answers"),
        ({"pairs": ""}, "--pairs is missing"),
    ],
)
def test_what_cannot_be_is_refused(cfg: SailConfig, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_sail(cfg.replace(**options), tmp_path / "run")


def test_only_pr_asks_while_it_trains(cfg: SailConfig) -> None:
    with JudgeServer() as server:
        api = cfg.replace(annotator="api:small", feedback__base_url=server.url)
        found = {variant: estimate_feedback(api.replace(variant=variant)) for variant in ("pp", "pr")}
        assert server.requests == []
    # r T B = 0.6 * 5 * 4 questions, in both orders.
    assert found["pr"][0].startswith("training: api:small: 24 calls (0 of 24 questions are in the cache), about ")
    assert found["pp"][0] == "training: api:small: no calls"
    # One look, at the end, at two answers.
    assert found["pp"][1] == found["pr"][1] and found["pp"][1].startswith("win rates: api:small: 4 calls ")


def test_the_published_configurations() -> None:
    found = {v: (SailConfig(variant=v).share, SailConfig(variant=v).c) for v in ("dp", "pp", "pr")}
    assert found == {"dp": (0.4, 0.2), "pp": (0.3, 0.2), "pr": (0.3, 0.3)}
    assert SailConfig().beta == 0.1 and SailConfig().response_term == "theory-baseline"
