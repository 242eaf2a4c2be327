"""Whether two engines sample from the same distribution: permutation tests on their answers to the same prompts.

When both do, nothing tells which of the two an answer to a prompt came from. So every statistic is compared with its
values after the answers to each prompt have been dealt out to the two engines anew, at random:

    p = (1 + deals at least as extreme) / (1 + deals)          (Phipson and Smyth 2010, Eq. 2)

This assumes nothing of lengths, tokens or log-probabilities, holds at any number of answers, and lets prompts differ as
they like. The p-values of `TESTS` are corrected together (Holm 1979), so two engines that do sample from the same
distribution are told apart with probability alpha at most.

Legend: n answers of both engines to one prompt, D deals, C cells (first tokens that are told apart).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from prefloop.errors import InputError
from prefloop.records import Group, Response
from prefloop.seeds import generator

ALPHA = 0.001
"""How often two engines that agree may be told apart: once in a thousand comparisons."""

DEALS = 19_999
"""The smallest p-value is 1 / 20,000, and a quarter of ALPHA after the correction for `TESTS`."""

TESTS = ("length", "finished", "logp", "logp_per_token", "first_token")
"""Means over answers of: tokens, whether a stop ended it, the trainer's log-probability of the answer and of its mean
token; and the frequencies of the first token, prompt by prompt (chi-square)."""

SMALLEST_CELL = 5
"""First tokens that an engine is expected to give less often than this to a prompt are counted together."""

DEALT_AT_ONCE = 500_000
"""Labels in memory for each prompt: deals times answers."""


@dataclass(frozen=True)
class Comparison:
    """`tests`: the p-value of each of `TESTS` after correction; `p` is the smallest, and below `alpha` is no chance."""

    tests: Mapping[str, float]
    alpha: float

    @property
    def p(self) -> float:
        return min(self.tests.values())

    @property
    def agrees(self) -> bool:
        return self.p >= self.alpha


def same_distribution(
    first: Sequence[Group], second: Sequence[Group], *, alpha: float = ALPHA, deals: int = DEALS, seed: int = 0
) -> Comparison:
    """Compare two engines' answers to the same prompts, which were sampled with different seeds.

    Every response carries `token_ids`, and `policy_logp` under one and the same model. Raises InputError when one does
    not, when the prompts differ, or when `deals` are too few for any p-value to come below `alpha`.

    Example:
        >>> from prefloop.records import Group, Prompt, Response
        >>> def group(*lengths):
        ...     answers = [Response(text="", token_ids=(5,) * n, policy_logp=-1.0 * n) for n in lengths]
        ...     return Group(prompt=Prompt.of("Hi"), responses=tuple(answers))
        >>> same_distribution([group(1, 3, 2, 4)], [group(4, 2, 1, 3)]).p
        1.0
    """
    if len(TESTS) >= alpha * (deals + 1):
        raise InputError(
            f"deals = {deals}: expected at least {np.ceil(len(TESTS) / alpha):.0f} at alpha = {alpha}; with fewer no "
            "p-value comes below it"
        )
    ids = [[group.prompt.id for group in groups] for groups in (first, second)]
    if not ids[0] or ids[0] != ids[1]:
        raise InputError("the two engines did not answer the same prompts in the same order; sample both from one list")
    prompts = [_Answers.of(ours, theirs) for ours, theirs in zip(first, second, strict=True)]
    rng = generator(seed, "same distribution")
    at_once = max(1, DEALT_AT_ONCE // max(len(prompt.labels) for prompt in prompts))
    found = [_statistics(prompts, [prompt.labels[None] for prompt in prompts])]
    for start in range(0, deals, at_once):
        rows = min(at_once, deals - start)
        found.append(_statistics(prompts, [rng.permuted(np.tile(p.labels, (rows, 1)), axis=1) for p in prompts]))
    statistics = np.concatenate(found)
    # Equal statistics of different deals differ by rounding.
    observed = statistics[0] - 1e-9 * np.abs(statistics).max(axis=0)
    p_values = (statistics >= observed).mean(axis=0)
    return Comparison(holm(dict(zip(TESTS, p_values.tolist(), strict=True))), alpha)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values corrected so that the chance of any below alpha, when all hypotheses hold, is alpha (Holm 1979).

    >>> holm({"a": 0.75, "b": 0.25, "c": 0.125})
    {'a': 0.75, 'b': 0.5, 'c': 0.375}
    """
    corrected: dict[str, float] = {}
    so_far = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = so_far
    return {name: corrected[name] for name in p_values}


class _Answers(NamedTuple):
    """Both engines' answers to one prompt.

    values [n, 4]: what has a mean, centred. cells [n, C]: 1 in the cell of the first token. labels [n]: True for the
    first engine's.
    """

    values: np.ndarray
    cells: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, first: Group, second: Group) -> "_Answers":
        responses = [*first.responses, *second.responses]
        labels = np.arange(len(responses)) < len(first.responses)
        values = np.array([_values(response, first.prompt.id) for response in responses])
        tokens = np.array([ids[0] for response in responses if (ids := response.token_ids)])
        kinds, kind, count = np.unique(tokens, return_inverse=True, return_counts=True)
        smaller = min(labels.mean(), 1 - labels.mean())
        kind[(count * smaller < SMALLEST_CELL)[kind]] = len(kinds)
        return cls(values - values.mean(axis=0), (kind[:, None] == np.unique(kind)).astype(float), labels)


def _values(response: Response, prompt_id: str) -> tuple[float, ...]:
    """The first four of `TESTS`."""
    if not response.token_ids or response.policy_logp is None:
        lacking = "policy_logp; score the answers under the policy" if response.token_ids else "token ids; sample them"
        raise InputError(f"an answer to prompt {prompt_id!r} has no {lacking} first")
    length = len(response.token_ids)
    return length, response.finish_reason == "stop", response.policy_logp, response.policy_logp / length


def _statistics(prompts: Sequence[_Answers], labels: Sequence[np.ndarray]) -> np.ndarray:
    """[D, len(TESTS)], larger is further apart, of labels [D, n] for each prompt."""
    sums, chi_square = 0.0, 0.0
    for prompt, dealt in zip(prompts, labels, strict=True):
        mine = dealt.astype(float)
        share, totals = prompt.labels.mean(), prompt.cells.sum(axis=0)
        # The margins are the same in every deal, so means differ as sums do, and cells by one engine's counts.
        sums = sums + mine @ prompt.values
        distance = ((mine @ prompt.cells - share * totals) ** 2 / totals).sum(axis=1)
        chi_square = chi_square + distance / (share * (1 - share))
    return np.column_stack([np.abs(sums), chi_square])
