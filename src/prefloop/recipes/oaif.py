"""OAIF: direct alignment from online AI feedback (Guo et al. 2024, arXiv 2402.04792, Algorithm 1).

Start: an instruction-tuned model pi(0), prompts, an annotator. Step t = 1..T:
1. Draw a batch of prompts; sample two answers to each from the current model, independently, at temperature 0.9.
2. Ask the annotator which is better. One that shows an answer first is asked in both orders and averaged.
3. Take the better one as y+, the other as y-; one optimiser step on the mean of the loss of

       h = log pi/pi(0) (y+|x) - log pi/pi(0) (y-|x)

   DPO  -log sigmoid(beta h)          beta 0.1
   IPO  (h - 1 / (2 beta))^2          beta 1.0
   SLiC max(0, 1 - beta h)            beta 0.002

   all on log-probabilities summed over tokens. pi(0) stays the reference to the end. Others: docs/losses.md.

Every N steps the model is looked at: win rate against pi(0) and against itself N steps before, on held-out prompts, by
an annotator that does not train it.

Every step samples inside this process, from the weights in training; --engine and --server are those of the answers
that are looked at before and after.

Departures from the paper (docs/methods/oaif.md says more): AdamW by default (--train.optimizer adafactor is the
paper's); identical answers, ties and abstentions make no pair; an answer that was cut at the limit of new tokens has no
end token, and --on-unfinished says what becomes of it. `--offline` is the paper's baseline: the same labels, on
answers of pi(0).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from prefloop.config import Config, free
from prefloop.feedback.options import AnnotatorName, Feedback
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef
from prefloop.recipes.online import (
    Judges,
    OnlineLoop,
    Unfinished,
    counts_of,
    distinct,
    estimate_online,
    evaluate,
    lengths,
    lengths_of_pairs,
    load_both,
    preferences,
    run_online,
)
from prefloop.recipes.steps import LookAt
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, LossName, Train, beta_of, check_loss

if TYPE_CHECKING:
    from prefloop.records import Group, Prompt
    from prefloop.run import Run, Stage


class OaifConfig(Config):
    """Options of `prefloop oaif`. The defaults are the paper's."""

    policy: str = Field(default="", description="pi(0), the instruction-tuned model to start from")
    prompts: str = Field(default="", description="prompts: a file, a data set folder or hub name, or seed:train")
    held_out: str = Field(default="", description="prompts to look at models with; a tenth of them when left out")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    annotator: AnnotatorName = ""
    evaluator: str = Field(
        default="", description="who judges the win rates; another than --annotator, which is used when left out"
    )
    feedback: Feedback = Field(default_factory=Feedback)
    evaluation: Feedback = Field(
        default_factory=lambda: Feedback(instruction="helpfulness-scoring"),
        description="the evaluator's own options, with a budget of its own",
    )
    loss: LossName = "dpo"
    beta: float | None = Field(
        default=None, gt=0, description="of the loss; none: 0.1 for dpo, 1.0 for ipo, 0.002 for slic (paper)"
    )
    on_unfinished: Unfinished = Field(
        default="keep",
        description="an answer cut at the limit: keep it, drop its pair, or penalise it (it loses to a finished one)",
    )
    offline: bool = Field(
        default=False, description="the baseline: answers of the start model instead of the current one"
    )
    evaluate_every: int = Field(default=100, ge=1, description="steps between win rates")
    dry_run: bool = free(
        default=False, description="say what the annotators would take in calls, tokens and money, and do nothing"
    )
    seed: int = Field(default=0, ge=0, description="of every random choice")
    sampling: Sampling = Field(default_factory=lambda: Sampling(temperature=0.9))
    look_at: LookAt = Field(default_factory=LookAt)
    train: Train = Field(
        default_factory=lambda: Train(steps=4000, batch_size=128, warmup_steps=150, validation_pairs=0),
        description="every step is one batch of prompts",
    )
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)

    @model_validator(mode="after")
    def _known_loss(self) -> Self:
        check_loss(self.loss, self.beta, online=True, soft=self.feedback.labels == "soft")
        return self


def paper() -> OaifConfig:
    """The paper's setting: needs GPUs. Give --policy, --prompts and --annotator."""
    return OaifConfig(train=OaifConfig().train.replace(optimizer="adafactor"))


def demo() -> OaifConfig:
    """The packaged small model, and a rule that likes answers of 25 words which keep to the prompt."""
    return OaifConfig(
        policy="smollm2-135m",
        prompts="seed:train",
        held_out="seed:held_out",
        annotator="rule:helpful-short",
        evaluator="rule:varied",
        evaluate_every=8,
        sampling=Sampling(temperature=0.9, max_new_tokens=64),
        look_at=LookAt(answers=12, shown=4),
        train=Train(steps=16, batch_size=8, learning_rate=1e-5, warmup_steps=2, validation_pairs=0, checkpoint_every=8),
    )


def oaif(cfg: OaifConfig, run: "Run") -> ModelRef:
    """Run OAIF; returns the final model, RUN/model."""
    return run_online(cfg, run, align, *load_both(cfg, run), beta=beta_of(cfg.loss, cfg.beta))


def align(
    start: ModelRef,
    prompts: "Sequence[Prompt]",
    before: "Sequence[Group]",
    judges: Judges,
    cfg: OaifConfig,
    *,
    stage: "Stage",
) -> Path:
    """The T steps. `before`: answers of the start model to the held-out prompts."""
    from prefloop.train.learner import Learner, batch_of_step
    from prefloop.train.losses import parse_loss
    from prefloop.train.objective import PairObjective
    from prefloop.train.online import OnlineLearner

    objective = PairObjective(parse_loss(cfg.loss, beta=cfg.beta))
    learner = Learner(start, [], objective=objective, config=cfg.train, compute=cfg.compute, seed=cfg.seed, stage=stage)
    online = OnlineLearner(learner, behaviour="start" if cfg.offline else "current")
    with OnlineLoop(online, before, judges, cfg, ask=preferences, look=evaluate, description=f"{cfg.loss} online",
                    stage=stage) as loop:  # fmt: skip
        for step in loop.steps():
            batch = [prompts[i] for i in batch_of_step(len(prompts), cfg.train.batch_size, step, cfg.seed)]
            groups = online.sample(distinct(batch), k=2, sampling=cfg.sampling, seed=seed_of_step(cfg, step))
            gap = {} if cfg.offline else loop.sampler_gap(step, groups)
            pairs, labelled = loop.pairs(step, groups)
            counts = counts_of(labelled) | lengths_of_pairs(pairs)
            figures = online.step(pairs, step) if pairs else {}
            loop.done({"step": step + 1, **lengths(groups), **gap, **counts, **figures})
    return loop.conclude()


def seed_of_step(cfg: OaifConfig, step: int) -> int:
    """Of the answers of a step. Offline a prompt has one pair of answers, however often it comes round."""
    return derive_seed(cfg.seed, "offline") if cfg.offline else derive_seed(cfg.seed, "step", step)


def estimate_feedback(cfg: OaifConfig) -> list[str]:
    """What --dry-run prints (`estimate_online`)."""
    return estimate_online(cfg, "oaif")
