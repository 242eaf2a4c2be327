"""The transformers engine against transformers itself: generate, and plain forward passes without padding."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from prefloop.errors import EngineError, InputError
from prefloop.records import Group
from prefloop.sample.cache import NAME, Seating, SharedPromptLayer
from prefloop.sample.draw import largest
from prefloop.sample.sampling import Sampling
from prefloop.sample.transformers import TransformersEngine, can_share
from tests.sample.engines import CHAT, PROMPTS, ids_of, plain_logps, stopping_llama

PROMPT = CHAT.prompt_ids(PROMPTS[1])
SMALL = {
    "vocab_size": len(CHAT.tokenizer),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "gemma2 with window": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0, sliding_window=16),
    "gpt2": GPT2Config(vocab_size=len(CHAT.tokenizer), n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
                       n_positions=256),
    "gptj": GPTJConfig(vocab_size=len(CHAT.tokenizer), n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=256,
                       initializer_range=0.2),
    "mistral with window": MistralConfig(**SMALL, sliding_window=16),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
}  # fmt: skip


def family(name: str) -> PreTrainedModel:
    if name == "llama":
        return stopping_llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(FAMILIES[name]).float().eval()


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_sampling_logps_equal_a_forward_without_padding(name: str) -> None:
    model = family(name)
    engine = TransformersEngine(model, CHAT, batch_size=7)
    sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=40)
    groups = engine.sample(PROMPTS, k=3, sampling=sampling, seed=1)
    ours = [response.sampling_logp for group in groups for response in group.responses]
    assert ours == pytest.approx(plain_logps(model, groups), abs=1e-4)
    assert model.config._attn_implementation != NAME


def test_logps_are_of_each_token() -> None:
    model = stopping_llama()
    [group] = TransformersEngine(model, CHAT).sample(PROMPTS[:1], k=2, sampling=Sampling(max_new_tokens=9), seed=1)
    for response in group.responses:
        ids, logps = response.token_ids or (), response.sampling_logps or ()
        for n in range(len(ids)):
            cut = response.model_copy(update={"token_ids": ids[: n + 1]})
            [total] = plain_logps(model, [Group(prompt=group.prompt, responses=(cut,))])
            assert sum(logps[: n + 1]) == pytest.approx(total, abs=1e-4)
        assert all(logp == round(logp, 6) for logp in logps)


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("llama", True),
        ("gpt2", True),
        ("qwen3", True),
        ("gptj", False),
        ("gemma2 with window", False),
        ("mistral with window", False),
    ],
)
def test_prompts_are_shared_where_it_is_proven(name: str, shares: bool) -> None:
    with torch.inference_mode():
        assert can_share(family(name), PROMPT) is shares
        assert can_share(family(name).bfloat16(), PROMPT) is shares


@pytest.mark.parametrize("wrong", ["prompt", "own", "order"])
def test_wrong_attention_is_found_out(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the proof is for: a batch whose rows see too little, or one another's, is not taken."""
    advance = Seating.advance

    def hide(seating: Seating, lengths: Sequence[int]) -> None:
        advance(seating, lengths)
        width = seating.columns[0]
        hidden = seating.mask[..., : width - 15] if wrong == "prompt" else seating.mask[..., width + 1 :]
        hidden.fill_(float("-inf"))

    if wrong == "order":
        monkeypatch.setattr(SharedPromptLayer, "move", lambda layer, sources, targets, width: None)
    else:
        monkeypatch.setattr(Seating, "advance", hide)
    with torch.inference_mode():
        assert not can_share(stopping_llama(), PROMPT)
        if wrong != "own":  # one token of many: less than bfloat16's rounding does
            assert not can_share(stopping_llama().bfloat16(), PROMPT)


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_neighbours_do_not_change_an_answer(name: str) -> None:
    engine = TransformersEngine(family(name), CHAT)
    sampling = Sampling(max_new_tokens=24)
    together = ids_of(engine.sample(PROMPTS, k=2, sampling=sampling, seed=1))
    for prompt in PROMPTS[:2]:
        assert ids_of(engine.sample([prompt], k=2, sampling=sampling, seed=1))[prompt.id] == together[prompt.id]


def test_greedy_equals_generate() -> None:
    model: Any = stopping_llama()
    sampling = Sampling(temperature=0, max_new_tokens=30)
    groups = TransformersEngine(model, CHAT).sample(PROMPTS, k=1, sampling=sampling, seed=0)
    for group in groups:
        ids = torch.tensor([CHAT.prompt_ids(group.prompt)])
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=30,
            eos_token_id=list(CHAT.stop_token_ids),
            pad_token_id=0,
        )
        assert group.responses[0].token_ids == tuple(generated[0, ids.shape[1] :].tolist())


