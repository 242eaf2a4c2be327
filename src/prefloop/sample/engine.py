"""The engine contract: what every way of sampling from a model promises, and the checks that all of them share."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from prefloop.data.chat import ChatFormat, check_prompt_length
from prefloop.errors import InputError
from prefloop.progress import Advance, ignore
from prefloop.records import FinishReason, Group, Prompt
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed, generator


class Engine(Protocol):
    """Samples K answers to each of a list of prompts.

    What it promises, and `tests/sample/test_contract.py` checks on every engine:

    * one group per prompt, in the order of the prompts, with exactly k responses in the order of k;
    * `token_ids` are the ids that were sampled. An answer ends after the first of: an end token of the chat format, one
      of `Sampling.stop_token_ids`, the token that completes one of `Sampling.stop` (`ends` says which); what ended it
      is kept and `finish_reason` is "stop". An answer of `max_new_tokens` ids that none of these ended has "length".
      `text` is `ChatFormat.decode(token_ids)`;
    * `sampling_logps`, when the engine has them, are the log-probabilities of `token_ids` under the model itself,
      before temperature and truncation, so that they can be compared with the trainer's. `tolerance` is how far, in
      nats a token and on average, they may be from them when all is well; None for an engine that has none;
    * same seed, same answers. A seed belongs to (seed, prompt id, k), never to a batch: an answer is the same
      whichever prompts are sampled with it, up to rounding of the logits (`openvino` draws the K answers to a prompt
      from one stream: there another K gives others);
    * only `Sampling` decides how tokens are drawn: nothing comes from the model's generation_config. What an engine
      cannot draw in exactly that way it refuses (InputError).

    k < 1, a prompt id that occurs twice, and a prompt that leaves no room for `max_new_tokens` in the model's context
    are refused (InputError) before anything is sampled. A failure of the engine itself is an EngineError.
    """

    tolerance: float | None

    def prompt_lengths(self, prompts: Sequence[Prompt], *, sampling: Sampling) -> list[int]:
        """Tokens of every prompt. Raises InputError naming the first one without room for `max_new_tokens` more."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seed: int, advance: Advance = ignore
    ) -> list[Group]:
        """The groups of answers, in the order of `prompts`; `advance` is called with the number just finished."""
        ...

    def close(self) -> None:
        """Give back what the engine holds (a server, a model); may be called twice, nothing may be sampled after it."""
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


def checked_prompt_ids(
    chat: ChatFormat, prompts: Sequence[Prompt], sampling: Sampling, context: int | None
) -> list[list[int]]:
    """The ids of every prompt. Raises InputError naming the first one without room for `max_new_tokens` more."""
    prompt_ids = [chat.prompt_ids(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        check_prompt_length(ids, sampling.max_new_tokens, context, prompt)
    return prompt_ids


def ends(chat: ChatFormat, token_ids: Sequence[int], sampling: Sampling) -> bool:
    """Whether an answer ends with its last token: an end token, a stop id, or the token that completes a stop string.

    A stop string is complete when it stands in the text with the last token and did not without it, as in
    transformers' `StopStringCriteria`; the token may say more than the stop string needs.
    """
    last = token_ids[-1]
    if last in chat.stop_token_ids or last in sampling.stop_token_ids:
        return True
    if not sampling.stop:
        return False
    # Every token that shows in the text has a byte of it at least, so a stop string spans no more tokens than bytes.
    # Some more before them, because a character may begin in an earlier token.
    tail = list(token_ids[-(max(len(text.encode()) for text in sampling.stop) + 4) :])
    text, before = chat.decode(tail), chat.decode(tail[:-1])
    return any(text.count(stop) > before.count(stop) for stop in sampling.stop)


def finish_reason(chat: ChatFormat, token_ids: Sequence[int], sampling: Sampling) -> FinishReason:
    """Why a whole answer ends; raises ValueError for one that neither a stop nor the limit has ended."""
    if ends(chat, token_ids, sampling):
        return "stop"
    if len(token_ids) < sampling.max_new_tokens:
        raise ValueError(f"{len(token_ids)} tokens, fewer than {sampling.max_new_tokens}, and no end")
    return "length"


def shards(lengths: Sequence[int], k: int, answers: int) -> list[list[int]]:
    """Indices of prompts that are sampled together: `answers // k` of them (at least 1), of similar length.

    >>> shards([5, 9, 4, 8], k=2, answers=4)
    [[2, 0], [3, 1]]
    """
    size = max(1, answers // k)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def uniforms(seed: int, prompt_id: str, k: int, n: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64, for the first `n` tokens of answer `k`; a larger n only adds to them."""
    return generator(seed, "answer", prompt_id, k).random(n)


def answer_seed(seed: int, prompt_id: str, k: int) -> int:
    """The seed of answer `k` for engines that draw their own random numbers, below 2^31."""
    return derive_seed(seed, "answer", prompt_id, k) % 2**31
