"""The tiled output head inside whole models: every kind of head, tiles that cut tokens and vocabulary, frozen parts."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import prefloop.train.head as head
from prefloop.train.config import Lora
from prefloop.train.learner import add_lora
from tests.parity.families import FAMILIES, GROUPS, VOCABULARY, small_model
from tests.parity.plain import assert_bfloat16_parity, assert_float32_parity, core_outcome, plain_outcome

HEADS = {
    "tied": "llama",
    "untied": "llama untied",
    "bias": "phi",
    "softcap": "gemma 2, narrow window",
    "logits multiplied": "cohere",
    "logits divided": "granite",
}
ROWS, COLUMNS = 11, 5


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles in both directions, the last ones cut off."""
    monkeypatch.setattr(head, "TOKENS", ROWS)
    monkeypatch.setitem(head.TILE, "cpu", ROWS * COLUMNS)
    assert VOCABULARY % COLUMNS


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", HEADS)
def test_tiles_change_nothing_in_float32(kind: str) -> None:
    model = small_model(FAMILIES[HEADS[kind]].config)
    found = core_outcome(model, GROUPS, path="padded")
    assert len(found.tokens) > ROWS and len(found.tokens) % ROWS
    assert_float32_parity(found, plain_outcome(model, GROUPS))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", HEADS)
def test_tiles_keep_the_bounds_in_bfloat16(kind: str) -> None:
    model = small_model(FAMILIES[HEADS[kind]].config)
    found = core_outcome(model, GROUPS, path="padded", dtype="bfloat16")
    assert_bfloat16_parity(found, plain_outcome(model, GROUPS, dtype="bfloat16"), plain_outcome(model, GROUPS))


def test_the_heads_are_of_the_kinds_they_stand_for() -> None:
    models = {kind: small_model(FAMILIES[family].config) for kind, family in HEADS.items()}
    configs = {kind: model.config for kind, model in models.items()}
    weights = {kind: model.get_output_embeddings().weight for kind, model in models.items()}
    tied = {kind for kind, model in models.items() if weights[kind] is model.get_input_embeddings().weight}
    assert "tied" in tied and not {"untied", "bias"} & tied
    assert float(models["bias"].get_output_embeddings().bias.detach().abs().max()) > 0.1
    assert configs["softcap"].final_logit_softcapping == 3.0
    assert (configs["logits multiplied"].logit_scale, configs["logits divided"].logits_scaling) == (0.25, 3.0)


def head_frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.get_output_embeddings().requires_grad_(False)
    return model


def all_but_the_head_frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False).get_output_embeddings().requires_grad_(True)
    return model


def with_adapters(model: PreTrainedModel) -> PreTrainedModel:
    adapted = add_lora(model, Lora(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero when fresh: the adapters would do nothing and half of them get no gradient
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return adapted


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["tied", "untied", "bias"])
@pytest.mark.parametrize("prepare", [head_frozen, all_but_the_head_frozen, with_adapters])
def test_frozen_parts_get_no_gradient_and_the_rest_gets_its_own(
    kind: str, prepare: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    model = prepare(small_model(FAMILIES[HEADS[kind]].config))
    found = core_outcome(model, GROUPS, path="shared")
    assert found.gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert_float32_parity(found, plain_outcome(model, GROUPS))