def test_generation_config_does_not_leak() -> None:
    model = stopping_llama()
    sampling = Sampling(max_new_tokens=20)
    before = TransformersEngine(model, CHAT).sample(PROMPTS, k=2, sampling=sampling, seed=0)
    assert model.generation_config is not None
    model.generation_config.temperature = 0.1
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.eos_token_id = 65
    model.generation_config.max_new_tokens = 3
    assert TransformersEngine(model, CHAT).sample(PROMPTS, k=2, sampling=sampling, seed=0) == before


def test_every_stop_token_ends_an_answer_and_is_the_id_that_was_sampled() -> None:
    chat = type(CHAT)(CHAT.tokenizer)
    chat.stop_token_ids = frozenset([*chat.stop_token_ids, *chat.response_ids("abcdefgh")])
    groups = TransformersEngine(stopping_llama(), chat).sample(
        PROMPTS, k=8, sampling=Sampling(max_new_tokens=60), seed=0
    )
    finished = [r.token_ids for group in groups for r in group.responses if r.finish_reason == "stop"]
    assert {ids[-1] for ids in finished if ids} > {chat.end_token_id}
    assert all(not chat.stop_token_ids.intersection(ids[:-1]) for ids in finished if ids)


def rows_by_step(model: PreTrainedModel, **options: Any) -> tuple[list[int], list[int], list[int]]:
    """Prompts computed, rows of every step after them, lengths of the answers (longest prompt first)."""
    prompts: list[int] = []
    steps: list[int] = []

    def look(module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        rows, tokens = kwargs["input_ids"].shape
        (steps if tokens == 1 else prompts).append(rows)

    engine = TransformersEngine(model, CHAT, **options)
    with torch.inference_mode():
        engine.sample(PROMPTS[:1], k=1, sampling=Sampling(max_new_tokens=1), seed=0)  # proves the path
    hook = model.register_forward_hook(look, with_kwargs=True)
    groups = engine.sample(PROMPTS, k=8, sampling=Sampling(max_new_tokens=60), seed=0)
    hook.remove()
    groups.sort(key=lambda group: -len(CHAT.prompt_ids(group.prompt)))
    return prompts, steps, [response.length_tokens for group in groups for response in group.responses]


def test_finished_answers_leave_at_once_and_others_take_their_rows() -> None:
    prompts, steps, lengths = rows_by_step(stopping_llama(), batch_size=12)
    assert sum(prompts) == 5
    waiting, running, expected = list(lengths), [], []
    while waiting or running:
        joining = 12 - len(running)
        running = [left - 1 for left in running + waiting[:joining] if left > 1]
        waiting = waiting[joining:]
        expected.append(len(running))
    assert steps == [rows for rows in expected if rows]
    assert max(steps) == 12


def test_finished_answers_leave_a_batch_with_repeated_prompts() -> None:
    prompts, steps, lengths = rows_by_step(family("mistral with window"))
    assert prompts == [5]
    assert len(steps) == max(lengths) - 1
    for step, width in enumerate(steps, start=1):
        running = sum(length > step for length in lengths)
        assert running <= width < running / 0.75 + 1e-9 or running == width


def test_logits_that_are_not_numbers_are_an_engine_error() -> None:
    model = stopping_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(EngineError, match=r"token 0 of answer 0 to prompt 'capital' are not finite; .*float32"):
        TransformersEngine(model, CHAT).sample(PROMPTS, k=2, sampling=Sampling(), seed=0)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"call model.eval\(\)"):
        TransformersEngine(stopping_llama().train(), CHAT).sample(PROMPTS, k=1, sampling=Sampling(), seed=0)


def test_a_model_with_a_recurrent_state_is_refused() -> None:
    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match="MambaForCausalLM keeps a state"):
        TransformersEngine(AutoModelForCausalLM.from_config(config), CHAT)


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size = 0: expected at least 1"):
        TransformersEngine(stopping_llama(), CHAT, batch_size=0)


def test_tolerance_is_wider_in_half_precision() -> None:
    assert TransformersEngine(stopping_llama(), CHAT).tolerance == 2e-3
    assert TransformersEngine(stopping_llama().bfloat16(), CHAT).tolerance == 0.08


def test_a_closed_engine_gives_the_model_back_and_samples_no_more() -> None:
    model = stopping_llama()
    engine = TransformersEngine(model, CHAT)
    there = weakref.ref(model)
    engine.close()
    engine.close()
    del model
    gc.collect()
    assert there() is None
    with pytest.raises(EngineError, match="this engine was closed"):
        engine.sample(PROMPTS, k=1, sampling=Sampling(), seed=0)


def test_the_largest_of_a_large_vocabulary() -> None:
    values = torch.randn(4, 50_001, generator=torch.Generator().manual_seed(0))
    values[1] = values[1].round(decimals=1)  # ties
    values[2, ::2] = float("-inf")
    values[3] = torch.arange(50_001)
    found, columns = largest(values, 128)
    assert torch.equal(found, values.topk(128, dim=1).values)
    assert torch.equal(values.gather(1, columns), found)
    assert all(len(set(row)) == 128 for row in columns.tolist())
