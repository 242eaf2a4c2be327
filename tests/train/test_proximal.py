"""Members, their mean, and the references of BPO: what each is, and what they reduce to (related methods, 2.6)."""

from statistics import fmean

import pytest
import torch
from tests.sample.engines import PROMPTS, ids_of, plain_logps, stopping_folder, stopping_llama
from tests.train.test_online import pairs_of

from prefloop.models import load_model
from prefloop.records import Pair
from prefloop.sample import transformers as engines
from prefloop.sample.sampling import Sampling
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.learner import Learner
from prefloop.train.losses import parse_loss
from prefloop.train.objective import PairObjective
from prefloop.train.online import OnlineLearner, _base, copy_weights
from prefloop.train.proximal import ProximalLearner

SAMPLING = Sampling(max_new_tokens=12)
TRAIN = Train(steps=4, batch_size=4, learning_rate=1e-2, warmup_steps=0, validation_pairs=0)


def learner(rank: int = 0, *, loss: str = "dpo", beta: float = 0.1, sampling: str = "float32") -> Learner[Pair]:
    compute = Compute(device="cpu", dtype="float32", sampling_dtype=sampling, sequences_per_batch=16)
    objective = PairObjective(parse_loss(loss, beta=beta))
    config = TRAIN.replace(lora=Lora(rank=rank, alpha=8).model_dump())
    return Learner(stopping_folder(), [], objective=objective, config=config, compute=compute, seed=0)


def fresh_pairs(online: OnlineLearner, seed: int) -> list[Pair]:
    return pairs_of(online.sample(PROMPTS[:3], k=2, sampling=SAMPLING, seed=seed))


def trained(online: ProximalLearner, *, steps: int, every: int) -> ProximalLearner:
    """After so many steps, refreshed every so many."""
    for step in range(steps):
        if step % every == 0:
            online.refresh()
        online.step(fresh_pairs(online, step), step)
    return online


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("rank", [0, 4])
def test_one_phase_is_the_offline_baseline_of_oaif_to_the_bit(rank: int) -> None:
    """F = 1: answers and reference of the start model throughout."""
    ours = trained(ProximalLearner(learner(rank)), steps=2, every=2)
    theirs = OnlineLearner(learner(rank), behaviour="start")
    for step in range(2):
        theirs.step(fresh_pairs(theirs, step), step)
    assert same(weights(ours.learner.model), weights(theirs.learner.model))


@pytest.mark.parametrize(("alpha", "kind"), [(1.0, "behaviour"), (0.0, "start")])
def test_the_moving_mean_is_bpo_at_1_and_online_alignment_at_0(alpha: float, kind: str) -> None:
    ema = trained(ProximalLearner(learner(), reference="ema", ema=alpha), steps=3, every=2)
    plain = trained(ProximalLearner(learner(), reference=kind), steps=3, every=2)
    assert same(weights(ema.learner.model), weights(plain.learner.model))


def test_the_moving_mean_moves_by_its_share_at_every_refresh() -> None:
    online = ProximalLearner(learner(), reference="ema", ema=0.25)
    mean = weights(online.behaviour_model)
    for step in range(2):
        online.refresh()
        mean = [m + 0.25 * (b - m) for m, b in zip(mean, weights(online.behaviour_model), strict=True)]
        online.step(fresh_pairs(online, step), step)
    for found, expected in zip(weights(online.other), mean, strict=True):
        assert torch.allclose(found, expected, atol=1e-7)


def test_another_model_is_the_reference_in_every_phase() -> None:
    other = stopping_folder(1)
    online = ProximalLearner(learner(4), reference=other)
    for step in range(2):
        online.refresh()
        groups = online.sample(PROMPTS[:3], k=2, sampling=SAMPLING, seed=step)
        pairs = online.with_reference_logps(pairs_of(groups))
        found = [logp for pair in pairs for logp in pair.reference_logps or ()]
        assert found == pytest.approx(plain_logps(stopping_llama(1), groups), abs=1e-4)
        of_start = plain_logps(stopping_llama(), groups)
        assert max(abs(a - b) for a, b in zip(found, of_start, strict=True)) > 0.1
        assert {pair.reference for pair in pairs} == {other.fingerprint}
        online.step(pairs_of(groups), step)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("members", [1, 2])
def test_the_behaviour_model_samples_and_the_merged_one_where_asked(members: int, dtype: str) -> None:
    """Where sampling is in half precision, one after the other in the same copy."""
    online = trained(ProximalLearner(learner(4, sampling=dtype), members=members), steps=4, every=2)
    tolerance = online.engine.tolerance
    assert tolerance
    for _ in range(2):
        of_behaviour = online.sample(PROMPTS, k=2, sampling=SAMPLING, seed=9)
        of_merged = online.sample(PROMPTS, k=2, sampling=SAMPLING, seed=9, current=True)
        assert fmean(online.sampler_gap(of_behaviour)) < tolerance < fmean(online.drift(of_behaviour)[1])
        assert fmean(online.drift(of_merged)[1]) < tolerance < fmean(online.sampler_gap(of_merged))


def test_sharing_prompts_is_proven_once_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    proven: list[object] = []
    real = engines.can_share
    monkeypatch.setattr(engines, "can_share", lambda model, ids: proven.append(model) or real(model, ids))
    online = trained(ProximalLearner(learner(4), members=2), steps=3, every=1)
    for current in (True, False, True):
        online.sample(PROMPTS, k=1, sampling=SAMPLING, seed=0, current=current)
    assert proven == [online.behaviour_model, online.merged()]


