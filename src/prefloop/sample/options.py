"""Options of sampling engines. Imports no torch, so that the command line can show them at once."""

from pydantic import Field

from prefloop.config import Config


class Server(Config):
    """The server that `--engine server` or `--engine vllm` samples from."""

    url: str = Field(
        default="",
        description="of a running server, such as http://127.0.0.1:8000/v1; when empty, --engine vllm starts its own",
    )
    model: str = Field(default="", description="the name it serves the model under; its only model when empty")
    api_key_env: str = Field(
        default="OPENAI_API_KEY", description="environment variable with the key, where the server wants one"
    )
    concurrency: int = Field(default=64, ge=1, description="requests that are open at once")
    timeout: float = Field(default=600.0, gt=0, description="seconds that one request may take")
    python: str = Field(
        default="", description="interpreter of an environment with vLLM; the one of `vllm` on the PATH when empty"
    )
    start_timeout: float = Field(default=900.0, gt=0, description="seconds until a started server must be ready")
    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs that share one copy of the model")
    data_parallel_size: int = Field(default=1, ge=1, description="copies of the model")
    args: tuple[str, ...] = Field(
        default=(), description="further arguments for `vllm serve`, such as --gpu-memory-utilization 0.8"
    )
