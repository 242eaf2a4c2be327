"""Every row of the table of losses: values, gradients, labels, symmetries, optima, what it needs, how it is named."""

import inspect
import math
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefloop.errors import InputError
from prefloop.records import Pair, Prompt, Response
from prefloop.train.config import LossName
from prefloop.train.losses import LOSSES, SHORT, AnswerLogps, PairLogps, pair_metrics, parse_loss
from prefloop.train.losses.pairwise import dpo, robust_dpo, wpo_weights
from prefloop.train.losses.unpaired import kto
from prefloop.train.objective import check_labels

PAIRWISE = [name for name, row in LOSSES.items() if not row.unpaired]
LABELLED = [name for name in PAIRWISE if not LOSSES[name].no_p]
LN2 = math.log(2)
DOUBLE = torch.float64


def example(seed: int = 0, n: int = 6, *, dtype: torch.dtype = DOUBLE, spread: float = 1.0) -> PairLogps:
    """Random pairs with all that any loss needs; lengths differ, and nothing lies on a kink."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n, generator=generator, dtype=DOUBLE)).to(dtype)

    counts = [torch.randint(3, 12, (n,), generator=generator) for _ in range(2)]
    counts[1] += counts[1] == counts[0]
    sums = [drawn(-4, -1) * count for count in counts]
    references = [one + spread * drawn(-2, 2) for one in sums]
    longer = counts[0] > counts[1]
    tails = [one * 0.3 * (longer if side == 0 else ~longer) for side, one in enumerate(sums)]
    tail_references = [one * 1.1 for one in tails]
    collisions = [drawn(-2, -1) * count for count in counts]
    flags = torch.rand(n, generator=generator) < 0.5
    tail = PairLogps(tails[0], tails[1], tail_references[0], tail_references[1])
    return PairLogps(*sums, *references, *counts, tail, *collisions, drawn(0.1, 2), flags)


def at_start(n: int = 1, length: int = 4) -> PairLogps:
    """The policy is its reference, and all log-probabilities are -8 nats over four tokens."""
    one, zero, count = -8.0 * torch.ones(n, dtype=DOUBLE), torch.zeros(n, dtype=DOUBLE), torch.full((n,), length)
    return PairLogps(
        one, one, one, one, count, count, PairLogps(zero, zero, zero, zero), one, one, zero + 1.5, zero < 1
    )


def rows_of(logps: PairLogps, index: Tensor) -> PairLogps:
    return PairLogps(*(rows_of(one, index) if isinstance(one, PairLogps) else None if one is None else one[index]
                       for one in logps))  # fmt: skip


def with_policy(logps: PairLogps, chosen: Tensor, rejected: Tensor) -> PairLogps:
    return logps._replace(policy_chosen=chosen, policy_rejected=rejected)


def slopes(loss: Callable[..., Tensor], logps: PairLogps, **labels: Any) -> tuple[Tensor, Tensor]:
    """Gradients of the summed loss with respect to both log-probabilities of the policy."""
    own = [one.detach().clone().requires_grad_() for one in logps[:2]]
    total = loss(with_policy(logps, *own), **labels).sum()
    first, second = torch.autograd.grad(total, own, allow_unused=True)
    zero = torch.zeros_like(own[0])
    return zero if first is None else first, zero if second is None else second


START = {
    "dpo": LN2, "cdpo": LN2, "robust_dpo": LN2, "spce": LN2, "length_dpo": LN2, "ld_dpo": LN2, "ln_dpo": LN2,
    "dpop": LN2, "wpo": LN2, "aot": LN2, "aot_unpaired": LN2, "f_dpo": LN2, "wdpo": 1.5 * LN2,
    "wdpo:shape=none": LN2, "f_dpo:divergence=js": LN2, "f_dpo:divergence=alpha": LN2,
    "f_dpo:divergence=forward_kl": LN2, "wdpo:shape=sigmoid": LN2 / (1 + math.exp(-1.5)), "ipo": 0.25,
    "ipo:beta=0.1": 25.0, "ipo_mean": 25.0, "slic": 1.0, "hinge": 1.0, "exo": 2.761231, "sppo_hard": 500000.0,
    "sppo_soft": 500000.0, "apo_zero": 1.0, "apo_down": 1.0, "nca": 1.386294, "bco_pair": 1.386294,
    "discopop": 0.846574, "simpo:gamma=1.6": 1.783900, "simpo:gamma=0.25": 0.825940, "simpo": 1.313262,
    "simpo:gamma=1.375": 1.600414, "simpo:gamma=3": 3.048587, "simpo:gamma=5": 5.006715, "orpo": 2.0 + 0.1 * LN2,
    "cpo": LN2 + 8.0, "slic_hf": 1.0 + 0.8, "nll_mean": 2.0, "nll_sum": 8.0, "xpo_bonus": -8.0, "irpo": LN2 + 2.0,
    "rpo": LN2 + 0.01, "xpo": LN2 - 8e-5, "mpo_mix": 0.8 * LN2 + 0.2 * 2 * LN2 + 2.0, "dpo+0.5*slic": LN2 + 0.5,
}  # fmt: skip
"""Where the policy is its reference, both answers have 4 tokens and -8 nats, and the scores differ by 1.5."""


@pytest.mark.parametrize("text", START)
def test_value_before_the_first_update(text: str) -> None:
    assert parse_loss(text)(at_start()).item() == pytest.approx(START[text], abs=1e-6, rel=1e-6)


def test_every_row_has_a_value_and_a_mention_in_help_and_docs() -> None:
    assert {*PAIRWISE, *SHORT} <= START.keys()
    said = LossName.__metadata__[0].description.replace(".", "").replace(";", "").split()
    assert {*LOSSES, *SHORT} <= set(said)
    docs = (Path(__file__).parents[2] / "docs/losses.md").read_text()
    assert [name for name in [*LOSSES, *SHORT] if f"`{name}`" not in docs] == []


@pytest.mark.parametrize("text", [*[n for n in PAIRWISE if n != "wpo"], "f_dpo:divergence=js", "f_dpo:divergence=alpha",
                                  "f_dpo:divergence=forward_kl", "wdpo:shape=sigmoid", "mpo_mix"])  # fmt: skip
def test_gradients_are_those_of_finite_differences(text: str) -> None:
    loss, logps = parse_loss(text), example(1)
    labels = {} if loss.no_p else {"p": torch.linspace(0.1, 0.9, 6, dtype=DOUBLE)}
    own = [one.clone().requires_grad_() for one in logps[:2]]
    assert torch.autograd.gradcheck(lambda *own: loss(with_policy(logps, *own), **labels), own, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_wpo_is_that_of_dpo_times_its_weight() -> None:
    logps = example(1)
    weights = wpo_weights(logps)
    found, expected = slopes(parse_loss("wpo"), logps), slopes(parse_loss("dpo:beta=0.01"), logps, weight=weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not weights.requires_grad and weights.std() > 0.01


SHIFT_INVARIANT = {"dpo", "cdpo", "robust_dpo", "spce", "wdpo", "ipo", "slic", "length_dpo", "ld_dpo", "exo",
                   "discopop", "f_dpo", "aot"}  # fmt: skip


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_constant_a_prompt_changes_what_it_should(name: str) -> None:
    loss, logps, shift = parse_loss(name), example(2), torch.linspace(-1, 1, 6, dtype=DOUBLE)
    moved = with_policy(logps, logps.policy_chosen + shift, logps.policy_rejected + shift)
    same = torch.allclose(loss(logps), loss(moved), rtol=1e-10, atol=1e-12)
    assert same == (name in SHIFT_INVARIANT)


@pytest.mark.parametrize("name", LABELLED)
def test_the_other_label_is_the_other_pair(name: str) -> None:
    loss, logps, p = parse_loss(name), example(3), torch.linspace(0, 1, 6, dtype=DOUBLE)
    torch.testing.assert_close(loss(logps, p=p), loss(logps.swapped, p=1 - p), rtol=1e-12, atol=1e-12)
    for one, other in zip(logps.swapped.swapped, logps, strict=True):
        assert one == other if isinstance(one, PairLogps) else torch.equal(one, other)


LINEAR = [name for name in LABELLED if name not in ("exo", "sppo_soft")]


@pytest.mark.parametrize("name", LINEAR)
def test_a_soft_label_is_the_mean_over_hard_ones(name: str) -> None:
    loss, logps, p = parse_loss(name), example(4), torch.linspace(0, 1, 6, dtype=DOUBLE)
    mean = p * loss(logps, p=1.0) + (1 - p) * loss(logps, p=0.0)
    torch.testing.assert_close(loss(logps, p=p), mean, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(loss(logps, p=1.0), loss(logps), rtol=0, atol=0)


@pytest.mark.parametrize("name", PAIRWISE)
def test_weights_multiply_or_are_refused_with_the_reason(name: str) -> None:
    row, loss, logps = LOSSES[name], parse_loss(name), example(5)
    takes = inspect.signature(row.function).parameters
    assert ("p" in takes, "weight" in takes) == (not row.no_p, not row.no_weight)
    if not row.no_weight:
        weight = torch.linspace(0, 3, 6, dtype=DOUBLE)
        torch.testing.assert_close(loss(logps, weight=weight), weight * loss(logps), rtol=1e-12, atol=1e-12)
    answers = {"chosen": Response(text="a"), "rejected": Response(text="b")}
    pair = Pair(
        prompt=Prompt.of("?", id="p1"), **answers, chosen_score=2.0, rejected_score=1.0, reference_sample="chosen"
    )
    check_labels([pair], loss)
    for label, reason in ({"p": 0.7}, row.no_p), ({"weight": 2.0}, row.no_weight):
        labelled = pair.model_copy(update=label)
        if reason:
            with pytest.raises(InputError, match=rf"'p1' has \w+ = .*, and the loss takes no .*: {name}: "):
                check_labels([pair, labelled], loss)
        else:
            check_labels([labelled], loss)


@pytest.mark.parametrize("name", PAIRWISE)
def test_the_order_of_a_batch_matters_to_coupled_losses_only(name: str) -> None:
    loss, logps = parse_loss(name), example(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    found, expected = loss(rows_of(logps, order)), loss(logps)
    if LOSSES[name].coupled:
        torch.testing.assert_close(found.sum(), expected.sum())
        alone = torch.stack([loss(rows_of(logps, torch.tensor([i]))).sum() for i in range(6)]).sum()
        assert abs(alone - expected.sum()) > 1e-6
    else:
        torch.testing.assert_close(found, expected[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("text", [*PAIRWISE, "f_dpo:divergence=js", "f_dpo:divergence=alpha",
                                  "f_dpo:divergence=forward_kl"])  # fmt: skip
def test_nothing_overflows_far_out(text: str) -> None:
    loss = parse_loss(text)
    far = torch.tensor([-1e4, -3e2, -1e-3, 0.0])
    chosen, rejected = (one.flatten() for one in torch.meshgrid(far, far, indexing="ij"))
    count = torch.full((16,), 7)
    zero = torch.zeros(16)
    for of_chosen, of_rejected in product((-1e4, -5.0, 0.0), repeat=2):
        logps = PairLogps(chosen, rejected, zero + of_chosen, zero + of_rejected, count, count + 3,
                          PairLogps(zero, 0.1 * rejected, zero, zero), chosen - 5, rejected, zero + 1,
                          zero < 1)  # fmt: skip
        for labels in ({}, {"p": torch.full((16,), 0.3)})[: 1 if loss.no_p else 2]:
            assert loss(logps, **labels).isfinite().all()
            assert all(one.isfinite().all() for one in slopes(loss, logps, **labels))


NEEDS = {"reference": ("reference_chosen", "reference_rejected"), "tail": ("tail",), "gap": ("gap",),
         "collision": ("chosen_collision", "rejected_collision"),
         "reference_sample": ("chosen_is_reference_sample",)}  # fmt: skip


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_loss_needs_what_its_row_says_and_nothing_else(name: str) -> None:
    loss, logps, needs = parse_loss(name), example(7), LOSSES[name].needs
    spare = [field for need, fields in NEEDS.items() if need not in needs for field in fields]
    bare = logps._replace(**dict.fromkeys(spare))
    torch.testing.assert_close(loss(bare), loss(logps), rtol=0, atol=0)
    pair_metrics(bare, beta=loss.beta or 1.0, per_token=loss.per_token)
    for need in needs:
        with pytest.raises(ValueError, match="come without"):
            loss(logps._replace(**dict.fromkeys(NEEDS[need])))


SAME = ["cdpo:epsilon=0", "robust_dpo:epsilon=0", "spce", "length_dpo:alpha=0", "dpop:penalty=0,beta=0.1",
        "ld_dpo:alpha=1", "wdpo:shape=none", "f_dpo", "1.0*dpo", "wpo:beta=0.1"]  # fmt: skip


@pytest.mark.parametrize("text", SAME)
def test_the_same_floats_as_dpo(text: str) -> None:
    """11.1 of the dossier; of WPO, where the weights are 1."""
    logps = example(8, dtype=torch.float32)
    logps = logps._replace(chosen_collision=logps.policy_chosen, rejected_collision=logps.policy_rejected)
    expected = parse_loss("dpo")
    assert torch.equal(parse_loss(text)(logps), expected(logps))
    for one, other in zip(slopes(parse_loss(text), logps), slopes(expected, logps), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_equal_lengths_make_length_terms_vanish() -> None:
    logps = example(9)
    count = torch.full((6,), 5)
    logps = logps._replace(chosen_tokens=count, rejected_tokens=count)
    torch.testing.assert_close(parse_loss("length_dpo:alpha=0.7")(logps), dpo(logps))
    torch.testing.assert_close(parse_loss("ln_dpo:beta=0.5")(logps), dpo(logps, beta=0.1))
    torch.testing.assert_close(parse_loss("ipo_mean:beta=0.5")(logps), parse_loss("ipo:beta=0.1")(logps) / 25)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3])
def test_cdpo_spce_and_robust_dpo_are_one_family(epsilon: float) -> None:
    """11.2, and rDPO's unbiasedness (9.2)."""
    logps = example(10)
    conservative = parse_loss(f"cdpo:epsilon={epsilon}")(logps)
    assert torch.equal(parse_loss("spce")(logps, p=1 - epsilon), conservative)
    found = ((1 - epsilon) * dpo(logps) - epsilon * dpo(logps.swapped)) / (1 - 2 * epsilon)
    torch.testing.assert_close(robust_dpo(logps, epsilon=epsilon), found)
    flips = (1 - epsilon) * robust_dpo(logps, epsilon=epsilon) + epsilon * robust_dpo(logps.swapped, epsilon=epsilon)
    torch.testing.assert_close(flips, dpo(logps))


