"""A completions server on 127.0.0.1 in a thread: vLLM in miniature, over a tiny model, that can be told to misbehave.

It speaks OpenAI's protocol with vLLM's extensions, so the real client runs against it. Requests that are open at once
are decoded in one batch, without a cache: padding on the right is seen by no earlier position. What a request leaves
unsaid comes from `DEFAULTS`, which are as unlike a request's as a model's generation_config can be.

As a program it takes the part of `vllm.entrypoints.openai.api_server` (see test_vllm.py).
"""

import argparse
import atexit
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prefloop.sample.draw import draw
from prefloop.sample.engine import Engine
from prefloop.sample.options import Server
from prefloop.sample.sampling import Sampling
from prefloop.sample.server import ServerEngine
from prefloop.seeds import generator

DEFAULTS: dict[str, Any] = {
    "n": 1,
    "max_tokens": 16,
    "temperature": 0.1,
    "top_p": 0.5,
    "top_k": 2,
    "min_p": 0.5,
    "repetition_penalty": 5.0,
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "min_tokens": 9,
    "skip_special_tokens": True,
    "ignore_eos": False,
    "stop": [],
    "stop_token_ids": [],
    "seed": None,
    "logprobs": None,
    "return_token_ids": False,
}
NEUTRAL = {"n": 1, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0}


@dataclass(frozen=True)
class Reply:
    """What goes out for a request. `announced`: Content-Length, when it is not that of the body; `delay` in seconds."""

    body: bytes
    status: int = 200
    announced: int | None = None
    delay: float = 0.0

    @classmethod
    def of(cls, data: Any, status: int = 200) -> "Reply":
        return cls(json.dumps(data).encode(), status)

    def edit(self, change: Callable[[dict[str, Any]], object]) -> "Reply":
        """The reply after `change` has edited the first answer in it."""
        data = json.loads(self.body)
        change(data["choices"][0])
        return replace(self, body=json.dumps(data).encode())


Misbehaviour = Callable[[dict[str, Any], Reply], Reply]
"""(request, reply that would go out) -> reply that goes out, for completions."""


def behave(request: dict[str, Any], reply: Reply) -> Reply:
    return reply


@dataclass
class _Row:
    """One answer while it is being sampled."""

    prompt: list[int]
    request: dict[str, Any]
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    done: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        self.uniforms = generator(self.request["seed"], "loopback").random(self.request["max_tokens"])
        self.setting = tuple(self.request[name] for name in ("temperature", "top_p", "top_k", "min_p"))


