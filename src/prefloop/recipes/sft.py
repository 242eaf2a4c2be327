"""SFT: supervised fine-tuning on answers to imitate.

1. Take a model and answers y to prompts x; of preference pairs, the chosen ones.
2. Minimise -log pi(y|x), on the tokens of the answer alone, its end token included.
"""

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prefloop.models import ModelRef, resolve
from prefloop.pairs.rewards import demonstrations
from prefloop.recipes.scored import SupervisedConfig, demo_options, load_answers, load_judges, supervised_round
from prefloop.recipes.steps import conclude, look_at

if TYPE_CHECKING:
    from prefloop.run import Run


class SftConfig(SupervisedConfig):
    """Options of `prefloop sft`."""

    pairs: Literal["chosen", "both"] = Field(
        default="chosen", description="of preference pairs: train on the chosen answers, or on both"
    )


def demo() -> SftConfig:
    """The packaged small model on the chosen answers of the packaged pairs: minutes on two CPU cores."""
    return SftConfig(**demo_options())


def sft(cfg: SftConfig, run: "Run") -> ModelRef:
    """Fine-tune `cfg.policy` on `cfg.data`; returns the final model, RUN/model."""
    policy = resolve(cfg.policy)
    judges = load_judges(cfg, run)
    answers, held_out = load_answers(cfg, run, policy, rejected=cfg.pairs == "both")
    look = partial(look_at, run, policy, [], cfg, prompts=held_out, evaluator=judges.evaluator)

    look("start", policy)
    trained = supervised_round(run.round(1), policy, demonstrations(answers), cfg)
    look("round-1", trained)
    return conclude(run, trained)
