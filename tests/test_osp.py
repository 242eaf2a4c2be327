"""OSP: strengths, ranking and pairing in closed form; end to end on a tiny model that judges itself."""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefloop.errors import BudgetReached, InputError
from prefloop.feedback.annotator import Comparison, Judgement, average, sigmoid
from prefloop.feedback.cache import JudgementCache
from prefloop.feedback.instructions import load_instruction
from prefloop.feedback.judge import LocalJudge
from prefloop.feedback.meter import Meter, usage_of
from prefloop.feedback.rule import RuleAnnotator, load_rule
from prefloop.models import ModelRef
from prefloop.pairs.ranked import Pairing, paired, ranked_pairs, strength, tempered
from prefloop.recipes.osp import OspConfig, osp, strengths
from prefloop.recipes.steps import LookAt
from prefloop.records import Group, Pair, Prompt, Response
from prefloop.run import Run, Stage
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Train
from prefloop.train.learner import Learner
from prefloop.train.reference import logps_under
from tests.sample.engines import stopping_folder

COMPUTE = Compute(device="cpu", dtype="float32", sampling_dtype="float32", sequences_per_batch=16)
TRAIN = Train(steps=2, batch_size=4, learning_rate=2e-3, warmup_steps=1, validation_pairs=0, checkpoint_every=1)
SHORT = "{{ conversation }}\n{{ response_1 }}\n{{ response_2 }}\nWhich?"


def group(scores: list[float | None], id: str = "p") -> Group:
    return Group(
        prompt=Prompt.of("?", id=id),
        responses=tuple(Response(text=f"answer {i}", score=score) for i, score in enumerate(scores)),
    )


def both_orders(q_ab: float, q_ba: float) -> Judgement:
    return average(Judgement(p=q_ab), Judgement(p=q_ba))


def test_strengths_through_a_baseline_are_those_of_bradley_terry() -> None:
    rewards = np.random.default_rng(0).normal(scale=2, size=6)
    us = [strength(sigmoid(r - rewards[0])) for r in rewards]
    assert us[0] == 0.0
    for i, j in combinations(range(6), 2):
        assert sigmoid(us[i] - us[j]) == pytest.approx(sigmoid(rewards[i] - rewards[j]), abs=1e-9)
        assert sigmoid(us[i] - us[j]) == 1 - sigmoid(us[j] - us[i])


def test_a_certain_judge_has_a_finite_strength() -> None:
    assert [strength(1.0), -strength(0.0)] == pytest.approx([math.log(1e6)] * 2, abs=1e-3)
    assert sigmoid(strength(1.0) - strength(1.0)) == 0.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_temperature_divides_the_logit_of_each_order(temperature: float) -> None:
    first, second = 1.3, -0.4  # l_1 - l_2 with a first and with b first
    judgement = both_orders(sigmoid(first), sigmoid(second))
    expected = (sigmoid(first / temperature) + 1 - sigmoid(second / temperature)) / 2
    s = tempered(judgement, temperature)
    assert s == pytest.approx(expected, abs=1e-12)
    swapped = tempered(judgement.swapped, temperature)
    assert s is not None and swapped is not None and s + swapped == 1.0
    # A judge that looks at the slot alone says nothing at any temperature.
    assert tempered(both_orders(0.97, 0.97), temperature) == 0.5
    # One without slots has one logit.
    assert tempered(Judgement(p=sigmoid(first)), temperature) == pytest.approx(sigmoid(first / temperature))
    assert [tempered(Judgement(p=p), temperature) for p in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]
    assert tempered(Judgement(reason="none"), temperature) is None


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        ("all", [(i, j) for i in range(5) for j in range(i + 1, 5)]),
        ("best_vs_rest", [(0, 1), (0, 2), (0, 3), (0, 4)]),
        ("mirrored", [(0, 4), (1, 3)]),
    ],
)
def test_pairs_of_a_ranking(pairing: Pairing, expected: list[tuple[int, int]]) -> None:
    ranked = [Response(text=str(i)) for i in range(5)]
    assert [(int(a.text), int(b.text)) for a, b in paired(ranked, pairing)] == expected
    assert paired([], pairing) == paired(ranked[:1], pairing) == []


