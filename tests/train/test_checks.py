"""Every self-check of training: the real thing is broken, and the check stops the run with what was seen."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.tiny import LLAMA3, Template, save_tiny_model

from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed
from prefloop.models import ModelRef, load_tokenizer
from prefloop.recipes.steps import tokenise
from prefloop.records import Pair, Prompt, Response
from prefloop.run import Run
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.learner import Learner, fit
from prefloop.train.losses import parse_loss
from prefloop.train.objective import PairObjective
from prefloop.train.reference import with_reference_logps

DPO = PairObjective(parse_loss("dpo"))
COMPUTE = Compute(device="cpu", dtype="float32")
TRAIN = Train(steps=3, batch_size=3, learning_rate=1e-3, warmup_steps=0, validation_pairs=0)
WORDS = ["red", "green tea", "a long walk home", "no"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Log-probabilities that earlier runs of the tests have cached are not seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFLOOP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Template, ModelRef]:
    folder = tmp_path_factory.mktemp("models")
    names: list[Template] = ["chatml", "llama3", "zephyr"]
    return {name: ModelRef.of(save_tiny_model(folder / name, template=name)) for name in names}


@pytest.fixture(scope="module")
def policy(models: dict[Template, ModelRef]) -> ModelRef:
    return models["chatml"]


@pytest.fixture(scope="module")
def pairs(policy: ModelRef) -> list[Pair]:
    return with_reference_logps(made(policy), policy, compute=COMPUTE)


def made(model: ModelRef) -> list[Pair]:
    chat = ChatFormat(load_tokenizer(model))
    return [
        Pair(
            prompt=Prompt.of(f"Question {i}?", id=f"p{i}"),
            chosen=chat.with_token_ids(Response(text=WORDS[i])),
            rejected=chat.with_token_ids(Response(text=WORDS[(i + 2) % 4] * 2)),
        )
        for i in range(4)
    ]


def new_learner(policy: ModelRef, pairs: list[Pair], config: Train = TRAIN) -> Learner:
    return Learner(policy, pairs, objective=DPO, config=config, compute=COMPUTE, seed=0)


def chosen_ids(pair: Pair, *ids: int) -> Pair:
    return pair.model_copy(update={"chosen": pair.chosen.model_copy(update={"token_ids": ids})})


def test_another_models_reference_is_found_out_at_step_0(policy: ModelRef, pairs: list[Pair]) -> None:
    wrong = [p.model_copy(update={"reference_logps": (p.reference_logps[0] + 3, p.reference_logps[1])}) for p in pairs
             if p.reference_logps]  # fmt: skip
    with pytest.raises(
        CheckFailed, match=r"prompt 'p\d' has log pi - log pi_ref = -3\.0\d* nats .*another model, tokenizer"
    ):
        new_learner(policy, pairs).step(wrong[:3], 0)
    # A reference that is another model on purpose has a margin.
    named = [pair.model_copy(update={"reference": "another model"}) for pair in wrong]
    assert new_learner(policy, pairs).step(named[:3], 0)["margin"] == pytest.approx(-0.3, abs=1e-4)


def test_a_weight_that_takes_no_part_in_the_loss_stops_the_run(policy: ModelRef, pairs: list[Pair]) -> None:
    learner = new_learner(policy, pairs)
    learner.trained.append(("forgotten.weight", torch.nn.Parameter(torch.zeros(2))))
    with pytest.raises(CheckFailed, match=r"1 trainable weights got no gradient .*forgotten\.weight"):
        learner.step(pairs[:3], 0)


def test_a_nan_in_the_gradient_names_its_prompts(policy: ModelRef, pairs: list[Pair]) -> None:
    broken = [pairs[0].model_copy(update={"weight": float("nan")}), pairs[1]]
    with pytest.raises(CheckFailed, match="gradient of step 1 is not finite; its items are those of prompts p0, p1"):
        new_learner(policy, pairs).step(broken, 0)


def test_log_probabilities_that_are_no_numbers_name_their_prompt(policy: ModelRef, pairs: list[Pair]) -> None:
    learner = new_learner(policy, pairs)
    learner.step(pairs[:3], 0)
    with torch.no_grad():
        learner.model.model.norm.weight[0] = float("inf")
    with pytest.raises(CheckFailed, match=r"\[nan, nan\] of a response to prompt 'p\d' under the model in training"):
        learner.step(pairs[:3], 1)


def test_a_weight_that_the_optimiser_does_not_hold_stops_the_run(policy: ModelRef, pairs: list[Pair]) -> None:
    learner = new_learner(policy, pairs)
    held = learner.optimizer.param_groups[0]["params"]
    missing = learner.model.model.layers[1].mlp.up_proj.weight
    learner.optimizer.param_groups[0]["params"] = [weight for weight in held if weight is not missing]
    with pytest.raises(CheckFailed, match=r"layers\.1\.mlp\.up_proj\.weight has a gradient and did not change .*hold"):
        learner.step(pairs[:3], 0)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_learning_rate_below_the_resolution_of_the_weights_stops_the_run(
    policy: ModelRef, pairs: list[Pair], optimizer: str
) -> None:
    # The norms' weights are ones: the next float32 above is 1.2e-7 away.
    learner = new_learner(policy, pairs, TRAIN.replace(learning_rate=1e-9, optimizer=optimizer))
    message = r"norm\.weight did not change .* 1\.0e-09, .*below the resolution .*--train\.learning-rate to 1\.\de-07"
    with pytest.raises(CheckFailed, match=message):
        learner.step(pairs[:3], 0)


def test_a_long_warm_up_to_a_rate_that_moves_the_weights_is_no_error(policy: ModelRef, pairs: list[Pair]) -> None:
    # DICE: 5e-7 after 50 steps. The first step of 1e-8 leaves every norm as it is.
    learner = new_learner(policy, pairs, TRAIN.replace(learning_rate=5e-7, warmup_steps=50))
    norm = learner.model.model.norm.weight
    learner.step(pairs[:3], 0)
    assert norm.grad is not None and norm.grad.any() and torch.equal(norm, torch.ones_like(norm))
    assert learner.unmoved == {}


def test_adapters_move_b_in_the_first_step_and_a_in_the_second(policy: ModelRef, pairs: list[Pair]) -> None:
    learner = new_learner(policy, pairs, TRAIN.replace(lora=Lora(rank=2).model_dump()))
    names = [name for name, _ in learner.trained]
    learner.step(pairs[:3], 0)
    assert sorted(learner.unmoved) == sorted(name for name in names if "lora_A" in name)
    learner.step(pairs[:3], 1)
    assert learner.unmoved == {}


def test_first_updates_are_counted_and_not_steps(policy: ModelRef, pairs: list[Pair]) -> None:
    """An online method may have no pair in its first step: A has its gradient in the second update, not in step 2."""
    learner = new_learner(policy, pairs, TRAIN.replace(lora=Lora(rank=2).model_dump()))
    notes: list[str] = []
    learner.stage.note = notes.append
    learner.step(pairs[:3], 1)
    assert len(learner.unmoved) == len(learner.trained) // 2
    learner.step(pairs[:3], 7)
    assert learner.unmoved == {} and not notes


def test_an_adapter_that_does_not_move_in_the_second_step_stops_the_run(policy: ModelRef, pairs: list[Pair]) -> None:
    learner = new_learner(policy, pairs, TRAIN.replace(lora=Lora(rank=2).model_dump()))
    group = learner.optimizer.param_groups[0]
    group["params"] = [weight for name, weight in learner.trained if "lora_B" in name]
    learner.step(pairs[:3], 0)
    with pytest.raises(CheckFailed, match=r"lora_A\.default\.weight has a gradient and did not change"):
        learner.step(pairs[:3], 1)


def test_weights_without_any_gradient_but_zero_are_noted(policy: ModelRef, pairs: list[Pair], tmp_path: Path) -> None:
    idle = [pair.model_copy(update={"weight": 0.0}) for pair in pairs]
    with Run.open(tmp_path / "run", recipe="test", config=TRAIN) as run:
        run.stage("model", fit, policy, idle, [], objective=DPO, config=TRAIN, compute=COMPUTE,
                  seed=0)  # fmt: skip
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    notes = [event["text"] for event in events if event["event"] == "note"]
    number = len(new_learner(policy, pairs).trained)
    assert [note for note in notes if note.startswith(f"{number} trainable weights had no gradient but zero")]


def test_two_identical_responses_reach_no_training(policy: ModelRef, pairs: list[Pair]) -> None:
    same = pairs[1].model_copy(update={"rejected": pairs[1].chosen})
    with pytest.raises(CheckFailed, match="both responses of the pair of prompt 'p1' are the same 10 tokens"):
        new_learner(policy, [pairs[0], same])
    with pytest.raises(CheckFailed, match="prompt 'p1'"):
        new_learner(policy, pairs).step([same], 0)


@pytest.mark.parametrize("template", ["chatml", "llama3", "zephyr"])
def test_an_end_token_inside_a_response_is_found(models: dict[Template, ModelRef], template: Template) -> None:
    first, second, *_ = made(models[template])
    end = ChatFormat(load_tokenizer(models[template])).end_token_id
    new_learner(models[template], [first, second])
    for early in ((70, end, 71, end), (end, end)):
        with pytest.raises(CheckFailed, match=rf"chosen response to prompt 'p1' has the end token .*\({end}\) at pos"):
            new_learner(models[template], [first, chosen_ids(second, *early)])
    # A response that the token limit cut has no end token, and that is right.
    new_learner(models[template], [chosen_ids(second, 70, 71)])


def test_a_response_that_begins_with_a_bos_is_found(models: dict[Template, ModelRef]) -> None:
    first = made(models["llama3"])[0]
    assert first.chosen.token_ids is not None
    bos = ChatFormat(load_tokenizer(models["llama3"])).bos_token_id
    assert bos is not None
    with pytest.raises(CheckFailed, match=r"chosen response to prompt 'p0' begins with the BOS <\|begin_of_text\|>"):
        new_learner(models["llama3"], [chosen_ids(first, bos, *first.chosen.token_ids)])
    # What a model has sampled may begin with any token, and is trained on as it is.
    sampled = first.chosen.model_copy(update={"finish_reason": "stop"})
    new_learner(
        models["llama3"], [chosen_ids(first.model_copy(update={"chosen": sampled}), bos, *first.chosen.token_ids)]
    )


def test_a_doubled_bos_is_found(
    models: dict[Template, ModelRef], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(models["llama3"])
    tokenizer.chat_template = "{{ bos_token }}" + LLAMA3
    new_learner(models["llama3"], made(models["llama3"]))
    monkeypatch.setattr(ChatFormat, "_single_bos", lambda self, ids: ids)
    new_learner(models["llama3"], made(models["llama3"]))
    monkeypatch.setattr("prefloop.train.learner.load_tokenizer", lambda ref: tokenizer)
    with pytest.raises(CheckFailed, match=r"'p0' has the BOS <\|begin_of_text\|> \(256\) twice .* at position 0"):
        new_learner(models["llama3"], made(models["llama3"]))


def test_text_that_spells_the_bos_is_found_before_anything_is_computed(models: dict[Template, ModelRef]) -> None:
    pair = made(models["llama3"])[0].model_copy(update={"prompt": Prompt.of("<|begin_of_text|>?", id="odd")})
    message = r"prompt 'odd' has the BOS <\|begin_of_text\|> \(256\) at position \d+; expected it at the very start"
    with pytest.raises(CheckFailed, match=message):
        new_learner(models["llama3"], [pair])
    with pytest.raises(CheckFailed, match=message):
        tokenise([pair], models["llama3"])


def test_a_template_that_opens_every_turn_with_the_bos_is_no_error(policy: ModelRef, pairs: list[Pair]) -> None:
    chat = ChatFormat(load_tokenizer(policy))
    assert chat.bos_token_id is not None
    assert new_learner(policy, pairs).tokenise(pairs)[0].prompt_ids.count(chat.bos_token_id) == 2
