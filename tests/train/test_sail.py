"""SAIL's surrogate against the objective itself, by enumeration on a categorical policy (related methods, 1.6)."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from tests.sample.engines import CHAT, stopping_folder
from torch import Tensor

from prefloop.records import Pair, Prompt, Response
from prefloop.train.config import Compute, Train
from prefloop.train.learner import Learner
from prefloop.train.losses import PairLogps, parse_loss
from prefloop.train.objective import Objective, PairObjective
from prefloop.train.sail import RoutedPair, SailObjective, sail, sign_change

BETA = 0.7
REWARD = [0.3, 1.1, -0.4, 0.9]
REFERENCE = torch.tensor([0.1, -0.3, 0.4, 0.2], dtype=torch.float64).log_softmax(0)
THETA = torch.tensor([0.9, -0.6, 0.2, 0.5], dtype=torch.float64)
DATA = [(1, 0), (3, 2), (0, 2)]
"""(chosen, rejected) of the data set, for dp."""

Outcome = tuple[int, int, Tensor]
"""(winner, loser, its probability)."""


def h_of(logp: Tensor, winner: int, loser: int) -> Tensor:
    return (logp[winner] - REFERENCE[winner]) - (logp[loser] - REFERENCE[loser])


def outcomes(variant: str, logp: Tensor) -> Iterator[Outcome]:
    """Everything that can be drawn for one prompt, with its probability under the policy."""
    pairs = [(a, b, logp[a].exp() * logp[b].exp()) for a in range(4) for b in range(4)]
    if variant == "dp":
        pairs = [(a, b, torch.tensor(1 / len(DATA), dtype=torch.float64)) for a, b in DATA]
    for a, b, p in pairs:
        if variant == "pr":
            yield (a, b, p) if REWARD[a] >= REWARD[b] else (b, a, p)
        else:
            q = torch.sigmoid(BETA * h_of(logp, a, b))
            yield a, b, p * q
            yield b, a, p * (1 - q)


def objective(variant: str, theta: Tensor) -> Tensor:
    """J: the expectation of F, parameters in the distribution too."""
    logp = theta.log_softmax(0)
    terms = [p * torch.nn.functional.logsigmoid(BETA * h_of(logp, *of)) for *of, p in outcomes(variant, logp)]
    return torch.stack(terms).sum()


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-3) -> Tensor:
    """Five points, so that the error is of the fourth order."""
    found = []
    for direction in torch.eye(len(at), dtype=at.dtype):
        points = [function(at + k * step * direction) for k in (-2, -1, 1, 2)]
        found.append((points[0] - 8 * points[1] + 8 * points[2] - points[3]) / (12 * step))
    return torch.stack(found)


def expected_gradient(variant: str, c: float, **options: object) -> Tensor:
    """The mean of the surrogate's gradient over everything that can be drawn; probabilities are constants in it."""
    theta = THETA.clone().requires_grad_()
    logp = theta.log_softmax(0)
    drawn = [(winner, loser, p.detach()) for winner, loser, p in outcomes(variant, logp)]
    winners, losers = [one[0] for one in drawn], [one[1] for one in drawn]
    ones = torch.ones(len(drawn), dtype=torch.float64)
    losses = sail(
        PairLogps(logp[winners], logp[losers], REFERENCE[winners], REFERENCE[losers]),
        coefficient=c,
        policy_label=ones * (variant != "pr"),
        own_answers=ones * (variant != "dp"),
        beta=BETA,
        **options,
    )
    (torch.stack([p for _, _, p in drawn]) * losses).sum().backward()
    assert theta.grad is not None
    return theta.grad


@pytest.mark.parametrize("variant", ["dp", "pp", "pr"])
def test_the_expected_gradient_is_that_of_the_objective(variant: str) -> None:
    exact = finite_differences(partial(objective, variant), THETA)
    assert float((expected_gradient(variant, 1.0) + exact).abs().max()) < 1e-9
    assert float(exact.abs().max()) > 1e-3
    # Without the second term it is another direction.
    assert float((expected_gradient(variant, 0.0) + exact).abs().max()) > 1e-3


@pytest.mark.parametrize("variant", ["pp", "pr"])
@pytest.mark.parametrize("baseline", [-math.log(2), 0.4])
def test_a_baseline_leaves_the_expectation_as_it_is(variant: str, baseline: float) -> None:
    plain = expected_gradient(variant, 0.3)
    moved = expected_gradient(variant, 0.3, response_term="theory-baseline", baseline=baseline)
    assert float((plain - moved).abs().max()) < 1e-12


@pytest.mark.parametrize("variant", ["dp", "pp", "pr"])
def test_the_coefficient_mixes_dpo_and_the_exact_gradient(variant: str) -> None:
    none, all_of_it = expected_gradient(variant, 0.0), expected_gradient(variant, 1.0)
    assert torch.allclose(expected_gradient(variant, 0.3), 0.7 * none + 0.3 * all_of_it, atol=1e-12)