def test_the_ranking_is_by_strength_and_p_by_their_difference() -> None:
    stage = Stage.detached()
    pairs = ranked_pairs([group([-0.5, 2.0, None, -1.5])], pairing="all", stage=stage)
    texts = [(p.chosen.text, p.rejected.text) for p in pairs]
    assert texts == [("answer 1", "answer 0"), ("answer 1", "answer 3"), ("answer 0", "answer 3")]
    assert [p.p for p in pairs] == [sigmoid(2.5), sigmoid(3.5), sigmoid(1.0)]
    # Bradley-Terry: the odds of a chain are the product of its links', so no ranking has a cycle.
    odds = [p.p / (1 - p.p) for p in pairs]
    assert odds[1] == pytest.approx(odds[0] * odds[2])
    assert stage.counts == {"answers not ranked: no strength": 1, "pairs made": 3}
    hard = ranked_pairs([group([0.0, 2.0])], pairing="all", labels="hard")
    assert [p.p for p in hard] == [1.0]


def test_ties_and_identical_answers_make_no_pair() -> None:
    tied = group([1.0, 1.0])
    same = Group(prompt=Prompt.of("?"), responses=(Response(text="a", score=1.0), Response(text=" a", score=2.0)))
    stage = Stage.detached()
    assert ranked_pairs([tied, same], pairing="all", stage=stage) == []
    assert stage.counts == {"pairs dropped: identical answers": 1, "questions dropped: tie": 1, "pairs made": 0}


def answers(n: int, k: int) -> list[Group]:
    rng = np.random.default_rng(1)
    return [
        Group(
            prompt=Prompt.of(f"Question {i}?", id=f"q{i}"),
            responses=tuple(Response(text="x" * int(length)) for length in rng.choice(40, size=k, replace=False)),
        )
        for i in range(n)
    ]


@pytest.mark.parametrize(("external", "a_prompt"), [(False, 3), (True, 4)])
def test_judge_calls_are_n_minus_1_or_n_a_prompt_and_twice_that_in_both_orders(
    external: bool, a_prompt: int, tmp_path: Path
) -> None:
    groups = answers(3, 4)
    baselines = [Group(prompt=g.prompt, responses=(Response(text="y"),)) for g in groups] if external else []
    (tmp_path / "short.jinja").write_text(SHORT)
    meter = Meter()
    own = LocalJudge(
        stopping_folder(), load_instruction(str(tmp_path / "short.jinja")), compute=COMPUTE, meter=meter,
        cache=JudgementCache(tmp_path / "cache.sqlite"),
    )  # fmt: skip
    stage = Stage.detached()
    ranked = strengths(groups, baselines, own, temperature=1.0, stage=stage)
    assert stage.counts["comparisons"] == 3 * a_prompt
    assert stage.counts["questions"] == meter.tallies[own.name].calls == 2 * 3 * a_prompt
    assert stage.counts["decided"] + stage.counts["tie"] == 3 * a_prompt
    base = {g.prompt.id: g.responses[0] for g in (baselines or groups)}
    for g in ranked:
        for i, response in enumerate(g.responses):
            asked = Comparison(g.prompt, response, base[g.prompt.id])
            [judgement] = own.judge([asked])
            expected = 0.0 if not external and i == 0 else strength(judgement.p or 0.0)
            assert response.score == pytest.approx(expected, abs=1e-9)


def never(prompt: Prompt, a: Response, b: Response) -> float | None:
    return None if "x" * 30 in (a.text[:30], b.text[:30]) else 0.25 if len(a.text) > len(b.text) else 0.75


