"""The batch that holds every prompt once, step by step against plain forwards without padding and cache."""

from collections import deque
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, PreTrainedModel, Qwen3Config

from prefloop.sample.cache import SharedPrompts, shared_prompt_attention
from tests.tiny import tiny_llama

VOCABULARY = 64
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
FAMILIES = {
    "gemma2 with capped attention": Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=2.0, layer_types=["full_attention"] * 2
    ),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2),
    "qwen3 with one key head": Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8),
    "qwen3 with all key heads": Qwen3Config(**SMALL, num_key_value_heads=4, head_dim=16),
}
PROMPT_LENGTHS = (40, 17, 16, 3, 1)


def family(name: str) -> PreTrainedModel:
    if name == "llama":
        return tiny_llama(VOCABULARY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(FAMILIES[name]).float().eval()


@dataclass
class Known:
    """An answer that is known beforehand, with the plain forward's logits [len(ids), V] of its tokens."""

    prompt: int
    ids: list[int]
    logits: Tensor
    done: int = 0


def known_answers(model: PreTrainedModel, prompts: list[list[int]], k: int) -> list[Known]:
    """`k` answers to each prompt, of 1 to 45 random tokens."""
    generator = torch.Generator().manual_seed(1)
    answers = []
    for index, prompt in enumerate(prompts):
        for _ in range(k):
            length = int(torch.randint(1, 46, (), generator=generator))
            ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
            row = torch.tensor([prompt + ids[:-1]])
            answers.append(Known(index, ids, model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 :]))
    return answers


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def replay(batch: SharedPrompts, answers: list[Known]) -> float:
    """Feed the answers through the batch, always as full as it goes; the largest difference from the known logits."""
    waiting, rows, worst = deque(answers), [], 0.0
    found: Tensor | None = None
    while rows or waiting:
        joining = [waiting.popleft() for _ in range(min(batch.room, len(waiting)))]
        if joining:
            rows += joining
            first = batch.join([answer.prompt for answer in joining])
            found = first if found is None else torch.cat([found, first])
        assert found is not None and len(found) == len(rows)
        expected = torch.stack([answer.logits[answer.done] for answer in rows])
        worst = max(worst, float((found - expected).abs().max()))
        for answer in rows:
            answer.done += 1
        order = batch.keep([row for row, answer in enumerate(rows) if answer.done < len(answer.ids)])
        rows = [rows[row] for row in order]
        found = batch.step(torch.tensor([answer.ids[answer.done - 1] for answer in rows])) if rows else None
    assert all(answer.done == len(answer.ids) for answer in answers)
    return worst


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
@pytest.mark.parametrize("capacity", [1, 4, 64])
def test_every_step_equals_a_plain_forward(name: str, capacity: int) -> None:
    model, prompts = family(name), prompts_of(PROMPT_LENGTHS)
    with torch.inference_mode():
        batch = SharedPrompts(model, prompts, capacity=capacity, limit=45)
        assert replay(batch, known_answers(model, prompts, k=4)) < 1e-4


def test_prompts_of_any_order_of_lengths() -> None:
    """The engine sends the longest first; the batch does not rely on it."""
    model, prompts = family("llama"), prompts_of(PROMPT_LENGTHS[::-1])
    with torch.inference_mode():
        assert replay(SharedPrompts(model, prompts, capacity=5, limit=45), known_answers(model, prompts, k=3)) < 1e-4


def test_every_prompt_is_computed_once_and_its_slot_is_used_again() -> None:
    model, prompts = family("llama"), prompts_of((9,) * 30)
    computed: list[int] = []

    def look(module: object, inputs: object, kwargs: dict[str, Tensor], output: object) -> None:
        rows, tokens = kwargs["input_ids"].shape
        computed.extend([rows] * (tokens > 1))

    with torch.inference_mode():
        answers = known_answers(model, prompts, k=3)
        hook = model.register_forward_hook(look, with_kwargs=True)
        batch = SharedPrompts(model, prompts, capacity=6, limit=45)
        assert replay(batch, answers) < 1e-4
        hook.remove()
    assert sum(computed) == 30
    # Six rows belong to six prompts at most, and one more may have left when the next joins.
    assert len(batch._layers[0].prompt_keys) <= 6


def test_many_prompts_are_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefloop.sample.cache.PREFILL", 60)
    model, prompts = family("llama"), prompts_of((30, 25, 20, 20, 70, 5))
    computed: list[int] = []
    with torch.inference_mode():
        answers = known_answers(model, prompts, k=1)
        hook = model.register_forward_hook(
            lambda module, inputs, kwargs, output: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        batch = SharedPrompts(model, prompts, capacity=6, limit=45)
        batch.join(range(6))
        hook.remove()
        assert max(computed) == 70 and sum(size > 60 for size in computed) == 1
        assert replay(SharedPrompts(model, prompts, capacity=6, limit=45), answers) < 1e-4


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "sliding_window"])
def test_attention_with_more_to_it_is_refused(name: str) -> None:
    model = family("llama")
    state = torch.zeros(1, 4, 1, 8)
    more = {name: 4, "prompt_layers": []}
    with pytest.raises(RuntimeError, match=name):
        shared_prompt_attention(model.model.layers[0].self_attn, state, state, state, None, **more)
