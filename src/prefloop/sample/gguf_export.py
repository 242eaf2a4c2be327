"""A policy as a GGUF file of 16-bit floats: what OpenVINO GenAI builds its model from, without an export of the graph.

Names and layout are those of llama.cpp, through the `gguf` package's own table. Only families are written whose GGUF
form says everything there is to say about them; `gguf_obstacle` names what another one has that it could not say.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefloop.errors import InputError, OutOfRange
from prefloop.models import ModelRef, model_config

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""model_type in transformers -> name in gguf.MODEL_ARCH."""

FLOAT16 = 1
"""`general.file_type` of files whose matrices are float16."""


def gguf_obstacle(config: dict[str, Any]) -> str | None:
    """What keeps a model of this configuration from being written, or None."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        return f"its architecture is {kind!r}, not one of {', '.join(ARCHITECTURES)}"
    rope = _rope(config)
    if rope.get("rope_type", "default") != "default":
        return f"its rotary positions are scaled ({rope['rope_type']})"
    if config.get("quantization_config"):
        return "its weights are quantised"
    if config.get("use_sliding_window"):
        return "it looks at a sliding window"
    if config.get("hidden_act", "silu") != "silu":
        return f"its activation is {config['hidden_act']!r}, not 'silu'"
    for name in ("attention_bias", "mlp_bias"):
        if kind != "qwen2" and config.get(name):
            return f"it has {name}"
    return None


def write_gguf(ref: ModelRef, file: Path) -> None:
    """Write the model's weights and shape, matrices in float16 and vectors in float32; no tokenizer.

    Raises InputError for a model that `gguf_obstacle` names or whose weights are beyond float16's range.
    """
    import gguf
    from safetensors import safe_open

    config = model_config(ref)
    obstacle = gguf_obstacle(config)
    if obstacle:
        raise InputError(f"model {ref.name} cannot be written as GGUF: {obstacle}; use --engine transformers")
    architecture = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, architecture.lower())
    _describe(writer, config)
    tied = config.get("tie_word_embeddings", False)
    for part in sorted(ref.path.glob("*.safetensors")):
        with safe_open(part, "pt") as tensors:
            for name in tensors.keys():
                if tied and name == "lm_head.weight":
                    continue
                known = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if known is None:
                    raise InputError(
                        f"model {ref.name} has a weight {name!r} that is no part of a {config['model_type']} in GGUF; "
                        "use --engine transformers"
                    )
                writer.add_tensor(known, _stored(tensors.get_tensor(name).float().numpy(), name, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: "GGUFWriter", config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(FLOAT16)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters: a dictionary of their own in transformers 5, spread over the configuration before it."""
    old: dict[str, Any] = {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta")}
    if "type" in old:
        old["rope_type"] = old["type"]
    return config.get("rope_parameters") or old


def _stored(weight: np.ndarray, name: str, config: dict[str, Any]) -> np.ndarray:
    if not np.isfinite(weight).all():
        raise InputError(f"the weight {name!r} has values that are not finite numbers: the model is damaged")
    if weight.ndim == 1:
        return weight
    if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config["num_attention_heads"]
        weight = _interleaved(weight, heads if ".q_proj" in name else config.get("num_key_value_heads") or heads)
    if np.abs(weight).max(initial=0.0) > np.finfo(np.float16).max:
        raise OutOfRange(
            f"the weight {name!r} has values beyond the range of float16, which this engine stores; use --engine "
            "transformers"
        )
    return weight.astype(np.float16)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads x size, D] from transformers' order of a head's rows, whose two halves rotate together, to llama.cpp's,
    where neighbours do.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
