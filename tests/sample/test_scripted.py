"""The scripted engine beyond the contract: where its texts come from."""

import pytest

from prefloop.errors import InputError
from prefloop.sample.sampling import Sampling
from prefloop.sample.scripted import ScriptedEngine, echo
from prefloop.seeds import derive_seed
from tests.sample.engines import CHAT, PROMPTS

TEXTS = {"colour": ["Red.", "A light blue."], "hi": ["Hello!", "Hi."]}


def test_a_mapping_answers_in_order_with_the_tokens_of_the_text() -> None:
    groups = ScriptedEngine(CHAT, TEXTS).sample(PROMPTS[:2], k=2, sampling=Sampling(), seed=0)
    assert [[r.text for r in group.responses] for group in groups] == [TEXTS["colour"], TEXTS["hi"]]
    red = groups[0].responses[0]
    assert red.token_ids == tuple(CHAT.response_ids("Red."))
    assert red.finish_reason == "stop" and red.sampling_logp is None


def test_a_long_text_is_cut_at_the_limit() -> None:
    engine = ScriptedEngine(CHAT, TEXTS)
    [group] = engine.sample(PROMPTS[:1], k=2, sampling=Sampling(max_new_tokens=5), seed=0)
    assert [(r.text, r.finish_reason) for r in group.responses] == [("Red.", "stop"), ("A lig", "length")]


def test_a_function_gets_the_prompt_the_answer_and_its_seed() -> None:
    engine = ScriptedEngine(CHAT, lambda prompt, k, seed: f"{prompt.id} {k} {seed}")
    [group] = engine.sample(PROMPTS[:1], k=2, sampling=Sampling(), seed=9)
    expected = [f"colour {k} {derive_seed(9, 'answer', 'colour', k)}" for k in range(2)]
    assert [r.text for r in group.responses] == expected


def test_missing_texts_are_named() -> None:
    engine = ScriptedEngine(CHAT, TEXTS)
    with pytest.raises(InputError, match="no answers to prompt 'tea'"):
        engine.sample([PROMPTS[3]], k=1, sampling=Sampling(), seed=0)
    with pytest.raises(InputError, match="2 answers to prompt 'colour', and answer 3 was asked for"):
        engine.sample(PROMPTS[:2], k=3, sampling=Sampling(), seed=0)


def test_echo_repeats_the_end_of_the_message() -> None:
    assert [echo(PROMPTS[0], k, seed=k) for k in range(3)] == [
        "Answer 1: Name a colour.",
        "Answer 2: a colour.",
        "Answer 3: colour.",
    ]
