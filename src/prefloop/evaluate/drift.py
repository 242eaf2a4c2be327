"""How far a model has moved from its reference, on answers of its own, and what these answers look like.

    KL(pi || pi_ref) a token  =  sum over answers of (log pi - log pi_ref)(y) / number of tokens

an unbiased estimate at temperature 1; at other temperatures and under truncation it is of the answers as sampled. Its
interval, and those of the other ratios, resample answers: the tokens of one answer go together.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefloop.data.chat import ChatFormat
from prefloop.models import ModelRef, choose_device, load_model, load_tokenizer
from prefloop.records import Group, Record, Response
from prefloop.run import Stage
from prefloop.seeds import generator
from prefloop.train.config import Compute

Floats = NDArray[np.float64]
Interval = tuple[float, float, float]
DRAWS = 1000
REPEATED = 4
"""Words of the runs that count as repeated when they come again in the same answer."""


class Drift(Record):
    """kl_per_token: against the reference, in nats a token. entropy: mean entropy of the next-token distribution at the
    answers' tokens, in nats, of the model and of the reference. length_tokens, finished: of the answers. repetition:
    share of an answer's runs of four words that it has had before. distinct: share of different runs of 1 and 2 words
    among all of all answers (Li et al. 2016). Intervals are [value, low, high] at 95 %.
    """

    answers: int
    kl_per_token: Interval | None = None
    entropy: Interval
    reference_entropy: float | None = None
    length_tokens: Interval
    finished: float
    repetition: Interval
    distinct_1: float
    distinct_2: float


def drift(
    answers: Sequence[Group], policy: ModelRef, reference: ModelRef | None, *, compute: Compute, stage: Stage
) -> Drift:
    """Stage: the figures of a model's own answers; without a reference, or with itself, there is no KL."""
    responses = [response for group in answers for response in group.responses]
    logps, entropy, tokens = token_sums(answers, policy, compute=compute, stage=stage)
    kl, before = None, None
    if reference is not None and reference.weights != policy.weights:
        theirs, their_entropy, _ = token_sums(answers, reference, compute=compute, stage=stage)
        kl, before = ratio(logps - theirs, tokens), float(their_entropy.sum() / tokens.sum())
    return Drift(
        answers=len(responses),
        kl_per_token=kl,
        entropy=ratio(entropy, tokens),
        reference_entropy=before,
        **answer_figures(responses),
    )


def answer_figures(responses: Sequence[Response]) -> dict[str, Any]:
    """length_tokens, finished, repetition, distinct_1 and distinct_2 of some answers, as `Drift` has them."""
    texts = [response.text for response in responses]
    ones = np.ones(len(texts))
    return {
        "length_tokens": ratio(np.array([response.length_tokens for response in responses], dtype=float), ones),
        "finished": float(np.mean([response.finish_reason == "stop" for response in responses])),
        "repetition": ratio(np.array([repetition(text) for text in texts]), ones),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }


def token_sums(
    answers: Sequence[Group], ref: ModelRef, *, compute: Compute, stage: Stage
) -> tuple[Floats, Floats, Floats]:
    """(log-probability, entropy, number) summed over the tokens of every answer [A], in nats."""
    import torch

    from prefloop.train.logprobs import known_path, response_logps, rows
    from prefloop.train.packing import split
    from prefloop.train.reference import choose_dtype, token_group

    device = choose_device(compute.device)
    model, chat = load_model(ref, device=device).requires_grad_(False), ChatFormat(load_tokenizer(ref))
    groups = [token_group(chat, group.prompt, group.responses) for group in answers]
    path, why = known_path(model, groups)
    stage.event("path", model=ref.name, path=path, why=why)
    _, pieces = zip(*split(groups, compute.tokens_per_forward, shared=path == "shared"), strict=True)
    found: dict[int, Floats] = {}
    with stage.progress(len(pieces), unit="groups", description=f"tokens under {ref.name}") as advance:
        for row in rows(pieces, compute.tokens_per_forward, path=path):
            with torch.no_grad():
                result = response_logps(
                    model, [pieces[i] for i in row], path=path, dtype=choose_dtype(compute, device), entropy=True
                )
            assert result.entropy is not None
            counts = result.counts.tolist()
            entropies = [float(part.sum()) for part in result.entropy.split(counts)]
            table = iter(np.array([result.sums.tolist(), entropies, counts]).T)
            found.update({i: np.array([next(table) for _ in pieces[i].responses]) for i in row})
            advance(len(row))
    sums, entropy, tokens = np.concatenate([found[i] for i in range(len(pieces))]).T
    return sums, entropy, tokens


def ratio(values: Floats, sizes: Floats, *, draws: int = DRAWS) -> Interval:
    """sum of values [n] over sum of sizes [n], [value, low, high] at 95 % by resampling both together."""
    n = len(values)
    counts = generator(0, "ratio").multinomial(n, np.full(n, 1 / n), size=draws)
    low, high = np.quantile((counts @ values) / (counts @ sizes), [0.025, 0.975])
    return float(values.sum() / sizes.sum()), float(low), float(high)


def repetition(text: str) -> float:
    """Share of runs of four words that the text has had before.

    >>> repetition("a b c d a b c d")
    0.2
    """
    runs = word_runs(text, REPEATED)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different runs of n words among all in the texts; 0 where there is none."""
    counts = Counter(run for text in texts for run in word_runs(text, n))
    return len(counts) / counts.total() if counts else 0.0


def word_runs(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
