"""The core: log-probabilities of responses that share prompts, for scoring, references and training alike.

    log pi(y|x) = sum_i log pi(y_i | x, y_<i)        over all response tokens, the end token included (DICE §2)

Two paths give the same numbers. `shared` computes each prompt once (`prefloop.train.attention`); `padded` is the plain
forward with one row per response, for models on which the shared path is not proven. Neither keeps vocabulary-sized
logits (`prefloop.train.head`).

Legend: B rows, R responses, T predicted response tokens, S tokens of a row, D hidden size.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefloop.errors import CheckFailed
from prefloop.train.attention import Layout, shared_prefix
from prefloop.train.head import token_logps
from prefloop.train.packing import TokenGroup, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Path = Literal["shared", "padded"]


class ResponseLogps(NamedTuple):
    """Log-probabilities of R responses, end to end, in nats and float32.

    sums [R]: per response. counts [R]: predicted tokens of each. tokens [T]: per token. entropy [T]: of the whole
    next-token distribution at each of them, and collision [T], log sum_v pi(v)^2 of it: when asked for, and without
    gradient.
    """

    sums: Float[Tensor, " R"]
    counts: Int[Tensor, " R"]
    tokens: Float[Tensor, " T"]
    entropy: Float[Tensor, " T"] | None = None
    collision: Float[Tensor, " T"] | None = None

    @classmethod
    def of(
        cls, tokens: Tensor, counts: Tensor, entropy: Tensor | None = None, collision: Tensor | None = None
    ) -> "ResponseLogps":
        """From the log-probabilities [T] of all tokens and the number [R] of each response's."""
        return cls(_sums(tokens, counts), counts, tokens, entropy, collision)

    def summed(self, values: Tensor) -> Tensor:
        """Sums [R] over each response of values [T] of its tokens."""
        return _sums(values, self.counts)

    @property
    def positions(self) -> Tensor:
        """[T] the place of every token in its response, from 0."""
        starts = self.counts.cumsum(0) - self.counts
        return torch.arange(len(self.tokens), device=self.counts.device) - starts.repeat_interleave(self.counts)


def _sums(values: Tensor, counts: Tensor) -> Tensor:
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return torch.zeros(len(counts), device=counts.device).index_add(0, owner, values)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Matrix products in `dtype` over float32 weights; float32 itself needs no context."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, dtype=getattr(torch, dtype))


def response_logps(
    model: "PreTrainedModel",
    groups: Sequence[TokenGroup],
    *,
    path: Path = "shared",
    dtype: str = "float32",
    entropy: bool = False,
    collision: bool = False,
) -> ResponseLogps:
    """Log-probabilities of every response, group by group; differentiable.

    All groups go through the model at once: use `rows` to cut a long list under a token budget. A response to an empty
    prompt counts from its second token on: nothing predicts its first.
    """
    with autocast(model.device, dtype):
        hidden, targets, counts = response_hidden(model, groups, path=path)
        tokens, entropies, collisions = token_logps(model, hidden, targets, entropy=entropy, collision=collision)
    return ResponseLogps.of(tokens, counts, entropies, collisions)


def response_hidden(
    model: "PreTrainedModel", groups: Sequence[TokenGroup], *, path: Path
) -> tuple[Float[Tensor, "T D"], Int[Tensor, " T"], Int[Tensor, " R"]]:
    """Of all response tokens, end to end: the trunk's hidden state that predicts each, the token's id, and how many
    tokens each response has. Differentiable.
    """
    return _shared_hidden(model, groups) if path == "shared" else _padded_hidden(model, groups)


def rows(groups: Sequence[TokenGroup], token_budget: int, *, path: Path = "shared") -> list[list[int]]:
    """Indices of groups that go through the model together, at most `token_budget` tokens at once (padding counted)."""
    if path == "shared":
        return pack([group.tokens for group in groups], token_budget)
    batches: list[list[int]] = []
    responses = 0
    for index in sorted(range(len(groups)), key=lambda i: (_width([groups[i]]), i)):
        responses += len(groups[index].responses)
        if not batches or responses * _width([groups[index]]) > token_budget:
            batches.append([])
            responses = len(groups[index].responses)
        batches[-1].append(index)
    return batches


