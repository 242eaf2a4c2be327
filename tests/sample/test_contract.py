"""What the `Engine` docstring promises, on every engine in the table."""

import pytest
import torch

from prefloop.errors import InputError, PrefloopError
from prefloop.records import Group, Prompt, Response
from prefloop.sample.engine import Engine
from prefloop.sample.sampling import Sampling
from tests.sample.engines import CHAT, ENGINES, PROMPTS, ids_of, plain_logps, stopping_llama

SAMPLING = Sampling(max_new_tokens=40)
ONE_STREAM = {"openvino"}
"""Engines that draw the K answers to a prompt from one stream of random numbers."""


@pytest.fixture(scope="module", params=list(ENGINES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(name: str) -> Engine:
    return ENGINES[name](64)


@pytest.fixture(scope="module")
def groups(engine: Engine) -> list[Group]:
    return engine.sample(PROMPTS, k=4, sampling=SAMPLING, seed=3)


def responses(groups: list[Group]) -> list[Response]:
    return [response for group in groups for response in group.responses]


def test_one_group_per_prompt_in_order_with_k_responses(groups: list[Group]) -> None:
    assert [group.prompt for group in groups] == PROMPTS
    assert [len(group.responses) for group in groups] == [4] * 5


def test_answers_to_one_prompt_differ(groups: list[Group]) -> None:
    assert all(len(set(ids)) == 4 for ids in ids_of(groups).values())


def test_end_token_last_exactly_when_the_reason_is_stop(groups: list[Group]) -> None:
    for response in responses(groups):
        assert response.token_ids
        body, last = response.token_ids[:-1], response.token_ids[-1]
        assert not CHAT.stop_token_ids.intersection(body)
        assert (last in CHAT.stop_token_ids) == (response.finish_reason == "stop")
        assert response.finish_reason == "stop" or len(response.token_ids) == 40
    assert {response.finish_reason for response in responses(groups)} == {"stop", "length"}


def test_text_is_the_decoded_ids(groups: list[Group]) -> None:
    assert all(response.text == CHAT.decode(response.token_ids or ()) for response in responses(groups))
    assert not any("<|im_end|>" in response.text for response in responses(groups))


def test_log_probabilities_are_the_models_own_before_temperature_and_truncation(name: str, engine: Engine) -> None:
    if engine.tolerance is None:
        pytest.skip("gives no log-probabilities")
    cold = SAMPLING.replace(temperature=0.5, top_p=0.8, top_k=50)
    groups = engine.sample(PROMPTS, k=4, sampling=cold, seed=3)
    for ours, theirs in zip(responses(groups), plain_logps(stopping_llama(), groups), strict=True):
        assert len(ours.sampling_logps or ()) == ours.length_tokens
        assert abs((ours.sampling_logp or 0) - theirs) < engine.tolerance * ours.length_tokens


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_stop_string_ends_an_answer_and_stays_in_it(engine: Engine, groups: list[Group], temperature: float) -> None:
    letters = tuple("etaoinsr")
    sampling = SAMPLING.replace(stop=letters, temperature=temperature)
    found = responses(engine.sample(PROMPTS, k=4, sampling=sampling, seed=3))
    stopped = [response for response in found if response.text.endswith(letters)]
    assert stopped
    for response in found:
        ended = response in stopped or (response.token_ids or ())[-1] in CHAT.stop_token_ids
        assert response.finish_reason == ("stop" if ended else "length")
        assert ended or response.length_tokens == 40
        assert not any(letter in response.text[:-1] for letter in letters)


def test_a_stop_id_ends_an_answer_and_stays_in_it(name: str, engine: Engine, groups: list[Group]) -> None:
    first = [(response.token_ids or ())[:3] for response in responses(groups)]
    third = next(ids[2] for ids in first if len(ids) == 3 and ids[2] not in CHAT.stop_token_ids)
    found = responses(engine.sample(PROMPTS, k=4, sampling=SAMPLING.replace(stop_token_ids=(third,)), seed=3))
    for response in found:
        assert third not in (response.token_ids or ())[:-1]
        assert response.finish_reason == "stop" or response.length_tokens == 40
    assert third in {(response.token_ids or ())[-1] for response in found}
    if name in ONE_STREAM:
        return  # an answer that ends earlier leaves other random numbers to its neighbours
    for response, before in zip(found, responses(groups), strict=True):
        ids = before.token_ids or ()
        cut = ids.index(third) + 1 if third in ids else len(ids)
        assert response.token_ids == ids[:cut]
        assert response.finish_reason == ("stop" if third in ids else before.finish_reason)


def test_greedy_takes_the_most_likely_token(engine: Engine, name: str) -> None:
    if engine.tolerance is None:
        pytest.skip("draws from no model")
    model = stopping_llama()
    for group in engine.sample(PROMPTS, k=2, sampling=SAMPLING.replace(temperature=0, max_new_tokens=8), seed=3):
        prompt = CHAT.prompt_ids(group.prompt)
        ids = group.responses[0].token_ids or ()
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        assert tuple(logits.argmax(dim=1).tolist()) == ids == group.responses[1].token_ids


def test_nothing_is_sampled_after_close(name: str) -> None:
    if name == "scripted":
        pytest.skip("holds nothing")
    engine = ENGINES[name](4)
    engine.close()
    engine.close()
    with pytest.raises(PrefloopError, match="closed"):
        engine.sample(PROMPTS, k=1, sampling=SAMPLING, seed=3)


def test_max_new_tokens_counts_every_token(engine: Engine) -> None:
    short = engine.sample(PROMPTS, k=4, sampling=SAMPLING.replace(max_new_tokens=5), seed=3)
    assert max(response.length_tokens for response in responses(short)) == 5
    unfinished = [response for response in responses(short) if response.finish_reason == "length"]
    assert unfinished and all(response.length_tokens == 5 for response in unfinished)


def test_a_lower_limit_cuts_the_same_answers(engine: Engine, groups: list[Group]) -> None:
    short = engine.sample(PROMPTS, k=4, sampling=SAMPLING.replace(max_new_tokens=7), seed=3)
    assert [r.token_ids for r in responses(short)] == [(r.token_ids or ())[:7] for r in responses(groups)]


def test_same_seed_same_answers_and_another_seed_others(engine: Engine, groups: list[Group]) -> None:
    again = engine.sample(PROMPTS, k=4, sampling=SAMPLING, seed=3)
    assert ids_of(again) == ids_of(groups)
    for ours, theirs in zip(responses(again), responses(groups), strict=True):
        assert ours.sampling_logp == pytest.approx(theirs.sampling_logp, abs=1e-4)
    other = engine.sample(PROMPTS, k=4, sampling=SAMPLING, seed=4)
    assert all(not set(ids).intersection(ids_of(groups)[prompt_id]) for prompt_id, ids in ids_of(other).items())


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_batch_size_does_not_matter(name: str, groups: list[Group], batch_size: int) -> None:
    if name in ONE_STREAM and batch_size < 4:
        pytest.skip("draws as many answers to a prompt from one stream as fit into a batch")
    again = ENGINES[name](batch_size).sample(PROMPTS, k=4, sampling=SAMPLING, seed=3)
    assert ids_of(again) == ids_of(groups)
    for ours, theirs in zip(responses(again), responses(groups), strict=True):
        assert ours.sampling_logp == pytest.approx(theirs.sampling_logp, abs=1e-3)


def test_order_of_prompts_does_not_matter(engine: Engine, groups: list[Group]) -> None:
    again = engine.sample(PROMPTS[::-1], k=4, sampling=SAMPLING, seed=3)
    assert [group.prompt for group in again] == PROMPTS[::-1]
    assert ids_of(again) == ids_of(groups)


def test_larger_k_only_adds_answers(name: str, engine: Engine, groups: list[Group]) -> None:
    if name in ONE_STREAM:
        pytest.skip("draws the answers to a prompt from one stream")
    again = engine.sample(PROMPTS, k=6, sampling=SAMPLING, seed=3)
    assert {prompt_id: ids[:4] for prompt_id, ids in ids_of(again).items()} == ids_of(groups)


def test_every_answer_is_reported_as_it_finishes(engine: Engine) -> None:
    finished: list[int] = []
    engine.sample(PROMPTS, k=4, sampling=SAMPLING, seed=3, advance=finished.append)
    assert sum(finished) == 20


def test_no_prompts_no_groups(engine: Engine) -> None:
    assert engine.sample([], k=4, sampling=SAMPLING, seed=3) == []


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(engine: Engine, k: int) -> None:
    with pytest.raises(InputError, match=f"k = {k}: expected at least 1"):
        engine.sample(PROMPTS, k=k, sampling=SAMPLING, seed=3)


def test_a_repeated_prompt_id_is_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match="'tea' occurs twice"):
        engine.sample([*PROMPTS, PROMPTS[3]], k=1, sampling=SAMPLING, seed=3)


def test_a_prompt_without_room_is_refused_by_name_before_sampling(engine: Engine) -> None:
    long = Prompt.of("x" * 500, id="long")
    [length] = engine.prompt_lengths([long], sampling=SAMPLING)
    assert length == len(CHAT.prompt_ids(long))
    fits = SAMPLING.replace(max_new_tokens=1024 - length)
    assert engine.prompt_lengths([long], sampling=fits) == [length]
    finished: list[int] = []
    too_many = SAMPLING.replace(max_new_tokens=1024 - length + 1)
    with pytest.raises(InputError, match="'long'"):
        engine.sample([*PROMPTS, long], k=1, sampling=too_many, seed=3, advance=finished.append)
    assert not finished
