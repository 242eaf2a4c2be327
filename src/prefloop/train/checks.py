"""What training checks about itself in its first steps. CheckFailed says what was seen, expected, and to be changed.

Two further ones are made where their figures are: the sampler against the trainer (`prefloop.sample.handover`)
and the shared path against the plain forward (`prefloop.train.logprobs.choose_path`).
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed
from prefloop.records import Answer, Item, Pair, Prompt
from prefloop.train.packing import TokenGroup

CONVERSATION = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def check_pairs(pairs: Sequence[Pair], groups: Sequence[TokenGroup], chat: ChatFormat) -> None:
    """Token ids of pairs: those of `check_tokens`, and two different responses."""
    check_tokens(pairs, groups, chat, names=("chosen response", "rejected response"))
    for pair, group in zip(pairs, groups, strict=True):
        if group.responses[0] == group.responses[1]:
            raise CheckFailed(
                f"both responses of the pair of prompt {pair.prompt.id!r} are the same {len(group.responses[0])} "
                "tokens; expected two different answers: leave this pair out"
            )


def check_tokens(
    items: Sequence[Item], groups: Sequence[TokenGroup], chat: ChatFormat, *, names: Sequence[str]
) -> None:
    """Token ids of prompts and responses: one BOS, one end of turn. `names`: what each of an item's responses is.

    A BOS may stand at the start of a prompt, once. Some templates open every turn with it (SmolLM2, Llama 2): then it
    may stand elsewhere in a prompt too, but never twice in succession. No response made from text begins with one;
    elsewhere it is what a model sampled. A token that ends sampling is the last of its response or not in it at all.
    """
    bos = chat.bos_token_id
    in_turns = bos is not None and chat.prompt_ids(Prompt.of(CONVERSATION)).count(bos) > 1
    for item, group in zip(items, groups, strict=True):
        where = f"prompt {item.prompt.id!r}"
        if bos is not None:
            _check_bos(group.prompt_ids, bos, in_turns=in_turns, name=chat.token(bos), where=where)
        for which, response, ids in zip(names, item.responses, group.responses, strict=True):
            given = response.finish_reason == "given"
            if given and bos is not None and ids[0] == bos and bos not in chat.stop_token_ids:
                raise CheckFailed(
                    f"the {which} to {where} begins with the BOS {chat.token(bos)}; expected none, because "
                    "the prompt stands before it: tokenise responses without special tokens, or leave their ids out"
                )
            early = next((i for i, id in enumerate(ids[:-1]) if id in chat.stop_token_ids), None)
            if early is not None:
                raise CheckFailed(
                    f"the {which} to {where} has the end token {chat.token(ids[early])} at position {early} "
                    f"of {len(ids)}; expected it once, as the last token: cut the response there, or leave its ids out"
                )


def _check_bos(ids: Sequence[int], bos: int, *, in_turns: bool, name: str, where: str) -> None:
    seen = [i for i, id in enumerate(ids) if id == bos]
    doubled = next((i for i in seen if i + 1 in seen), None)
    stray = None if in_turns else next((i for i in seen if i > 0), None)
    if doubled is not None:
        raise CheckFailed(
            f"{where} has the BOS {name} twice in succession at position {doubled}; expected it once: "
            "the chat template and the tokenizer both add it, so remove it from one of them"
        )
    if stray is not None:
        raise CheckFailed(
            f"{where} has the BOS {name} at position {stray}; expected it at the very start at most: the text of the "
            "prompt spells this token, so change the text or leave the prompt out"
        )


def check_finite(
    logps: Sequence[Sequence[float]], prompt_ids: Sequence[str], model: str, *, what: str = "log-probability"
) -> None:
    """Log-probabilities (or `what` else is read) of each prompt's responses under `model` are numbers."""
    for prompt_id, values in zip(prompt_ids, logps, strict=True):
        if not all(map(math.isfinite, values)):
            raise CheckFailed(
                f"{what} {list(values)} of a response to prompt {prompt_id!r} under {model} is not "
                "finite; its weights are probably damaged (in training: lower the learning rate), or its context is "
                "shorter than the row"
            )