def _width(groups: Sequence[TokenGroup]) -> int:
    return max((len(group.prompt_ids) + len(response) for group in groups for response in group.responses), default=0)


def _shared_hidden(
    model: "PreTrainedModel", groups: Sequence[TokenGroup]
) -> tuple[Float[Tensor, "T D"], Int[Tensor, " T"], Int[Tensor, " R"]]:
    layout = Layout.of(groups, model.device)
    if not layout.input_ids.numel():
        # One-token responses to empty prompts: nothing is predicted, and models do not take rows without tokens.
        return model.get_input_embeddings()(layout.input_ids[0]), layout.targets, layout.counts
    with shared_prefix(model):
        hidden = _decoder(model)(
            input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, layout=layout
        ).last_hidden_state
    return hidden[0].index_select(0, layout.predictors), layout.targets, layout.counts


def _padded_hidden(
    model: "PreTrainedModel", groups: Sequence[TokenGroup]
) -> tuple[Float[Tensor, "T D"], Int[Tensor, " T"], Int[Tensor, " R"]]:
    pairs = [(group.prompt_ids, response) for group in groups for response in group.responses]
    width = _width(groups)
    input_ids = torch.zeros(len(pairs), width, dtype=torch.long)
    attention_mask = torch.zeros(len(pairs), width, dtype=torch.long)
    predictors: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    for row, (prompt, response) in enumerate(pairs):
        length = len(prompt) + len(response)
        input_ids[row, :length] = torch.tensor([*prompt, *response])
        attention_mask[row, :length] = 1
        first = max(1, len(prompt))
        predictors += range(row * width + first - 1, row * width + length - 1)
        targets += response[first - len(prompt) :]
        counts.append(length - first)
    device = model.device
    hidden = _decoder(model)(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
    ).last_hidden_state
    selected = hidden.flatten(0, 1).index_select(0, torch.tensor(predictors, dtype=torch.long, device=device))
    return selected, torch.tensor(targets, dtype=torch.long, device=device), torch.tensor(counts, device=device)


def _decoder(model: "PreTrainedModel") -> Any:
    """The model without its output head (through a LoRA wrapper, whose layers are already inside)."""
    wrapped: Any = model
    inner = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    return inner.base_model


HIDDEN_TOLERANCE = 1e-3
"""Of hidden states, which average no rounding away as a sum does: those of SmolLM2-135M differ by 9e-6 between the two
paths in float32, where a wrong mask makes them differ by tenths.
"""


def choose_path(model: "PreTrainedModel", groups: Sequence[TokenGroup]) -> tuple[Path, str]:
    """The path for this model on these groups (none yet, where they are sampled later), proven on a few rows, and one
    line that says why. A model with another head than the vocabulary's is proven by its hidden states.

    The shared path is taken when the plain forward, one response at a time, agrees with it. What short rows cannot
    show is read from the configuration: a window of positions that is shorter than the longest of `groups`, and layers
    that carry a state, take the padded path without trial. Raises CheckFailed when the output head does something to
    the logits that neither path knows.
    """
    obstacle = config_obstacle(model, groups)
    if obstacle:
        return "padded", obstacle
    if model.get_output_embeddings() is not None:
        _check_head(model)
    shortest = sorted(groups, key=lambda group: group.tokens)[:1]
    theirs = [TokenGroup(group.prompt_ids, group.responses[:2]) for group in shortest]
    try:
        difference, responses = _disagreement(model, [*_PROBES, *theirs])
    except (RuntimeError, TypeError, ValueError) as error:
        return "padded", f"padded: the shared path does not run on this model ({type(error).__name__}: {error})"
    if not difference <= (HIDDEN_TOLERANCE if model.get_output_embeddings() is None else 1e-5):
        return "padded", f"padded: the shared path differs from the plain forward by {difference:.1e} (relative)"
    return "shared", f"shared prefix, equal to the plain forward to {difference:.0e} on {responses} responses"


_PROVEN: dict[str, tuple[Path, str]] = {}


