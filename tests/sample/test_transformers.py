"""The transformers engine against transformers itself: generate, and plain forward passes without padding."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from prefloop.errors import EngineError, InputError
from prefloop.records import Group
from prefloop.sample.sampling import Sampling
from prefloop.sample.transformers import TransformersEngine
from tests.sample.engines import CHAT, PROMPTS, ids_of, stopping_llama

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
    "mistral with window": MistralConfig(**SMALL, sliding_window=16),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
}  # fmt: skip


def family(name: str) -> PreTrainedModel:
    if name == "llama":
        return stopping_llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(FAMILIES[name]).float().eval()


def plain_logps(model: PreTrainedModel, groups: list[Group]) -> list[float]:
    """Summed log-softmax of the sampled ids by one full forward per answer: no padding, no cache, no batch."""
    found = []
    for group in groups:
        prompt = CHAT.prompt_ids(group.prompt)
        for response in group.responses:
            ids = torch.tensor([[*prompt, *(response.token_ids or ())]])
            with torch.inference_mode():
                logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(dim=1)
            found.append(float(logps.gather(1, ids[0, len(prompt) :, None]).sum()))
    return found


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_sampling_logp_equals_a_forward_without_padding(name: str) -> None:
    model = family(name)
    sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=30)
    groups = TransformersEngine(model, CHAT).sample(PROMPTS, k=3, sampling=sampling, seed=1)
    ours = [response.sampling_logp for group in groups for response in group.responses]
    assert ours == pytest.approx(plain_logps(model, groups), abs=1e-4)


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


def test_finished_answers_leave_the_batch() -> None:
    model = stopping_llama()
    rows: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    groups = TransformersEngine(model, CHAT).sample(PROMPTS, k=8, sampling=Sampling(max_new_tokens=60), seed=0)
    hook.remove()
    lengths = [response.length_tokens for group in groups for response in group.responses]
    assert rows[:2] == [5, 40]
    assert len(rows) == max(lengths)
    for step, width in enumerate(rows[1:], start=1):
        running = sum(length > step for length in lengths)
        assert running <= width < running / 0.75 + 1e-9 or running == width


def test_logits_that_are_not_numbers_are_an_engine_error() -> None:
    model = stopping_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(EngineError, match=r"token 0 of answer 0 to prompt 'hi' are not finite; .*float32"):
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
