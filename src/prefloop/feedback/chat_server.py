"""Chat completions from an OpenAI-compatible server: patience with one that falters, and no word of its key.

What the server may recover from is tried again, with waits that double or as long as its Retry-After says, and counted
by kind: status 408, 409, 429 and 5xx, time-outs, connections that break or are refused, answers that are not JSON or
not of the protocol. The client's own retries are off: they would not be counted, nor end when the run ends.
"""

import json
import os
import random
import re
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from threading import Event
from typing import Any

from pydantic import BaseModel, ValidationError

from prefloop.errors import FeedbackError, InputError, PrefloopError
from prefloop.feedback.options import without_secret
from prefloop.sample.options import Server
from prefloop.sample.server import _client

FIRST_RETRIES = 2
"""A server that has never answered is probably not there: its connections are tried again no more often than this."""
SHORTEST_KEY = 8
AGAIN = (408, 409, 429)
TOO_LONG = re.compile(
    r"context.{0,20}(length|window|size)|maximum.{0,20}(length|tokens)|too long|too many tokens", re.I
)


class TopLogprob(BaseModel):
    """One of the likeliest tokens."""

    token: str
    logprob: float


class TokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob] | None = None


class Logprobs(BaseModel):
    content: list[TokenLogprobs] | None = None


class Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class Choice(BaseModel):
    message: Message | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ChatCompletion(BaseModel):
    """What comes back for one request, as far as a judge needs it."""

    choices: list[Choice]
    usage: Usage | None = None


@dataclass(frozen=True)
class Patience:
    """Seconds that one request may take; how often a failed one is sent again; the first wait before that, which then
    doubles; and the longest wait, above which a server counts as gone.
    """

    timeout: float = 60.0
    retries: int = 6
    backoff: float = 1.0
    longest_wait: float = 300.0

    def wait(self, failures: int) -> float:
        """Seconds before the next try; a quarter is drawn, so that many requests do not return at once."""
        return min(self.longest_wait, self.backoff * 2.0 ** (failures - 1)) * random.uniform(0.75, 1.0)


class Refused(Exception):
    """The server does not take this one question; it may take others."""


class NoLogprobs(Exception):
    """The server takes no request for log-probabilities, with what it said; it may take the same without."""


class Stopped(Exception):
    """The question was given up, because the run is ending."""


