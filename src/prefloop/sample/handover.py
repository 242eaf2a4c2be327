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
from prefloop.records import Group, Response
from prefloop.seeds import generator
from prefloop.train.config import Compute
from prefloop.train.logprobs import known_path, response_logps, rows
from prefloop.train.packing import TokenGroup
from prefloop.train.reference import choose_dtype

PROBES, LOGGED = 8, 64
"""Answers that are looked at before the bulk is sampled, and at the end of every sampling stage."""


class Gap(NamedTuple):
    """|log p(engine) - log p(trainer)| of sampled tokens, in nats, and the mean of the difference itself.

    The latter is an estimate of KL(engine || trainer) a token: small where the two differ by rounding alone.
    """

    mean: float
    p99: float
    kl: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"sampler and trainer differ by {self.mean:.2g} nats a token (99th percentile {self.p99:.2g}, "
            f"KL {self.kl:.1g}; {self.tokens} tokens)"
        )


def token_logps(policy: ModelRef, groups: Sequence[TokenGroup], *, compute: Compute, device: str) -> list[list[float]]:
    """The trainer's log-probability of every response token, response by response, in nats."""
    model = load_model(policy, device=device).requires_grad_(False)
    path, _ = known_path(model, groups)
    found: dict[int, list[list[float]]] = {}
    for row in rows(groups, compute.tokens_per_forward, path=path):
        with torch.no_grad():
            logps = response_logps(model, [groups[i] for i in row], path=path, dtype=choose_dtype(compute, device))
        parts = iter(logps.tokens.split(logps.counts.tolist()))
        found.update((i, [next(parts).tolist() for _ in groups[i].responses]) for i in row)
    return [tokens for i in range(len(groups)) for tokens in found[i]]


def measure(
    policy: ModelRef, groups: Sequence[Group], *, compute: Compute, device: str, answers: int, seed: int
) -> Gap | None:
    """The gap over `answers` answers drawn from `groups`; None when the engine gave no log-probabilities."""
    flat = [(group, response) for group in groups for response in group.responses if response.sampling_logps]
    if not flat:
        return None
    drawn = sorted(generator(seed, "sampler gap").permutation(len(flat))[:answers])
    chosen: dict[str, tuple[Group, list[Response]]] = {}
    for group, response in (flat[i] for i in drawn):
        chosen.setdefault(group.prompt.id, (group, []))[1].append(response)
    chat = ChatFormat(load_tokenizer(policy))
    token_groups = [
        TokenGroup(tuple(chat.prompt_ids(group.prompt)), tuple(r.token_ids or () for r in responses))
        for group, responses in chosen.values()
    ]
    trainer = token_logps(policy, token_groups, compute=compute, device=device)
    engine = [r.sampling_logps or () for _, responses in chosen.values() for r in responses]
    difference = np.concatenate([np.subtract(a, b) for a, b in zip(engine, trainer, strict=True)])
    absolute = np.abs(difference)
    return Gap(float(absolute.mean()), float(np.quantile(absolute, 0.99)), float(difference.mean()), len(difference))


def check(gap: Gap, tolerance: float, *, engine: str, policy: str) -> None:
    """Raises CheckFailed when an engine is further from the trainer than it is when all is well."""
    if not gap.mean <= tolerance:
        raise CheckFailed(
            f"engine {engine!r} does not sample from {policy}: its log-probabilities of its own tokens differ from the "
            f"trainer's by {gap.mean:.3f} nats a token on average over {gap.tokens} tokens, at most {tolerance} "
            "expected; it holds other weights or another template, or computes too coarsely (try --engine "
            "transformers, or --compute.sampling-dtype float32)"
        )
