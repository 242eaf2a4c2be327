"""A small language model that is trained on the spot: for experiments on methods on a machine where a real one is slow.

Its world is a made-up one of forty things, each with a place, a look, a use and something it goes with. It is asked
about one, two or three of them, and answers with sentences about them. As real models do, it says a little or a lot,
drifts off to something else, and repeats itself: it can be made better by choosing among its answers. Trained for four
minutes on one core, by next-token prediction on answers drawn from `conversation`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefloop.data.chat import ChatFormat
from prefloop.models import write_model
from prefloop.records import Prompt
from prefloop.seeds import derive_seed, generator

THINGS = (
    "apple lantern river saddle garden violin hammer teapot feather anchor blanket candle ladder mirror basket needle "
    "pillow kettle saucer compass drum engine fiddle goblet helmet island jacket kitten lemon mantle napkin oyster "
    "parrot quill ribbon shovel thimble umbrella vessel willow"
).split()
PLACES = "kitchen harbour forest market attic meadow workshop school".split()
LOOKS = "green wooden shiny heavy small round yellow narrow".split()
USES = "cooking sailing sewing music travel painting building sleeping".split()
ASKED = (
    "Tell me about the {}.",
    "What is there to say about the {}?",
    "Describe the {} for me, please.",
    "I would like to know more about the {}.",
)
SAID = (
    "The {thing} is {look}.",
    "You will find the {thing} in the {place}.",
    "People use the {thing} for {use}.",
    "A {look} {thing} goes well with the {other}.",
    "In the {place} nobody can do without the {thing}.",
    "Long ago the {thing} was only known for {use} and was kept beside the {other}.",
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

OFF_TOPIC, REPEATED, ENOUGH = 0.25, 0.2, 0.2
"""Of a sentence: that it is about something else, that it was said before; after it, that the answer ends."""


def question(rng: np.random.Generator) -> tuple[str, list[int]]:
    """A question and the things in it."""
    things = [int(thing) for thing in rng.choice(len(THINGS), size=rng.integers(1, 4), replace=False)]
    names = " and the ".join(THINGS[thing] for thing in things)
    return str(rng.choice(ASKED)).format(names), things


def answer(things: list[int], rng: np.random.Generator) -> str:
    """Sentences about the things, with the faults that a model learns."""
    said: list[str] = []
    while not said or (len(said) < 10 and rng.random() > ENOUGH):
        if said and rng.random() < REPEATED:
            said.append(said[-1])
            continue
        thing = int(rng.integers(len(THINGS)) if rng.random() < OFF_TOPIC else rng.choice(things))
        # Each thing has its own facts; which others it goes with is left open.
        facts = {"place": PLACES[thing % 8], "look": LOOKS[thing // 5 % 8], "use": USES[thing * 3 % 8]}
        other = THINGS[int(rng.integers(len(THINGS)))]
        said.append(str(rng.choice(SAID)).format(thing=THINGS[thing], other=other, **facts))
    return " ".join(said)


def prompts(n: int, seed: int) -> list[str]:
    """n different questions."""
    rng = generator(seed, "prompts")
    found: dict[str, None] = {}
    while len(found) < n:
        found[question(rng)[0]] = None
    return list(found)


def small_model(folder: Path, *, steps: int = 500, batch: int = 32, seed: int = 0) -> Path:
    """Train the model and write it as an ordinary transformers folder; one that is there is taken as it is."""
    if (folder / "model.safetensors").is_file():
        return folder
    rng = generator(seed, "small world")
    tokenizer = _tokenizer([_text(rng) for _ in range(2000)])
    model = _train(tokenizer, rng, steps, batch, seed)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    write_model(folder, model, tokenizer)
    return folder


def _text(rng: np.random.Generator) -> str:
    asked, things = question(rng)
    return f"{asked}\n{answer(things, rng)}"


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _train(
    tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, steps: int, batch: int, seed: int
) -> LlamaForCausalLM:
    chat = ChatFormat(tokenizer)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            rows = []
            for _ in range(batch):
                asked, things = question(rng)
                prompt = chat.prompt_ids(Prompt.of(asked))
                rows.append((len(prompt), [*prompt, *chat.response_ids(answer(things, rng))]))
            longest = max(len(row) for _, row in rows)
            inputs = torch.zeros(batch, longest, dtype=torch.long)
            labels = torch.full((batch, longest), -100)
            for i, (start, row) in enumerate(rows):
                inputs[i, : len(row)] = torch.tensor(row)
                labels[i, start : len(row)] = torch.tensor(row[start:])
            yield inputs, labels

    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "max_position_embeddings": 512}
    return pretrained(tokenizer, batches(), steps=steps, rate=3e-3, seed=seed, **shape)


def pretrained(
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    rate: float,
    seed: int,
    **shape: Any,
) -> LlamaForCausalLM:
    """A small Llama of this shape, trained by next-token prediction on (input ids, labels), one batch a step."""
    ids: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, **shape,
        **ids,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        model = LlamaForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for inputs, labels in batches:
        model(input_ids=inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()