def at_h(h: float) -> PairLogps:
    start = at_start()
    return start._replace(policy_chosen=start.policy_chosen + h)


OPTIMA = {"cdpo": (21.972246, 0.325083), "exo": (10 * math.log(999), 0.0), "ipo": (0.5, 0.0), "ipo_mean": (20.0, 0.0)}


@pytest.mark.parametrize("name", OPTIMA)
def test_where_a_loss_stops(name: str) -> None:
    h, least = OPTIMA[name]
    loss = parse_loss(name)
    assert loss(at_h(h)).item() == pytest.approx(least, abs=1e-6)
    assert slopes(loss, at_h(h))[0].item() == pytest.approx(0, abs=1e-7)
    assert slopes(loss, at_h(h - 0.1))[0].item() < 0 < slopes(loss, at_h(h + 0.1))[0].item()


@pytest.mark.parametrize("p", [0.5, 0.7, 0.99])
def test_spce_stops_at_the_strength_with_its_entropy(p: float) -> None:
    h = math.log(p / (1 - p)) / 0.1
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert parse_loss("spce")(at_h(h), p=p).item() == pytest.approx(entropy, abs=1e-12)
    assert slopes(parse_loss("spce"), at_h(h), p=p)[0].item() == pytest.approx(0, abs=1e-12)


