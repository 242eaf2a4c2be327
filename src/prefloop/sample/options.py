"""Options of sampling engines. Imports no torch, so that the command line can show them at once."""

import re
import shlex
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator

from prefloop.config import Config, free

EngineName = Annotated[
    str,
    Field(
        description="what samples: auto (the fastest that can), transformers, openvino (on CPUs), vllm (started here, "
        "or at --server.url), server (any OpenAI-compatible one with token ids), scripted"
    ),
]


def _variable_name(name: str) -> str:
    """The name; ValueError, which does not show it, for what can be no name: it may be the key itself."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(
            "api_key_env is not the name of an environment variable (it is not shown, in case it is the key); put the "
            "key into a variable, such as OPENAI_API_KEY, and give that name"
        )
    return name


KeyVariable = Annotated[str, AfterValidator(_variable_name)]
"""The name of an environment variable that holds a key, and never the key."""


class Server(Config):
    """The server that `--engine server` or `--engine vllm` samples from."""

    url: str = free(
        default="",
        description="of a running server, such as http://127.0.0.1:8000/v1; when empty, --engine vllm starts its own",
    )
    model: str = Field(default="", description="the name it serves the model under; its only model when empty")
    api_key_env: KeyVariable = free(
        default="OPENAI_API_KEY", description="environment variable with the key, where the server wants one"
    )
    concurrency: int = free(default=64, ge=1, description="requests that are open at once")
    timeout: float = free(default=600.0, gt=0, description="seconds that one request may take")
    retries: int = free(default=2, ge=0, description="times that a request is sent again after a failure")
    python: str = free(
        default="", description="interpreter of an environment with vLLM; the one of `vllm` on the PATH when empty"
    )
    start_timeout: float = free(default=900.0, gt=0, description="seconds until a started server must be ready")
    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs that share one copy of the model")
    data_parallel_size: int = free(default=1, ge=1, description="copies of the model")
    args: str = Field(
        default="",
        description="further arguments of its server in one string, such as '--gpu-memory-utilization 0.8 --seed 1'",
    )

    @field_validator("url")
    @classmethod
    def _completions_live_below(cls, url: str) -> str:
        """Without a trailing slash, and with the usual /v1 where there is no path."""
        if not url:
            return url
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise ValueError("server.url has a user name or a password in it; put the key into server.api_key_env")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"server.url = {url!r}: expected http://HOST:PORT/v1 or https://HOST/v1")
        return url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")

    @field_validator("args")
    @classmethod
    def _args_can_be_split(cls, args: str) -> str:
        try:
            shlex.split(args)
        except ValueError as error:
            raise ValueError(f"server.args = {args!r}: {str(error).lower()}; quote as in a shell") from None
        return args
