"""Parity: the core's numbers beside those of the plain transformers forward, one response at a time.

The plain forward here is the definition, with none of our code in it: all logits, log-softmax, gather, sum. So it also
finds what the shared and the padded path have in common, such as an output head that scales its logits in its own way.

Legend: R responses.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from prefloop.train.logprobs import Path, plain_sums, response_logps
from prefloop.train.packing import TokenGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VALUE_TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 1e-2
"""Relative float32 differences beyond these are no rounding: a wrong mask or scale shows in the first digits. (The
plain forward itself is 3e-5 off its float64 values on SmolLM2-135M, where a likely answer has a small sum.)
"""


@torch.no_grad()
def value_difference(model: "PreTrainedModel", groups: Sequence[TokenGroup], path: Path) -> float:
    """Largest difference of a response's summed log-probability on `path`, relative to the plain forward's."""
    expected = plain_sums(model, groups)
    found = response_logps(model, groups, path=path).sums
    return float(((found - expected).abs() / expected.abs().clamp(min=1.0)).max())


def gradient_difference(model: "PreTrainedModel", groups: Sequence[TokenGroup], path: Path) -> float:
    """Largest difference of a weight's gradient on `path`, relative to the largest element of the plain forward's.

    The gradient is that of the sum of all log-probabilities. Both are in memory at once.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    expected, found = (
        torch.autograd.grad(sums.sum(), weights, allow_unused=True, materialize_grads=True)
        for sums in (plain_sums(model, groups), response_logps(model, groups, path=path).sums)
    )
    sizes = torch.stack([gradient.abs().max() for gradient in expected])
    # A gradient can be zero but for rounding (a key bias shifts all scores alike): the others give its scale.
    scales = sizes.clamp(min=float(sizes.max()) * 1e-3)
    differences = torch.stack([(a - b).abs().max() for a, b in zip(found, expected, strict=True)])
    return float((differences / scales).max())
