"""A chat server on 127.0.0.1 in a thread that judges two answers, and that can be told to misbehave.

It speaks OpenAI's protocol, so the real client runs against it. It reads the two answers out of their fences, as a
judge has to, and likes the longer one; with a `bias` it also leans to the first slot.
"""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from prefloop.feedback.api_judge import ApiJudge, load_api_judge
from prefloop.feedback.cache import JudgementCache
from prefloop.feedback.chat_server import Patience
from prefloop.feedback.meter import Meter

PATIENCE = Patience(timeout=5.0, retries=3, backoff=0.001, longest_wait=0.5)
FENCED = re.compile(r"<<<([0-9a-f]{8})\n(.*?)\n\1>>>", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """What goes out for a request. `announced`: Content-Length, when it is not that of the body; `delay`: seconds, more
    than anybody waits; `cut`: the connection ends without a word.
    """

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    announced: int | None = None
    delay: float = 0.0
    cut: bool = False

    @classmethod
    def of(cls, data: Any, status: int = 200, **headers: str) -> "Reply":
        return cls(json.dumps(data).encode(), status, headers)

    def edit(self, change: Callable[[dict[str, Any]], object]) -> "Reply":
        """The reply after `change` has edited the completion in it."""
        data = json.loads(self.body)
        change(data)
        return replace(self, body=json.dumps(data).encode())

    @property
    def is_answer(self) -> bool:
        """Whether a completion reaches the one who asked."""
        whole = self.announced is None and not self.cut and not self.delay
        return whole and self.status == 200 and b'"choices"' in self.body and self.body.endswith(b"}")


def refusal(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    return Reply.of({"error": {"message": message, "type": "error", "code": code}}, status, **headers)


Misbehaviour = Callable[[int, dict[str, Any], Reply], Reply]
"""(number of the request from 1, its body, reply that would go out) -> reply that goes out."""


def judge_of(server: "JudgeServer | str", cache: Path, *, meter: Meter | None = None, **options: Any) -> ApiJudge:
    """A judge that asks this server (or address), with a cache file, and waits of milliseconds."""
    settings = {"instruction": "helpfulness", "patience": PATIENCE, "meter": meter or Meter(), **options}
    url = server if isinstance(server, str) else server.url
    return load_api_judge("small", base_url=url, cache=JudgementCache(cache), **settings)


def behave(number: int, body: dict[str, Any], reply: Reply) -> Reply:
    return reply


class JudgeServer:
    """A running server; use it in a `with`. `requests` are the bodies that came, `answered` those that were served.

    `bias`: log-odds for the first slot. `mass`: probability on both labels. `api_key`: the key that it wants, if any.
    """

    def __init__(
        self, *, misbehave: Misbehaviour = behave, bias: float = 0.0, mass: float = 0.98, api_key: str = ""
    ) -> None:
        self.misbehave, self.bias, self.mass, self.api_key = misbehave, bias, mass, api_key
        self.requests: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self._lock = Lock()
        self._http = _HttpServer(("127.0.0.1", 0), _Handler)
        self._http.judge = self
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "JudgeServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def most_asked(self) -> int:
        """How often the question that was answered most often was answered."""
        return max(Counter(json.dumps(body, sort_keys=True) for body in self.answered).values(), default=0)

    def reply(self, body: dict[str, Any]) -> Reply:
        with self._lock:
            self.requests.append(body)
            number = len(self.requests)
        reply = self.misbehave(number, body, Reply.of(self.completion(body)))
        if reply.is_answer:
            with self._lock:
                self.answered.append(body)
        return reply

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        q = first_preferred(body["messages"][0]["content"], self.bias)
        label = "1" if q >= 0.5 else "2"
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": label},
        }
        if body.get("logprobs"):
            # Half of each label's probability is on its spelling with a space before it.
            tops = [(label, p * self.mass / 2) for label, p in (("1", q), (" 1", q), ("2", 1 - q), (" 2", 1 - q))]
            tops = [(token, p) for token, p in [*tops, ("The", 1 - self.mass)] if p > 0]
            top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in tops]
            choice["logprobs"] = {"content": [{**max(top, key=lambda t: t["logprob"]), "top_logprobs": top}]}
        usage = {"prompt_tokens": len(body["messages"][0]["content"]) // 4, "completion_tokens": 1}
        return {"id": "c", "object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}


def first_preferred(message: str, bias: float = 0.0) -> float:
    """P(the first answer is preferred): by a tenth of the difference in characters, and the slot."""
    _, (_, first), (_, second) = FENCED.findall(message)
    return 1 / (1 + math.exp(-(len(first) - len(second)) / 10 - bias))


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    judge: JudgeServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has hung up is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        assert isinstance(self.server, _HttpServer)
        judge = self.server.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if judge.api_key and self.headers["Authorization"] != f"Bearer {judge.api_key}":
            self._send(refusal(401, f"Unauthorized: {self.headers['Authorization']}"))
        elif self.path != "/v1/chat/completions":
            self._send(refusal(404, "Not Found"))
        else:
            self._send(judge.reply(body))

    def _send(self, reply: Reply) -> None:
        time.sleep(reply.delay)
        if reply.cut:
            self.close_connection = True
            return
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(reply.body)), **reply.headers}
        if reply.announced is not None:
            headers["Content-Length"] = str(reply.announced)
            self.close_connection = True
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""