def check_zero_ratios(
    own: Tensor, reference: Tensor, items: Sequence[Pair] | Sequence[Answer], *, policy: str, dtype: str
) -> None:
    """Before the first update the policy is its reference (D1), if `policy` is the fingerprint the items were given.

    own, reference [B, 2]: log-probabilities of both responses of every item. Each is looked at by itself: what both
    share cancels in h, and not in losses that take them one by one.
    """
    if any(item.reference != policy for item in items):
        return
    own = own.detach()
    allowed = 1e-3 + 1e-5 * own.abs() if dtype == "float32" else 0.5 + 2e-2 * own.abs()
    ratios = own - reference
    worst, side = divmod(int((ratios.abs() - allowed).argmax()), 2)
    if float(ratios[worst, side].abs()) > float(allowed[worst, side]):
        raise CheckFailed(
            f"before the first update the policy should equal its reference, but response {side + 1} to prompt "
            f"{items[worst].prompt.id!r} has log pi - log pi_ref = {float(ratios[worst, side]):.4f} nats (at most "
            f"{float(allowed[worst, side]):.4f} expected); the reference log-probabilities belong to another model, "
            "tokenizer or precision"
        )


def check_gradients(trained: Sequence[tuple[str, Tensor]]) -> None:
    """Every trainable weight took part in the loss."""
    without = [name for name, weight in trained if weight.grad is None]
    if without:
        raise CheckFailed(
            f"{len(without)} trainable weights got no gradient in the first step (such as {without[0]}); "
            "they would stay as they are: freeze them, or report this model's architecture"
        )


@contextmanager
def check_movement(
    waiting: dict[str, Tensor], unit_step: Callable[[Tensor], Tensor], *, rate: float, peak: float
) -> Iterator[None]:
    """Around an optimiser step: weights of `waiting` that have a gradient move in it, and are taken out of `waiting`.

    Weights without any gradient but zero go on waiting: a LoRA A in the first step (its B is 0), an expert that no
    token was sent to. A weight may stay bit for bit as it is when the rate is below its resolution, as the norms of a
    large model early in a warm-up: that is an error when it is so at the `peak` rate too. `unit_step(weight)` is about
    how far a rate of 1 moves each entry.
    """
    before = {
        name: _digest(weight) for name, weight in waiting.items() if weight.grad is not None and weight.grad.any()
    }
    yield
    for name, digest in before.items():
        weight = waiting.pop(name)
        if _digest(weight) != digest:
            continue
        needed = _least_rate(weight.detach(), unit_step(weight))
        if rate > 4 * needed:  # a clear margin: `unit_step` is an estimate
            raise CheckFailed(
                f"weight {name} has a gradient and did not change in a step at learning rate {rate:.1e}, where "
                f"{needed:.1e} moves it; expected every trainable weight to move: the optimiser does not hold it"
            )
        if peak < needed / 2:
            raise CheckFailed(
                f"weight {name} did not change in a step at learning rate {rate:.1e}, and would not at the peak of "
                f"{peak:.1e}: this is below the resolution of its float32 values; raise --train.learning-rate to "
                f"{needed:.1e} or more, or train adapters (--train.lora.rank)"
            )


def _digest(weight: Tensor) -> bytes:
    """A hash of the weight's bytes: a copy of all weights would not fit beside a large model."""
    return hashlib.sha256(weight.detach().contiguous().cpu().numpy().data).digest()


def _least_rate(weight: Tensor, unit_step: Tensor) -> float:
    """The learning rate at which the first entry of a weight moves by a whole unit in its last place."""
    size = weight.abs()
    spacing = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    return float((spacing / unit_step).min())
