"""Models of a published shape with random weights, for benchmarks on machines without a hub."""

import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Of Llama-3.2-1B and Llama-3.1-8B, from their published config.json, with a shorter context.
LLAMA = {"vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True,
    },
    "llama-8b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@contextmanager
def shaped(shape: str | None, device: str) -> Iterator[str | None]:
    """The folder of a model of this shape while the block runs; None without a shape."""
    if shape is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="prefloop-shape-") as temporary:
        folder = Path(temporary) / shape
        # In a process of its own, so that none of the accelerator's memory stays taken.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(random_model, (shape, folder, device))
        yield str(folder)


def random_model(shape: str, folder: Path, device: str) -> None:
    """Write a model of this shape with random bfloat16 weights, and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from prefloop.models import load_tokenizer, resolve, write_model

    tokenizer: Any = load_tokenizer(resolve("smollm2-135m"))
    config = LlamaConfig(**SHAPES[shape], bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    write_model(folder, model, tokenizer)
