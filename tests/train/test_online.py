"""Sampling between the steps of training: always the current weights, and a reference that stays what it was."""

import pytest
import torch
from tests.sample.engines import PROMPTS, ids_of, plain_logps, stopping_folder, stopping_llama

from prefloop.errors import CheckFailed
from prefloop.records import Group, Pair
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.learner import Learner
from prefloop.train.losses import parse_loss
from prefloop.train.objective import PairObjective
from prefloop.train.online import OnlineLearner, _base, copy_weights

DPO = PairObjective(parse_loss("dpo"))
SAMPLING = Sampling(max_new_tokens=20)
TRAIN = Train(steps=4, batch_size=4, learning_rate=1e-2, warmup_steps=0, validation_pairs=0)
KINDS = {"full": 0, "lora": 4}


def online_learner(rank: int = 0, *, dtype: str = "float32", behaviour: str = "current") -> OnlineLearner:
    compute = Compute(device="cpu", dtype="float32", sampling_dtype=dtype, sequences_per_batch=16)
    config = TRAIN.replace(lora=Lora(rank=rank).model_dump())
    learner = Learner(
        stopping_folder(),
        [],
        objective=DPO,
        config=config,
        compute=compute,
        seed=0,
    )
    return OnlineLearner(learner, behaviour=behaviour)


def pairs_of(groups: list[Group]) -> list[Pair]:
    return [Pair(prompt=g.prompt, chosen=g.responses[0], rejected=g.responses[1]) for g in groups]


def train_a_step(online: OnlineLearner, step: int = 0) -> None:
    groups = online.sample(PROMPTS, k=2, sampling=SAMPLING, seed=step)
    online.learner.step(online.with_reference_logps(pairs_of(groups)), step)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", KINDS.values(), ids=KINDS)
def test_o15_samples_after_an_update_come_from_the_updated_weights(rank: int, dtype: str) -> None:
    online = online_learner(rank, dtype=dtype)
    train_a_step(online)
    for step in (1, 2):
        train_a_step(online, step)
    assert any(weight.grad is not None for _, weight in online.learner.trained)
    [*groups] = online.sample(PROMPTS, k=2, sampling=SAMPLING, seed=9)
    assert all(weight.grad is None for _, weight in online.learner.trained)  # none beside the sampler's cache
    drift, gap = online.drift(groups)
    assert sum(gap) / len(gap) < online.engine.tolerance
    assert sum(map(abs, drift)) / len(drift) > 0.1  # the gap that the start weights would leave


@pytest.mark.parametrize("rank", KINDS.values(), ids=KINDS)
def test_o13_the_reference_stays_the_start_model(rank: int) -> None:
    online = online_learner(rank)
    groups = online.sample(PROMPTS, k=2, sampling=SAMPLING, seed=0)
    before = plain_logps(stopping_llama(), groups)
    for step in range(3):
        train_a_step(online, step)
    pairs = online.with_reference_logps(pairs_of(groups))
    found = [logp for pair in pairs for logp in pair.reference_logps or ()]
    assert found == pytest.approx(before, abs=1e-4)
    assert {pair.reference for pair in pairs} == {stopping_folder().fingerprint}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", KINDS.values(), ids=KINDS)
def test_the_offline_baseline_samples_from_the_start_model_to_the_end(rank: int, dtype: str) -> None:
    online = online_learner(rank, dtype=dtype, behaviour="start")
    before = ids_of(online.sample(PROMPTS, k=2, sampling=SAMPLING, seed=5))
    for step in range(3):
        train_a_step(online, step)
    for _ in range(2):  # looking at the current model in between leaves nothing behind
        assert ids_of(online.sample(PROMPTS, k=2, sampling=SAMPLING, seed=5)) == before
        assert ids_of(online.sample(PROMPTS, k=2, sampling=SAMPLING, seed=5, current=True)) != before


def test_o11_o12_sampler_and_trainer_agree_a_token_whatever_the_temperature() -> None:
    """The sampler's figure is that of the model, so it agrees at 0.9 too, without dividing the trainer's logits."""
    online = online_learner()
    for temperature in (1.0, 0.9):
        sampling = SAMPLING.replace(temperature=temperature)
        _, gap = online.drift(online.sample(PROMPTS, k=4, sampling=sampling, seed=0))
        assert max(gap) < 1e-4


def test_a_sampler_that_is_off_stops_the_run() -> None:
    online = online_learner()
    groups = online.sample(PROMPTS, k=2, sampling=SAMPLING, seed=0)
    assert online.check_sampler(online.drift(groups)[1]) < 1e-4
    with torch.no_grad():
        online.learner.model.model.norm.weight.mul_(1.5)
    with pytest.raises(CheckFailed, match=r"differ from the trainer's by .* at most 0.0001 expected"):
        online.check_sampler(online.drift(groups)[1])


def test_copied_weights_are_those_with_the_adapter_merged() -> None:
    online = online_learner(4)
    train_a_step(online)
    train_a_step(online, 1)
    before = {name: weight.clone() for name, weight in online.learner.model.named_parameters()}
    copy = stopping_llama()
    copy_weights(_base(online.learner.model), copy)
    assert all(torch.equal(weight, before[name]) for name, weight in online.learner.model.named_parameters())
    merged = online.learner.model.merge_and_unload()
    for (name, ours), (_, theirs) in zip(copy.named_parameters(), merged.named_parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name
    moved = sum(not torch.equal(a, b) for a, b in zip(copy.parameters(), stopping_llama().parameters(), strict=True))
    assert moved >= 14
