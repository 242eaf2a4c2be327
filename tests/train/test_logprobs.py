"""The core's own promises: batches and rows change nothing, and a model the shared path does not suit is found out.

That its numbers are those of the plain forward is proven in tests/parity.
"""

from typing import Any

import pytest
import torch
from tests.parity.families import FAMILIES, GROUPS, small_model
from tests.parity.plain import assert_float32_parity, core_outcome, plain_outcome
from tests.tiny import tiny_llama
from transformers import LlamaConfig, PreTrainedModel

from prefloop.errors import CheckFailed
from prefloop.train import logprobs
from prefloop.train.logprobs import Path, choose_path, known_path, response_logps, rows
from prefloop.train.packing import TokenGroup

PATHS: list[Path] = ["shared", "padded"]


@pytest.fixture
def model() -> PreTrainedModel:
    return small_model(FAMILIES["llama"].config)


def counting_its_own_positions(model: PreTrainedModel) -> PreTrainedModel:
    """The model as if its forward took no positions: the branches of a row then stand at the wrong places."""

    def drop(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if name != "position_ids"}

    model.base_model.register_forward_pre_hook(drop, with_kwargs=True)
    return model


def test_a_model_on_which_the_shared_path_is_wrong_is_found_out(model: PreTrainedModel) -> None:
    path, why = choose_path(counting_its_own_positions(model), GROUPS)
    assert path == "padded" and "differs from the plain forward" in why, why


def test_a_head_that_changes_its_logits_stops_the_run(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(lambda _, __, logits: logits / 2)
    with pytest.raises(CheckFailed, match="does something to its logits that prefloop does not know"):
        choose_path(model, GROUPS)


def test_choosing_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    before = model.config._attn_implementation
    assert choose_path(model, GROUPS)[0] == "shared"
    assert model.config._attn_implementation == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_responses_do_not_see_each_other_nor_other_groups(model: PreTrainedModel) -> None:
    first, *rest = GROUPS[2].responses
    changed = TokenGroup(GROUPS[2].prompt_ids, (first, *(tuple((token + 1) % 97 for token in r) for r in rest)))
    with torch.no_grad():
        before = response_logps(model, GROUPS).sums
        after = response_logps(model, [GROUPS[0], TokenGroup((96, 95), ((94,), (93, 92))), changed, *GROUPS[3:]]).sums
    # Sums 0, 3 and 8 on are of responses that stayed; 4 to 7 are the changed ones.
    torch.testing.assert_close(after[[0, 3]], before[[0, 3]], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(after[8:], before[8:], rtol=1e-6, atol=0.0)
    assert float((after[4:8] - before[4:8]).abs().min()) > 1e-2


@pytest.mark.parametrize("path", PATHS)
def test_d15_o16_batch_composition_does_not_change_a_value(model: PreTrainedModel, path: Path) -> None:
    with torch.no_grad():
        together = response_logps(model, GROUPS, path=path).sums
        apart = torch.cat([response_logps(model, [group], path=path).sums for group in GROUPS])
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("path", PATHS)
def test_sums_tokens_and_counts_belong_together(model: PreTrainedModel, path: Path) -> None:
    found = response_logps(model, GROUPS, path=path, dtype="bfloat16")
    assert found.entropy is None
    assert found.sums.dtype == found.tokens.dtype == torch.float32
    parts = [part.sum() for part in found.tokens.split(found.counts.tolist())]
    torch.testing.assert_close(found.sums, torch.stack(parts))


@pytest.mark.parametrize("path", PATHS)
def test_entropy_changes_no_value_and_carries_no_gradient(model: PreTrainedModel, path: Path) -> None:
    asked = response_logps(model, GROUPS, path=path, entropy=True)
    assert asked.entropy is not None and not asked.entropy.requires_grad
    assert asked.tokens.requires_grad
    assert torch.equal(asked.tokens, response_logps(model, GROUPS, path=path).tokens)


@pytest.mark.parametrize("path", PATHS)
def test_where_nothing_is_predicted_the_sum_is_zero(model: PreTrainedModel, path: Path) -> None:
    found = response_logps(model, [TokenGroup((), ((5,), (6,)))], path=path)
    assert found.sums.tolist() == [0.0, 0.0]
    assert found.counts.tolist() == [0, 0]
    assert len(found.tokens) == 0


def test_long_responses_cross_the_tiles_of_the_head() -> None:
    config = LlamaConfig(**{**FAMILIES["llama"].config.to_dict(), "max_position_embeddings": 1024})
    tokens = torch.randint(0, 97, (1300,), generator=torch.Generator().manual_seed(0)).tolist()
    group = TokenGroup((1, 2), (tuple(tokens[:700]), tuple(tokens[700:])))
    model = small_model(config)
    assert_float32_parity(core_outcome(model, [group], path="shared"), plain_outcome(model, [group]))


def test_shared_rows_hold_every_group_once_under_the_budget() -> None:
    # Tokens of the groups: 6, 2, 24, 48, 6.
    assert rows(GROUPS, 54, path="shared") == [[0, 3], [1, 2, 4]]
    assert rows(GROUPS, 1, path="shared") == [[3], [2], [0], [4], [1]]


def test_padded_rows_count_every_response_at_the_width_of_the_widest() -> None:
    # Responses x longest row: 1 x 7, 2 x 3, 5 x 16, 16 x 18, 3 x 5; narrow groups first.
    assert rows(GROUPS, 42, path="padded") == [[1, 4, 0], [2], [3]]
    assert rows(GROUPS, 41, path="padded") == [[1, 4], [0], [2], [3]]


def test_rotations_that_follow_the_longest_row_are_not_shared(model: PreTrainedModel) -> None:
    longest = max(len(group.prompt_ids) + len(response) for group in GROUPS for response in group.responses)
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": longest - 1}
    path, why = choose_path(model, GROUPS)
    assert path == "padded" and f"beyond {longest - 1} tokens" in why
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": longest}
    assert choose_path(model, GROUPS)[0] == "shared"


def test_the_path_is_proven_once_for_all_weights_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    proven: list[int] = []
    monkeypatch.setattr(logprobs, "_PROVEN", {})
    monkeypatch.setattr(logprobs, "choose_path", lambda model, groups: proven.append(1) or ("shared", "proven"))
    assert known_path(tiny_llama(50, seed=1), GROUPS) == known_path(tiny_llama(50, seed=2), GROUPS)
    assert len(proven) == 1
    known_path(tiny_llama(50, layers=3), GROUPS)
    assert len(proven) == 2
