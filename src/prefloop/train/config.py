"""Options of scoring and training. Imports no torch, so that the command line can show them at once."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from prefloop.config import Config
from prefloop.errors import InputError

LossName = Annotated[
    str,
    Field(
        description="of docs/losses.md: a name, with hyper-parameters (simpo:gamma=1.6) or without, or a sum "
        "(dpo+0.2*nll_mean). dpo cdpo robust_dpo spce wdpo ipo ipo_mean slic length_dpo ld_dpo ln_dpo dpop wpo exo "
        "sppo_hard sppo_soft apo_zero apo_down nca bco_pair discopop f_dpo aot aot_unpaired; without a reference simpo "
        "orpo cpo slic_hf; of single answers kto; to add nll_mean nll_sum xpo_bonus; short: hinge irpo rpo xpo mpo_mix"
    ),
]
"""What `prefloop.train.losses.parse_loss` reads."""


def check_loss(loss: str, beta: float | None, *, online: bool = False, soft: bool = False) -> None:
    """Raises InputError, which is a ValueError, where `parse_loss` would. DPO, the default, is known without torch.

    `online`: also for losses that need more than a step has in which both answers were just sampled and compared.
    `soft`: also for losses that take no soft labels.
    """
    if loss != "dpo":
        from prefloop.train.losses import parse_loss

        chosen = parse_loss(loss, beta=beta)
        missing = "single answers" if chosen.unpaired else ", ".join(sorted(chosen.needs - {"reference", "collision"}))
        if online and missing:
            raise InputError(f"loss = {loss!r}: needs {missing}, which online feedback does not give")
        if soft and chosen.no_p:
            raise InputError(f"feedback.labels = soft: the loss takes no soft labels: {chosen.no_p}; take hard ones")


def beta_of(loss: str, beta: float | None) -> float:
    """The scale of a loss's margin: the beta given, or that of the loss, or 1 where it has none."""
    from prefloop.train.losses import parse_loss

    return parse_loss(loss, beta=beta).beta or 1.0


class Compute(Config):
    """Where and in which precision models run."""

    device: str = Field(default="auto", description="auto (the first of cuda, mps, cpu), cpu, cuda, cuda:N, mps")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="matrix products of scoring and training, over float32 weights and reductions; "
        "auto is bfloat16 on cuda and float32 elsewhere (rewards are small differences of large sums)",
    )
    sampling_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="of the sampling engine and of local judges; auto is bfloat16 where the hardware multiplies it",
    )
    tokens_per_forward: int = Field(default=2048, ge=1, description="tokens that go through the model at once")
    sequences_per_batch: int = Field(default=64, ge=1, description="answers that are sampled at once")


class Lora(Config):
    """Low-rank adapters (peft) on all linear layers; the trained adapter is merged into the saved model."""

    rank: int = Field(default=0, ge=0, description="0 trains all weights")
    alpha: float = Field(default=32.0, gt=0, description="the adapter's output is scaled by alpha / rank")


class Train(Config):
    """Options of one training round."""

    steps: int = Field(default=300, ge=1, description="optimiser steps a round (DICE: 300)")
    batch_size: int = Field(default=32, ge=1, description="pairs a step, whatever the memory (DICE: 32)")
    optimizer: Literal["adamw", "adafactor", "adamw-8bit"] = Field(
        default="adamw",
        description="bytes of state a weight: adamw 8, adamw-8bit 2 (bitsandbytes), adafactor next to none; the "
        "learning rate of adafactor is relative to the RMS of each weight tensor, so give it one some 50 times larger",
    )
    learning_rate: float = Field(default=5e-7, gt=0, description="peak learning rate (DICE: 5e-7)")
    warmup_steps: int = Field(default=50, ge=0, description="linear warm-up to the peak (DICE: 50)")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="after the warm-up: the peak (DICE), or a fall that ends at 0 after the last step",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    gradient_checkpointing: bool = Field(
        default=False, description="keep each layer's input only and compute the layer again in the backward pass"
    )
    compile: bool = Field(
        default=False,
        description="torch.compile of the layers (on a CPU it needs a C++ compiler): half a minute at the start, then "
        "steps a tenth faster in float32 on two cores",
    )
    validation_pairs: int = Field(default=576, ge=0, description="pairs of a round held out to watch (DICE: 576)")
    validate_every: int = Field(default=50, ge=1, description="steps between looks at the validation pairs")
    checkpoint_every: int = Field(default=50, ge=1, description="steps between checkpoints")
    lora: Lora = Field(default_factory=Lora)

    @model_validator(mode="after")
    def _compile_or_recompute(self) -> Self:
        if self.compile and self.gradient_checkpointing:
            raise ValueError("compile = True with gradient_checkpointing = True is not supported; choose one")
        return self


class EpochTrain(Train):
    """Of a training that goes over its data once or so, however much that is."""

    steps: int = Field(default=0, ge=0, description="optimiser steps of a training; 0: as many as the epochs take")
    epochs: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="times over what a training has, where no steps are given"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.steps and self.epochs != 1.0:
            raise ValueError(
                f"steps = {self.steps} and epochs = {self.epochs:g} both say how long; give one (steps = 0: by epochs)"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _steps_are_given(cls, data: Any) -> Any:
        """A `Train` says how many steps."""
        return data.model_dump() if type(data) is Train else data

    def over(self, n: int) -> Train:
        """The same with the steps that the epochs take over n items, each seen that often, unless steps are given."""
        steps = self.steps or math.ceil(self.epochs * n / self.batch_size)
        return Train.model_validate(self.model_dump(exclude={"epochs"}) | {"steps": steps})