def known_path(model: "PreTrainedModel", groups: Sequence[TokenGroup]) -> tuple[Path, str]:
    """`choose_path`, proven once in a process for all weights of one class and configuration, which alone make the
    paths differ: two models of a score, and those of every round, need one proof.
    """
    obstacle = config_obstacle(model, groups)
    if obstacle:
        return "padded", obstacle
    described = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    kind = f"{type(model).__qualname__} on {model.device.type}: {json.dumps(described, sort_keys=True, default=str)}"
    if kind not in _PROVEN:
        path, why = choose_path(model, groups)
        # Without the figure of whichever model was first: a run's records must not depend on what ran before.
        _PROVEN[kind] = path, "shared prefix, proven equal to the plain forward" if path == "shared" else why
    return _PROVEN[kind]


def config_obstacle(model: "PreTrainedModel", groups: Sequence[TokenGroup]) -> str | None:
    """Why the configuration keeps these groups from sharing a row, or None."""
    config = model.config.get_text_config()
    longest = _width(groups)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    stateful = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if stateful:
        return f"padded: this model has layers of the kinds {', '.join(sorted(stateful))}"
    used = kinds & {"sliding_attention", "chunked_attention"} or not getattr(config, "layer_types", None)
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if used and window and window < longest and getattr(config, "use_sliding_window", True):
            return f"padded: this model looks at windows of {window} tokens and the longest row has {longest}"
    # Rotations that follow the longest position of the row: a long group would change its row mates' numbers.
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        trained = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", longest)
        if rope.get("rope_type") in ("dynamic", "longrope") and trained < longest:
            return f"padded: rotary positions change beyond {trained} tokens and the longest row has {longest}"
    return None


# Rows that show what the shortest rows of real data may not: several branches of several tokens, and a second group.
_PROBES = (TokenGroup((1, 2, 3, 4), ((5, 6, 7), (4, 3, 2, 1))), TokenGroup((3, 1), ((2, 4), (6, 5, 1))))


def plain_sums(model: "PreTrainedModel", groups: Sequence[TokenGroup]) -> Tensor:
    """[R] summed log-probabilities in float32 by definition, with none of our code in it: all logits of one response at
    a time, log-softmax, gather, sum. Differentiable. Prompts are not empty.
    """
    sums = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt_ids, *response]], device=model.device)
            logps = (
                model(input_ids=ids, use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1].float().log_softmax(-1)
            )
            sums.append(logps.gather(1, ids[0, len(group.prompt_ids) :, None]).sum())
    return torch.stack(sums)


@torch.no_grad()
def _check_head(model: "PreTrainedModel") -> None:
    """Both paths share the output head; what it does to the logits must be what the model does."""
    expected = plain_sums(model, _PROBES)
    found = torch.cat([response_logps(model, [group], path="padded").sums for group in _PROBES])
    difference = float(((found - expected).abs() / expected.abs().clamp(min=1.0)).max())
    # NaN is another check's business (`check_finite`). Below this it is rounding: the plain float32 forward of
    # SmolLM2-135M is 3e-5 off its own float64 values.
    if difference > 1e-3:
        raise CheckFailed(
            f"log-probabilities of this {type(model).__name__} differ from its own logits' by {difference:.1e} "
            "(relative, at most 1e-3 expected): it does something to its logits that prefloop does not know; "
            "report this model's architecture"
        )


@torch.no_grad()
def _disagreement(model: "PreTrainedModel", groups: Sequence[TokenGroup]) -> tuple[float, int]:
    """Largest relative difference between the shared path and the plain forward, one response at a time.

    Always in float32: bfloat16's rounding is larger than what a wrong mask does to a short row.
    """
    alone = [TokenGroup(group.prompt_ids, (response,)) for group in groups for response in group.responses]
    plain = torch.cat([_said(model, [one], "padded") for one in alone])
    shared = _said(model, groups, "shared")
    return float(((shared - plain).norm(dim=1) / plain.norm(dim=1).clamp(min=1.0)).max()), len(alone)


def _said(model: "PreTrainedModel", groups: Sequence[TokenGroup], path: Path) -> Tensor:
    """What the two paths are compared by: [R, 1] summed log-probabilities, or [T, D] hidden states where the model has
    no head that gives some (what a new head makes of them is zero on any path).
    """
    if model.get_output_embeddings() is None:
        return response_hidden(model, groups, path=path)[0]
    return response_logps(model, groups, path=path).sums[:, None]
