"""Options of annotators. Imports no torch, so that the command line can show them at once."""

from typing import Annotated, Literal

from pydantic import Field

from prefloop.config import Config, free

AnnotatorName = Annotated[
    str,
    Field(
        description="who judges: rule:NAME, rule:module:function, reward-model:MODEL, "
        "implicit-reward:POLICY,REFERENCE, file:PATH, judge:MODEL (runs here), api:MODEL (on a server); "
        "several joined by + vote"
    ),
]


class Feedback(Config):
    """How annotators judge, and how much it may cost."""

    labels: Literal["hard", "soft"] = Field(
        default="hard",
        description="hard: the likelier answer is chosen (OAIF); soft: the loss gets its probability too",
    )
    instruction: str = Field(
        default="helpfulness", description="of LLM judges: the name of a packaged instruction, or a template file"
    )
    base_url: str = free(default="", description="of the server of api:MODEL, such as http://127.0.0.1:8000/v1")
    api_key_env: str = free(default="OPENAI_API_KEY", description="environment variable with the key to the server")
    concurrency: int = free(default=16, ge=1, description="requests to the server that are open at once")
    timeout: float = free(default=60.0, gt=0, description="seconds that one request may take")
    prices: str = free(
        default="", description="YAML file with money per million tokens, one line a model: NAME: {input: 1, output: 2}"
    )
    budget_calls: int | None = free(default=None, ge=0, description="calls of LLM judges after which the run stops")
    budget_money: float | None = free(default=None, ge=0, description="money after which it stops; needs prices")
    scale: float | None = Field(
        default=None,
        gt=0,
        description="of a rule's scores: P(a > b) = sigmoid(difference / scale); none: the higher score wins outright",
    )
    beta: float = Field(default=0.1, gt=0, description="of the implicit reward: P(a > b) = sigmoid(beta * difference)")
    weights: tuple[float, ...] = Field(default=(), description="of the annotators that vote; equal when empty")
    quorum: int = Field(default=1, ge=1, description="answers that a vote needs; with fewer it is an abstention")
