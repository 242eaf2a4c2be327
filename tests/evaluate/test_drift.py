"""Drift against independent arithmetic on tiny models, and the figures of texts by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from prefloop.data.chat import ChatFormat
from prefloop.evaluate.drift import distinct, drift, ratio, repetition
from prefloop.models import ModelRef, load_model, load_tokenizer
from prefloop.records import Group, Prompt, Response
from prefloop.run import Stage
from prefloop.train.config import Compute
from tests.tiny import save_tiny_model


def test_drift_against_plain_forward_passes(tmp_path: Path) -> None:
    policy, reference = (ModelRef.of(save_tiny_model(tmp_path / str(seed), seed=seed)) for seed in (1, 2))
    chat = ChatFormat(load_tokenizer(policy))
    texts = ["Hi.", "Nothing more to say", "one two three four one two three four"]
    answers = [
        Group(
            prompt=Prompt.of(f"Hello {i}?"),
            responses=(chat.with_token_ids(Response(text=text, finish_reason="stop" if i else "length")),),
        )
        for i, text in enumerate(texts)
    ]
    compute = Compute(device="cpu", dtype="float32")
    found = drift(answers, policy, reference, compute=compute, stage=Stage.detached())

    def by_token(ref: ModelRef) -> tuple[list[np.ndarray], list[np.ndarray]]:
        model, logps, entropies = load_model(ref), [], []
        for group in answers:
            prompt, ids = chat.prompt_ids(group.prompt), list(group.responses[0].token_ids or ())
            with torch.no_grad():
                row = torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1], dim=-1)
            logps.append(row[torch.arange(len(ids)), torch.tensor(ids)].numpy())
            entropies.append(-(row.exp() * row).sum(-1).numpy())
        return logps, entropies

    (ours, entropy), (theirs, their_entropy) = by_token(policy), by_token(reference)
    assert found.kl_per_token and found.reference_entropy is not None
    assert found.kl_per_token[0] == pytest.approx((np.concatenate(ours) - np.concatenate(theirs)).mean(), abs=1e-4)
    assert found.kl_per_token[1] < found.kl_per_token[0] < found.kl_per_token[2]
    assert found.entropy[0] == pytest.approx(np.concatenate(entropy).mean(), abs=1e-4)
    assert found.reference_entropy == pytest.approx(np.concatenate(their_entropy).mean(), abs=1e-4)
    assert found.length_tokens[0] == pytest.approx(np.mean([len(row) for row in ours]))
    assert found.finished == pytest.approx(2 / 3)
    assert found.repetition[0] == pytest.approx((0 + 0 + 1 / 5) / 3)
    assert drift(answers, policy, policy, compute=compute, stage=Stage.detached()).kl_per_token is None


def test_the_interval_of_a_ratio_has_the_width_of_the_delta_method() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 50, 300).astype(float)
    values = 0.3 * sizes + rng.normal(0, 3, 300)
    value, low, high = ratio(values, sizes, draws=4000)
    assert value == values.sum() / sizes.sum()
    error = np.std(values - value * sizes, ddof=1) / np.sqrt(300) / sizes.mean()
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.06)


def test_repetition_and_distinct_by_hand() -> None:
    assert repetition("a b c d e") == 0.0 and repetition("short") == 0.0
    assert repetition("x x x x x x") == pytest.approx(2 / 3)
    assert distinct(["a b a", "a b"], 1) == 2 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3
    assert distinct(["", "a"], 2) == 0.0
