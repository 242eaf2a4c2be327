"""Every loss on a real model: what the learner provides for it, and that it falls."""

import json
import random
from pathlib import Path

import pytest
import torch
from tests.tiny import save_tiny_model

import prefloop.train.head as head
import prefloop.train.reference as reference
from prefloop.data.chat import ChatFormat
from prefloop.data.mapping import load_answers
from prefloop.errors import CheckFailed, InputError
from prefloop.models import ModelRef, load_model, load_tokenizer
from prefloop.pairs.answers import answers_of, mismatched
from prefloop.recipes.dpo import DpoConfig, dpo
from prefloop.recipes.steps import LookAt
from prefloop.records import Answer, Pair, Prompt, Response
from prefloop.run import Run
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Train
from prefloop.train.learner import Learner
from prefloop.train.logprobs import response_logps
from prefloop.train.losses import LOSSES, SHORT, parse_loss
from prefloop.train.objective import AnswerObjective, Objective, PairObjective
from prefloop.train.packing import TokenGroup
from prefloop.train.reference import with_reference_logps

COMPUTE = Compute(device="cpu", dtype="float32", sampling_dtype="float32")
TRAIN = Train(steps=3, batch_size=4, learning_rate=3e-5, warmup_steps=0, validation_pairs=0)
WORDS = ["red", "green tea", "a long walk home", "no", "yes, but later"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFLOOP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef.of(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def pairs(policy: ModelRef) -> list[Pair]:
    chat = ChatFormat(load_tokenizer(policy))
    made = [
        Pair(
            prompt=Prompt.of(f"Question {i}?", id=f"p{i}"),
            chosen=chat.with_token_ids(Response(text=WORDS[i])),
            rejected=chat.with_token_ids(Response(text=WORDS[(i + 3) % 5] * 2)),
            chosen_score=2.0 + i,
            rejected_score=1.0,
            reference_sample="rejected" if i % 2 else "chosen",
        )
        for i in range(4)
    ]
    return with_reference_logps(made, policy, compute=COMPUTE, prefixes=True)


@pytest.fixture(scope="module")
def learner(policy: ModelRef) -> Learner:
    return Learner(policy, [], objective=PairObjective(parse_loss("dpo")), config=TRAIN, compute=COMPUTE, seed=0)


def started(learner: Learner, objective: Objective, policy: ModelRef, budget: int = 2048) -> Learner:
    """The learner at its start model, with another objective."""
    learner.model.load_state_dict(load_model(policy).state_dict())
    learner.optimizer.state.clear()
    learner.objective, learner.compute = objective, COMPUTE.replace(tokens_per_forward=budget)
    learner.unmoved = {}
    return learner


@pytest.mark.parametrize("name", [*LOSSES, *SHORT])
def test_every_loss_falls_on_a_batch_that_is_trained_on(
    name: str, learner: Learner, policy: ModelRef, pairs: list[Pair]
) -> None:
    loss = parse_loss(name)
    if loss.unpaired:
        items = with_reference_logps(mismatched(answers_of(pairs), policy), policy, compute=COMPUTE)
        trainer = started(learner, AnswerObjective(loss), policy)
    else:
        # A pair carries what its loss needs and no more.
        spare = {} if "reference" in loss.needs else {"reference_logps": None, "reference": None}
        items = [pair.model_copy(update=spare) for pair in pairs]
        trainer = started(learner, PairObjective(loss), policy)
    values = [trainer.step(items, step)["loss"] for step in range(3)]
    assert trainer.evaluate(items)["loss"] < values[0]


@pytest.mark.parametrize("name", ["wpo", "aot", "aot_unpaired", "aot+wpo", "kto"])
def test_gradients_do_not_depend_on_how_memory_cuts_the_batch(
    name: str, learner: Learner, policy: ModelRef, pairs: list[Pair]
) -> None:
    """At a policy that is far from its reference, on some answers more than on others: at the start all margins are
    zero, and there is nothing to sort.
    """
    loss, draw = parse_loss(name), random.Random(0)
    answers = with_reference_logps(mismatched(answers_of(pairs), policy), policy, compute=COMPUTE)
    items, objective = (answers, AnswerObjective(loss)) if loss.unpaired else (pairs, PairObjective(loss))
    away = [
        item.model_copy(
            update={
                "reference_logps": tuple(logp + draw.uniform(-25, 5) for logp in item.reference_logps or ()),
                "reference": "another",
            }
        )
        for item in items
    ]
    losses, gradients = [], []
    for budget in (2048, 1):
        trainer = started(learner, objective, policy, budget)
        losses.append(trainer.step(away, 0)["loss"])
        gradients.append(torch.cat([weight.grad.flatten() for _, weight in trainer.trained if weight.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-4


def test_the_tail_is_that_of_the_tokens(learner: Learner, policy: ModelRef, pairs: list[Pair]) -> None:
    objective = PairObjective(parse_loss("ld_dpo"))
    trainer = started(learner, objective, policy)
    groups = trainer.tokenise(pairs)
    found = objective.pair_logps(pairs, trainer._logps(pairs, groups, trainer.path))
    assert found.tail is not None
    for i, group in enumerate(groups):
        shorter = min(map(len, group.responses))
        for side, ids in enumerate(group.responses):
            [tokens] = [response_logps(trainer.model, [TokenGroup(group.prompt_ids, (ids,))]).tokens]
            assert found.tail[side][i].item() == pytest.approx(tokens[shorter:].sum().item(), abs=1e-4)
    # The policy is its reference, beyond the shorter answer too.
    assert found.tail.policy_rejected.abs().max() > 5.0
    assert found.tail.h.abs().max() < 1e-3 and found.h.abs().max() < 1e-3


@pytest.mark.parametrize("path", ["shared", "padded"])
def test_collision_probabilities_are_those_of_the_plain_softmax(
    path: str, policy: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "TILE", {"cpu": 40, "cuda": 40})
    monkeypatch.setattr(head, "TOKENS", 3)
    model = load_model(policy)
    groups = [TokenGroup((1, 2, 3), ((4, 5, 6), (7, 8))), TokenGroup((9,), ((10, 11),))]
    found = response_logps(model, groups, path=path, collision=True)
    expected = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt_ids, *response]])
            logps = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
            expected.append((2 * logps).logsumexp(-1))
    assert found.collision is not None and not found.collision.requires_grad
    torch.testing.assert_close(found.collision, torch.cat(expected).detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.tokens, response_logps(model, groups, path=path).tokens)


def test_mismatched_answers_are_of_other_prompts(policy: ModelRef, pairs: list[Pair]) -> None:
    answers = mismatched(answers_of(pairs[:2]), policy)
    texts = [response.text for pair in pairs[:2] for response in pair.responses]
    assert [answer.response.text for answer in answers] == texts
    assert [answer.p for answer in answers] == [1.0, 0.0, 1.0, 0.0]
    others = [answer.mismatched and answer.mismatched.text for answer in answers]
    assert others == [texts[2], texts[3], texts[0], texts[1]]  # good ones for good ones, bad ones for bad ones
    # What was known of another mismatched response is forgotten.
    known = [one.model_copy(update={"reference": "r", "reference_logps": (-1.0, -2.0)}) for one in answers]
    assert [one.reference for one in mismatched(known, policy)] == ["r"] * 4
    third = answers_of(pairs[2:3])
    assert [one.reference for one in mismatched([*known, *third], policy)] == ["r", "r", None, None, None, None]
    with pytest.raises(InputError, match="prompt 'p0': kto estimates drift by answers to other prompts"):
        mismatched(answers_of(pairs[:1]), policy)


def test_a_wrong_reference_is_found_out_for_losses_that_have_one(
    learner: Learner, policy: ModelRef, pairs: list[Pair]
) -> None:
    wrong = [pair.model_copy(update={"reference_logps": (-1.0, -2.0)}) for pair in pairs]
    with pytest.raises(CheckFailed, match="another model, tokenizer"):
        started(learner, PairObjective(parse_loss("exo")), policy).step(wrong, 0)
    started(learner, PairObjective(parse_loss("simpo")), policy).step(wrong, 0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [f'{{"prompt": "Question {i}?", "chosen": "{WORDS[i % 5]}", "rejected": "{WORDS[(i + 2) % 5]}!"}}\n'
            for i in range(6)]  # fmt: skip
    path.write_text("".join(rows))
    return path


@pytest.mark.parametrize(("loss", "rank"), [("simpo:gamma=0.5", 0), ("kto", 2), ("ld_dpo+0.1*nll_mean", 0)])
def test_a_round_computes_what_its_loss_needs(
    loss: str, rank: int, policy: ModelRef, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    model_pass = reference.model_pass

    def counting(groups: list[TokenGroup], *args: object, **kwargs: object) -> object:
        passes.append((kwargs["part"], len(groups), {len(group.responses) for group in groups}))
        return model_pass(groups, *args, **kwargs)

    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    for module in ("reference", "learner"):
        monkeypatch.setattr(f"prefloop.train.{module}.model_pass", counting)
    train = Train(steps=2, batch_size=2, learning_rate=1e-3, warmup_steps=0, validation_pairs=1, validate_every=1)
    apart = tmp_path / "held_out.jsonl"
    apart.write_text(file.read_text().replace("Question", "Another question"))
    cfg = DpoConfig(policy=str(policy.path), pairs=str(file), held_out=str(apart), loss=loss,
                    look_at=LookAt(answers=0), train=train.replace(lora__rank=rank), compute=COMPUTE)  # fmt: skip
    with Run.open(tmp_path / "run", recipe="dpo", config=cfg) as run:
        dpo(cfg, run)
    of_training = [one for one in passes if one[0] != "own"][1:]  # after that of the held-out pairs
    expected = {
        "simpo:gamma=0.5": [],
        "kto": [("logps", 12, {2})],
        "ld_dpo+0.1*nll_mean": [("logps", 6, {2}), ("prefix-logps", 6, {2})],
    }
    assert of_training == expected[loss]
    assert (tmp_path / "run/report.html").is_file() and (tmp_path / "run/report.md").is_file()
    assert f"loss: {loss}" in (tmp_path / "run/config.yaml").read_text()
    # The margin of the start model: zero against itself; without a reference that of its own log-probabilities.
    held_out = [Pair.from_json(line) for line in (tmp_path / "run/start/held_out.jsonl").read_text().splitlines()]
    margins = [
        2.0
        * (pair.reference_logps[0] / pair.chosen.length_tokens - pair.reference_logps[1] / pair.rejected.length_tokens)
        for pair in held_out
        if pair.reference_logps
    ]
    found = json.loads((tmp_path / "run/start/checkup.json").read_text())["margin"][0]
    assert found == pytest.approx(sum(margins) / 6 if loss.startswith("simpo") else 0.0, abs=1e-9)
    assert len(margins) == 6 and abs(sum(margins)) > 0.1


def test_kto_without_held_out_pairs_holds_answers_out(policy: ModelRef, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i % 10}?", "completion": f"{WORDS[i % 5]} {i}", "label": i < 10} for i in range(20)]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = Train(steps=1, batch_size=4, learning_rate=1e-3, warmup_steps=0, validation_pairs=0)
    cfg = DpoConfig(policy=str(policy.path), pairs=str(tmp_path / "rated.jsonl"), loss="kto", train=train,
                    look_at=LookAt(answers=1, shown=1), sampling=Sampling(max_new_tokens=4), compute=COMPUTE,
                    engine="transformers")  # fmt: skip
    with Run.open(tmp_path / "run", recipe="dpo", config=cfg) as run:
        dpo(cfg, run)
    written = (tmp_path / "run/round-1/training_answers.jsonl").read_text().splitlines()
    trained_on = {Answer.from_json(line).prompt.messages[0].content for line in written}
    [held_out] = (tmp_path / "run/start/held_out.jsonl").read_text().splitlines()
    pair = Pair.from_json(held_out)
    text = pair.prompt.messages[0].content
    assert len(written) == 18 and len(trained_on) == 9 and text not in trained_on
    number = int(text[9:-1])
    assert (pair.chosen.text, pair.rejected.text) == (rows[number]["completion"], rows[number + 10]["completion"])
    found = json.loads((tmp_path / "run/round-1/checkup.json").read_text())
    assert (found["pairs"], found["answers"]) == (1, 1) and found["margin"][0] != 0.0


@pytest.mark.parametrize(
    ("loss", "row", "message"),
    [
        ("robust_dpo", {"p": 0.7}, "'p1' has p = 0.7, and the loss takes no soft labels: robust_dpo: it corrects hard"),
        ("aot", {"weight": 2.0}, "'p1' has weight = 2.0, and the loss takes no weights: aot: it sorts the batch"),
        ("wdpo", {}, "'p0' has no scores, which the loss wdpo.* needs; give chosen_score and rejected_score"),
        ("xpo", {}, "'p0' has no reference_sample"),
    ],
)
def test_labels_that_a_loss_cannot_take_are_refused_before_anything_is_computed(
    loss: str, row: dict[str, float], message: str, policy: ModelRef, pairs: list[Pair], tmp_path: Path
) -> None:
    spare = {"chosen_score": None, "rejected_score": None, "reference_sample": None}
    given = [pair.model_copy(update=spare | (row if i else {})) for i, pair in enumerate(pairs)]
    (tmp_path / "pairs.jsonl").write_text("".join(pair.to_json() + "\n" for pair in given))
    cfg = DpoConfig(policy=str(policy.path), pairs=str(tmp_path / "pairs.jsonl"), loss=loss, compute=COMPUTE)
    with pytest.raises(InputError, match=message), Run.open(tmp_path / "run", recipe="dpo", config=cfg) as run:
        dpo(cfg, run)
    assert not (tmp_path / "run").exists()


def test_kto_on_one_prompt_is_refused_before_a_model_is_looked_at(policy: ModelRef, file: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Alone?", "chosen": "Yes", "rejected": "No"}\n')
    cfg = DpoConfig(policy=str(policy.path), pairs=str(tmp_path / "pairs.jsonl"), held_out=str(file), loss="kto",
                    look_at=LookAt(answers=0), compute=COMPUTE)  # fmt: skip
    with (
        pytest.raises(InputError, match="answers to other prompts, and none is there"),
        Run.open(tmp_path / "run", recipe="dpo", config=cfg) as run,
    ):
        dpo(cfg, run)
    assert not (tmp_path / "run/start/checkup.json").exists()


def test_kto_takes_answers_that_were_never_pairs(policy: ModelRef, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Question {i % 4}?", "completion": WORDS[i % 5], "label": i % 3 > 0, "weight": 1 + i}
        for i in range(8)
    ]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = Train(steps=2, batch_size=4, learning_rate=1e-3, warmup_steps=0, validation_pairs=2, validate_every=1)
    cfg = DpoConfig(policy=str(policy.path), pairs=str(tmp_path / "rated.jsonl"), loss="kto:undesirable=1.5",
                    look_at=LookAt(answers=0), train=train, compute=COMPUTE)  # fmt: skip
    with Run.open(tmp_path / "run", recipe="dpo", config=cfg) as run:
        dpo(cfg, run)
    written = (tmp_path / "run/round-1/training_answers.jsonl").read_text().splitlines()
    made = [Answer.from_json(line) for line in written]
    assert [(one.response.text, one.p, one.weight) for one in made] == [
        (row["completion"], float(row["label"]), row["weight"]) for row in rows
    ]
    assert all(one.mismatched is not None and one.reference_logps is not None for one in made)
    log = [json.loads(line) for line in (tmp_path / "run/round-1/model/training_log.jsonl").read_text().splitlines()]
    assert log[0]["good_change"] == pytest.approx(0, abs=1e-4) and log[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert any("validation" in row for row in log)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "maybe"}, "line 1: label = 'maybe': expected true or false"),
        ({"completion": " "}, "line 1: the response in column 'completion' is empty"),
        ({"label": None}, "line 1: label = None: expected true or false"),
    ],
)
def test_rated_answers_that_do_not_fit_are_refused(row: dict[str, object], message: str, tmp_path: Path) -> None:
    good = {"prompt": "a?", "completion": "b", "label": True}
    (tmp_path / "rated.jsonl").write_text(json.dumps(good | row) + "\n" + json.dumps(good) + "\n")
    with pytest.raises(InputError, match=message):
        load_answers(tmp_path / "rated.jsonl")