class ChatServer:
    """One model behind one URL. The key is read from the environment variable `api_key_env`, and kept from every text.

    `on_fault` is called with the kind of every failure.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str,
        patience: Patience,
        on_fault: Callable[[str], None],
    ) -> None:
        self.url, self.model, self.patience, self.on_fault = checked_url(base_url), model, patience, on_fault
        self.api_key_env = api_key_env
        self._key = _read_key(api_key_env)
        options = Server(url=self.url, timeout=patience.timeout, retries=0)
        self._client = _client(options, self._key)
        self._close = weakref.finalize(self, self._client.close)
        self._answered = False

    def complete(self, body: dict[str, Any], stop: Event) -> ChatCompletion:
        """The answer to a request. Raises Refused for this question alone, Stopped in place of a wait once `stop` is
        set, InputError for what the user has to mend, FeedbackError when the server is gone.
        """
        failures = 0
        while True:
            try:
                completion = self._send(body)
            except _Failure as failure:
                self.on_fault(failure.kind)
                failures += 1
                wait = failure.retry_after or self.patience.wait(failures)
                if failures > self._retries(failure) or wait > self.patience.longest_wait:
                    raise self._gone(failure, failures, wait) from None
                if stop.wait(wait):
                    raise Stopped from None
            else:
                self._answered = True
                return completion

    def close(self) -> None:
        self._close()

    def redacted(self, text: str) -> str:
        """A text without the key. What is shorter than a key ("EMPTY" for a local server) is no secret, and stands in
        answers as a word.
        """
        if len(self._key) < SHORTEST_KEY:
            return text
        for written in sorted({self._key, repr(self._key)[1:-1], json.dumps(self._key)[1:-1]}, key=len, reverse=True):
            text = text.replace(written, "***") if written else text
        return text

    def _send(self, body: dict[str, Any]) -> ChatCompletion:
        import openai

        try:
            data = self._client.post("/chat/completions", body={"model": self.model, **body}, cast_to=object)
            return ChatCompletion.model_validate(data)
        except openai.APITimeoutError:
            raise _Failure("timeout", f"nothing came back within {self.patience.timeout:g} s") from None
        except openai.APIStatusError as error:
            problem = self._by_status(error, asked_for_logprobs="logprobs" in body)
            if isinstance(problem, PrefloopError):
                self.on_fault(f"status {error.status_code}")
            raise problem from None
        except openai.OpenAIError as error:
            raise _Failure("connection", self._quoted(str(error.__cause__ or error))) from None
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"])) or "all of it"
            raise _Failure("wrong JSON", f"the answer is not of the protocol ({place})") from None
        except ValueError:
            raise _Failure("not JSON", "the answer is not JSON") from None

    def _by_status(self, error: Any, *, asked_for_logprobs: bool) -> "PrefloopError | Refused | NoLogprobs | _Failure":
        """What a status other than 2xx means (`error`: openai.APIStatusError)."""
        status, said = error.status_code, self._quoted(error.message)
        asked = f"{self.url} (model {self.model!r})"
        if status in (401, 403):
            fix = "is the key right that is in" if self._key else "put its key into"
            return InputError(f"{asked} let us not in ({status}); {fix} ${self.api_key_env}")
        if error.code == "insufficient_quota":
            return FeedbackError(
                f"{asked}: the account has no money left ({status}); what is answered is kept: top it up and run the "
                "same command again"
            )
        if status in AGAIN or status >= 500:
            return _Failure(f"status {status}", said, _retry_after(error.response.headers))
        if "content_filter" in (error.code or "") or "content_policy" in (error.code or ""):
            return Refused("refused by the server's content filter")
        if status == 413 or (
            status in (400, 422) and (error.code == "context_length_exceeded" or TOO_LONG.search(said))
        ):
            return Refused("longer than the judge's context")
        if status in (400, 422) and asked_for_logprobs and "logprob" in said.lower():
            return NoLogprobs(said)
        if status == 404:
            return InputError(
                f"{asked}: not found ({said}); check the model's name, and that base_url ends where /chat/completions "
                "begins, as in http://127.0.0.1:8000/v1"
            )
        return InputError(
            f"{asked} does not take the request ({said}); choose another model, or change the request: "
            "feedback.votes = 1 asks for no log-probabilities, and a null in feedback.request leaves a field out"
        )

    def _retries(self, failure: "_Failure") -> int:
        unreachable = failure.kind == "connection" and not self._answered
        return min(self.patience.retries, FIRST_RETRIES) if unreachable else self.patience.retries

    def _gone(self, failure: "_Failure", failures: int, wait: float) -> FeedbackError:
        kept = "what is answered is kept: run the same command again when it is back"
        if wait > self.patience.longest_wait:
            return FeedbackError(f"{self.url} asks to wait {wait:.0f} s ({failure.said}); {kept}")
        return FeedbackError(
            f"{self.url} (model {self.model!r}) failed {failures} times on one question, at last so: {failure.said}; "
            f"{kept}"
        )

    def _quoted(self, text: str) -> str:
        """One short line of what a server or a library said, without the key."""
        return " ".join(self.redacted(text).split())[:300]


class _Failure(Exception):
    """A request that may be sent again: the `kind` to count, what was `said`, and the wait that the server asks for."""

    def __init__(self, kind: str, said: str, retry_after: float | None = None) -> None:
        super().__init__(said)
        self.kind, self.said, self.retry_after = kind, said, retry_after


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait: a number of them, or of milliseconds, or a date."""
    for header, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = headers.get(header, "")
        if re.fullmatch(r"\d{1,9}(\.\d*)?", text):
            return float(text) / unit
    date = parsedate_tz(headers.get("retry-after", ""))
    return None if date is None else max(0.0, mktime_tz(date) - time.time())


def checked_url(base_url: str) -> str:
    """The address of a server. Raises InputError for none, and for one with a secret in it (which is not shown)."""
    if not base_url:
        raise InputError("base_url is missing: name the server, such as http://127.0.0.1:8000/v1")
    try:
        without_secret(base_url, "base_url")
    except ValueError as error:
        raise InputError(str(error)) from None
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", base_url):
        raise InputError(f"base_url = {base_url!r}: expected http://HOST:PORT/v1 or https://HOST/v1")
    return Server(url=base_url).url


def _read_key(variable: str) -> str:
    """The key in an environment variable, or nothing. Raises InputError for one that no request can carry."""
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise InputError(f"${variable} is no key: it has spaces or special characters in it; set it again")
    return key
