"""The annotators that the contract battery runs on, and the comparisons that they judge."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForSequenceClassification, PreTrainedModel

from prefloop.feedback.annotator import Annotator, Comparison
from prefloop.feedback.implicit_reward import ImplicitReward
from prefloop.feedback.judgement_file import JudgementFile
from prefloop.feedback.reward_model import RewardModel
from prefloop.feedback.rule import RuleAnnotator, load_rule
from prefloop.feedback.votes import Votes
from prefloop.models import ModelRef
from prefloop.records import Prompt, Response
from prefloop.train.config import Compute
from tests.tiny import Template, save_tiny_model, tiny_tokenizer

COMPUTE = Compute(device="cpu", dtype="float32", sampling_dtype="float32", tokens_per_forward=300)
ANSWERS = {
    "Name a colour.": ("Red.", "The colour of the sky on a clear day."),
    "Tea or coffee?": ("Tea, because it is quieter than coffee.", "No"),
    "Count to three.": ("1, 2, 3", "one one one one one one"),
    "What is 2 + 2?": ("4", "5"),
    "Hi": ("Hello! How are you?", "Hello? How are you!"),
}
COMPARISONS = [Comparison(Prompt.of(prompt), Response(text=a), Response(text=b)) for prompt, (a, b) in ANSWERS.items()]
SAME_TEXT = Comparison(
    Prompt.of("Hi"), Response(text="Hello!", finish_reason="stop"), Response(text="Hello!\n", finish_reason="length")
)


def prefers_a_vowel(prompt: Prompt, a: Response, b: Response) -> float:
    """A preference that is biased towards the first slot: its two orders do not sum to 1."""
    vowels = [sum(response.text.count(vowel) for vowel in "aeiou") for response in (a, b)]
    return 0.9 if vowels[0] >= vowels[1] else 0.3


def likes_the_first_slot(prompt: Prompt, a: Response, b: Response) -> float:
    return 0.8


def save_tiny_reward_model(
    folder: Path,
    seed: int = 0,
    template: Template | None = "llama3",
    labels: int = 1,
    pad: bool = True,
    kind: type[PreTrainedModel] = LlamaForSequenceClassification,
    **more: Any,
) -> Path:
    """A random Llama (or another `kind`) with a classifier head, and its tokenizer, as an ordinary transformers folder.
    `more`: of its configuration.
    """
    tokenizer = tiny_tokenizer(template)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "num_labels": labels,
        "pad_token_id": tokenizer.pad_token_id if pad else None,
    }
    assert kind.config_class is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind(kind.config_class(**sizes | more)).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _rule(folder: Path) -> Annotator:
    return load_rule("short")


def _soft_rule(folder: Path) -> Annotator:
    return load_rule("helpful", scale=0.5)


def _pair_rule(folder: Path) -> Annotator:
    return RuleAnnotator(prefers_a_vowel, "vowels")


def _reward_model(folder: Path) -> Annotator:
    return RewardModel(ModelRef.of(save_tiny_reward_model(folder / "reward")), compute=COMPUTE)


def _implicit_reward(folder: Path) -> Annotator:
    policy, reference = (ModelRef.of(save_tiny_model(folder / f"m{seed}", seed=seed)) for seed in (1, 2))
    return ImplicitReward(policy, reference, beta=0.1, compute=COMPUTE)


def _file(folder: Path) -> Annotator:
    preferences = [1, "b", 0.3, "tie", 0.85]
    rows = [
        {"prompt": prompt, "response_1": a, "response_2": b, "preference": preference}
        for (prompt, (a, b)), preference in zip(ANSWERS.items(), preferences, strict=True)
    ]
    path = folder / "people.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return JudgementFile(path)


def _votes(folder: Path) -> Annotator:
    return Votes([_soft_rule(folder), _pair_rule(folder), _file(folder)], weights=(1.0, 0.3, 0.7))


ANNOTATORS: dict[str, Callable[[Path], Annotator]] = {
    "rule": _rule,
    "soft rule": _soft_rule,
    "pair rule": _pair_rule,
    "reward model": _reward_model,
    "implicit reward": _implicit_reward,
    "file": _file,
    "votes": _votes,
}
"""Annotators by name, made in a folder that they may write to."""
