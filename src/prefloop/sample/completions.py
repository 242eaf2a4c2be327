"""The completions protocol as `ServerEngine` speaks it: what is asked for, and what is checked in what comes back.

It is OpenAI's protocol with vLLM's extensions: token ids in and out, truncations and stop ids.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from prefloop.data.chat import ChatFormat
from prefloop.errors import EngineError, InputError, did_you_mean
from prefloop.records import FinishReason, Prompt, Response
from prefloop.sample.engine import finish_reason
from prefloop.sample.sampling import Sampling

COLDEST = 0.01
"""The lowest temperature above zero that vLLM takes as it is; it raises lower ones to this."""


class Ask(NamedTuple):
    """One answer that is wanted: answer `k` to `prompt`, whose place among the prompts is `place`."""

    place: int
    k: int
    prompt: Prompt
    prompt_ids: list[int]
    seed: int

    def __str__(self) -> str:
        return f"answer {self.k} to prompt {self.prompt.id!r}"


class Model(BaseModel):
    """One entry of the list of models. `parent` is the model that an adapter belongs to."""

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None
    parent: str | None = None


class Models(BaseModel):
    """The list of models."""

    data: list[Model]


class Logprobs(BaseModel):
    """Log-probabilities of the sampled tokens, in nats."""

    token_logprobs: list[float | None]


class Choice(BaseModel):
    """One answer."""

    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: Logprobs | None = None


class Completion(BaseModel):
    """What comes back for one request."""

    choices: list[Choice]


def sampling_obstacle(sampling: Sampling) -> str | None:
    """Why vLLM and its like would not draw as `Sampling` says, or None.

    vLLM divides by the temperature, applies min_p, then top_k and top_p. top_k and min_p keep the same tokens in either
    order; top_p does not.
    """
    if sampling.min_p is not None and sampling.top_p < 1:
        return "vLLM applies min_p before top_p, which transformers does after it (use one of them)"
    if 0 < sampling.temperature < COLDEST:
        return f"vLLM raises temperatures below {COLDEST} to it (use 0, the most likely token, or at least {COLDEST})"
    return None


def request(model: Model, ask: Ask, chat: ChatFormat, sampling: Sampling) -> dict[str, Any]:
    """The body of a request, every value that decides a draw stated."""
    return {
        "model": model.id,
        "prompt": ask.prompt_ids,
        "seed": ask.seed,
        "n": 1,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p or 0.0,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted({*chat.stop_token_ids, *sampling.stop_token_ids}),
        # Else vLLM ends answers at every eos_token_id of the model's generation_config as well. Elsewhere the option
        # may forbid these tokens (llama.cpp), so it is for vLLM alone.
        "ignore_eos": model.owned_by == "vllm",
        "include_stop_str_in_output": True,
        # Stop strings are looked for in the text of ChatFormat.decode, which has no special tokens in it.
        "skip_special_tokens": True,
        "add_special_tokens": False,
        "min_tokens": 0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "watermarking": False,
        "logprobs": 1,
        "return_token_ids": True,
    }


def response(completion: Completion, ask: Ask, chat: ChatFormat, sampling: Sampling, url: str) -> Response:
    """The answer that came back. Raises InputError for a server that cannot do this, EngineError for a wrong answer."""
    if len(completion.choices) != 1:
        raise EngineError(f"{url} sent {len(completion.choices)} answers in place of 1, for {ask}")
    choice = completion.choices[0]
    if choice.token_ids is None:
        raise InputError(
            f"{url} returns text without token ids (return_token_ids); use vLLM 0.10.2 or later, or engine vllm"
        )
    if choice.logprobs is None:
        raise InputError(f"{url} returns no log-probabilities (logprobs); use vLLM, or engine vllm")
    ids, logps = choice.token_ids, choice.logprobs.token_logprobs
    if choice.prompt_token_ids is not None and choice.prompt_token_ids != ask.prompt_ids:
        raise EngineError(
            f"{url} changed prompt {ask.prompt.id!r}: {len(ask.prompt_ids)} ids were sent, and it answered to "
            f"{len(choice.prompt_token_ids)} that are not the same; let it take token ids as they are"
        )
    if len(logps) != len(ids):
        raise EngineError(f"{url} sent {len(logps)} log-probabilities of {len(ids)} tokens, for {ask}")
    finite = [logp for logp in logps if logp is not None and math.isfinite(logp)]
    if len(finite) < len(ids):
        raise EngineError(
            f"{url}: {len(ids) - len(finite)} of {len(ids)} log-probabilities are not numbers, for {ask}; the weights "
            "that it serves are damaged or overflow in its precision (try float32)"
        )
    return Response(
        text=chat.decode(ids),
        token_ids=tuple(ids),
        finish_reason=_checked_end(ids, choice.finish_reason, ask, chat, sampling, url),
        sampling_logps=tuple(round(logp, 6) for logp in finite),
    )


def _checked_end(
    ids: list[int], said: str | None, ask: Ask, chat: ChatFormat, sampling: Sampling, url: str
) -> FinishReason:
    """Why the answer ends, by its ids. Raises EngineError when it ends early or late, or the server says otherwise."""
    if not 0 < len(ids) <= sampling.max_new_tokens:
        raise EngineError(f"{url}: {ask} has {len(ids)} tokens; expected 1 to {sampling.max_new_tokens}")
    if _goes_on(chat, ids, sampling):
        raise EngineError(f"{url}: {ask} goes on past its end; the server does not honour stop_token_ids or stop")
    try:
        reason = finish_reason(chat, ids, sampling)
    except ValueError:
        reason = None
    # Servers that look at the limit first call an end on the last token that fits a matter of length.
    full = said == "length" and len(ids) == sampling.max_new_tokens
    if reason is None or (reason != said and not full):
        raise EngineError(
            f"{url}: {ask} has {len(ids)} of at most {sampling.max_new_tokens} tokens and ends with "
            f"{chat.token(ids[-1])}, for which the server says {said!r} and {reason or 'no end'!r} is right; it has a "
            "rule or a limit of its own (start vLLM with --generation-config vllm)"
        )
    return reason


def _goes_on(chat: ChatFormat, ids: list[int], sampling: Sampling) -> bool:
    """Whether an answer ends before its last token already."""
    before = ids[:-1]
    text = chat.decode(before) if sampling.stop else ""
    stops = chat.stop_token_ids.union(sampling.stop_token_ids)
    return not stops.isdisjoint(before) or any(stop in text for stop in sampling.stop)


def choose_model(models: Sequence[Model], name: str, url: str) -> Model:
    """The model called `name`, or without a name the only one (adapters of it not counted). Raises InputError."""
    names = ", ".join(model.id for model in models) or "none"
    if name:
        found = [model for model in models if model.id == name]
        if not found:
            near = did_you_mean(name, [model.id for model in models])
            raise InputError(f"{url} does not serve model {name!r}; it serves {names}.{near}")
        return found[0]
    own = [model for model in models if model.parent is None]
    if len(own) != 1:
        raise InputError(f"{url} serves {len(own)} models ({names}); name one with server.model")
    return own[0]
