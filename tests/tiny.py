"""Tiny real tokenizers and models that tests build on the spot: nothing is downloaded, everything is deterministic.

A tokenizer's vocabulary is the 256 bytes (id = position in the byte-level alphabet) and then its special tokens, so any
text round-trips and one byte is one token.
"""

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Template = Literal["chatml", "llama3", "zephyr"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL: dict[str | None, list[str]] = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "zephyr": ["<unk>", "<s>", "</s>"],
    None: ["<|endoftext|>"],
}
NAMED: dict[str | None, dict[str, str]] = {
    # SmolLM2's own choice: the token that opens every turn is the tokenizer's BOS.
    "chatml": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"},
    "zephyr": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
    None: {"eos_token": "<|endoftext|>"},
}
TEMPLATES: dict[str | None, str | None] = {"chatml": CHATML, "llama3": LLAMA3, "zephyr": ZEPHYR, None: None}


def tiny_tokenizer(template: Template | None = "chatml") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (256 byte tokens, then specials) with the manners of a model family.

    "chatml": SmolLM2 and Qwen, BOS opens every turn. "llama3": the template writes the BOS, and encoding plain text
    adds one too. "zephyr": encoding plain text adds a BOS, the template writes none; EOS ends a turn. None: no template
    and no BOS.
    """
    # Sorted: the alphabet comes in an order that changes from process to process.
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL[template])
    named = NAMED[template]
    if template in ("llama3", "zephyr"):
        add_bos_to_text(backend, named["bos_token"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def add_bos_to_text(backend: Tokenizer, bos: str) -> None:
    """Make encoding plain text (with special tokens) start with `bos`."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def tiny_llama(
    vocab_size: int, hidden: int = 32, layers: int = 2, heads: int = 4, kv_heads: int = 2, seed: int = 0
) -> LlamaForCausalLM:
    """A random float32 Llama in evaluation mode, tied embeddings, weights wide enough that log-probabilities differ.

    The global generator of torch is left as it was.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float().eval()


def save_tiny_model(folder: Path, seed: int = 0, template: Template | None = "chatml") -> Path:
    """Write a tiny model and its tokenizer as an ordinary transformers folder; returns the folder."""
    tokenizer = tiny_tokenizer(template)
    model = tiny_llama(len(tokenizer), seed=seed)
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