def test_abstentions_and_identical_answers_are_counted_and_not_asked() -> None:
    texts = ("x" * 10, "x" * 35, "x" * 10, "x" * 20)
    one = Group(prompt=Prompt.of("?"), responses=tuple(Response(text=text) for text in texts))
    stage = Stage.detached()
    [ranked] = strengths([one], [], RuleAnnotator(never, "never"), temperature=1.0, stage=stage)
    assert [r.score for r in ranked.responses] == [0.0, None, 0.0, pytest.approx(-math.log(3))]
    assert ranked.responses[1].failure == "the rule gave no answer"
    expected = {"comparisons": 3, "identical": 1, "decided": 1, "tie": 0, "abstained": 1, "questions": 4}
    assert {name: stage.counts[name] for name in expected} == expected


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> OspConfig:
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(10)))
    (folder / "short.jinja").write_text(SHORT)
    return OspConfig(
        policy=str(stopping_folder().path),
        prompts=str(folder / "prompts.jsonl"),
        evaluator="rule:short",
        feedback={"labels": "soft", "instruction": str(folder / "short.jinja")},  # pyright: ignore[reportArgumentType]
        rounds=2,
        n=3,
        prompts_per_round=5,
        temperature=0.1,
        sampling=Sampling(max_new_tokens=16),
        look_at=LookAt(answers=1, shown=1),
        train=TRAIN,
        compute=COMPUTE,
        engine="transformers",
    )


def run_osp(cfg: OspConfig, out: Path) -> Path:
    with Run.open(out, recipe="osp", config=cfg) as run:
        osp(cfg, run)
    return out