def test_documented_facts() -> None:
    assert robust_dpo(at_h(100.0)).item() == pytest.approx(-1.25, abs=1e-3)
    # The hinge stops at 1/beta; SPPO's targets are 1/(2 beta) for each answer.
    for text, beta in (("slic:beta=0.1", 0.1), ("hinge", 0.05), ("slic", 0.002)):
        found = [slopes(parse_loss(text), at_h(1 / beta + away))[0].item() for away in (-0.01, 0.01)]
        assert found == [-beta, 0.0], text
    sppo = at_start()
    sppo = with_policy(sppo, sppo.policy_chosen + 500, sppo.policy_rejected - 500)
    assert parse_loss("sppo_hard")(sppo).item() == 0.0
    # DPOP: 1 + penalty times the pull where chosen is below its reference, DPO's where it is above.
    for ratio, factor in ((-0.5, 51.0), (0.5, 1.0)):
        logps = at_h(ratio)
        margin = 0.3 * (ratio - 50 * max(0.0, -ratio))
        expected = -0.3 * factor / (1 + math.exp(margin))
        assert slopes(parse_loss("dpop"), logps)[0].item() == pytest.approx(expected)
    # ORPO: the odds ratio's slope with respect to the mean log-probability of chosen.
    logps = example(11)
    mean = logps.per_token
    odds = [one.exp() / (1 - one.exp()) for one in mean[:2]]
    falling = 1 / (1 + odds[0] / odds[1])
    expected = (-1 - 0.1 * falling / (1 - mean.policy_chosen.exp())) / logps.lengths[0]
    torch.testing.assert_close(slopes(parse_loss("orpo"), logps)[0], expected)
    # R-DPO: chosen answers that are longer get a smaller gradient.
    longer = at_start()._replace(chosen_tokens=torch.tensor([9]))
    assert abs(slopes(parse_loss("length_dpo"), longer)[0]) < abs(slopes(parse_loss("dpo"), longer)[0])
    # DiscoPOP has a bump at zero, where it pushes a pair back.
    assert slopes(parse_loss("discopop"), at_h(0.0))[0].item() == pytest.approx(0.1 * ((1 - LN2) / 0.2 - 0.75))


