"""Closed forms of the DPO loss: D1, D2, D14, D16 of the dossier."""

import math
from collections.abc import Callable

import pytest
import torch

from prefloop.train.losses import LOSSES, PairLogps, pair_metrics
from prefloop.train.losses.pairwise import dpo, ipo, slic

OAIF = ("dpo", "ipo", "slic")


def logps_with(h: torch.Tensor) -> PairLogps:
    zero = torch.zeros_like(h)
    return PairLogps(h - 30.0, zero - 40.0, zero - 30.0, zero - 40.0)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_d1_loss_before_the_first_update_is_ln_2(beta: float) -> None:
    logps = logps_with(torch.zeros(3))
    assert dpo(logps, beta=beta).tolist() == pytest.approx([math.log(2)] * 3, abs=1e-7)
    metrics = pair_metrics(logps, beta=beta)
    assert metrics["margin"].tolist() == [0, 0, 0]
    assert metrics["correct"].tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_d2_slope_at_zero_is_minus_half_beta(beta: float) -> None:
    h = torch.zeros(1, requires_grad=True)
    dpo(logps_with(h), beta=beta).sum().backward()
    assert h.grad is not None and h.grad.item() == pytest.approx(-beta / 2, rel=1e-6)


def test_d16_swapping_chosen_and_rejected_adds_beta_h() -> None:
    h = torch.linspace(-50, 50, 11, dtype=torch.float64)
    a = logps_with(h)
    b = PairLogps(a.policy_rejected, a.policy_chosen, a.reference_rejected, a.reference_chosen)
    assert torch.allclose(dpo(a, beta=0.3) - dpo(b, beta=0.3), -0.3 * h, atol=1e-12)


def test_d14_margins_of_both_orders_cancel() -> None:
    a = logps_with(torch.tensor([3.5, -2.0]))
    b = PairLogps(a.policy_rejected, a.policy_chosen, a.reference_rejected, a.reference_chosen)
    assert (pair_metrics(a, beta=0.1)["margin"] + pair_metrics(b, beta=0.1)["margin"]).tolist() == [0, 0]


def test_known_value_away_from_zero() -> None:
    # h = 4, beta = 0.1: -log sigmoid(0.4) = 0.513015 (dossier, 2.2)
    assert dpo(logps_with(torch.tensor([4.0])), beta=0.1).item() == pytest.approx(0.513015, abs=1e-6)


def test_a_soft_label_mixes_both_orders_and_a_half_has_no_slope_at_zero() -> None:
    h = torch.tensor([2.0], requires_grad=True)
    expected = 0.7 * dpo(logps_with(h), beta=0.5) + 0.3 * dpo(logps_with(-h), beta=0.5)
    assert torch.allclose(dpo(logps_with(h), beta=0.5, p=torch.tensor([0.7])), expected)
    zero = torch.zeros(1, requires_grad=True)
    dpo(logps_with(zero), beta=0.5, p=0.5).sum().backward()
    assert zero.grad is not None and zero.grad.item() == 0.0


def test_weight_scales_each_pair() -> None:
    logps = logps_with(torch.tensor([1.0, 1.0]))
    one, three = dpo(logps, weight=torch.tensor([1.0, 3.0])).tolist()
    assert three == pytest.approx(3 * one)


def test_metrics_report_changes_against_the_reference() -> None:
    logps = PairLogps(torch.tensor([-9.0]), torch.tensor([-25.0]), torch.tensor([-10.0]), torch.tensor([-20.0]))
    metrics = pair_metrics(logps, beta=0.1)
    assert metrics["chosen_change"].tolist() == [1.0]
    assert metrics["rejected_change"].tolist() == [-5.0]
    assert metrics["margin"].item() == pytest.approx(0.6)
    assert metrics["correct"].tolist() == [1.0]


# O1, O2, O9, O10 of the dossier: the three losses of OAIF (O3 is D16)


@pytest.mark.parametrize(
    ("name", "value", "slope"), [("dpo", math.log(2), -0.05), ("ipo", 0.25, -1.0), ("slic", 1.0, -0.002)]
)
def test_o1_o2_value_and_slope_before_the_first_update(name: str, value: float, slope: float) -> None:
    loss, beta = LOSSES[name].function, LOSSES[name].beta
    h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    found = loss(logps_with(h), beta=beta).sum()
    found.backward()
    assert found.item() == pytest.approx(value, abs=1e-12)
    assert h.grad is not None and h.grad.item() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize(("name", "value"), [("dpo", 0.5130), ("ipo", 12.25), ("slic", 0.992)])
