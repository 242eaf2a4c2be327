"""One step of decoding: from logits and one uniform number per row to the sampled tokens.

A token is drawn by inverting the distribution function of the truncated distribution, tokens in vocabulary order, at a
uniform number that the caller has fixed. The draw is exact, and it does not depend on what else is in the batch.

Legend: R rows, V vocabulary, W candidates (the most likely tokens of a row).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from prefloop.sample.sampling import Sampling

BLOCK = 128
"""Tokens that are summed before the distribution function is inverted; divides most vocabulary sizes."""

CANDIDATES = 128
"""Most likely tokens that are looked at first; rows that need more get eight times as many until they have enough."""


STRIPES = 3072
"""Columns into which a large vocabulary is folded when its most likely tokens are looked for."""

AT_ONCE = 2**20
"""Logits that are worked on at once on a CPU: their float32 copies stay in its caches."""


def draw(
    logits: Float[Tensor, "R V"], uniforms: Float[Tensor, " R"], sampling: Sampling
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    """The sampled token of each row, and its log-probability before temperature and truncation, in nats.

    `uniforms` lie in [0, 1). A row with NaN or infinite logits gives a NaN log-probability.
    """
    rows = max(1, AT_ONCE // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    drawn = [
        _draw(some, numbers, sampling) for some, numbers in zip(logits.split(rows), uniforms.split(rows), strict=True)
    ]
    tokens, logps = zip(*drawn, strict=True)
    return torch.cat(tokens), torch.cat(logps)


def _draw(
    logits: Float[Tensor, "R V"], uniforms: Float[Tensor, " R"], sampling: Sampling
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    logits = logits.float()
    shifted = logits - logits.amax(dim=1, keepdim=True)
    weights = shifted.exp()
    log_total = weights.sum(dim=1).log()
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=1)
    else:
        scaled = shifted
        if sampling.temperature != 1:
            scaled = shifted / sampling.temperature
            weights = scaled.exp()
        if sampling.truncates:
            tokens = _draw_truncated(scaled, weights.sum(dim=1), uniforms, sampling)
        else:
            tokens = invert(weights, uniforms)
    return tokens, shifted.gather(1, tokens[:, None])[:, 0] - log_total


def invert(weights: Float[Tensor, "R W"], uniforms: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """The first column at which the cumulated weights exceed `uniforms` times their sum.

    In two steps, the block and then the column in it: a running sum over a whole vocabulary in double precision
    would cost more than all else that is done to the logits.
    """
    rows, width = weights.shape
    padded = pad(weights, (0, -width % BLOCK)) if width % BLOCK else weights
    blocks = padded.view(rows, -1, BLOCK)
    block, rest = _invert_flat(blocks.sum(dim=2), uniforms)
    column, _ = _invert_flat(blocks[torch.arange(rows, device=weights.device), block], rest)
    return (block * BLOCK + column).clamp(max=width - 1)


def _invert_flat(
    weights: Float[Tensor, "R W"], uniforms: Float[Tensor, " R"]
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    """As `invert`, and where in its column's weight each uniform number fell: a uniform number for the next step."""
    cumulated = weights.to(uniforms.dtype).cumsum(dim=1)
    target = uniforms[:, None] * cumulated[:, -1:]
    # A uniform number is below 1, so the target is below the last cumulated value; NaN weights alone need the clamp.
    column = torch.searchsorted(cumulated, target, right=True).clamp(max=weights.shape[1] - 1)
    weight = weights.to(uniforms.dtype).gather(1, column)
    rest = (target - cumulated.gather(1, column)) / weight + 1
    below_one = 1 - torch.finfo(uniforms.dtype).eps / 2
    return column[:, 0], rest[:, 0].clamp(0, below_one)


def largest(values: Float[Tensor, "R V"], width: int) -> tuple[Float[Tensor, "R W"], Int[Tensor, "R W"]]:
    """The `width` largest values of every row and their columns, in descending order: `topk`, fast for few of many.

    The row is folded into stripes (columns that are equal modulo STRIPES), and only the `width` stripes with the
    largest maxima are searched: a value outside them is at most as large as the maximum of each.
    """
    size = -(-values.shape[1] // STRIPES)
    if STRIPES + size * width > values.shape[1] // 2:
        return values.topk(width, dim=1)
    padded = pad(values, (0, -values.shape[1] % STRIPES), value=float("-inf"))
    stripes = padded.view(len(values), size, STRIPES).amax(dim=1).topk(width, dim=1, sorted=False).indices
    columns = torch.arange(0, size * STRIPES, STRIPES, device=values.device)[:, None] + stripes[:, None]
    columns = columns.flatten(1)
    found, order = padded.gather(1, columns).topk(width, dim=1)
    return found, columns.gather(1, order)


def truncate(
    scaled: Float[Tensor, "R V"], mass: Float[Tensor, " R"], sampling: Sampling, width: int
) -> tuple[Float[Tensor, "R W"], Int[Tensor, "R W"], Bool[Tensor, " R"]]:
    """The weights and token ids of the `width` most likely tokens, in vocabulary order; truncated ones weigh 0.

    `scaled` are logits over temperature with their maximum at 0, and `mass` is the sum of their exponentials.
    The third result is False for a row whose kept tokens may go on beyond its candidates.
    """
    width = min(width, scaled.shape[1])
    values, ids = largest(scaled, width)
    weights = values.exp()
    keep_mask = torch.ones_like(ids, dtype=torch.bool)
    open_ended = torch.zeros_like(keep_mask[:, -1])
    if sampling.top_k is not None:
        keep_mask &= values >= values[:, min(sampling.top_k, width) - 1, None]
        # Ties with the k-th token may go on beyond the candidates, and then the mass below is not yet known.
        open_ended |= keep_mask[:, -1]
        mass = (weights * keep_mask).sum(dim=1)
    if sampling.top_p < 1:
        likelier = weights.cumsum(dim=1) - weights
        keep_mask &= likelier < sampling.top_p * mass[:, None]
    if sampling.min_p is not None:
        keep_mask &= weights >= sampling.min_p
    open_ended |= keep_mask[:, -1]
    complete = ~open_ended if width < scaled.shape[1] else torch.ones_like(open_ended)
    ids, order = ids.sort(dim=1)
    return (weights * keep_mask).gather(1, order), ids, complete


def _draw_truncated(
    scaled: Float[Tensor, "R V"], mass: Float[Tensor, " R"], uniforms: Float[Tensor, " R"], sampling: Sampling
) -> Int[Tensor, " R"]:
    """Tokens of the truncated distribution. Sorting whole vocabularies is avoided: most rows need few candidates."""
    tokens = torch.empty_like(mass, dtype=torch.long)
    rows = torch.arange(len(mass), device=mass.device)
    width = CANDIDATES + (sampling.top_k or 0)
    while len(rows):
        every = len(rows) == len(mass)
        weights, ids, complete = truncate(scaled if every else scaled[rows], mass[rows], sampling, width)
        tokens[rows] = ids.gather(1, invert(weights, uniforms[rows])[:, None])[:, 0]
        rows = rows[~complete]
        width *= 8
    return tokens