def test_sppo_soft_and_hard_have_one_gradient() -> None:
    logps, p = example(12), torch.linspace(0, 1, 6, dtype=DOUBLE)
    hard, soft = (slopes(parse_loss(f"sppo_{kind}:beta=0.01"), logps, p=p) for kind in ("hard", "soft"))
    for one, other in zip(hard, soft, strict=True):
        torch.testing.assert_close(one, other)


def test_alpha_divergence_between_reverse_and_forward_kl() -> None:
    logps = example(13)
    f = "f_dpo:divergence="
    torch.testing.assert_close(parse_loss(f"{f}alpha,alpha=0.00001")(logps), dpo(logps), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        parse_loss(f"{f}alpha,alpha=0.99999")(logps), parse_loss(f"{f}forward_kl")(logps), rtol=1e-3, atol=1e-3
    )


def test_a_small_alpha_is_the_reverse_kl_in_float32() -> None:
    """e^(-alpha rho) / alpha without its constant: the constant would leave no digits of rho."""
    logps = example(13, dtype=torch.float32)
    found = parse_loss("f_dpo:divergence=alpha,alpha=0.000001")
    torch.testing.assert_close(found(logps), dpo(logps), rtol=1e-5, atol=1e-6)
    for one, other in zip(slopes(found, logps), slopes(parse_loss("dpo"), logps), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_wpo_weights_by_hand() -> None:
    """9.12: 1 for uniform and for sure tokens; 1.154 for the likelier of 0.6 and 0.4; mean 1 under the policy."""

    def weight(policy: list[float], token: int) -> float:
        p = torch.tensor(policy, dtype=DOUBLE)
        logp, collision = p[token].log()[None], (p**2).sum().log()[None]
        one, zero = torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=DOUBLE)
        return wpo_weights(PairLogps(logp, zero, zero, zero, one, one, None, collision, zero)).item()

    assert weight([0.25] * 4, 2) == pytest.approx(1.0)
    assert weight([1.0, 0.0], 0) == pytest.approx(1.0)
    assert weight([0.6, 0.4], 0) == pytest.approx(1.153846, abs=1e-6)
    assert sum(p * weight([0.6, 0.3, 0.1], i) for i, p in enumerate([0.6, 0.3, 0.1])) == pytest.approx(1.0)


