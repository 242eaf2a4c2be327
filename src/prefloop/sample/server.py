"""Sampling from a server: any OpenAI-compatible completions endpoint that returns token ids and log-probabilities.

Every answer is a request with a seed of its own; the server's prefix cache shares the prompt among them. What is asked
for and what is checked in the answers is in `prefloop.sample.completions`; here is how it gets there and back.
"""

import ipaddress
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from importlib.util import find_spec
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from prefloop.data.chat import ChatFormat
from prefloop.errors import EngineError, InputError, PrefloopError
from prefloop.progress import Advance, ignore
from prefloop.records import Group, Prompt, Response
from prefloop.sample.completions import (
    Ask,
    Completion,
    Model,
    Models,
    choose_model,
    request,
    response,
    sampling_obstacle,
)
from prefloop.sample.engine import answer_seed, check_request, checked_prompt_ids
from prefloop.sample.options import Server
from prefloop.sample.sampling import Sampling

if TYPE_CHECKING:
    from openai import OpenAI

# Mean distance, in nats a token, from the float32 trainer's log-probabilities. Seen with vLLM on SmolLM2-135M: 0.00001
# in float32 and 0.04 in bfloat16, on a CPU. GPU kernels may use TensorFloat-32 for float32 products.
TOLERANCE = {"float32": 5e-3, "bfloat16": 0.1}

CONNECT_TIMEOUT = 30.0
"""Seconds until a host that does not answer at all counts as unreachable."""

CHECK_URL = "check server.url: it ends where /completions begins, as in http://127.0.0.1:8000/v1"

T = TypeVar("T")
R = TypeVar("R")
Shape = TypeVar("Shape", bound=BaseModel)


class ServerEngine:
    """An `Engine` over the completions endpoint at `options.url`.

    `context`: the model's, where it is known; the server's own limit counts too. `dtype`: what the server computes in,
    for the tolerance. `api_key`: in place of the one in the environment variable `options.api_key_env`.
    Nothing is sent before the first prompt is measured or sampled.
    """

    def __init__(
        self,
        chat: ChatFormat,
        options: Server,
        *,
        context: int | None = None,
        dtype: str = "bfloat16",
        api_key: str | None = None,
    ) -> None:
        if not options.url:
            raise InputError("server.url is missing: name the server, such as http://127.0.0.1:8000/v1")
        self.chat, self.options, self.context = chat, options, context
        self.tolerance: float | None = TOLERANCE[dtype]
        self._api_key = api_key or os.environ.get(options.api_key_env, "")
        self._client = _client(options, self._api_key)
        self._close = weakref.finalize(self, self._client.close)
        self._model: Model | None = None

    def prompt_lengths(self, prompts: Sequence[Prompt], *, sampling: Sampling) -> list[int]:
        return [len(ids) for ids in checked_prompt_ids(self.chat, prompts, sampling, self._room())]

    def sample(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seed: int, advance: Advance = ignore
    ) -> list[Group]:
        check_request(prompts, k)
        check_sampling(sampling)
        if not prompts:
            return []
        prompt_ids = checked_prompt_ids(self.chat, prompts, sampling, self._room())
        asks = [
            Ask(place, number, prompt, ids, answer_seed(seed, prompt.id, number))
            for place, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
            for number in range(k)
        ]
        responses: dict[tuple[int, int], Response] = {}
        with closing(in_threads(lambda ask: self._answer(ask, sampling), asks, self.options.concurrency)) as answers:
            for ask, answer in answers:
                responses[ask.place, ask.k] = answer
                advance(1)
        return [
            Group(prompt=prompt, responses=tuple(responses[place, number] for number in range(k)))
            for place, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        self._close()

    def _room(self) -> int | None:
        """Tokens of a prompt and its answer together, by what the model and the server allow."""
        return min((n for n in (self.context, self._served().max_model_len) if n is not None), default=None)

    def _served(self) -> Model:
        """The model to sample from, as the server describes it; asked for once."""
        if self._model is None:
            models = self._read(Models, self._send("/models", None, "the list of models"))
            self._model = choose_model(models.data, self.options.model, self.options.url)
        return self._model

    def _answer(self, ask: Ask, sampling: Sampling) -> Response:
        body = request(self._served(), ask, self.chat, sampling)
        completion = self._read(Completion, self._send("/completions", body, str(ask)))
        return response(completion, ask, self.chat, sampling, self.options.url)

    def _send(self, path: str, body: dict[str, Any] | None, about: str) -> object:
        """The JSON that comes back. Raises EngineError, or InputError for what the user has to mend."""
        import openai

        if self._client.is_closed():
            raise InputError("this engine was closed; load another")
        try:
            if body is None:
                return self._client.get(path, cast_to=object)
            return self._client.post(path, body=body, cast_to=object)
        except openai.OpenAIError as error:
            raise self._failure(error, about) from None
        except ValueError:
            raise EngineError(f"{self.options.url}: the answer to {path} is not JSON; {CHECK_URL}") from None

    def _read(self, shape: type[Shape], data: object) -> Shape:
        try:
            return shape.model_validate(data)
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors()[0]["loc"]) or "all of it"
            raise EngineError(
                f"{self.options.url}: what came back is not what the completions protocol says ({place}); {CHECK_URL}"
            ) from None

    def _failure(self, error: Exception, about: str) -> PrefloopError:
        """What went wrong with a request; the key is not in it."""
        import openai

        url = self.options.url
        if isinstance(error, openai.APITimeoutError):
            return EngineError(
                f"{url}: nothing came back within {self.options.timeout:g} s ({about}); raise server.timeout, or lower "
                "server.concurrency"
            )
        if isinstance(error, openai.APIStatusError):
            said = f"{error.status_code}: {self._quoted(error.message)}"
            if error.status_code in (401, 403):
                fix = "is the key right that is in" if self._api_key else "put its key into"
                return InputError(f"{url} let us not in ({error.status_code}); {fix} ${self.options.api_key_env}")
            if error.status_code == 404:
                return InputError(f"{url}: not found ({said}) asking for {about}; {CHECK_URL}")
            if error.status_code in (400, 422):
                return InputError(f"{url} does not take the request for {about} ({said})")
            return EngineError(f"{url} failed on {about} ({said}); its log may say why")
        cause = self._quoted(str(error.__cause__ or error))
        return EngineError(f"{url} cannot be reached, or broke off ({about}: {cause}); is it running? {CHECK_URL}")

    def _quoted(self, text: str) -> str:
        """One short line of what a server or a library said, with the key taken out."""
        line = " ".join(text.split())
        return (line.replace(self._api_key, "***") if self._api_key else line)[:300]


