"""The reference: the plain transformers forward, one whole sequence at a time, unpadded and without any of our code.

Beside it: the same outcome from the core, and the bounds within which the two must agree.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefloop.train.logprobs import Path, response_logps
from prefloop.train.packing import TokenGroup

FLOAT32 = 1e-5
"""Relative, in float32: every sum, every entropy, and the gradient of every parameter (against its largest element).

The same sums in another order differ by some units in the last place (6e-8): 3e-7 on values and 2e-6 on gradients."""

BFLOAT16_SUMS = 2e-2
"""Relative, of sums with bfloat16 products. A product of 8 bits is rounded by up to 4e-3, and so is every logit, by up
to 0.016 nats from 4 on; the plain forward itself is off by up to 8e-3."""
BFLOAT16_GRADIENT = 0.1
"""Norm of the error against the norm of the gradient of all parameters. The plain forward is off by 0.01 to 0.025, and
by 0.075 where a linear-attention layer multiplies its roundings."""
BFLOAT16_OF_PLAIN = 1.5
"""The core's bfloat16 error against the plain forward's own: it rounds as often, in other places."""


class Outcome(NamedTuple):
    """What a forward and a backward pass say about R responses of T predicted tokens, in float32.

    sums, counts [R]; tokens, entropy [T]; the gradient of `weighted(sums)` for every parameter that has one.
    """

    sums: Tensor
    counts: Tensor
    tokens: Tensor
    entropy: Tensor
    gradients: dict[str, Tensor]


def weighted(sums: Tensor) -> Tensor:
    """A scalar whose gradient pulls every response with another strength, some up and some down, as a loss does."""
    return (sums * torch.linspace(-1, 2, len(sums))).sum()


def plain_outcome(model: PreTrainedModel, groups: Sequence[TokenGroup], *, dtype: str = "float32") -> Outcome:
    """The definition: log-softmax of the full logits, gathered at each response token that has a token before it."""
    model.zero_grad()
    tokens, entropies = [], []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt_ids, *response]])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(input_ids=ids, use_cache=False).logits[0]
            first = max(1, len(group.prompt_ids))
            logps = logits[first - 1 : -1].float().log_softmax(-1)
            tokens.append(logps.gather(1, ids[0, first:, None])[:, 0])
            entropies.append(-(logps.exp() * logps).sum(-1).detach())
    sums = torch.stack([logps.sum() for logps in tokens])
    weighted(sums).backward()
    counts = torch.tensor([len(logps) for logps in tokens])
    return Outcome(sums.detach(), counts, torch.cat(tokens).detach(), torch.cat(entropies), _gradients(model))


def core_outcome(
    model: PreTrainedModel, groups: Sequence[TokenGroup], *, path: Path, dtype: str = "float32"
) -> Outcome:
    """The same from the core, all groups at once."""
    model.zero_grad()
    found = response_logps(model, groups, path=path, dtype=dtype, entropy=True)
    weighted(found.sums).backward()
    assert found.entropy is not None
    return Outcome(found.sums.detach(), found.counts, found.tokens.detach(), found.entropy, _gradients(model))


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_float32_parity(found: Outcome, expected: Outcome) -> None:
    """Sums, tokens, entropies and every parameter's gradient within `FLOAT32`; counts and parameters the same."""
    assert found.counts.tolist() == expected.counts.tolist()
    for name in ("sums", "entropy", "tokens"):
        # Sums and entropies are far from 0; a token's log-probability need not be, so it is compared with one nat.
        floor = FLOAT32 if name == "tokens" else 0.0
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=FLOAT32, atol=floor, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert expected.gradients
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        error = float((found.gradients[name] - gradient).abs().max() / gradient.abs().max())
        assert error <= FLOAT32, f"gradient of {name}: relative error {error:.1e}"


def assert_bfloat16_parity(found: Outcome, plain: Outcome, truth: Outcome) -> None:
    """`found` within the stated bounds of the float32 `truth`, and not further from it than the `plain` bfloat16."""
    assert found.counts.tolist() == truth.counts.tolist()
    # No absolute slack: a response of one token to an empty prompt predicts nothing, and its sum is exactly 0.
    torch.testing.assert_close(found.sums, truth.sums, rtol=BFLOAT16_SUMS, atol=0.0)
    torch.testing.assert_close(found.sums, plain.sums, rtol=BFLOAT16_SUMS, atol=0.0)
    assert found.gradients.keys() == truth.gradients.keys()
    assert _gradient_error(found, truth) <= BFLOAT16_GRADIENT
    assert _gradient_error(found, truth) <= BFLOAT16_OF_PLAIN * _gradient_error(plain, truth)
    for name in ("tokens", "entropy"):
        error, plain_error = (float((getattr(o, name) - getattr(truth, name)).norm()) for o in (found, plain))
        assert error <= BFLOAT16_OF_PLAIN * plain_error, f"{name}: error {error:.1e}, plain forward {plain_error:.1e}"


def _gradient_error(found: Outcome, truth: Outcome) -> float:
    difference = torch.stack([(found.gradients[name] - gradient).norm() for name, gradient in truth.gradients.items()])
    return float(difference.norm() / torch.stack([gradient.norm() for gradient in truth.gradients.values()]).norm())