def test_ld_dpo_leaves_out_the_tail_at_alpha_zero() -> None:
    logps = example(14)
    assert logps.tail is not None
    heads = PairLogps(*(one - other for one, other in zip(logps[:4], logps.tail[:4], strict=True)))
    torch.testing.assert_close(parse_loss("ld_dpo:alpha=0")(logps), dpo(heads))


def test_identical_answers_teach_the_dpo_family_nothing() -> None:
    for name in sorted(SHIFT_INVARIANT - {"aot"}):
        chosen, rejected = slopes(parse_loss(name), at_start())
        assert chosen.item() == pytest.approx(-rejected.item(), abs=1e-15), name


def test_metrics_without_a_reference_are_those_of_the_policy() -> None:
    logps = example(15)
    found = pair_metrics(logps._replace(reference_chosen=None, reference_rejected=None), beta=2.0, per_token=True)
    means = logps.policy_chosen / logps.lengths[0] - logps.policy_rejected / logps.lengths[1]
    torch.testing.assert_close(found["margin"], 2.0 * means)
    assert found["chosen_logp"].equal(logps.policy_chosen) and "chosen_change" not in found


@cache
def answer_example() -> tuple[AnswerLogps, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [-5 * torch.rand(6, generator=generator, dtype=DOUBLE) for _ in range(4)]
    return AnswerLogps(*drawn), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.3], dtype=DOUBLE)