def server_obstacle(sampling: Sampling) -> str | None:
    """Why no server can be sampled from here in this way, or None."""
    if find_spec("openai") is None:
        return "openai is not installed (pip install 'prefloop[server]')"
    return sampling_obstacle(sampling)


def check_sampling(sampling: Sampling) -> None:
    """Raises InputError for what a server would not draw as `Sampling` says."""
    obstacle = sampling_obstacle(sampling)
    if obstacle:
        raise InputError(f"a server cannot sample in this way: {obstacle}")


def in_threads(function: Callable[[T], R], items: Sequence[T], workers: int) -> Generator[tuple[T, R]]:
    """`(item, function(item))` for every item, as they finish. The first exception ends it.

    The threads are daemons: requests that are still open when it ends early are left to themselves, and a process that
    wants to exit does not wait for them, as it would for a `ThreadPoolExecutor`.
    """
    waiting = deque(items)
    finished: SimpleQueue[tuple[T, R] | BaseException] = SimpleQueue()

    def work() -> None:
        while waiting:
            try:
                item = waiting.popleft()
            except IndexError:  # another thread was quicker
                return
            try:
                finished.put((item, function(item)))
            except BaseException as error:
                waiting.clear()
                finished.put(error)

    try:
        for _ in range(min(workers, len(items))):
            Thread(target=work, name="prefloop-request", daemon=True).start()
        for _ in items:
            result = finished.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        waiting.clear()


def _client(options: Server, api_key: str) -> "OpenAI":
    try:
        import openai
    except ImportError:
        raise InputError("sampling from a server needs openai; run: pip install 'prefloop[server]'") from None
    timeout = openai.Timeout(options.timeout, connect=min(options.timeout, CONNECT_TIMEOUT))
    return openai.OpenAI(
        base_url=options.url,
        # The client insists on one; a server that wants none ignores it.
        api_key=api_key or "none",
        timeout=timeout,
        max_retries=options.retries,
        # No proxy that the environment names can reach a server on this machine.
        http_client=openai.DefaultHttpxClient(timeout=timeout, trust_env=not _is_loopback(options.url)),
    )


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
