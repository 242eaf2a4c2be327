"""The records that every stage reads and writes: `Prompt`, `Response`, `Group`, `Pair`, `Answer`,
`Demonstration`.

All are frozen and each is one JSON line (`record.to_json()`, `Group.from_json(line)`), so a file of records can be read
with any tool, and equal records have equal bytes.

    Prompt    {"id": "p-1", "messages": [{"role": "user", "content": "Name a colour."}], "category": "list"}
    Response  {"text": "Red.", "token_ids": [5, 9, 2], "finish_reason": "stop", ...}
    Group     one prompt and its K responses
    Pair      one prompt, the chosen and the rejected response, and what is known about them
    Answer    one prompt, a response, and whether it is good
    Demonstration   one prompt, a response to imitate, and how much it counts
"""

import hashlib
import json
import math
from typing import Literal, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "given"]
"""Why a response ends: an end token or a stop string, the new-token limit, or it came whole from a file."""


class Record(BaseModel):
    """A frozen record with a stable one-line JSON form."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> str:
        """One line of JSON without fields that were left at None; floats round-trip exactly."""
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """The record that `to_json` wrote. Raises pydantic's ValidationError for anything else."""
        return cls.model_validate_json(line)


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Prompt(Record):
    """A conversation that ends where the model is to answer."""

    id: str
    messages: tuple[Message, ...]
    category: str | None = None

    @classmethod
    def of(cls, messages: str | list[dict[str, str]], *, id: str | None = None, category: str | None = None) -> Self:
        """A prompt from text or from message dictionaries; without `id`, a hash of the content is the id."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        parsed = tuple(Message.model_validate(message) for message in messages)
        return cls(id=id or content_id(parsed), messages=parsed, category=category)


def content_id(messages: tuple[Message, ...]) -> str:
    """A short id that is equal exactly when the conversation is equal."""
    text = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
    return "p-" + hashlib.sha256(text.encode()).hexdigest()[:12]


class Response(Record):
    """One answer to a prompt.

    `token_ids` are the ids that were sampled and they are what is scored and trained on; they include what ended the
    response: its end token, or the tokens of a stop string. Text from a file has none until it is tokenised.
    All log-probabilities are natural logarithms at temperature 1; those named `_logp` are summed over `token_ids`.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    finish_reason: FinishReason = "given"
    sampling_logps: tuple[float, ...] | None = Field(
        default=None, description="of every token under the sampler, before temperature and truncation"
    )
    policy_logp: float | None = Field(default=None, description="log pi(t-1), the numerator of the implicit reward")
    reference_logp: float | None = Field(default=None, description="log pi(t-2), the denominator")
    score: float | None = Field(default=None, description="higher is better; None with `failure` when unusable")
    failure: str | None = Field(default=None, description="why there is no score")
    version: int | None = Field(default=None, description="t of the policy pi(t) that sampled it, where several have")

    @property
    def length_chars(self) -> int:
        """Unicode code points of the stripped text: the length that DICE regularises (Eq. 5 and released code)."""
        return len(self.text.strip())

    @property
    def length_tokens(self) -> int:
        """Number of response tokens, the end token included."""
        if self.token_ids is None:
            raise ValueError("this response has no token ids yet; tokenise it with ChatFormat.with_token_ids")
        return len(self.token_ids)

    def same_as(self, other: "Response") -> bool:
        """Whether both are the same answer, by token ids or by stripped text."""
        same_ids = self.token_ids is not None and self.token_ids == other.token_ids
        return same_ids or self.text.strip() == other.text.strip()

    @property
    def sampling_logp(self) -> float | None:
        """The sum of `sampling_logps`; None when the sampler gave none."""
        return None if self.sampling_logps is None else math.fsum(self.sampling_logps)


class Item(Protocol):
    """What can be trained on: a prompt and one or several responses to it."""

    @property
    def prompt(self) -> Prompt: ...

    @property
    def responses(self) -> tuple[Response, ...]: ...


class Group(Record):
    """The K responses to one prompt, in sampling order."""

    prompt: Prompt
    responses: tuple[Response, ...]


class Pair(Record):
    """Two responses to one prompt, the first preferred.

    `reference_logps` are (chosen, rejected) under the model that the next training round uses as its reference, when
    they are already known; `reference` is that model's fingerprint, so they can never be used with another.
    """

    prompt: Prompt
    chosen: Response
    rejected: Response
    source: Literal["offline", "generated"] = "offline"
    p: float = Field(default=1.0, ge=0.0, le=1.0, description="P(chosen is preferred): a soft label")
    weight: float = Field(default=1.0, ge=0.0)
    chosen_score: float | None = None
    rejected_score: float | None = None
    reference_logps: tuple[float, float] | None = None
    reference: str | None = None
    reference_prefix_logps: tuple[float, float] | None = Field(
        default=None, description="`reference_logps` of both responses cut to the tokens of the shorter one (LD-DPO)"
    )
    reference_sample: Literal["chosen", "rejected"] | None = Field(
        default=None, description="which response the reference model gave, where that is known (XPO)"
    )

    @property
    def responses(self) -> tuple[Response, Response]:
        """(chosen, rejected)."""
        return self.chosen, self.rejected

    def with_responses(self, chosen: Response, rejected: Response) -> Self:
        """The pair with its responses replaced."""
        return self.model_copy(update={"chosen": chosen, "rejected": rejected})

    @property
    def scores(self) -> tuple[float | None, float | None]:
        """Of (chosen, rejected): the pair's own, else those that its responses carry."""
        chosen = self.chosen.score if self.chosen_score is None else self.chosen_score
        rejected = self.rejected.score if self.rejected_score is None else self.rejected_score
        return chosen, rejected


class Answer(Record):
    """One prompt and a response that was called good or bad (KTO).

    `mismatched` is a response to another prompt, by which the drift from the reference is estimated. `reference_logps`
    are those of `responses` under the model with the fingerprint `reference`.
    """

    prompt: Prompt
    response: Response
    p: float = Field(ge=0.0, le=1.0, description="P(the response is good): 1 or 0, or a soft label")
    weight: float = Field(default=1.0, ge=0.0)
    mismatched: Response | None = None
    reference_logps: tuple[float, float] | None = None
    reference: str | None = None

    @property
    def responses(self) -> tuple[Response, ...]:
        """The response and the mismatched one."""
        return (self.response,) if self.mismatched is None else (self.response, self.mismatched)

    def with_responses(self, response: Response, mismatched: Response | None = None) -> Self:
        """The answer with its responses replaced."""
        return self.model_copy(update={"response": response, "mismatched": mismatched})


class Demonstration(Record):
    """One prompt and a response to imitate; `weight` multiplies its loss."""

    prompt: Prompt
    response: Response
    weight: float = Field(default=1.0, ge=0.0)

    @property
    def responses(self) -> tuple[Response]:
        """The response alone."""
        return (self.response,)


Judged = TypeVar("Judged", Pair, Answer)
"""Items with labels, and with log-probabilities under a reference."""
