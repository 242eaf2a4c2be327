"""The log-probability core against the plain transformers forward, one response at a time: values and gradients."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from prefloop.train.logprobs import choose_path, response_logps, rows
from prefloop.train.packing import TokenGroup

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
GROUPS = [
    TokenGroup((5, 6, 7, 8), ((9, 10, 11), (12,), (13, 14, 15, 16, 17))),
    TokenGroup((20,), ((21, 22), (23,))),
    TokenGroup(tuple(range(30, 50)), tuple((50 + i, 60, 61 + i, 3) for i in range(16))),
]
SHARED: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama untied": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "mistral without window": MistralConfig(**SMALL, sliding_window=None),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, logits_scaling=3.0),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, n_positions=256,
                       resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}  # fmt: skip
PADDED: dict[str, PretrainedConfig] = {
    "mistral with window": MistralConfig(**SMALL, sliding_window=8),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0, sliding_window=8),
}


def small_model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def plain_logps(model: PreTrainedModel, groups: list[TokenGroup]) -> torch.Tensor:
    """The definition, without any of our code: full forward of one sequence, log-softmax, gather, sum."""
    result = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt_ids, *response]])
            logps = model(input_ids=ids).logits[0].float().log_softmax(-1)
            start = len(group.prompt_ids) - 1
            result.append(sum(logps[start + i, token] for i, token in enumerate(response)))
    return torch.stack(result)


@pytest.mark.parametrize("path", ["shared", "padded"])
@pytest.mark.parametrize("family", SHARED)
def test_values_and_every_gradient_equal_the_plain_forward(family: str, path: str) -> None:
    model = small_model(SHARED[family])
    weights = torch.linspace(-1, 2, 21)
    expected = plain_logps(model, GROUPS)
    (expected * weights).sum().backward()
    expected_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    found = response_logps(model, GROUPS, path=path).sums
    (found * weights).sum().backward()

    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert expected_gradients
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in expected_gradients), name
        if parameter.grad is not None:
            scale = expected_gradients[name].abs().max().clamp(min=1e-3)
            assert float((parameter.grad - expected_gradients[name]).abs().max() / scale) < 2e-4, name


@pytest.mark.parametrize("family", PADDED)
def test_windowed_families_take_the_padded_path_and_are_right_there(family: str) -> None:
    model = small_model(PADDED[family])
    path, why = choose_path(model, GROUPS)
    assert path == "padded" and "padded" in why
    with torch.no_grad():
        assert torch.allclose(
            response_logps(model, GROUPS, path=path).sums, plain_logps(model, GROUPS), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("family", SHARED)
def test_plain_causal_families_take_the_shared_path(family: str) -> None:
    path, why = choose_path(small_model(SHARED[family]), GROUPS)
    assert path == "shared", why


def test_a_model_on_which_the_shared_path_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import prefloop.train.attention as attention

    model = small_model(SHARED["llama"])
    monkeypatch.setattr(
        attention.Layout, "mask", lambda self, branch, prompt, like: like.new_zeros(branch, prompt + branch)
    )
    path, why = choose_path(model, GROUPS)
    assert path == "padded" and "differs from the plain forward" in why


def test_responses_do_not_see_each_other_nor_other_groups() -> None:
    model = small_model(SHARED["llama"])
    with torch.no_grad():
        before = response_logps(model, GROUPS).sums
        other = TokenGroup(GROUPS[0].prompt_ids, (GROUPS[0].responses[0], (90,), (91, 92, 93, 94, 95)))
        after = response_logps(model, [other, TokenGroup((96, 95), ((94,),)), GROUPS[2]]).sums
    assert after[0].item() == pytest.approx(before[0].item(), abs=1e-5)
    assert torch.allclose(after[4:], before[5:], atol=1e-5)


def test_d15_batch_composition_does_not_change_a_value() -> None:
    model = small_model(SHARED["llama"])
    with torch.no_grad():
        together = response_logps(model, GROUPS).sums
        apart = torch.cat([response_logps(model, [group]).sums for group in GROUPS])
        padded = response_logps(model, GROUPS, path="padded").sums
    assert torch.allclose(together, apart, atol=1e-4)
    assert torch.allclose(together, padded, atol=1e-4)


def test_bfloat16_products_stay_near_float32() -> None:
    model = small_model(SHARED["llama"])
    with torch.no_grad():
        exact = response_logps(model, GROUPS).sums
        rough = response_logps(model, GROUPS, dtype="bfloat16").sums
    assert rough.dtype == torch.float32
    assert 0 < float(((rough - exact) / exact).abs().max()) < 3e-2


def test_long_responses_cross_head_chunks() -> None:
    model = small_model(LlamaConfig(**{**SMALL, "max_position_embeddings": 1024}))
    generator = torch.Generator().manual_seed(0)
    long = tuple(torch.randint(0, 97, (600,), generator=generator).tolist())
    group = TokenGroup((1, 2), (long, long[:300]))
    with torch.no_grad():
        assert torch.allclose(response_logps(model, [group]).sums, plain_logps(model, [group]), rtol=1e-5)


@pytest.mark.parametrize("path", ["shared", "padded"])
def test_rows_hold_every_group_once_under_the_budget(path: str) -> None:
    cut = rows(GROUPS, 70, path=path)
    assert sorted(index for row in cut for index in row) == [0, 1, 2]
    assert len(cut) == 2