@pytest.fixture(scope="module")
def finished(cfg: OspConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_osp(cfg, tmp_path_factory.mktemp("osp") / "run")


def records(file: Path, kind: Any) -> list[Any]:
    return [kind.from_json(line) for line in file.read_text().split("\n")[:-1]]


def stages(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())["stages"]


def test_every_round_trains_on_strengths_of_its_own_policy_as_judge(cfg: OspConfig, finished: Path) -> None:
    policies = [stopping_folder(), ModelRef.of(finished / "round-1/model")]
    for t, policy in enumerate(policies, start=1):
        judge = LocalJudge(policy, load_instruction(cfg.feedback.instruction), compute=COMPUTE, meter=Meter(),
                           cache=JudgementCache())  # fmt: skip
        u = {}
        for g in records(finished / f"round-{t}/groups.jsonl", Group):
            for response in g.responses:
                [judgement] = judge.judge([Comparison(g.prompt, response, g.responses[0])])
                u[g.prompt.id, response.token_ids] = strength(tempered(judgement, 0.1) or 0.0)
        made: list[Pair] = records(finished / f"round-{t}/training_pairs.jsonl", Pair)
        assert made
        for pair in made:
            gap = u[pair.prompt.id, pair.chosen.token_ids] - u[pair.prompt.id, pair.rejected.token_ids]
            assert pair.p == pytest.approx(sigmoid(gap), abs=1e-6) and 0.5 < pair.p < 1
            assert pair.reference == stopping_folder().fingerprint
        items = [(pair.prompt, (pair.chosen, pair.rejected)) for pair in made]
        for pair, logps in zip(made, logps_under(stopping_folder(), items, compute=COMPUTE), strict=True):
            assert pair.reference_logps == pytest.approx(logps, abs=1e-3)
        counts = stages(finished)[f"round-{t}/strengths"]["counts"]
        assert counts["comparisons"] == 5 * (3 - 1)
        assert counts["questions"] == 2 * (counts["comparisons"] - counts["identical"])
        # Nothing was computed twice: the answers went through pi(0) once each.
        known = stages(finished)[f"round-{t}/training_pairs"]["counts"]
        assert known == {"reference log-probabilities already known from scoring": len(made)}


def test_the_first_loss_is_ln_2_whatever_the_strengths(finished: Path) -> None:
    first, *_ = (json.loads(line) for line in (finished / "round-1/model/training_log.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_report_has_the_win_rate_and_the_calls(finished: Path) -> None:
    report = (finished / "report.md").read_text()
    assert "| win rate | - |" in report and "| comparisons by the judge | 10 | 10 |" in report
    found = json.loads((finished / "round-2/win_rate.json").read_text())
    after, before = (records(finished / f"{label}/answers.jsonl", Group)[0] for label in ("round-2", "start"))
    [judgement] = load_rule("short").judge([Comparison(after.prompt, after.responses[0], before.responses[0])])
    assert found["rate"][0] == judgement.p


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.slow
def test_killed_and_out_of_budget_it_ends_in_the_same_bytes(
    cfg: OspConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    calls = sum(stages(finished)[f"round-{t}/strengths"]["counts"]["questions"] for t in (1, 2))
    with pytest.raises(BudgetReached, match=f"the budget of {calls - 1} calls is used up"):
        run_osp(cfg.replace(feedback__budget_calls=calls - 1), tmp_path / "run")
    steps: list[int] = []
    real = Learner.step

    def dying(self: Learner, *args: Any) -> dict[str, float]:
        steps.append(1)
        if len(steps) == 2:
            raise Killed
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", dying)
        with pytest.raises(Killed):
            run_osp(cfg.replace(feedback__budget_calls=calls), tmp_path / "run")
    run_osp(cfg.replace(feedback__budget_calls=calls), tmp_path / "run")
    for name, entry in stages(finished).items():
        path = entry["artifact"]["path"]
        if entry["artifact"]["kind"] != "folder":
            assert (tmp_path / "run" / path).read_bytes() == (finished / path).read_bytes(), name
    assert ModelRef.of(tmp_path / "run/model").weights == ModelRef.of(finished / "model").weights
    assert sum(tally.calls for tally in usage_of(tmp_path / "run").values()) == calls


def test_an_annotator_of_ones_own_a_baseline_of_pi_0_and_a_model_that_learned_to_judge(
    cfg: OspConfig, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Q{i}?", "chosen": f"yes {i}", "rejected": f"no, {i}"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = cfg.replace(
        annotator="rule:short", baseline="start", pairing="best_vs_rest", rounds=1, feedback__scale=5.0, evaluator="",
        look_at__answers=0, pairs=str(tmp_path / "pairs.jsonl"), judge_train=TRAIN.model_dump(),
    )  # fmt: skip
    out = run_osp(own, tmp_path / "run")
    assert stages(out)["round-0/judgements"]["counts"] == {"judgements to learn from": 6}
    pi_0 = ModelRef.of(out / "round-0/model")
    assert pi_0.weights != stopping_folder().weights
    made: list[Pair] = records(out / "round-1/training_pairs.jsonl", Pair)
    assert made and {pair.reference for pair in made} == {pi_0.fingerprint}
    base = {g.prompt.id: g.responses[0] for g in records(out / "round-1/baselines.jsonl", Group)}
    for g in records(out / "round-1/strengths.jsonl", Group):
        for r in g.responses:
            gap = (base[g.prompt.id].length_chars - r.length_chars) / 5.0 / 0.1
            assert r.score == pytest.approx(strength(sigmoid(gap)), abs=1e-6)
    assert stages(out)["round-1/strengths"]["counts"]["comparisons"] == 5 * 3
    assert not list(out.glob("*/win_rate.json"))


def test_what_cannot_be_used_is_refused_before_anything_is_computed(cfg: OspConfig, tmp_path: Path) -> None:
    for changes, said in (
        ({"prompts": ""}, "--prompts is missing"),
        ({"annotator": "rule:shorter"}, "unknown rule"),
        ({"feedback__instruction": "kindness"}, "neither a file nor one of"),
    ):
        with pytest.raises(InputError, match=said):
            run_osp(cfg.replace(**changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()