def test_kto() -> None:
    """9.7 of the dossier: values, z without gradient, weights, swap, coupling."""
    zero = torch.zeros(4, dtype=DOUBLE)
    start = AnswerLogps(zero, zero, zero, zero)
    assert kto(start, desirable=1.2, p=torch.tensor([1.0, 0.0, 1.0, 0.0])).tolist() == [0.6, 0.5, 0.6, 0.5]
    logps, p = answer_example()
    own = [one.clone().requires_grad_() for one in (logps.policy, logps.policy_mismatched)]
    moved = logps._replace(policy=own[0], policy_mismatched=own[1])
    z = max(0.0, (logps.policy_mismatched - logps.reference_mismatched).mean().item())
    assert moved.kl.item() == pytest.approx(z) and not moved.kl.requires_grad
    margin = 0.1 * (logps.policy - logps.reference - z)
    expected = p * (1 - margin.sigmoid()) + (1 - p) * (1 - (-margin).sigmoid())
    torch.testing.assert_close(kto(moved, p=p), expected)
    assert torch.autograd.gradcheck(lambda one: kto(logps._replace(policy=one), p=p), own[:1])
    torch.testing.assert_close(kto(logps, p=p, desirable=2.0, undesirable=2.0, weight=0.5), expected)
    above = logps._replace(policy_mismatched=logps.reference_mismatched + 2.0)
    assert not torch.allclose(kto(above, p=p), kto(above._replace(policy_mismatched=logps.reference_mismatched), p=p))
    far = AnswerLogps(zero - 1e4, zero, zero - 1e4, zero)
    assert kto(far, p=0.3).isfinite().all()


