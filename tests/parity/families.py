"""Small random models of many decoder families, the path each should take, and the groups they are compared on."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from prefloop.train.packing import TokenGroup

VOCABULARY = 97


def random_group(prompt: int, responses: list[int], seed: int) -> TokenGroup:
    """A prompt and responses of these lengths, of random tokens; the second response begins as the first does."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())

    made = [tokens(length) for length in responses]
    if len(made) > 1:
        made[1] = (made[0] + made[1])[: len(made[1])]
    return TokenGroup(tokens(prompt), tuple(made))


GROUPS = [
    random_group(4, [3], seed=1),
    random_group(1, [2, 1], seed=2),
    random_group(9, [6, 4, 1, 7, 2], seed=3),
    random_group(12, [1 + index % 6 for index in range(16)], seed=4),
    random_group(0, [5, 1, 3], seed=5),
]
"""1, 2, 5 and 16 responses, and 3 to an empty prompt; each of the last four groups has responses of one token."""

LONGEST_ROW = max(len(group.prompt_ids) + len(response) for group in GROUPS for response in group.responses)
NARROW = 6
"""A window that most rows of `GROUPS` outgrow."""

SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "intermediate_size": 48,
    **SPECIAL,
}
GROUPED = {**SIZE, "num_key_value_heads": 2}
# Caps near the size of the scores and logits: a path that forgot one would be far off.
GEMMA2 = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 2.0,
          "final_logit_softcapping": 3.0}  # fmt: skip
GEMMA3 = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 4, "layer_types": ["sliding_attention", "full_attention"]}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class Family:
    """A decoder family: a small configuration, and the path that `choose_path` should take for `GROUPS`."""

    config: PretrainedConfig
    path: Literal["shared", "padded"]


FAMILIES = {
    "llama": Family(LlamaConfig(**GROUPED, tie_word_embeddings=True), "shared"),
    "llama untied": Family(LlamaConfig(**GROUPED, tie_word_embeddings=False), "shared"),
    "qwen2": Family(Qwen2Config(**GROUPED), "shared"),
    "qwen3": Family(Qwen3Config(**GROUPED, head_dim=8), "shared"),
    "mistral": Family(MistralConfig(**GROUPED, sliding_window=None), "shared"),
    "mistral, wide window": Family(MistralConfig(**GROUPED, sliding_window=LONGEST_ROW), "shared"),
    "mistral, narrow window": Family(MistralConfig(**GROUPED, sliding_window=NARROW), "padded"),
    "gemma 2, wide window": Family(Gemma2Config(**GEMMA2, sliding_window=LONGEST_ROW), "shared"),
    "gemma 2, narrow window": Family(Gemma2Config(**GEMMA2, sliding_window=NARROW), "padded"),
    "gemma 3, wide window": Family(Gemma3TextConfig(**GEMMA3, sliding_window=LONGEST_ROW), "shared"),
    "gemma 3, narrow window": Family(Gemma3TextConfig(**GEMMA3, sliding_window=NARROW), "padded"),
    "phi": Family(PhiConfig(**GROUPED), "shared"),
    "phi 3": Family(Phi3Config(**GROUPED), "shared"),
    "gpt-2": Family(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                               initializer_range=0.2, **NO_DROPOUT, **SPECIAL), "shared"),
    "gpt-neox": Family(GPTNeoXConfig(**SIZE), "shared"),
    "olmo 2": Family(Olmo2Config(**GROUPED), "shared"),
    "cohere": Family(CohereConfig(**GROUPED, logit_scale=0.25), "shared"),
    "granite": Family(GraniteConfig(**GROUPED, logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0,
                                    attention_multiplier=0.3), "shared"),
    "mixtral": Family(MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2), "shared"),
    "mixtral, every expert": Family(MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=4), "shared"),
    "opt": Family(OPTConfig(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                            num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.2,
                            dropout=0.0, activation_function="gelu", enable_bias=False, **SPECIAL), "shared"),
    "bloom": Family(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2,
                                **SPECIAL), "padded"),
    "mamba": Family(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4,
                                initializer_range=0.2, **SPECIAL), "padded"),
    "qwen3-next": Family(Qwen3NextConfig(**GROUPED, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
                                         linear_num_key_heads=2, linear_num_value_heads=4, num_experts=4,
                                         num_experts_per_tok=4, moe_intermediate_size=16,
                                         shared_expert_intermediate_size=16,
                                         layer_types=["linear_attention", "full_attention"]), "padded"),
}  # fmt: skip


def small_model(config: PretrainedConfig) -> PreTrainedModel:
    """A random float32 model in evaluation mode; the global generator of torch is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        # A model keeps its configuration, and the families' own must stay as they are whatever a test sets.
        model = AutoModelForCausalLM.from_config(deepcopy(config)).float().eval()
        for parameter in model.parameters():
            # Fresh biases are 0 and fresh norms 1 everywhere: a path that left one out would go unnoticed.
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model
