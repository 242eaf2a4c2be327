"""The OpenVINO engine: the GGUF file that carries a policy, families, and faults of the pipeline kept away."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from prefloop.errors import InputError, OutOfRange
from prefloop.models import ModelRef
from prefloop.sample.gguf_export import gguf_obstacle, write_gguf
from prefloop.sample.openvino import TOLERANCE, OpenVinoEngine
from prefloop.sample.sampling import Sampling
from tests.sample.engines import CHAT, PROMPTS, openvino, plain_logps, stopping_folder, stopping_llama

SMALL = {
    "vocab_size": len(CHAT.tokenizer),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}


def folder_of(model: Any, folder: Path) -> ModelRef:
    model.save_pretrained(folder)
    CHAT.tokenizer.save_pretrained(folder)
    return ModelRef.of(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SMALL),
        Qwen3Config(**SMALL, head_dim=16),
        Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True),
    ],
    ids=["qwen2 with biases", "qwen3 with wide heads", "qwen3 with tied embeddings"],
)
def test_families_keep_their_log_probabilities(config: Any, dtype: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    engine = OpenVinoEngine(folder_of(model, tmp_path), CHAT, dtype=dtype, context=256)
    groups = engine.sample(PROMPTS, k=2, sampling=Sampling(max_new_tokens=20), seed=0)
    engine.close()
    found = [response for group in groups for response in group.responses]
    gaps = [
        abs((ours.sampling_logp or 0) - theirs) / ours.length_tokens
        for ours, theirs in zip(found, plain_logps(model, groups), strict=True)
    ]
    assert np.mean(gaps) < TOLERANCE[dtype]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_cache_that_is_used_again_and_again_stays_right(batch_size: int) -> None:
    """With prefix caching, and with too few cache blocks, the pipeline sampled from other answers' caches."""
    engine = openvino(batch_size)
    for seed in range(3):
        groups = engine.sample(PROMPTS, k=6, sampling=Sampling(max_new_tokens=40), seed=seed)
        found = [response for group in groups for response in group.responses]
        for ours, theirs in zip(found, plain_logps(stopping_llama(), groups), strict=True):
            assert abs((ours.sampling_logp or 0) - theirs) < 0.1
    engine.close()


def test_greedy_answers_are_asked_for_once() -> None:
    engine = openvino(4)
    [group] = engine.sample(PROMPTS[:1], k=5, sampling=Sampling(temperature=0, max_new_tokens=6), seed=0)
    engine.close()
    assert len(group.responses) == 5 and len(set(response.token_ids for response in group.responses)) == 1


def test_answers_that_end_by_a_stop_string_leave_the_cache_right() -> None:
    """The pipeline goes on with them, so they count as under way until it ends."""
    engine = openvino(8)
    sampling = Sampling(max_new_tokens=40, stop=tuple("etaoinsrhl"))
    groups = engine.sample(PROMPTS, k=6, sampling=sampling, seed=0)
    found = [response for group in groups for response in group.responses]
    for ours, theirs in zip(found, plain_logps(stopping_llama(), groups), strict=True):
        assert abs((ours.sampling_logp or 0) - theirs) < 0.1
    engine.close()


def test_nothing_is_left_on_disk(tmp_path: Path) -> None:
    def engine() -> OpenVinoEngine:
        made = OpenVinoEngine(stopping_folder(), CHAT, context=1024, folder=tmp_path)
        made.sample(PROMPTS[:1], k=1, sampling=Sampling(max_new_tokens=2), seed=0)
        return made

    closed, forgotten = engine(), engine()
    assert len(list(tmp_path.rglob("policy.gguf"))) == 2
    closed.close()
    del forgotten
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    """The pipeline itself samples from them without a word."""
    model = stopping_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match=r"'model.norm.weight' has values that are not finite numbers"):
        engine = OpenVinoEngine(folder_of(model, tmp_path), CHAT, context=1024)
        engine.sample(PROMPTS[:1], k=1, sampling=Sampling(max_new_tokens=2), seed=0)


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = stopping_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(OutOfRange, match=r"'model.layers.0.mlp.up_proj.weight' has values beyond the range of float16"):
        write_gguf(folder_of(model, tmp_path), tmp_path / "policy.gguf")


def test_the_file_holds_every_weight_to_float16(tmp_path: Path) -> None:
    import gguf

    write_gguf(stopping_folder(), tmp_path / "policy.gguf")
    reader = gguf.GGUFReader(tmp_path / "policy.gguf")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    state = stopping_llama().state_dict()
    assert len(stored) == len([name for name in state if name != "lm_head.weight"])
    up = state["model.layers.1.mlp.up_proj.weight"].numpy()
    assert np.array_equal(stored["blk.1.ffn_up.weight"], up.astype(np.float16))
    # One head of 8: rows 0..3 rotate with rows 4..7 in transformers, neighbours with each other in GGUF.
    q = state["model.layers.1.self_attn.q_proj.weight"].numpy().astype(np.float16)
    assert np.array_equal(stored["blk.1.attn_q.weight"][:8], q[[0, 4, 1, 5, 2, 6, 3, 7]])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gemma3_text"}, "its architecture is 'gemma3_text'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rotary positions are scaled"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled .linear."),
        ({"attention_bias": True}, "it has attention_bias"),
        ({"mlp_bias": True}, "it has mlp_bias"),
        ({"hidden_act": "gelu"}, "its activation is 'gelu'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding window"),
    ],
)
def test_what_gguf_cannot_say_is_an_obstacle(changes: dict[str, Any], reason: str) -> None:
    config = json.loads((stopping_folder().path / "config.json").read_text())
    assert gguf_obstacle(config) is None
    found = gguf_obstacle({**config, **changes})
    assert found and re.search(reason, found)
