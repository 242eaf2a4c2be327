"""The engine contract: what every way of sampling from a model promises, and the checks that all of them share."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from prefloop.errors import InputError
from prefloop.records import Group, Prompt
from prefloop.sample.sampling import Sampling
from prefloop.seeds import generator

Advance = Callable[[int], None]
"""Called with the number of answers that have just been finished."""


def ignore(n: int) -> None:
    """An `Advance` that does nothing."""


class Engine(Protocol):
    """Samples K answers to each of a list of prompts.

    What it promises, and `tests/sample/test_contract.py` checks on every engine:

    * one group per prompt, in the order of the prompts, with exactly k responses in the order of k;
    * `token_ids` are the ids that were sampled, the end token included exactly when `finish_reason` is "stop"; an
      answer of `max_new_tokens` ids without an end token has "length"; `text` is `ChatFormat.decode(token_ids)`;
    * `sampling_logp`, when the engine has it, is the summed log-probability of `token_ids` under the model itself,
      before temperature and truncation, so that it can be compared with the trainer's;
    * same seed, same answers. A seed belongs to (seed, prompt id, k), never to a batch: an answer is the same
      whichever prompts are sampled with it, up to rounding of the logits;
    * only `Sampling` decides how tokens are drawn: nothing comes from the model's generation_config.

    k < 1, a prompt id that occurs twice, and a prompt that leaves no room for `max_new_tokens` in the model's context
    are refused (InputError) before anything is sampled. A failure of the engine itself is an EngineError.
    """

    def prompt_lengths(self, prompts: Sequence[Prompt], *, sampling: Sampling) -> list[int]:
        """Tokens of every prompt. Raises InputError naming the first one without room for `max_new_tokens` more."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seed: int, advance: Advance = ignore
    ) -> list[Group]:
        """The groups of answers, in the order of `prompts`."""
        ...


def check_request(prompts: Sequence[Prompt], k: int) -> None:
    """Raises InputError when k < 1 or when two prompts share an id (they would get the same random numbers)."""
    if k < 1:
        raise InputError(f"k = {k}: expected at least 1 answer per prompt")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise InputError(
                f"prompt id {prompt.id!r} occurs twice; ids name the random numbers of a prompt's answers, so give "
                "each prompt an id of its own"
            )
        seen.add(prompt.id)


def shards(lengths: Sequence[int], k: int, batch_size: int) -> list[list[int]]:
    """Indices of prompts that are sampled together: `batch_size // k` of them (at least 1), of similar length.

    >>> shards([5, 9, 4, 8], k=2, batch_size=4)
    [[2, 0], [3, 1]]
    """
    size = max(1, batch_size // k)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def uniforms(seed: int, prompt_id: str, k: int, n: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64, for the first `n` tokens of answer `k`; a larger n only adds to them."""
    return generator(seed, "answer", prompt_id, k).random(n)
