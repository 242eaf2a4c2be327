"""Engines sample from the distribution that they claim, and the tests that say so tell wrong ones apart.

Seeds are fixed, so every test here gives the same result each time. Were they not, a comparison of two samples that
agree would fail once in a thousand runs (ALPHA), and so would a comparison with an exact distribution.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from prefloop.data.chat import ChatFormat
from prefloop.errors import InputError
from prefloop.records import Group, Prompt, Response
from prefloop.sample.distribution import ALPHA, TESTS, holm, same_distribution
from prefloop.sample.sampling import Sampling
from prefloop.sample.transformers import TransformersEngine
from prefloop.seeds import generator
from prefloop.train.logprobs import response_logps
from prefloop.train.reference import token_group
from tests.sample.engines import CHAT, PROMPTS, stopping_llama
from tests.sample.test_draw import processed
from tests.tiny import tiny_tokenizer

MODEL = stopping_llama()
DEALS = 5_999  # enough to come below ALPHA after the correction for all TESTS
FOUR = [prompt for prompt in PROMPTS if prompt.id != "capital"]
SHORT = Sampling(max_new_tokens=12)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 5},
    {"top_k": 40, "min_p": 0.05},
    {"min_p": 0.2},
]
FAULTS: dict[str, dict[str, Any]] = {"temperature 1.1": {"temperature": 1.1}, "top_k 50": {"top_k": 50}}


def answers(
    sampling: Sampling, *, k: int, seed: int, prompts: Sequence[Prompt], chat: ChatFormat = CHAT
) -> list[Group]:
    engine = TransformersEngine(MODEL, chat, batch_size=1024)
    return engine.sample(prompts, k=k, sampling=sampling, seed=seed)


def scored(groups: Sequence[Group]) -> list[Group]:
    """The groups with the trainer's log-probabilities."""
    with torch.no_grad():
        tokens = [token_group(CHAT, group.prompt, group.responses) for group in groups]
        sums = iter([logp for group in tokens for logp in response_logps(MODEL, [group]).sums.tolist()])
    return [
        group.model_copy(
            update={"responses": tuple(r.model_copy(update={"policy_logp": next(sums)}) for r in group.responses)}
        )
        for group in groups
    ]


@pytest.fixture(scope="module")
def reference() -> list[Group]:
    return scored(answers(SHORT, k=500, seed=0, prompts=FOUR))


def goodness_of_fit(counts: dict[Any, int], expected: dict[Any, float]) -> float:
    """The p-value of counts under exact probabilities: chi-square, and its distribution by 9,999 draws.

    Outcomes expected less than five times are one outcome together; an impossible one that occurs makes p 0.
    """
    n = sum(counts.values())
    if any(not expected.get(outcome) for outcome in counts):
        return 0.0
    likely = [outcome for outcome, p in expected.items() if n * p >= 5]
    p = np.array([*(expected[outcome] for outcome in likely), 0.0])
    p[-1] = max(0.0, 1 - p.sum())
    observed = np.array([*(counts.get(outcome, 0) for outcome in likely), 0.0])
    observed[-1] = n - observed.sum()
    p, observed = p[p > 1e-9], observed[p > 1e-9]
    draws = generator(0, "goodness of fit").multinomial(n, p / p.sum(), size=9999)
    statistics = ((np.vstack([observed, draws]) - n * p) ** 2 / (n * p)).sum(axis=1)
    return float((statistics >= statistics[0] * (1 - 1e-9)).mean())


@torch.no_grad()
def next_token(prompt: Prompt, answer: tuple[int, ...], sampling: Sampling) -> torch.Tensor:
    """[V] probabilities by definition: one plain forward of the whole sequence, transformers' own logits processors."""
    ids = torch.tensor([[*CHAT.prompt_ids(prompt), *answer]])
    return processed(MODEL(input_ids=ids, use_cache=False).logits[:, -1], sampling)[0].double()


def first_token_fit(counted: Sequence[Group], sampling: Sampling) -> list[float]:
    """For each prompt, the p-value of its answers' first tokens under the exact probabilities of `sampling`."""
    return [
        goodness_of_fit(
            Counter(ids[0] for response in group.responses if (ids := response.token_ids)),
            dict(enumerate(next_token(group.prompt, (), sampling).tolist())),
        )
        for group in counted
    ]


@pytest.mark.parametrize("options", SETTINGS)
def test_first_tokens_have_their_exact_frequencies(options: dict[str, Any]) -> None:
    sampling = Sampling(**options, max_new_tokens=1)
    assert min(first_token_fit(answers(sampling, k=2000, seed=1, prompts=PROMPTS[:2]), sampling)) > ALPHA


@pytest.mark.parametrize("options", [{"temperature": 1.5}, {"top_k": 50}, {"top_p": 0.95}, {"min_p": 0.05}])
def test_first_tokens_do_not_have_the_frequencies_of_other_settings(options: dict[str, Any]) -> None:
    plain = answers(Sampling(max_new_tokens=1), k=2000, seed=1, prompts=PROMPTS[:2])
    assert max(first_token_fit(plain, Sampling(**options))) < ALPHA


