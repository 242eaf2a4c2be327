"""Does the engine sample from the policy? Its own log-probabilities of what it sampled, against the trainer's.

An engine with other weights, another precision than it says, a wrong cache or a wrong position gives other
log-probabilities to its own tokens. What enters a loss is always the trainer's figure; this one only tells how far the
two are apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed
from prefloop.models import ModelRef, load_model, load_tokenizer
from prefloop.records import Group
from prefloop.seeds import generator
from prefloop.train.logprobs import known_path, response_logps, rows
from prefloop.train.packing import TokenGroup, split

PROBES, LOGGED = 8, 64
"""Answers that are looked at before the bulk is sampled, and at the end of every sampling stage."""


class Gap(NamedTuple):
    """|log p(engine) - log p(trainer)| of sampled tokens, in nats.

    `worst`: the largest mean of any part (shard) of the answers. `shift`: the mean of the difference itself, near 0
    where the two differ by rounding alone.
    """

    mean: float
    p99: float
    worst: float
    shift: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"sampler and trainer differ by {self.mean:.2g} nats a token (99th percentile {self.p99:.2g}, on average "
            f"{self.shift:+.1g}; {self.tokens} tokens)"
        )


def token_logps(policy: ModelRef, groups: Sequence[TokenGroup], *, budget: int, device: str) -> list[list[float]]:
    """log p of every response token in float32, response by response, in nats; `budget` tokens go through at once."""
    model = load_model(policy, device=device).requires_grad_(False)
    path, _ = known_path(model, groups)
    owners, pieces = zip(*split(groups, budget, shared=path == "shared"), strict=True)
    found: list[list[list[float]]] = [[] for _ in pieces]
    for row in rows(pieces, budget, path=path):
        with torch.no_grad():
            logps = response_logps(model, [pieces[i] for i in row], path=path)
        parts = iter(logps.tokens.split(logps.counts.tolist()))
        for i in row:
            found[i] = [next(parts).tolist() for _ in pieces[i].responses]
    of_group: list[list[list[float]]] = [[] for _ in groups]
    for owner, tokens in zip(owners, found, strict=True):
        of_group[owner] += tokens
    return [tokens for group in of_group for tokens in group]


def measure(
    policy: ModelRef, parts: Sequence[Sequence[Group]], *, budget: int, device: str, answers: int, seed: int
) -> Gap | None:
    """The gap over some `answers` answers, as many of each part; None when the engine gave no log-probabilities."""
    chosen = []
    for number, part in enumerate(parts):
        flat = [(group, response) for group in part for response in group.responses if response.sampling_logps]
        drawn = sorted(generator(seed, "sampler gap", number).permutation(len(flat))[: max(2, answers // len(parts))])
        chosen += [(number, *flat[i]) for i in drawn]
    if not chosen:
        return None
    chat = ChatFormat(load_tokenizer(policy))
    by_prompt: dict[str, list[int]] = {}
    for place, (_, group, _) in enumerate(chosen):
        by_prompt.setdefault(group.prompt.id, []).append(place)
    token_groups = [
        TokenGroup(tuple(chat.prompt_ids(chosen[places[0]][1].prompt)),
                   tuple(chosen[place][2].token_ids or () for place in places))
        for places in by_prompt.values()
    ]  # fmt: skip
    trainer = token_logps(policy, token_groups, budget=budget, device=device)
    differences: list[list[np.ndarray]] = [[] for _ in parts]
    for place, ours in zip([place for places in by_prompt.values() for place in places], trainer, strict=True):
        part, _, response = chosen[place]
        differences[part].append(np.subtract(response.sampling_logps or (), ours))
    every = np.concatenate([difference for part in differences for difference in part])
    means = [float(np.abs(np.concatenate(part)).mean()) for part in differences if part]
    size = np.abs(every)
    return Gap(float(size.mean()), float(np.quantile(size, 0.99)), max(means), float(every.mean()), len(every))


def check(gap: Gap, tolerance: float, *, engine: str, policy: str) -> None:
    """Raises CheckFailed when an engine is further from the trainer, in any part, than it is when all is well."""
    if not gap.worst <= tolerance:
        raise CheckFailed(
            f"engine {engine!r} does not sample from {policy}: its log-probabilities of its own tokens differ from the "
            f"trainer's by {gap.worst:.3f} nats a token on average, in {gap.tokens} tokens, at most {tolerance} "
            "expected; it holds other weights or another template, or computes too coarsely (try --engine "
            "transformers, or --compute.sampling-dtype float32). What it sampled is not kept"
        )
