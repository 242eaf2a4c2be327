"""Objectives other than pairs: demonstrations by definition, batches whose losses depend on one another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tests.tiny import save_tiny_model
from torch import Tensor

from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed
from prefloop.models import ModelRef, load_model, load_tokenizer
from prefloop.records import Demonstration, Prompt, Response
from prefloop.train.attention import shared_prefix
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.learner import Learner
from prefloop.train.logprobs import Path as LogpsPath
from prefloop.train.logprobs import ResponseLogps, plain_sums, rows
from prefloop.train.objective import Objective, SupervisedObjective

COMPUTE = Compute(device="cpu", dtype="float32", tokens_per_forward=10_000)
TRAIN = Train(steps=4, batch_size=3, learning_rate=1e-3, warmup_steps=0, validation_pairs=0, max_grad_norm=1e9)
WORDS = ["red", "green tea", "a long walk home", "no", "yes, but later"]
WEIGHTS = [1.0, 0.5, 3.0, 1.0, 0.25]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef.of(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def items(policy: ModelRef) -> list[Demonstration]:
    chat = ChatFormat(load_tokenizer(policy))
    return [
        Demonstration(prompt=Prompt.of(f"Question {i}?", id=f"p{i}"), response=chat.with_token_ids(Response(text=text)),
                      weight=weight)
        for i, (text, weight) in enumerate(zip(WORDS, WEIGHTS, strict=True))
    ]  # fmt: skip


def learner_of(
    policy: ModelRef, objective: Objective, *, budget: int = 10_000, path: LogpsPath = "shared", config: Train = TRAIN
) -> Learner:
    compute = COMPUTE.replace(tokens_per_forward=budget)
    learner = Learner(policy, [], objective=objective, config=config, compute=compute, seed=0)
    learner.path = path
    return learner


def gradients(learner: Learner) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in learner.trained if weight.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_the_supervised_loss_is_what_its_definition_says(
    policy: ModelRef, items: list[Demonstration], normalise: str
) -> None:
    objective = SupervisedObjective(normalise=normalise)
    learner = learner_of(policy, objective)
    row = learner.step(items, 0)
    model = load_model(policy)
    groups = learner.tokenise(items)
    sums = plain_sums(model, groups)
    tokens = [len(group.responses[0]) for group in groups]
    size = sum(tokens) if normalise == "token" else len(items)
    loss = -(torch.tensor(WEIGHTS) * sums).sum() / size
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["nll"] == pytest.approx(-sums.mean().item(), rel=1e-6)
    assert row["tokens"] == pytest.approx(sum(tokens) / len(items))
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert_close(gradients(learner), expected)
    found = learner_of(policy, objective).evaluate(items)
    assert found == pytest.approx({name: row[name] for name in found}, rel=1e-6)


@pytest.mark.parametrize("path", ["shared", "padded"])
@pytest.mark.parametrize("budget", [1, 60])
def test_a_supervised_step_does_not_depend_on_padding_or_packing(
    policy: ModelRef, items: list[Demonstration], budget: int, path: LogpsPath
) -> None:
    whole, cut = (learner_of(policy, SupervisedObjective(), budget=b, path=path) for b in (10_000, budget))
    alone = learner_of(policy, SupervisedObjective(), budget=1, path="padded")
    assert len(rows(cut.tokenise(items), budget, path=path)) > 1
    steps = [learner.step(items, 0) for learner in (whole, cut, alone)]
    assert [step["loss"] for step in steps] == pytest.approx([steps[0]["loss"]] * 3, rel=1e-6)
    assert_close(gradients(cut), gradients(whole))
    assert_close(gradients(alone), gradients(whole))


def test_demonstrations_with_wrong_token_ids_are_refused(policy: ModelRef, items: list[Demonstration]) -> None:
    end = ChatFormat(load_tokenizer(policy)).end_token_id
    learner = learner_of(policy, SupervisedObjective())
    for ids in ((70, end, 71, end), (end, end)):
        response = items[1].response.model_copy(update={"token_ids": ids})
        wrong = [items[0], items[1].model_copy(update={"response": response})]
        with pytest.raises(
            CheckFailed, match=rf"the response to prompt 'p1' has the end token .*\({end}\) at position"
        ):
            learner.step(wrong, 0)


def test_imitation_lowers_the_loss_and_its_state_is_its_identity(policy: ModelRef, items: list[Demonstration]) -> None:
    learner = learner_of(policy, SupervisedObjective())
    losses = [learner.step(items, step)["loss"] for step in range(4)]
    assert losses[-1] < losses[0] - 0.1
    assert SupervisedObjective("token").identity != SupervisedObjective("sequence").identity


@dataclass(frozen=True)
class Spread(Objective[Demonstration]):
    """The squared distance of each log-probability from the mean of the batch: no item's loss is its own."""

    kind: ClassVar = "demonstrations"
    coupled: ClassVar = True

    @property
    def identity(self) -> str:
        return "spread"

    def check(self, items: Sequence[Demonstration], groups: object, chat: object) -> None:
        pass

    def losses(self, items: Sequence[Demonstration], logps: ResponseLogps) -> tuple[Tensor, dict[str, Tensor]]:
        losses = (logps.sums - logps.sums.mean()) ** 2 * torch.tensor([item.weight for item in items])
        return losses, {"batch": torch.full_like(losses, len(items)).detach()}


@pytest.mark.parametrize("path", ["shared", "padded"])
@pytest.mark.parametrize("rank", [0, 2])
def test_coupled_losses_have_the_gradient_of_the_whole_batch_however_memory_cuts_it(
    policy: ModelRef, items: list[Demonstration], path: LogpsPath, rank: int
) -> None:
    config = TRAIN.replace(lora=Lora(rank=rank).model_dump())
    whole, cut = (learner_of(policy, Spread(), budget=b, path=path, config=config) for b in (10_000, 1))
    first, second = whole.step(items, 0), cut.step(items, 0)
    assert second["batch"] == len(items)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5) and first["loss"] > 1.0
    trained = {name: grad for name, grad in gradients(whole).items() if grad.any()}  # a LoRA A has none at first
    assert_close({name: gradients(cut)[name] for name in trained}, trained)


def test_coupled_losses_keep_no_activations_of_the_whole_batch(policy: ModelRef, items: list[Demonstration]) -> None:
    kept = {}
    for budget in (10_000, 1):
        learner = learner_of(policy, Spread(), budget=budget)
        weights = {weight.data_ptr() for weight in learner.model.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, weights: set[int] = weights, sizes: dict[int, int] = sizes) -> Tensor:
            if tensor.data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        groups = learner.tokenise(items)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), shared_prefix(learner.model):
            [(_, logps)] = learner._passes(items, groups, "shared")
        assert logps.sums.requires_grad
        kept[budget] = sum(sizes.values())
    assert kept[1] < 0.05 * kept[10_000]


def test_coupled_losses_are_evaluated_in_batches_of_training(policy: ModelRef, items: list[Demonstration]) -> None:
    found = learner_of(policy, Spread(), budget=1, config=TRAIN.replace(batch_size=3)).evaluate(items)
    sums = plain_sums(load_model(policy), learner_of(policy, Spread()).tokenise(items)).detach()
    expected = 0.0
    for part in (slice(0, 3), slice(3, 5)):
        expected += float(((sums[part] - sums[part].mean()) ** 2 * torch.tensor(WEIGHTS[part])).sum())
    assert found["loss"] == pytest.approx(expected / len(items), rel=1e-5)
    assert math.isclose(found["batch"], (3 * 3 + 2 * 2) / 5)