def enumerated(prompt: Prompt, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Every possible answer and its probability: an answer goes on unless its last token ends it."""
    open_answers, whole = {(): 1.0}, {}
    for _ in range(sampling.max_new_tokens):
        longer = {
            (*answer, token): mass * p
            for answer, mass in open_answers.items()
            for token, p in enumerate(next_token(prompt, answer, sampling).tolist())
            if p > 0
        }
        whole |= {answer: mass for answer, mass in longer.items() if answer[-1] in CHAT.stop_token_ids}
        open_answers = {answer: mass for answer, mass in longer.items() if answer not in whole}
    return whole | open_answers


def test_whole_answers_have_their_exact_frequencies() -> None:
    sampling = Sampling(top_k=3, temperature=1.5, max_new_tokens=4)
    [group] = answers(sampling, k=4000, seed=2, prompts=PROMPTS[1:2])
    exact = enumerated(group.prompt, sampling)
    assert math.fsum(exact.values()) == pytest.approx(1, abs=1e-6)
    assert {len(answer) for answer in exact} == {2, 3, 4}
    assert goodness_of_fit(Counter(response.token_ids for response in group.responses), exact) > ALPHA


@pytest.mark.parametrize("options", SETTINGS[::2])
def test_other_seeds_agree(options: dict[str, Any]) -> None:
    sampling = Sampling(**options, max_new_tokens=12)
    first, second = (scored(answers(sampling, k=100, seed=seed, prompts=FOUR)) for seed in (3, 4))
    assert same_distribution(first, second, deals=DEALS).agrees


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_sampling_is_caught_at_2000_answers(reference: list[Group], name: str) -> None:
    wrong = scored(answers(Sampling(**FAULTS[name], max_new_tokens=12), k=500, seed=5, prompts=FOUR))
    assert not same_distribution(reference, wrong, deals=DEALS).agrees


def test_an_end_token_that_is_missed_is_caught(reference: list[Group]) -> None:
    deaf = ChatFormat(tiny_tokenizer())
    deaf.stop_token_ids = frozenset()
    past_it = scored(answers(SHORT, k=500, seed=5, prompts=FOUR, chat=deaf))
    found = same_distribution(reference, past_it, deals=DEALS)
    assert found.tests["finished"] == found.tests["length"] == pytest.approx(len(TESTS) / (DEALS + 1))


def test_each_statistic_sees_its_own_kind_of_difference() -> None:
    """One thing is changed in half of the answers; the p-values of the others stay where they were."""

    def group(k: int, **changed: Any) -> list[Group]:
        plain = {"token_ids": (1, 2, 3), "finish_reason": "stop", "policy_logp": -3.0}
        some = [Response(text="", **{**plain, **(changed if i % 2 else {})}) for i in range(k)]
        return [Group(prompt=PROMPTS[0], responses=tuple(some))]

    def seen(**changed: Any) -> set[str]:
        found = same_distribution(group(100), group(100, **changed)).tests
        assert all(p < ALPHA or p == 1 for p in found.values())
        return {name for name, p in found.items() if p < ALPHA}

    assert seen() == set()
    assert seen(finish_reason="length") == {"finished"}
    assert seen(token_ids=(9, 2, 3)) == {"first_token"}
    assert seen(policy_logp=-4.0) == {"logp", "logp_per_token"}
    assert seen(token_ids=(1, 2, 3, 4), policy_logp=-4.0) == {"length", "logp"}


def test_p_values_equal_the_full_enumeration_of_deals() -> None:
    """The three shortest answers against the three longest: of 20 deals, this one and its mirror are as extreme."""
    first, second = (
        [Group(prompt=PROMPTS[0], responses=tuple(Response(text="", token_ids=(1,) * n, policy_logp=-n) for n in part))]
        for part in ((4, 1, 2), (5, 7, 9))
    )
    found = same_distribution(first, second, deals=49_999).tests
    assert found["length"] == pytest.approx(len(TESTS) * 2 / 20, abs=0.02)


def random_groups(rng: np.random.Generator, k: int) -> list[Group]:
    """Made-up answers to three prompts, of a distribution that differs between the prompts."""
    groups = []
    for prompt, mean in zip(PROMPTS, (2, 5, 9), strict=False):
        lengths = np.minimum(1 + rng.poisson(mean, k), 10)
        tokens, noise = rng.integers(0, mean, k), rng.gamma(2.0, 1.0, k)
        groups.append(
            Group(
                prompt=prompt,
                responses=tuple(
                    Response(
                        text="",
                        token_ids=(int(token),) * int(length),
                        finish_reason="length" if length == 10 else "stop",
                        policy_logp=-float(length * extra),
                    )
                    for length, token, extra in zip(lengths, tokens, noise, strict=True)
                ),
            )
        )
    return groups


def test_false_alarms_are_as_rare_as_stated() -> None:
    """300 comparisons of samples that agree, at alpha = 0.05: at most 0.05 in expectation, 27 with three deviations."""
    rng = generator(0, "false alarms")
    alarms = sum(
        not same_distribution(random_groups(rng, 20), random_groups(rng, 25), alpha=0.05, deals=199, seed=i).agrees
        for i in range(300)
    )
    assert 3 <= alarms <= 27  # some: a test that never alarms would show nothing


def test_holm_by_hand() -> None:
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"policy_logp": None}, "'colour' has no policy_logp"), ({"token_ids": None}, "'colour' has no token ids")],
)
def test_answers_that_cannot_be_compared_are_refused(changed: dict[str, Any], said: str) -> None:
    whole = Response(text="", token_ids=(1,), policy_logp=-1.0)
    first = [Group(prompt=PROMPTS[0], responses=(whole,))]
    second = [Group(prompt=PROMPTS[0], responses=(whole.model_copy(update=changed),))]
    with pytest.raises(InputError, match=said):
        same_distribution(first, second)


def test_other_prompts_and_too_few_deals_are_refused() -> None:
    groups = [
        Group(prompt=prompt, responses=(Response(text="", token_ids=(1,), policy_logp=-1.0),)) for prompt in PROMPTS
    ]
    with pytest.raises(InputError, match="same prompts in the same order"):
        same_distribution(groups, groups[::-1])
    with pytest.raises(InputError, match="deals = 4999: expected at least 5000"):
        same_distribution(groups, groups, deals=4999)
