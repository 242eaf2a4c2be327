"""Learning rates as golden values; the optimisers that a configuration names, and the bytes of their state."""

import sys
from typing import Literal

import pytest
import torch

from prefloop.errors import InputError
from prefloop.train.config import Train
from prefloop.train.optim import learning_rate, make_optimizer, unit_step

Name = Literal["adamw", "adafactor", "adamw-8bit"]


def rates(config: Train, steps: int) -> list[float]:
    return [learning_rate(config, step) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627, 0.0]),
    ],
)
def test_golden_rates_of_eight_steps_and_the_end(schedule: str, expected: list[float]) -> None:
    config = Train(steps=8, warmup_steps=4, learning_rate=2e-3).replace(schedule=schedule)
    assert rates(config, 9) == pytest.approx([2e-3 * value for value in expected], rel=1e-12, abs=1e-18)


def test_without_warm_up_the_first_step_has_the_peak_and_past_the_end_it_stays_zero() -> None:
    config = Train(steps=4, warmup_steps=0, learning_rate=1.0, schedule="linear")
    assert rates(config, 6) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_a_warm_up_longer_than_the_round_never_falls() -> None:
    config = Train(steps=2, warmup_steps=4, learning_rate=1.0, schedule="cosine")
    assert rates(config, 2) == [0.25, 0.5]


def weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(128, 64, generator=generator)), torch.nn.Parameter(torch.ones(64))]
    for weight in made:
        weight.grad = torch.randn(weight.shape, generator=generator)
    return made


def state_bytes(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> int:
    """Of the tensors that grow with the weight."""
    values = optimizer.state[weight].values()
    return sum(value.nbytes for value in values if torch.is_tensor(value) and value.numel() > 1)


def test_adamw_takes_steps_of_the_learning_rate_and_8_bytes_a_weight() -> None:
    made = weights()
    before = [weight.detach().clone() for weight in made]
    optimizer = make_optimizer(Train(learning_rate=1e-2), made)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    optimizer.step()
    for weight, old in zip(made, before, strict=True):
        assert weight.grad is not None
        assert torch.allclose(weight, old - 1e-2 * weight.grad.sign(), atol=1e-6)
        assert state_bytes(optimizer, weight) == 8 * weight.numel()


def test_adafactor_takes_steps_relative_to_the_size_of_the_tensor_and_keeps_rows_and_columns() -> None:
    made = weights()
    with torch.no_grad():
        made[0].mul_(5.0)
    before = made[0].detach().clone()
    optimizer = make_optimizer(Train(learning_rate=1e-2, optimizer="adafactor"), made)
    optimizer.step()
    moved = (made[0].detach() - before).square().mean().sqrt()
    assert moved.item() == pytest.approx(1e-2 * before.square().mean().sqrt().item(), rel=0.02)
    assert state_bytes(optimizer, made[0]) == 4 * (128 + 64)


def test_weight_decay_reaches_every_optimiser() -> None:
    for name in ("adamw", "adafactor"):
        made = weights()
        for weight in made:
            weight.grad = torch.zeros_like(weight)
        make_optimizer(Train(learning_rate=0.1, weight_decay=0.5).replace(optimizer=name), made).step()
        assert torch.allclose(made[1], torch.full((64,), 0.95)), name


def test_adamw_8bit_keeps_a_quarter_of_the_state_and_moves_like_adamw() -> None:
    pytest.importorskip("bitsandbytes")
    made, exact = weights(), weights()
    optimizer = make_optimizer(Train(learning_rate=1e-2, optimizer="adamw-8bit"), made)
    optimizer.step()
    make_optimizer(Train(learning_rate=1e-2), exact).step()
    # bitsandbytes rounds the first moment to 8 bits after the update, so the first step is AdamW's own.
    assert torch.allclose(made[0], exact[0], atol=1e-5)
    state = optimizer.state[made[0]]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert state["state1"].numel() == made[0].numel()
    assert made[0].dtype == torch.float32


def test_adamw_8bit_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError, match=r"needs bitsandbytes; run: pip install 'prefloop\[optim8bit\]'"):
        make_optimizer(Train(optimizer="adamw-8bit"), weights())


def test_adamw_8bit_on_a_device_without_kernels_names_the_device() -> None:
    with pytest.raises(InputError, match="runs on cpu and cuda, not on meta; choose adafactor"):
        make_optimizer(Train(optimizer="adamw-8bit"), [torch.empty(2, device="meta")])


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_unit_step_foretells_the_first_step(name: Name) -> None:
    made = weights()
    before = made[0].detach().clone()
    config = Train(learning_rate=1e-3).replace(optimizer=name)
    foretold = 1e-3 * unit_step(config, made[0])
    make_optimizer(config, made).step()
    ratio = ((made[0].detach() - before).abs() / foretold).median().item()
    assert 0.7 < ratio < 1.5


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(InputError, match="optimizer = 'sgd': input should be 'adamw', 'adafactor' or 'adamw-8bit'"):
        Train().replace(optimizer="sgd")
