"""OPTune: which prompts get new answers, what is reused, what weighs how much; end to end on a tiny real model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prefloop.errors import InputError
from prefloop.feedback.rule import load_rule
from prefloop.feedback.scorer import score_by
from prefloop.models import ModelRef
from prefloop.pairs.select import best_vs_worst
from prefloop.pairs.weights import Weights, gap_of, weigh
from prefloop.recipes.dpo import dpo_round
from prefloop.recipes.optune import OptuneConfig, lowest, optune, paper, refresh, reward_key
from prefloop.recipes.steps import LookAt
from prefloop.records import Group, Pair, Prompt, Response
from prefloop.run import Run, Stage
from prefloop.sample.sampling import Sampling
from prefloop.sample.stage import sample
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Train
from prefloop.train.learner import Learner
from prefloop.train.losses import PairLogps
from prefloop.train.losses.pairwise import dpo
from tests.sample.engines import stopping_folder

COMPUTE = Compute(device="cpu", dtype="float32", sampling_dtype="float32", sequences_per_batch=16)
TRAIN = Train(steps=2, batch_size=3, learning_rate=2e-3, warmup_steps=1, validation_pairs=0, checkpoint_every=1)


def group(id: str, *scores: float | None, texts: str = "abcdefgh") -> Group:
    responses = [
        Response(text=text, score=score, failure=None if score is not None else "none")
        for text, score in zip(texts, scores, strict=False)
    ]
    return Group(prompt=Prompt.of(f"{id}?", id=id), responses=tuple(responses))


def pair(gap: float, id: str = "p") -> Pair:
    return Pair(prompt=Prompt.of("?", id=id), chosen=Response(text="a"), rejected=Response(text="b"),
                chosen_score=1.0 + gap, rejected_score=1.0)  # fmt: skip


@pytest.mark.parametrize(("fraction", "n"), [(0.0, 0), (0.1, 3), (0.11, 4), (0.5, 15), (1.0, 30)])
def test_the_prompts_with_the_lowest_rewards_are_chosen_rounded_up(fraction: float, n: int) -> None:
    stored = [group(f"p{i:02}", i * 7 % 30, i * 7 % 30 + 1.0) for i in range(30)]
    drawn = lowest(stored, fraction, "pair")
    assert len(drawn) == n  # 0.1 * 30 is over 3 in floats
    assert {prompt.id for prompt in drawn} == {f"p{i:02}" for i in range(30) if i * 7 % 30 < n}
    assert [prompt.id for prompt in drawn] == sorted(prompt.id for prompt in drawn)  # in the order of the prompts


def test_ties_go_by_id_and_a_prompt_without_a_pair_comes_first() -> None:
    stored = [group("c", 1.0, 1.0), group("b", 0.5, 1.5), group("z", None, -9.0), group("a", 1.0, 1.0)]
    assert [[p.id for p in lowest(stored, f, "pair")] for f in (0.25, 0.5, 0.75)] == [
        ["z"],
        ["z", "a"],
        ["b", "z", "a"],
    ]


def test_each_key_orders_by_another_reward() -> None:
    one = group("x", 4.0, -2.0, None, 1.0)
    assert [reward_key(one, key) for key in ("pair", "mean", "max", "min")] == [1.0, 1.0, 4.0, -2.0]
    two = group("y", 3.0, 3.0, -3.0)
    assert [reward_key(two, key) for key in ("pair", "mean")] == [0.0, 1.0]


def test_a_constant_added_to_a_prompts_rewards_changes_the_order_and_no_weight() -> None:
    stored = [group("a", 1.0, 3.0), group("b", 2.0, 5.0)]
    moved = [group("a", 11.0, 13.0), stored[1]]
    before, after = (weigh(best_vs_worst(groups), Weights()) for groups in (stored, moved))
    assert [p.weight for p in before] == [p.weight for p in after] == pytest.approx([0.8, 1.2])
    assert [p.id for p in lowest(stored, 0.5, "pair")] == ["a"] and [p.id for p in lowest(moved, 0.5, "pair")] == ["b"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"function": "none"}, [1.0, 1.0, 1.0]),
        ({"function": "linear", "normalise": False, "scale": 0.5}, [0.0, 0.5, 2.0]),
        ({"function": "linear"}, [0.0, 0.6, 2.4]),
        ({"function": "linear", "scale": 7.0}, [0.0, 0.6, 2.4]),
        ({"function": "linear", "clip": 1.5}, [0.0, 0.6, 1.5]),
        ({"function": "sigmoid", "normalise": False, "scale": 0.5}, [0.5, 0.6224593312018546, 0.8807970779778823]),
    ],
)  # fmt: skip
def test_weights_of_the_gaps(changes: dict[str, Any], expected: list[float]) -> None:
    stage = Stage.detached()
    weighed = weigh([pair(0.0), pair(1.0), pair(4.0)], Weights(**changes), stage=stage)
    assert [p.weight for p in weighed] == pytest.approx(expected, abs=1e-12)
    scale, function = changes.get("scale", 1.0), changes["function"]
    raw = {"none": [1.0] * 3, "linear": [0.0, scale, 4 * scale]}.get(function, expected)
    assert stage.figures["E[w] before normalisation"] == pytest.approx(sum(raw) / 3)
    assert stage.figures["E[w] in training"] == pytest.approx(sum(expected) / 3)
    assert stage.figures["effective pairs, (sum w)^2 / sum w^2"] == pytest.approx(
        sum(expected) ** 2 / sum(w * w for w in expected)
    )
    assert stage.counts.get("weights clipped") == (1 if "clip" in changes else None)


def test_pairs_without_scores_or_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(InputError, match="has no scores, so no weight"):
        gap_of(pair(1.0).model_copy(update={"chosen_score": None}))
    with pytest.raises(InputError, match="has a gap of -1; expected"):
        gap_of(pair(-1.0))


@pytest.mark.parametrize("weight", [0.0, 0.4, 3.0])
def test_the_weight_scales_loss_and_gradient(weight: float) -> None:
    def loss_and_gradient(h: float, weight: float) -> tuple[float, float]:
        chosen = torch.tensor([h], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        loss = dpo(PairLogps(chosen, zero, zero, zero), beta=0.3, weight=weight)
        [gradient] = torch.autograd.grad(loss.sum(), chosen)
        return loss.item(), gradient.item()

    for h in (0.0, 1.7, -2.5):
        assert loss_and_gradient(h, weight) == pytest.approx([weight * x for x in loss_and_gradient(h, 1.0)], abs=1e-14)
    assert loss_and_gradient(0.0, weight)[0] == pytest.approx(weight * math.log(2))


def test_reused_answers_keep_all_that_they_had() -> None:
    first = refresh([], [group("a", 1.0, 2.0), group("b", 3.0, 4.0)], version=0)
    second = refresh(first, [group("b", 5.0, 6.0, texts="xy")], version=1)
    assert [r.version for g in second for r in g.responses] == [0, 0, 1, 1]
    assert second[0].to_json() == first[0].to_json() and [r.text for r in second[1].responses] == ["x", "y"]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> OptuneConfig:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(10)))
    return OptuneConfig(
        policy=str(stopping_folder().path),
        prompts=str(file),
        annotator="rule:short",
        sampling=Sampling(max_new_tokens=24),
        look_at=LookAt(answers=1, shown=1),
        train=TRAIN,
        compute=COMPUTE,
        engine="transformers",
    )


def run_optune(cfg: OptuneConfig, out: Path) -> Path:
    with Run.open(out, recipe="optune", config=cfg) as run:
        optune(cfg, run)
    return out


@pytest.fixture(scope="module")
def finished(cfg: OptuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_optune(cfg, tmp_path_factory.mktemp("optune") / "run")


def lines(file: Path) -> list[str]:
    return file.read_text().split("\n")[:-1]


def groups(file: Path) -> list[Group]:
    return [Group.from_json(line) for line in lines(file)]


def pairs(file: Path) -> list[Pair]:
    return [Pair.from_json(line) for line in lines(file)]


def stages(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())["stages"]


def test_half_of_the_prompts_get_new_answers_and_the_others_keep_theirs_byte_for_byte(finished: Path) -> None:
    version_of = {g.prompt.id: 0 for g in groups(finished / "round-1/stored.jsonl")}
    assert len(version_of) == 9  # one of ten is held out
    for t in (2, 3):
        before, after = (
            {g.prompt.id: line for line, g in zip(lines(f), groups(f), strict=True)}
            for f in (finished / f"round-{t - 1}/stored.jsonl", finished / f"round-{t}/stored.jsonl")
        )
        keys = {g.prompt.id: reward_key(g, "pair") for g in groups(finished / f"round-{t - 1}/stored.jsonl")}
        anew = {g.prompt.id for g in groups(finished / f"round-{t}/groups.jsonl")}
        assert len(anew) == 5 and anew == set(sorted(keys, key=lambda id: (keys[id], id))[:5])
        assert {id for id in before if before[id] != after[id]} <= anew
        version_of |= {id: t - 1 for id in anew}
        for g in groups(finished / f"round-{t}/stored.jsonl"):
            assert {r.version for r in g.responses} == {version_of[g.prompt.id]}
        counts = stages(finished)[f"round-{t}/stored"]["counts"]
        assert counts == {"prompts with new answers": 5, "prompts with stored answers": 4}
    assert len(set(version_of.values())) > 1


def test_pairs_are_weighed_by_their_gap_and_pi_0_sees_a_pair_once(finished: Path) -> None:
    start = stopping_folder().fingerprint
    for t in (1, 2, 3):
        made = pairs(finished / f"round-{t}/training_pairs.jsonl")
        gaps = [gap_of(p) for p in made]
        assert min(gaps) > 0
        assert [p.weight for p in made] == pytest.approx([gap * len(gaps) / sum(gaps) for gap in gaps])
        assert {p.reference for p in made} == {start}
    old = {p.prompt.id: p for p in pairs(finished / "round-2/training_pairs.jsonl")}
    new = {p.prompt.id: p for p in pairs(finished / "round-3/training_pairs.jsonl")}
    reused = [id for id in new if id in old and new[id].chosen == old[id].chosen]
    assert reused and all(new[id].reference_logps == old[id].reference_logps for id in reused)
    counts = stages(finished)["round-3/training_pairs"]["counts"]
    assert counts["reference log-probabilities already known from scoring"] == len(reused)


def test_the_report_says_what_an_iteration_took(finished: Path) -> None:
    report = (finished / "report.md").read_text()
    entries = stages(finished)
    tokens = [entries[f"round-{t}/groups"]["counts"]["tokens"] for t in (1, 2, 3)]
    assert tokens[1] < tokens[0] and f"| tokens sampled | {tokens[0]} | {tokens[1]} | {tokens[2]} |" in report
    for row in ("prompts with new answers | 9 | 5 | 5", "seconds of sampling", "seconds of training", "reward"):
        assert f"| {row} |" in report, row
    held_out = groups(finished / "round-3/answers.jsonl")
    assert json.loads((finished / "round-3/checkup.json").read_text())["reward"][0] == pytest.approx(
        -sum(g.responses[0].length_chars for g in held_out) / len(held_out)
    )


def test_rho_1_and_w_1_is_iterative_dpo_to_the_byte(cfg: OptuneConfig, tmp_path: Path) -> None:
    own = cfg.replace(regenerate=1.0, weights__function="none", rounds=2, look_at__answers=0)
    mine = run_optune(own, tmp_path / "optune")
    start = policy = stopping_folder()
    prompts = [g.prompt for g in groups(mine / "round-1/groups.jsonl")]
    with Run.open(tmp_path / "plain", recipe="plain", config=own) as run:
        for t in (1, 2):
            drawn = sample(policy, prompts, k=2, sampling=cfg.sampling, seed=derive_seed(0, "sample", t),
                           compute=COMPUTE, engine="transformers")  # fmt: skip
            made = best_vs_worst(score_by(drawn, load_rule("short")))
            policy = dpo_round(run.round(t), policy, start, made, beta=0.1, train=TRAIN, compute=COMPUTE,
                               seed=derive_seed(0, "dpo", t))  # fmt: skip
    assert policy.weights == ModelRef.of(mine / "model").weights


def test_rho_0_trains_on_the_first_answers_again(cfg: OptuneConfig, tmp_path: Path) -> None:
    out = run_optune(cfg.replace(regenerate=0.0, rounds=2, look_at__answers=0), tmp_path / "run")
    assert lines(out / "round-2/groups.jsonl") == []
    for name in ("stored", "training_pairs"):
        assert lines(out / f"round-2/{name}.jsonl") == lines(out / f"round-1/{name}.jsonl")


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(
    cfg: OptuneConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    real = Learner.step

    def dying(self: Learner, *args: Any) -> dict[str, float]:
        steps.append(1)
        if len(steps) == 4:  # in the second iteration
            raise Killed
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", dying)
        with pytest.raises(Killed):
            run_optune(cfg, tmp_path / "run")
    run_optune(cfg, tmp_path / "run")
    for name, entry in stages(finished).items():
        path = entry["artifact"]["path"]
        if entry["artifact"]["kind"] != "folder":
            assert (tmp_path / "run" / path).read_bytes() == (finished / path).read_bytes(), name
    assert ModelRef.of(tmp_path / "run/model").weights == ModelRef.of(finished / "model").weights


@pytest.mark.parametrize(
    ("annotator", "said"),
    [("", "--annotator is missing"), ("judge:PATH", "only compares two answers; OPTune orders"),
     ("rule:short+rule:long", "rule:short \\+ rule:long only compares")],
)  # fmt: skip
def test_an_annotator_without_scores_is_refused(cfg: OptuneConfig, tmp_path: Path, annotator: str, said: str) -> None:
    name = annotator.replace("PATH", cfg.policy)
    with pytest.raises(InputError, match=said):
        run_optune(cfg.replace(annotator=name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_paper_preset_holds_what_its_page_says() -> None:
    published = paper()
    assert (published.rounds, published.sampling.temperature, published.sampling.top_p) == (3, 1.0, 0.9)
    train = published.train
    assert (train.batch_size, train.learning_rate, published.sampling.max_new_tokens) == (128, 5e-7, 512)
    assert train.steps == 48000 // train.batch_size and train.warmup_steps == math.ceil(0.1 * train.steps)