def test_what_only_checkpoints_need_is_a_copy_on_the_cpu() -> None:
    online = ProximalLearner(learner(4), members=2)
    online.refresh()
    for taken, member in zip(online.taken, online.members, strict=True):
        for name, weight in taken.items():
            assert weight.device.type == "cpu" and weight.data_ptr() != member[name].data_ptr()
            assert torch.equal(weight, member[name]) and not weight.requires_grad


def test_every_step_on_policy_the_loss_is_a_constant_and_directions_agree() -> None:
    """F = T, n = 1: ln 2, 1/(4 beta^2), 1; gradients at the start in the ratio beta/2 : 1/beta : beta."""
    beta, gradients = 0.1, {}
    for loss, constant in {"dpo": 0.693147, "ipo": 25.0, "slic": 1.0}.items():
        online = ProximalLearner(learner(4, loss=loss, beta=beta))
        online.refresh()
        figures = online.step(fresh_pairs(online, 0), 0)
        assert figures["loss"] == pytest.approx(constant, rel=1e-6)
        clip = min(1.0, TRAIN.max_grad_norm / figures["grad_norm"])
        gradients[loss] = torch.cat([w.grad.flatten() / clip for _, w in online.learner.trained if w.grad is not None])
        online.refresh()
        assert online.step(fresh_pairs(online, 1), 1)["loss"] == pytest.approx(constant, rel=1e-4)
    for loss, slope in {"ipo": 1 / beta, "slic": beta}.items():
        ratio = slope / (beta / 2)
        assert torch.allclose(gradients[loss], ratio * gradients["dpo"], rtol=1e-3, atol=1e-6 * ratio)


def test_after_a_refresh_one_member_is_its_reference() -> None:
    online = trained(ProximalLearner(learner(4)), steps=2, every=2)
    assert any(weight.grad is not None for _, weight in online.learner.trained)
    groups = online.sample(PROMPTS[:3], k=2, sampling=SAMPLING, seed=9, current=True)
    assert all(weight.grad is None for _, weight in online.learner.trained)
    assert max(map(abs, online.further_drift(groups)["log_ratio_to_behaviour_per_token"])) > 1e-2
    online.refresh()
    assert max(map(abs, online.further_drift(groups)["log_ratio_to_behaviour_per_token"])) < 1e-5
    assert online.learner.evaluate(online.with_reference_logps(pairs_of(groups)))["margin"] == pytest.approx(
        0, abs=1e-4
    )
    drift, gap = online.drift(groups)
    assert max(map(abs, drift)) > 1e-2 and max(gap) < 1e-4


def delta(online: ProximalLearner, member: int, name: str) -> torch.Tensor:
    """alpha / rank B A, by hand."""
    a, b = (online.members[member][f"base_model.model.{name}.lora_{side}.default.weight"] for side in "AB")
    return 2.0 * b @ a


LAYER = "model.layers.1.mlp.down_proj"


def test_the_mean_is_that_of_weight_changes_for_independent_members() -> None:
    online = trained(ProximalLearner(learner(4), members=3, seed=0), steps=2, every=1)
    changes = [delta(online, i, LAYER) for i in range(3)]
    assert all(float((a - changes[0]).abs().max()) > 1e-3 for a in changes[1:])  # they began elsewhere
    start = load_model(stopping_folder()).get_parameter(f"{LAYER}.weight")
    found = online.merged().get_parameter(f"{LAYER}.weight") - start
    assert torch.allclose(found, sum(changes) / 3, atol=1e-6)
    assert float(found.detach().norm()) > 1e-3


def test_the_mean_of_identical_members_is_any_one_of_them() -> None:
    online = trained(ProximalLearner(learner(4)), steps=2, every=1)
    alone = load_model(stopping_folder())
    copy_weights(_base(online.learner.model), alone)
    [member] = online.members
    several = load_model(stopping_folder())
    online._write_mean([member, member, member], several)
    assert same(weights(several), weights(alone))
    assert not same(weights(several), weights(load_model(stopping_folder())))


def test_members_differ_and_each_keeps_its_own_optimiser() -> None:
    """Two members that begin alike and see the same pairs stay alike; each is the single member's twin."""
    online = ProximalLearner(learner(4), members=2, reference="start")
    assert any(not torch.equal(online.members[1][name], weight) for name, weight in online.members[0].items())
    online.members[1] = {name: weight.clone() for name, weight in online.members[0].items()}
    trained(online, steps=2, every=2)
    one = trained(ProximalLearner(learner(4), reference="start"), steps=2, every=2)
    for name, weight in one.members[0].items():
        assert torch.equal(online.members[0][name], weight) and torch.equal(online.members[1][name], weight)


@pytest.mark.parametrize(("rank", "members", "reference"), [(0, 1, "behaviour"), (4, 2, "ema")])
def test_a_state_is_taken_up_to_the_bit(rank: int, members: int, reference: str, tmp_path) -> None:
    def make() -> ProximalLearner:
        return ProximalLearner(learner(rank), members=members, reference=reference, ema=0.5)

    whole = trained(make(), steps=3, every=2)
    torch.save([whole.state(), whole._clone(), whole.learner.optimizer.state_dict()], tmp_path / "state")
    state, live, optimizer = torch.load(tmp_path / "state", weights_only=True)
    again = make()
    again._put(live)
    again.learner.optimizer.load_state_dict(optimizer)
    again.restore(state)
    assert ids_of(again.sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)) == ids_of(
        whole.sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)
    )
    for online in (whole, again):
        online.step(fresh_pairs(online, 3), 3)
    assert same(weights(again.merged()), weights(whole.merged()))
