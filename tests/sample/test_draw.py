"""One decoding step against transformers' own logits processors and against the distribution that it claims."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefloop.sample.draw import draw, invert, truncate
from prefloop.sample.engine import uniforms
from prefloop.sample.sampling import Sampling

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.5, "top_k": 300, "top_p": 0.95},
]


def processed(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that transformers' generate would draw from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    no_ids: Any = torch.zeros(len(logits), 1, dtype=torch.long)
    return warpers(no_ids, logits.clone()).softmax(dim=1)


def rows_of_logits(vocabulary: int) -> Tensor:
    """Rows from nearly flat, which need the whole vocabulary as candidates, to peaked, which need a few tokens."""
    noise = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([0.05, 1.0, 3.0, 6.0, 20.0])[:, None]


def scatter(weights: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    probabilities = torch.zeros(len(ids), vocabulary).scatter(1, ids, weights)
    return probabilities / probabilities.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("vocabulary", [300, 3000])
@pytest.mark.parametrize("options", [setting for setting in SETTINGS if Sampling(**setting).truncates])
def test_truncated_probabilities_equal_transformers(options: dict[str, Any], vocabulary: int) -> None:
    sampling = Sampling(**options)
    logits = rows_of_logits(vocabulary)
    expected = processed(logits, sampling)
    scaled = (logits - logits.amax(dim=1, keepdim=True)) / sampling.temperature
    finished = torch.zeros(len(logits), dtype=torch.bool)
    for width in (128, 1024, vocabulary):
        weights, ids, complete = truncate(scaled, scaled.exp().sum(dim=1), sampling, width)
        assert bool((ids.diff(dim=1) > 0).all())
        found = scatter(weights, ids, vocabulary)
        torch.testing.assert_close(found[complete], expected[complete], atol=1e-6, rtol=1e-5)
        finished |= complete
    assert bool(finished.all())


def test_incomplete_candidates_are_reported() -> None:
    flat, peaked = rows_of_logits(3000)[[0, 4]] - rows_of_logits(3000)[[0, 4]].amax(dim=1, keepdim=True)
    scaled = torch.stack([flat, peaked])
    for sampling in (Sampling(top_p=0.9), Sampling(min_p=0.5), Sampling(top_k=500)):
        _, _, complete = truncate(scaled, scaled.exp().sum(dim=1), sampling, 128)
        assert complete.tolist() == [False, sampling.top_k is None]


@pytest.mark.parametrize(("options", "kept"), [({"top_k": 3}, 500), ({"top_k": 3, "top_p": 0.5}, 250)])
def test_ties_with_the_kth_token_are_kept(options: dict[str, Any], kept: int) -> None:
    logits = torch.zeros(1, 500)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens, _ = draw(logits.expand(1000, -1), grid, Sampling(**options))
    assert tokens.unique().numel() == kept
    assert int((processed(logits, Sampling(**options)) > 0).sum()) == pytest.approx(kept, abs=1)


@pytest.mark.parametrize("row", [0, 1, 4])
@pytest.mark.parametrize("options", SETTINGS)
def test_draws_on_a_grid_have_the_exact_frequencies(options: dict[str, Any], row: int) -> None:
    """An inverse distribution function in vocabulary order gives each token its share of an even grid to within one."""
    sampling = Sampling(**options)
    logits = rows_of_logits(1200)[row : row + 1]
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens, _ = draw(logits.expand(1000, -1), grid, sampling)
    assert bool((tokens.diff() >= 0).all())
    counts = tokens.bincount(minlength=1200).double()
    expected = processed(logits, sampling)[0].double()
    assert float((counts - 1000 * expected).abs().max()) <= 1.001
    assert not counts[expected == 0].any()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.05}])
def test_20_000_seeded_draws_pass_a_chi_square_test(options: dict[str, Any]) -> None:
    sampling = Sampling(**options)
    logits = rows_of_logits(300)[1:2]
    numbers = torch.cat([torch.from_numpy(uniforms(7, f"p-{i}", k, 50)) for i in range(100) for k in range(4)])
    tokens, _ = draw(logits.expand(20_000, -1), numbers, sampling)
    expected = 20_000 * processed(logits, sampling)[0].double()
    observed = tokens.bincount(minlength=300).double()
    likely = expected >= 5
    cells = torch.cat([expected[likely], expected[~likely].sum()[None]])
    counts = torch.cat([observed[likely], observed[~likely].sum()[None]])
    cells, counts = cells[cells > 0], counts[cells > 0]
    statistic = float(((counts - cells) ** 2 / cells).sum())
    freedom = len(cells) - 1
    # Wilson and Hilferty's approximation to the 99.9 % quantile of chi square.
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert freedom > 10
    assert statistic < quantile


@pytest.mark.parametrize("width", [1, 5, 128, 129, 1000])
def test_invert_at_the_edges_never_takes_a_token_of_weight_zero(width: int) -> None:
    weights = torch.zeros(3, width)
    weights[0, 0] = weights[1, width // 2] = weights[2, -1] = 1e-6
    for uniform in (0.0, 0.5, 1 - 2**-53):
        chosen = invert(weights, torch.full((3,), uniform, dtype=torch.float64))
        assert chosen.tolist() == [0, width // 2, width - 1]


def test_invert_agrees_with_a_plain_running_sum() -> None:
    weights = rows_of_logits(1000)[2:3].exp()
    numbers = torch.from_numpy(uniforms(0, "p", 0, 5000))
    plain = torch.searchsorted(weights[0].double().cumsum(0), numbers * weights[0].double().sum(), right=True)
    assert torch.equal(invert(weights.expand(5000, -1), numbers), plain)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0, "top_p": 0.5}, {"temperature": 0.001}])
def test_greedy_takes_the_most_likely_token(options: dict[str, Any]) -> None:
    logits = rows_of_logits(300)
    tokens, _ = draw(logits, torch.full((5,), 0.999, dtype=torch.float64), Sampling(**options))
    assert torch.equal(tokens[1:], logits.argmax(dim=1)[1:])


def test_log_probability_is_of_the_model_itself() -> None:
    logits = rows_of_logits(300)
    sampling = Sampling(temperature=0.5, top_k=3)
    tokens, logps = draw(logits, torch.full((5,), 0.9, dtype=torch.float64), sampling)
    expected = logits.double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"temperature": 0}])
def test_broken_logits_give_nan(options: dict[str, Any]) -> None:
    logits = torch.full((1, 300), float("nan"))
    tokens, logps = draw(logits, torch.tensor([0.5], dtype=torch.float64), Sampling(**options))
    assert 0 <= int(tokens) < 300
    assert math.isnan(float(logps))


def test_uniform_numbers_belong_to_seed_prompt_answer_and_position() -> None:
    first = uniforms(0, "p-1", 0, 8)
    assert uniforms(0, "p-1", 0, 20)[:8].tolist() == first.tolist()
    others = [uniforms(1, "p-1", 0, 8), uniforms(0, "p-2", 0, 8), uniforms(0, "p-1", 1, 8)]
    assert all(not set(first).intersection(other) for other in others)
    assert first.min() >= 0 and first.max() < 1
