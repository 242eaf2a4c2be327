"""What the speed benchmarks share: pairs of a given shape made of shipped text, the machine's matrix-product rate,
and the operations that a log-probability needs at least.
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from prefloop.data.chat import ChatFormat
from prefloop.data.mapping import load_prompts
from prefloop.records import Pair, Prompt, Response
from prefloop.seeds import generator
from prefloop.train.packing import TokenGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Workload:
    """Mean token counts of prompts and responses, and the spread (standard deviation of the logarithm) of both.

    Lengths are log-normal, scaled so that a draw of any size has these means. Multi-turn transcripts of HH-RLHF
    (harmless-base, test) have means of 120 + template and 45 tokens and spreads of 1.06 and 0.90: ours are a little
    more even, which is to the advantage of padded batches.
    """

    prompt: int
    response: int
    prompt_spread: float
    response_spread: float


WORKLOADS = {
    "multi_turn": Workload(140, 45, 0.9, 0.8),
    "long_prompt": Workload(400, 60, 0.5, 0.5),
    "short_prompt": Workload(30, 120, 0.5, 0.5),
    "multi_turn_groups": Workload(140, 64, 0.9, 0.5),
    "long_prompt_groups": Workload(400, 60, 0.5, 0.5),
}
LONGEST = 1024
"""Tokens of prompt and response together, so that neither side truncates."""


def make_items(
    workload: Workload, chat: ChatFormat, n: int, *, responses: int, seed: int
) -> list[tuple[Prompt, tuple[Response, ...]]]:
    """n prompts with `responses` responses each, of the workload's lengths, cut from the shipped seed prompts' text.

    Responses carry their token ids, so that both sides see the same ones.
    """
    rng = generator(seed, "workload")
    text = " ".join(message.content for prompt in load_prompts("seed").records for message in prompt.messages)
    stream = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    template = len(chat.prompt_ids(Prompt.of("x")))

    def lengths(mean: int, spread: float, shape: tuple[int, ...]) -> np.ndarray:
        drawn = rng.lognormal(sigma=spread, size=shape)
        return np.clip(np.rint(drawn * mean / drawn.mean()), 2, None).astype(int)

    def cut(tokens: int) -> list[int]:
        start = int(rng.integers(0, len(stream) - LONGEST))
        return stream[start : start + tokens]

    prompt_lengths = np.maximum(template + 1, lengths(workload.prompt, workload.prompt_spread, (n,)))
    response_lengths = lengths(workload.response, workload.response_spread, (n, responses))
    items = []
    for prompt_length, row in zip(prompt_lengths, response_lengths, strict=True):
        # Neither side truncates: a row that the shortest context of the opponents could cut is cut here.
        prompt_length = min(prompt_length, LONGEST - row.max())
        prompt = Prompt.of(chat.tokenizer.decode(cut(prompt_length - template)))
        answers = []
        for tokens in row:
            ids = (*cut(tokens - 1), chat.end_token_id)
            answers.append(Response(text=chat.decode(ids), token_ids=ids, finish_reason="stop"))
        items.append((prompt, tuple(answers)))
    return items


def as_pairs(items: Sequence[tuple[Prompt, tuple[Response, ...]]]) -> list[Pair]:
    return [Pair(prompt=prompt, chosen=responses[0], rejected=responses[1]) for prompt, responses in items]


def model_flops(model: "PreTrainedModel", groups: Sequence[TokenGroup], *, backward: bool) -> float:
    """Operations of the matrix products that these log-probabilities need at least: each prompt once, no padding, the
    head on response positions only, no recomputation; attention left out.
    """
    config = model.config.get_text_config()
    body = sum(weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name)
    head = config.vocab_size * config.hidden_size
    if not config.tie_word_embeddings:
        body -= head
    tokens = sum(group.tokens for group in groups)
    predicted = sum(len(response) for group in groups for response in group.responses)
    return (6 if backward else 2) * (tokens * body + predicted * head)


def matmul_rate(model: "PreTrainedModel", dtype: str, tokens: int, seconds: float = 2.0) -> float:
    """FLOP/s of this machine on the model's own linear layers: [tokens, in] x [in, out], weighted as they occur.

    The median over several tries of the time of one pass over all shapes, on warm memory.
    """
    kind = getattr(torch, dtype)
    shapes: dict[tuple[int, int], int] = {}
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            shape = (module.in_features, module.out_features)
            shapes[shape] = shapes.get(shape, 0) + 1
    operands = [
        (*(torch.randn(*size, dtype=kind, device=model.device) for size in ((tokens, k), (n, k), (tokens, n))), count)
        for (k, n), count in shapes.items()
    ]
    flops = sum(2 * tokens * k * n * count for (k, n), count in shapes.items())
    times = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 4:
        before = time.perf_counter()
        for a, b, out, count in operands:
            for _ in range(count):
                torch.mm(a, b.T, out=out)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return flops / sorted(times)[len(times) // 2]


def peak_memory(device: str) -> int:
    """Largest resident size of this process so far, or on CUDA the memory that PyTorch reserved there; in bytes."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_reserved()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
