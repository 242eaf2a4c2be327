"""Options of annotators. Imports no torch, so that the command line can show them at once."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from prefloop.config import Config, free
from prefloop.sample.options import KeyVariable

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
    votes: int = Field(
        default=0, ge=0, description="of api:MODEL: answers drawn to one question; 0 reads the label's probability"
    )
    vote_temperature: float = Field(default=1.0, ge=0, description="at which these answers are drawn")
    request: str = Field(
        default="",
        description="of api:MODEL: JSON object of further fields of every request; null leaves a field out, such as "
        "'{\"seed\": null}'",
    )
    base_url: str = free(default="", description="of the server of api:MODEL, such as http://127.0.0.1:8000/v1")
    api_key_env: KeyVariable = free(
        default="OPENAI_API_KEY", description="environment variable with the key to the server"
    )
    concurrency: int = free(default=16, ge=1, description="requests to the server that are open at once")
    timeout: float = free(default=60.0, gt=0, description="seconds a request may wait for the next part of its answer")
    prices: str = free(
        default="", description="YAML file with money per million tokens, one line a model: NAME: {input: 1, output: 2}"
    )
    budget_calls: int | None = free(default=None, ge=0, description="calls of LLM judges after which a run stops")
    budget_money: float | None = free(default=None, ge=0, description="money after which it stops; needs prices")
    scale: float | None = Field(
        default=None,
        gt=0,
        description="of a rule's scores: P(a > b) = sigmoid(difference / scale); none: the higher score wins outright",
    )
    beta: float = Field(default=0.1, gt=0, description="of the implicit reward: P(a > b) = sigmoid(beta * difference)")
    weights: tuple[float, ...] = Field(default=(), description="of the annotators that vote; equal when empty")
    quorum: int = Field(default=1, ge=1, description="answers that a vote needs; with fewer it is an abstention")

    @field_validator("base_url")
    @classmethod
    def _no_secret_in_the_address(cls, url: str) -> str:
        """Here, because what passes is written into the run's configuration; what is refused is not shown."""
        return without_secret(url, "base_url")

    @field_validator("request")
    @classmethod
    def _an_object(cls, request: str) -> str:
        fields_of(request)
        return request


def without_secret(url: str, option: str) -> str:
    """The address; ValueError, which does not show it, for one with a user name, a password or a query in it."""
    if "@" in url or "?" in url:
        raise ValueError(
            f"{option} has a user name, a password or a query in it; put the key into the variable api_key_env names"
        )
    return url


def fields_of(request: str) -> dict[str, Any] | None:
    """What `request` says; None when it is empty. ValueError for anything but a JSON object."""
    if not request:
        return None
    try:
        fields = json.loads(request)
    except ValueError as error:
        raise ValueError(f"request = {request!r}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"request = {request!r}: expected a JSON object, such as '{{\"seed\": null}}'")
    return fields