def test_a_weighted_sum_adds_values_and_needs() -> None:
    logps, p = example(16), torch.linspace(0.2, 1, 6, dtype=DOUBLE)
    loss = parse_loss("0.8*dpo + 0.2*bco_pair:beta=0.3 + ld_dpo", beta=0.05)
    expected = sum(
        share * parse_loss(one)(logps, p=p)
        for share, one in ((0.8, "dpo:beta=0.05"), (0.2, "bco_pair:beta=0.3"), (1.0, "ld_dpo:beta=0.05"))
    )
    torch.testing.assert_close(loss(logps, p=p), expected)
    assert loss.beta == 0.05 and loss.needs == {"reference", "tail"} and not loss.coupled
    assert parse_loss("aot+nll_mean").coupled and parse_loss("dpo+robust_dpo").no_p.startswith("robust_dpo: ")
    assert parse_loss("2*xpo") == parse_loss("2*dpo+0.00002*xpo_bonus")


@pytest.mark.parametrize(
    "text",
    [
        *LOSSES,
        *SHORT,
        "slic_hf:nll=1e20",
        "2e+3*dpo+1e-20*nll_sum",
        "dpo:beta=1e+20",
        "simpo:gamma=1.6,beta=2.5",
        "0.8*f_dpo:divergence=js+1e-3*nll_sum",
    ],
)
def test_the_full_text_of_a_loss_means_the_loss(text: str) -> None:
    assert parse_loss(str(parse_loss(text))) == parse_loss(text)


@pytest.mark.parametrize(
    ("text", "beta", "message"),
    [
        ("simp", None, r"unknown loss 'simp'\. Did you mean 'simpo'\? Losses: dpo, cdpo"),
        ("simpo:gama=1", None, r"loss simpo: unknown option 'gama', it has beta, gamma\. Did you mean 'gamma'"),
        ("nll_sum:x=1", None, "loss nll_sum: unknown option 'x', it has none"),
        ("discopop:tau=1.5", None, "loss discopop: tau = 1.5: should be at least 1e-06 and less than 1.0"),
        ("discopop:tau=0", None, "loss discopop: tau = 0.0: should be at least 1e-06"),
        (
            "f_dpo:divergence=forward_kl,beta=1e30",
            None,
            "with beta = 1e\\+30, .* its value or gradient is no finite numb",
        ),
        ("ipo:beta=1e-25", None, "loss ipo: with beta = 1e-25 its value or gradient is no finite number where an answ"),
        ("slic_hf:nll=1e38", None, "loss slic_hf: with delta = 1.0, nll = 1e\\+38 its value or gradient is no finite"),
        ("kto:desirable=1e39", None, "loss kto: with .*desirable = 1e\\+39.* its value or gradient is no finite"),
        ("simpo:gamma=big", None, "loss simpo: gamma = 'big': expected a number"),
        ("dpo+", None, "loss = 'dpo\\+': '' is no term; expected such as simpo, simpo:gamma=1.6"),
        ("robust_dpo:epsilon=0.5", None, r"loss robust_dpo: epsilon = 0.5: should be at least 0.0 and less than 0.5"),
        ("exo:epsilon=0", None, "loss exo: epsilon = 0.0: should be at least"),
        ("ld_dpo:alpha=2", None, "loss ld_dpo: alpha = 2.0: should be at least 0.0"),
        (
            "f_dpo:divergence=tv",
            None,
            "loss f_dpo: divergence = 'tv': should be one of reverse_kl, forward_kl, js, alpha",
        ),
        ("wdpo:shape=cubic", None, "loss wdpo: shape = 'cubic': should be one of linear, sigmoid, none"),
        ("dpo:beta=-1", None, "loss dpo: beta = -1.0: should be greater than 0"),
        ("orpo", 0.1, "beta = 0.1: the loss orpo has none; leave it out"),
        ("kto+dpo", None, "kto is a loss of single answers and cannot be summed"),
        ("irpo:beta=1", None, r"irpo is short for dpo\+nll_mean; write that out to set options"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(text: str, beta: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_loss(text, beta=beta)
