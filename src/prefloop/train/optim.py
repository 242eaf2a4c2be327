"""Optimisers from libraries, and learning-rate schedules as pure functions of the step."""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloop.errors import InputError
from prefloop.models import quiet_bitsandbytes
from prefloop.train.config import Train

ADAM_EPSILON = 1e-8
ADAFACTOR_EPSILON = 1e-3
"""Adafactor's steps are relative to a tensor's RMS, taken to be at least this (Shazeer and Stern 2018, epsilon_2)."""


def learning_rate(config: Train, step: int) -> float:
    """The rate of `step`, from 0: linear warm-up to the peak, then as the schedule says.

    With W warm-up steps and N in all: (step + 1) / W of the peak, and from step W on, with r = (step - W) / (N - W),

        constant 1        linear 1 - r        cosine (1 + cos(pi r)) / 2

    A falling schedule is 0 from step N on, when all is done: no step is taken at rate 0.

    >>> config = Train(steps=6, warmup_steps=2, learning_rate=1.0, schedule="linear")
    >>> [learning_rate(config, step) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1.0 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * factor[config.schedule]


def make_optimizer(config: Train, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The optimiser that `config` names, over float32 weights on one device.

    Raises InputError where adamw-8bit cannot run: without bitsandbytes, or on a device that it has no kernels for.
    """
    rate, decay, device = config.learning_rate, config.weight_decay, weights[0].device.type
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(weights, lr=rate, eps=(None, ADAFACTOR_EPSILON), weight_decay=decay)
    adam = {"lr": rate, "betas": (0.9, 0.999), "eps": ADAM_EPSILON, "weight_decay": decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, **adam, fused=device != "mps")
    if device not in ("cpu", "cuda"):
        raise InputError(f"train.optimizer = 'adamw-8bit' runs on cpu and cuda, not on {device}; choose adafactor")
    quiet_bitsandbytes()
    try:
        bitsandbytes: Any = importlib.import_module("bitsandbytes.optim")
    except ImportError:
        raise InputError(
            "train.optimizer = 'adamw-8bit' needs bitsandbytes; run: pip install 'prefloop[optim8bit]'"
        ) from None
    return bitsandbytes.AdamW8bit(weights, **adam)


def unit_step(config: Train, weight: Tensor) -> Tensor:
    """About how far the first step of a weight moves each of its entries, for a learning rate of 1.

    AdamW: |g| / (|g| + epsilon), nearly 1 whatever the gradient g. Adafactor: up to the tensor's RMS.
    """
    assert weight.grad is not None
    size = weight.grad.abs()
    if config.optimizer != "adafactor":
        return size / (size + ADAM_EPSILON)
    rms = weight.detach().square().mean().sqrt().clamp(min=ADAFACTOR_EPSILON)
    return rms * (size / size.square().mean().sqrt()).clamp(max=1.0)
