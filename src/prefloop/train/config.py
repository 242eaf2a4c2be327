"""Options of scoring and training. Imports no torch, so that the command line can show them at once."""

from typing import Literal

from pydantic import Field

from prefloop.config import Config


class Compute(Config):
    """Where and in which precision models run."""

    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps; auto takes the first of cuda, mps, cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="matrix products of scoring and training, over float32 weights and reductions; "
        "auto is bfloat16 on cuda and float32 elsewhere (rewards are small differences of large sums)",
    )
    sampling_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the sampling engine; auto is bfloat16 where the hardware multiplies it natively"
    )
    tokens_per_forward: int = Field(2048, ge=1, description="tokens that go through the model at once")
    sequences_per_batch: int = Field(64, ge=1, description="answers that are sampled at once")


class Lora(Config):
    """Low-rank adapters (peft) on all linear layers; the trained adapter is merged into the saved model."""

    rank: int = Field(0, ge=0, description="0 trains all weights")
    alpha: float = Field(32.0, gt=0, description="the adapter's output is scaled by alpha / rank")


class Train(Config):
    """Options of one training round."""

    steps: int = Field(300, ge=1, description="optimiser steps a round (DICE: 300)")
    batch_size: int = Field(32, ge=1, description="pairs a step, whatever the memory (DICE: 32)")
    learning_rate: float = Field(5e-7, gt=0, description="peak learning rate (DICE: 5e-7)")
    warmup_steps: int = Field(50, ge=0, description="linear warm-up, then constant (DICE: 50)")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    validation_pairs: int = Field(576, ge=0, description="pairs held out of a round's data to watch (DICE: 576)")
    validate_every: int = Field(50, ge=1, description="steps between looks at the validation pairs")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    lora: Lora = Field(default_factory=Lora)