class Loopback:
    """A running server; use it in a `with`. `requests` are the bodies that came, in order.

    `names`: models that it lists. `owner`: whose server it says it is. `api_key`: the key that it wants, if any.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        names: Sequence[str] = ("tiny",),
        owner: str = "vllm",
        api_key: str = "",
        eos: Sequence[int] = (),
        misbehave: Misbehaviour = behave,
        port: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.names, self.owner, self.api_key = model, tokenizer, names, owner, api_key
        self.eos, self.misbehave = set(eos), misbehave
        self.context: int = model.config.max_position_embeddings
        self.requests: list[dict[str, Any]] = []
        self._arrived: SimpleQueue[_Row | None] = SimpleQueue()
        self._http = _HttpServer(("127.0.0.1", port), _Handler)
        self._http.loopback = self
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._threads = [
            Thread(target=self._decode, daemon=True),
            Thread(target=self._http.serve_forever, args=(0.02,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Loopback":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._arrived.put(None)
        for thread in self._threads:
            thread.join()

    def wait(self) -> None:
        """Serve until the process ends."""
        self._threads[1].join()

    def models(self) -> Reply:
        cards = [{"id": name, "owned_by": self.owner, "max_model_len": self.context} for name in self.names]
        return Reply.of({"object": "list", "data": cards})

    def complete(self, body: dict[str, Any]) -> Reply:
        self.requests.append(body)
        request = {**DEFAULTS, **body}
        if body.get("model") not in self.names:
            return refusal(404, f"The model `{body.get('model')}` does not exist.")
        strange = [name for name, value in NEUTRAL.items() if request[name] != value]
        if strange:
            return refusal(400, f"{', '.join(strange)}: not implemented here, so it must be stated and neutral")
        if len(request["prompt"]) + request["max_tokens"] > self.context:
            return refusal(400, f"This model's maximum context length is {self.context} tokens.")
        row = _Row(request["prompt"], request)
        self._arrived.put(row)
        row.done.wait()
        return self.misbehave(body, Reply.of({"id": "cmpl-1", "object": "text_completion", "choices": [_choice(row)]}))

    def _decode(self) -> None:
        """Sample a token for every open answer, take in those that have arrived, and so on."""
        rows: list[_Row] = []
        while True:
            try:
                while True:
                    row = self._arrived.get(block=not rows)
                    if row is None:
                        return
                    rows.append(row)
            except Empty:
                self._step(rows)
                rows = [row for row in rows if not row.finish_reason]

    @torch.inference_mode()
    def _step(self, rows: list[_Row]) -> None:
        ids = [row.prompt + row.token_ids for row in rows]
        width = max(len(row) for row in ids)
        padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        logits = self.model(input_ids=padded).logits[torch.arange(len(rows)), [len(row) - 1 for row in ids]]
        for setting in {row.setting for row in rows}:
            mine = [i for i, row in enumerate(rows) if row.setting == setting]
            numbers = torch.tensor([rows[i].uniforms[len(rows[i].token_ids)] for i in mine], dtype=torch.float64)
            tokens, logps = draw(logits[mine], numbers, _sampling(*setting))
            for i, token, logp in zip(mine, tokens.tolist(), logps.tolist(), strict=True):
                self._append(rows[i], token, logp)

    def _append(self, row: _Row, token: int, logp: float) -> None:
        row.token_ids.append(token)
        row.logps.append(logp)
        ends = {*row.request["stop_token_ids"], *(() if row.request["ignore_eos"] else self.eos)}
        if token in ends or any(stop in self._text(row) for stop in row.request["stop"]):
            row.finish_reason = "stop"
        elif len(row.token_ids) == row.request["max_tokens"]:
            row.finish_reason = "length"
        if row.finish_reason:
            row.done.set()

    def _text(self, row: _Row) -> str:
        return str(self.tokenizer.decode(row.token_ids, skip_special_tokens=row.request["skip_special_tokens"]))


def _sampling(temperature: float, top_p: float, top_k: int, min_p: float) -> Sampling:
    return Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k if top_k > 0 else None, min_p=min_p if min_p > 0 else None
    )


def _choice(row: _Row) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": row.finish_reason, "logprobs": None}
    if row.request["logprobs"] is not None:
        choice["logprobs"] = {"token_logprobs": row.logps}
    if row.request["return_token_ids"]:
        choice |= {"token_ids": row.token_ids, "prompt_token_ids": row.prompt}
    return choice


def refusal(status: int, message: str) -> Reply:
    return Reply.of({"error": {"message": message, "type": "error", "code": status}}, status)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    loopback: Loopback

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has hung up is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    @property
    def loopback(self) -> Loopback:
        assert isinstance(self.server, _HttpServer)
        return self.server.loopback

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(Reply(b""))
        elif self.path == "/v1/models":
            self._send(self._authorized() or self.loopback.models())
        else:
            self._send(refusal(404, "Not Found"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            self._send(self._authorized() or self.loopback.complete(body))
        else:
            self._send(refusal(404, "Not Found"))

    def _authorized(self) -> Reply | None:
        key = self.loopback.api_key
        if key and self.headers["Authorization"] != f"Bearer {key}":
            return refusal(401, f"Unauthorized: {self.headers['Authorization']}")
        return None

    def _send(self, reply: Reply) -> None:
        time.sleep(reply.delay)
        announced = len(reply.body) if reply.announced is None else reply.announced
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(reply.body)
        self.close_connection = announced != len(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@cache
def shared() -> Loopback:
    """One well-behaved server for all tests of a session."""
    from tests.sample.engines import CHAT, stopping_llama  # which has this module's `server` in its table

    running = Loopback(stopping_llama(), CHAT.tokenizer)
    atexit.register(running.__exit__)  # a thread that is inside torch when the interpreter goes would abort it
    return running


def server(batch_size: int) -> Engine:
    """A `ServerEngine` for the contract battery; `batch_size` requests are open at once."""
    from tests.sample.engines import CHAT

    return ServerEngine(CHAT, Server(url=shared().url, concurrency=batch_size), dtype="float32")


def main() -> None:
    """Serve the model folder that vLLM's command line names."""
    parser = argparse.ArgumentParser()
    for option in ("model", "served-model-name", "host", "dtype", "generation-config"):
        parser.add_argument(f"--{option}", required=True)
    for option in ("port", "max-model-len", "tensor-parallel-size", "data-parallel-size"):
        parser.add_argument(f"--{option}", type=int, required=True)
    for flag in ("enable-prefix-caching", "disable-uvicorn-access-log"):
        parser.add_argument(f"--{flag}", action="store_true", required=True)
    parser.add_argument("--no-enable-chunked-prefill", action="store_true", help="on a CPU")
    parser.add_argument("--die-at", type=int, default=0, help="the request at which the process ends")
    args = parser.parse_args()
    print("loading the model", flush=True)

    def die(request: dict[str, Any], reply: Reply) -> Reply:
        if 0 < args.die_at <= len(loopback.requests):
            os.write(1, b"RuntimeError: out of memory\n")  # at once: another request's thread may say it too
            os._exit(3)
        return reply

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    loopback = Loopback(
        model,
        AutoTokenizer.from_pretrained(args.model),
        names=[args.served_model_name],
        api_key=os.environ["VLLM_API_KEY"],
        misbehave=die,
        port=args.port,
    )
    loopback.wait()