def test_losses_at_four_nats(name: str, value: float) -> None:
    """The dossier's table (2.2)."""
    loss, beta = LOSSES[name].function, LOSSES[name].beta
    assert loss(logps_with(torch.tensor([4.0])), beta=beta).item() == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("name", OAIF)
def test_a_flipped_label_is_a_flipped_pair(name: str) -> None:
    loss, beta = LOSSES[name].function, LOSSES[name].beta
    h = torch.linspace(-700, 700, 15, dtype=torch.float64)
    assert torch.allclose(loss(logps_with(h), beta=beta, p=0.0), loss(logps_with(-h), beta=beta), atol=1e-9)


@pytest.mark.parametrize("name", OAIF)
def test_a_half_label_has_no_slope_at_zero_and_weights_multiply(name: str) -> None:
    loss, beta = LOSSES[name].function, LOSSES[name].beta
    h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss(logps_with(h), beta=beta, p=0.5).sum().backward()
    assert h.grad is not None and abs(h.grad.item()) < 1e-12
    four = logps_with(torch.tensor([4.0]))
    assert loss(four, beta=beta, weight=3.0).item() == pytest.approx(3 * loss(four, beta=beta).item())


def test_ipo_pulls_back_beyond_its_target_and_slic_stops_there() -> None:
    h = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    ipo(logps_with(h), beta=1.0).sum().backward()
    assert h.grad is not None and h.grad.tolist() == pytest.approx([0.0, 3.0])
    far = torch.tensor([499.0, 501.0], dtype=torch.float64, requires_grad=True)
    slic(logps_with(far), beta=0.002).sum().backward()
    assert far.grad is not None and far.grad.tolist() == pytest.approx([-0.002, 0.0])


def expected_first_step(name: str, preference: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Of a policy over a few answers to one prompt that is its own reference: the gradient of the expected loss of two
    independent draws, labelled first with probability preference[y, y'], by enumeration; and the loss's beta.
    """
    loss, beta = LOSSES[name].function, LOSSES[name].beta
    logp = torch.log_softmax(logits, 0)
    n = len(logits)
    first, second = (index.flatten() for index in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    logps = PairLogps(logp[first], logp[second], logp[first].detach(), logp[second].detach())
    # Sampling and labels are constants. Losses are linear in p, so a soft label is the mean over hard ones.
    drawn = (logp[first] + logp[second]).detach().exp()
    total = (drawn * loss(logps, beta=beta, p=preference[first, second])).sum()
    return torch.autograd.grad(total, logits)[0], beta


@pytest.mark.parametrize(
    ("name", "slope"), [("dpo", lambda b: -b / 2), ("ipo", lambda b: -1 / b), ("slic", lambda b: -b)]
)
def test_o10_the_first_step_climbs_the_win_rate_against_itself(name: str, slope: Callable[[float], float]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, generator=generator, requires_grad=True)
    upper = torch.rand(6, 6, dtype=torch.float64, generator=generator).triu(1)
    preference = upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(6, dtype=torch.float64)
    found, beta = expected_first_step(name, preference, logits)
    policy = torch.softmax(logits, 0).detach()
    advantage = 2 * preference @ policy - 1
    score = (policy * advantage * torch.log_softmax(logits, 0)).sum()
    [climb] = torch.autograd.grad(score, logits)
    # Twice: the better answer is pushed up and the other one down. For DPO that is -beta, as in the dossier.
    assert torch.allclose(found, 2 * slope(beta) * climb, atol=1e-15)
    assert climb.abs().max() > 0.01


@pytest.mark.parametrize("name", OAIF)
def test_o9_random_labels_teach_nothing(name: str) -> None:
    logits = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found, _ = expected_first_step(name, torch.full((6, 6), 0.5, dtype=torch.float64), logits)
    assert found.abs().max() < 1e-15


@pytest.mark.parametrize(("name", "value"), [("dpo", math.log(2)), ("ipo", 0.25), ("slic", 1.0)])
def test_o8_the_same_answer_twice_has_a_constant_loss(name: str, value: float) -> None:
    loss, beta = LOSSES[name].function, LOSSES[name].beta
    policy = torch.tensor([-5.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-7.0], dtype=torch.float64)
    found = loss(PairLogps(policy, policy, reference, reference), beta=beta).sum()
    found.backward()
    assert found.item() == pytest.approx(value, abs=1e-12)
    assert policy.grad is not None and policy.grad.item() == 0.0
