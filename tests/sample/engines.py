"""The engines that the contract battery runs on, over one tiny model that ends its answers often enough."""

import atexit
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from prefloop.data.chat import ChatFormat
from prefloop.models import ModelRef
from prefloop.records import Group, Prompt
from prefloop.sample.engine import Engine
from prefloop.sample.openvino import OpenVinoEngine
from prefloop.sample.scripted import ScriptedEngine
from prefloop.sample.transformers import TransformersEngine
from tests.sample.loopback import server
from tests.tiny import tiny_llama, tiny_tokenizer

CHAT = ChatFormat(tiny_tokenizer())
PROMPTS = [
    Prompt.of("Name a colour.", id="colour"),
    Prompt.of("Hi", id="hi"),
    Prompt.of("What is the capital of the country north of the one in which you are not?", id="capital"),
    Prompt.of("Tea or coffee?", id="tea"),
    Prompt.of("Count to three, slowly, and then stop.", id="count"),
]


def stopping_llama(seed: int = 0) -> LlamaForCausalLM:
    """A tiny Llama whose end token has a wide embedding row, hence now and then a high logit."""
    model = tiny_llama(len(CHAT.tokenizer), seed=seed)
    with torch.no_grad():
        model.model.embed_tokens.weight[CHAT.end_token_id] *= 3
    return model


def words(prompt: Prompt, k: int, seed: int) -> str:
    """A script: 1 to 12 words that depend on the seed alone."""
    chosen = random.Random(seed)
    return " ".join(chosen.choices(["red", "blue", "seven", "no", "tea time"], k=chosen.randint(1, 12)))


def transformers(batch_size: int) -> Engine:
    return TransformersEngine(stopping_llama(), CHAT, batch_size=batch_size)


def scripted(batch_size: int) -> Engine:
    return ScriptedEngine(CHAT, words, context=1024)


@cache
def stopping_folder(seed: int = 0) -> ModelRef:
    """`stopping_llama` as a model folder, for engines that read one; removed when the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    stopping_llama(seed).save_pretrained(folder)
    CHAT.tokenizer.save_pretrained(folder)
    return ModelRef.of(folder)


def openvino(batch_size: int) -> Engine:
    return OpenVinoEngine(stopping_folder(), CHAT, batch_size=batch_size, context=1024)


ENGINES: dict[str, Callable[[int], Engine]] = {
    "transformers": transformers,
    "openvino": openvino,
    "server": server,
    "scripted": scripted,
}


def plain_logps(model: PreTrainedModel, groups: Sequence[Group]) -> list[float]:
    """Summed log-softmax of the sampled ids by one full forward per answer: no padding, no cache, no batch."""
    found = []
    for group in groups:
        prompt = CHAT.prompt_ids(group.prompt)
        for response in group.responses:
            ids = torch.tensor([[*prompt, *(response.token_ids or ())]])
            with torch.inference_mode():
                logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(dim=1)
            found.append(float(logps.gather(1, ids[0, len(prompt) :, None]).sum()))
    return found


def ids_of(groups: Sequence[Group]) -> dict[str, list[tuple[int, ...] | None]]:
    return {group.prompt.id: [response.token_ids for response in group.responses] for group in groups}