def label_term(h: Tensor, c: float) -> Tensor:
    zero, one = torch.zeros_like(h), torch.ones_like(h)
    return sail(PairLogps(h, zero, zero, zero), coefficient=c, policy_label=one, own_answers=zero, beta=1.0)


def slope(h: float, c: float) -> float:
    x = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    label_term(x, c).sum().backward()
    assert x.grad is not None
    return float(x.grad)


@pytest.mark.parametrize("h", [-3.0, -0.2, 0.0, 1.7])
def test_labels_of_ones_own_teach_nothing_but_certainty(h: float) -> None:
    """DPO's gradient has mean zero under them; that of the c-term is c (beta h) q (1 - q), here with beta = 1."""
    q = 1 / (1 + math.exp(-h))
    for c in (0.0, 0.2):
        mean = q * slope(h, c) - (1 - q) * slope(-h, c)
        assert mean == pytest.approx(-c * h * q * (1 - q), abs=1e-15)


def test_dp_at_the_start_and_where_its_gradient_turns_round() -> None:
    assert float(label_term(torch.zeros(1, dtype=torch.float64), 0.2)) == pytest.approx(0.645102, abs=1e-6)
    for c, place in ((0.2, -4.993), (0.3, -3.30)):
        found = sign_change(c, beta=1.0)
        assert found == pytest.approx(place, abs=0.005)
        assert sign_change(c, beta=0.1) == pytest.approx(10 * found)
        assert slope(found - 1e-6, c) > 0 > slope(found + 1e-6, c)


def test_the_released_term_pushes_the_other_way() -> None:
    """Per answer -c F / log pi(y), not divided by the batch, where the theory has -c F."""
    c, batch = 0.3, 8
    logps = [torch.tensor([x], dtype=torch.float64) for x in (-40.0, -55.0, -41.0, -52.0)]
    slopes = {}
    for term in ("theory", "released"):
        chosen, rejected = (x.clone().requires_grad_() for x in logps[:2])
        one, zero = torch.ones(1), torch.zeros(1)
        pair = PairLogps(chosen, rejected, logps[2], logps[3])
        sail(pair, coefficient=c, policy_label=zero, own_answers=one, response_term=term, batch=batch).sum().backward()
        slopes[term] = chosen.grad, rejected.grad
    f = math.log(1 / (1 + math.exp(-0.1 * 4)))
    through_f = -0.1 * (1 - math.exp(f))  # d(-F) / d log pi(y_w)
    assert float(slopes["theory"][0]) == pytest.approx(through_f - c * f)
    assert float(slopes["released"][0]) == pytest.approx(through_f - batch * c * f / -40)
    assert float(slopes["released"][1]) == pytest.approx(-through_f - batch * c * f / -55)
    assert -c * f > 0 > -batch * c * f / -40


# On a real model


def pairs() -> list[Pair]:
    def response(text: str) -> Response:
        return Response(text=text, token_ids=tuple(CHAT.response_ids(text)))

    return [
        Pair(
            prompt=Prompt.of(f"Q{i}"),
            chosen=response("yes" * i),
            rejected=response("no, never"),
            reference_logps=(-20.0 - i, -30.0 + i),
        )
        for i in range(1, 5)
    ]


def trained(objective: Objective, items: list, steps: int = 2) -> tuple[dict[str, float], list[Tensor]]:
    compute = Compute(device="cpu", dtype="float32")
    config = Train(steps=steps, batch_size=4, learning_rate=1e-2, warmup_steps=0, validation_pairs=0)
    learner = Learner(stopping_folder(), [], objective=objective, config=config, compute=compute, seed=0)
    figures = [learner.step(items, step) for step in range(steps)]
    return figures[0], [weight.detach() for weight in learner.model.parameters()]


@pytest.mark.parametrize("route", ["plain", "dp", "pp", "pr"])
def test_without_its_term_it_is_dpo_to_the_bit(route: str) -> None:
    """c = 0, or the route never taken; u = 0 keeps every label."""
    c = 0.3 if route == "plain" else 0.0
    ours = SailObjective(beta=0.1, coefficient=c, response_term="theory", batch_size=4)
    items = [RoutedPair.of(pair, route, u=0.0, baseline=-0.5) for pair in pairs()]
    found, weights = trained(ours, items)
    expected, theirs = trained(PairObjective(parse_loss("dpo")), pairs())
    assert found["loss"] == expected["loss"]
    assert all(torch.equal(a, b) for a, b in zip(weights, theirs, strict=True))


def test_accuracy_and_margin_are_those_before_a_label_is_turned_round() -> None:
    objective = SailObjective(beta=0.1, coefficient=0.2, response_term="theory", batch_size=4)
    kept, _ = trained(objective, [RoutedPair.of(pair, "dp", u=0.0, baseline=0) for pair in pairs()], steps=1)
    turned, _ = trained(objective, [RoutedPair.of(pair, "dp", u=0.999999, baseline=0) for pair in pairs()], steps=1)
    assert (kept["flipped"], turned["flipped"]) == (0.0, 1.0)
    assert kept["loss"] != turned["loss"]
    for name in ("correct", "margin", "chosen_change", "rejected_change"):
        assert kept[name] == turned[name]
