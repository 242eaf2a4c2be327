"""The core: summed log-probabilities of responses that share prompts, for scoring, references and training alike.

    log pi(y|x) = sum_i log pi(y_i | x, y_<i)        over all response tokens, the end token included (DICE §2)

Two paths give the same numbers. `shared` computes each prompt once (`prefloop.train.attention`); `padded` is the plain
forward with one row per response, for models on which the shared path is not proven. Neither keeps vocabulary-sized
logits: the output head runs on response positions only, in chunks that the backward pass recomputes.

Legend: B rows, R responses, T response tokens, S tokens of a row, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefloop.train.attention import Layout, shared_prefix
from prefloop.train.packing import TokenGroup, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Path = Literal["shared", "padded"]

HEAD_CHUNK = 256
"""Response positions per call of the output head: with V = 49,152 a chunk's float32 logits take 50 MB."""


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Matrix products in `dtype` over float32 weights; float32 itself needs no context."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, dtype=getattr(torch, dtype))


def response_logps(
    model: "PreTrainedModel", groups: Sequence[TokenGroup], *, path: Path = "shared", dtype: str = "float32"
) -> Float[Tensor, " R"]:
    """Summed log-probability of every response, group by group, in float32; differentiable.

    All groups go through the model at once: use `rows` to cut a long list under a token budget.
    """
    forward = _shared_token_logps if path == "shared" else _padded_token_logps
    with autocast(model.device, dtype):
        token_logps, counts = forward(model, groups)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return torch.zeros(len(counts), device=counts.device).index_add(0, owner, token_logps)


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
    return max(len(group.prompt_ids) + len(response) for group in groups for response in group.responses)


def _shared_token_logps(
    model: "PreTrainedModel", groups: Sequence[TokenGroup]
) -> tuple[Float[Tensor, " T"], Int[Tensor, " R"]]:
    layout = Layout.of(groups, model.device)
    with shared_prefix(model):
        hidden = _decoder(model)(
            input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, layout=layout
        ).last_hidden_state
    return _head_logps(model, hidden[0].index_select(0, layout.predictors), layout.targets), layout.counts


def _padded_token_logps(
    model: "PreTrainedModel", groups: Sequence[TokenGroup]
) -> tuple[Float[Tensor, " T"], Int[Tensor, " R"]]:
    pairs = [(group.prompt_ids, response) for group in groups for response in group.responses]
    width = _width(groups)
    input_ids = torch.zeros(len(pairs), width, dtype=torch.long)
    attention_mask = torch.zeros(len(pairs), width, dtype=torch.long)
    for row, (prompt, response) in enumerate(pairs):
        length = len(prompt) + len(response)
        input_ids[row, :length] = torch.tensor([*prompt, *response])
        attention_mask[row, :length] = 1
    predictors = [
        row * width + position
        for row, (prompt, response) in enumerate(pairs)
        for position in range(len(prompt) - 1, len(prompt) + len(response) - 1)
    ]
    device = model.device
    hidden = _decoder(model)(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
    ).last_hidden_state
    targets = torch.tensor([token for _, response in pairs for token in response], device=device)
    counts = torch.tensor([len(response) for _, response in pairs], device=device)
    flat = hidden.flatten(0, 1).index_select(0, torch.tensor(predictors, device=device))
    return _head_logps(model, flat, targets), counts


def _decoder(model: "PreTrainedModel") -> Any:
    """The model without its output head (through a LoRA wrapper, whose layers are already inside)."""
    wrapped: Any = model
    inner = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    return inner.base_model


def _head_logps(
    model: "PreTrainedModel", hidden: Float[Tensor, "T D"], targets: Int[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """log softmax(head(hidden))[target] in float32, chunk by chunk; a chunk's logits live only inside its call."""
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has an output head"
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    # Cohere multiplies the logits, Granite divides them; the start-up parity check covers what is not named here.
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    def chunk_logps(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float() * scale if scale != 1.0 else head(hidden).float()
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    pieces = []
    for part, part_targets in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
        if torch.is_grad_enabled() and part.requires_grad:
            pieces.append(checkpoint(chunk_logps, part, part_targets, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(chunk_logps(part, part_targets))
    return torch.cat(pieces)


def choose_path(model: "PreTrainedModel", groups: Sequence[TokenGroup], *, dtype: str = "float32") -> tuple[Path, str]:
    """The path for this model, proven on a few of its own rows, and one line that says why.

    The shared path is taken when the plain forward, one response at a time, agrees with it; models whose layers look
    at a window of positions or carry a state take the padded path without trial, because short rows cannot show it.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return "padded", f"padded: this model has layers of the kinds {', '.join(sorted(kinds))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "padded", f"padded: this model attends to a sliding window of {config.sliding_window} tokens"
    probe = sorted(groups, key=lambda group: group.tokens)[:2]
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    with torch.no_grad():
        alone = [TokenGroup(group.prompt_ids, (response,)) for group in probe for response in group.responses]
        plain = torch.cat([response_logps(model, [one], path="padded", dtype=dtype) for one in alone])
        try:
            shared = response_logps(model, probe, path="shared", dtype=dtype)
        except (RuntimeError, TypeError, ValueError) as error:
            return "padded", f"padded: the shared path does not run on this model ({type(error).__name__})"
    difference = float(((shared - plain).abs() / plain.abs().clamp(min=1.0)).max())
    if not difference <= tolerance:
        return "padded", f"padded: the shared path differs from the plain forward by {difference:.1e} (relative)"
    return "shared", f"shared prefix, equal to the plain forward to {difference:.0e} on {len(plain)} responses"
