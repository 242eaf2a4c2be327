"""BPO: online preference optimisation in proximity to the behaviour model (Xu et al. 2024, arXiv 2406.12168).

Start: an instruction-tuned model pi(0), prompts, an annotator; F phases in T steps, K = ceil(T / F).
1. n members begin at pi(0), each with an adapter of its own. Step s = 0..T-1:
2. Where K divides s, the behaviour model becomes the mean of the members: pi_beta = W + 1/n sum_i dW_i.
3. Draw a batch of prompts; sample two answers to each from pi_beta, independently, at temperature 1.
4. Ask the annotator which is better.
5. Log-probabilities of the pairs under the reference, which is pi_beta itself, before any member moves.
6. Every member takes one optimiser step on the mean loss of the same pairs, with an optimiser of its own:

       h = log pi_i/pi_beta (y+|x) - log pi_i/pi_beta (y-|x)
       DPO -log sigmoid(beta h)       IPO (h - 1 / (2 beta))^2       SLiC max(0, 1 - beta h)

The result is the mean of the members. F = 1 is training on answers of pi(0); F = T is on-policy, and its loss is a
constant, because every step begins at h = 0 (n = 1): look at win rates and drift, not at the loss.

`--reference start` is online direct alignment with the same data (OAIF's with F = T and one member), `ema` a moving
mean of behaviour models (F - 1 moves, so it is for many phases), and another model's name the paper's ablation with a
better, but farther, reference.

Departures (docs/methods/bpo.md says more): members differ by the random A of their adapters and not by a supervised
round each; the mean is of weight changes, where the released code averages the factors; ties and identical answers
make no pair.
"""

from collections.abc import Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prefloop.config import Config, free
from prefloop.errors import InputError
from prefloop.feedback.options import AnnotatorName, Feedback
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, resolve
from prefloop.recipes.online import (
    Judges,
    OnlineLoop,
    Unfinished,
    check_online,
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
from prefloop.recipes.steps import LookAt, check_same_tokenizer
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Lora, Train

if TYPE_CHECKING:
    from prefloop.records import Group, Prompt
    from prefloop.run import Run, Stage

OWN = ("behaviour", "start", "ema")
"""References that are made here; any other is a model's name."""


class BpoConfig(Config):
    """Options of `prefloop bpo`. The defaults are the paper's, for TL;DR (docs/methods/bpo.md has the others)."""

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
    phases: int | Literal["all"] = Field(
        default=2, description="F: how often the behaviour model is taken anew, from 1 to every step (all)"
    )
    reference: str = Field(
        default="behaviour",
        description="of the loss: behaviour (BPO), start (online direct alignment), ema, or another model's name",
    )
    ema: float = Field(
        default=5e-3, ge=0, le=1, description="how far each phase moves the ema reference to the behaviour model (code)"
    )
    members: int = Field(default=5, ge=1, description="n adapters that are trained side by side; 1 without an adapter")
    loss: Literal["dpo", "ipo", "ipo_mean", "slic"] = Field(
        default="dpo",
        description="on summed log-probabilities, or (ipo_mean, the released code's) on means over tokens",
    )
    beta: float = Field(default=0.1, gt=0, description="of the loss (paper: 0.1 for dpo, ipo_mean and slic)")
    on_unfinished: Unfinished = Field(
        default="keep",
        description="an answer cut at the limit: keep it, drop its pair, or penalise it (it loses to a finished one)",
    )
    evaluate_every: int = Field(default=100, ge=1, description="steps between win rates")
    dry_run: bool = free(
        default=False, description="say what the annotators would take in calls, tokens and money, and do nothing"
    )
    seed: int = Field(default=0, ge=0, description="of every random choice")
    sampling: Sampling = Field(default_factory=lambda: Sampling(max_new_tokens=128))
    look_at: LookAt = Field(default_factory=LookAt)
    train: Train = Field(
        default_factory=lambda: Train(
            steps=625, batch_size=16, learning_rate=5e-5, warmup_steps=0, schedule="linear", validation_pairs=0,
            lora=Lora(rank=256, alpha=512),
        ),
        description="every step is one batch of prompts",
    )  # fmt: skip
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)


def paper() -> BpoConfig:
    """The paper's setting for TL;DR. Give --policy, --prompts and --annotator."""
    return BpoConfig()


def demo() -> BpoConfig:
    """The packaged small model with two small adapters, and a rule that likes answers of 25 words."""
    return BpoConfig(
        policy="smollm2-135m",
        prompts="seed:train",
        held_out="seed:held_out",
        annotator="rule:helpful-short",
        evaluator="rule:varied",
        members=2,
        evaluate_every=6,
        sampling=Sampling(max_new_tokens=48),
        look_at=LookAt(answers=12, shown=4),
        train=Train(
            steps=12, batch_size=4, learning_rate=2e-4, warmup_steps=0, schedule="linear", validation_pairs=0,
            checkpoint_every=3, lora=Lora(rank=8, alpha=16),
        ),
    )  # fmt: skip


def bpo(cfg: BpoConfig, run: "Run") -> ModelRef:
    """Run BPO; returns the final model, RUN/model."""
    check_options(cfg)
    k, phases = phase_length(cfg), phases_of(cfg)
    run.note(f"{phases} phases of {k} steps, reference {cfg.reference}, {cfg.members} members")
    if cfg.reference == "ema":
        # The first phase takes the start model, where the mean is already.
        share = 1 - (1 - cfg.ema) ** (phases - 1)
        run.note(f"the moving mean moves {phases - 1} times, {share:.3g} of the way to the behaviour models in all")
    reference = other_reference(cfg)
    return run_online(cfg, run, partial(align, reference=reference), *load_both(cfg, run), beta=cfg.beta)


def check_options(cfg: BpoConfig) -> None:
    """Raises InputError for what cannot be, before a model is fetched or anything is computed."""
    check_online(cfg)
    if cfg.members > 1 and not cfg.train.lora.rank:
        raise InputError(
            f"members = {cfg.members} needs an adapter for each: give --train.lora.rank, or --members 1 to train all "
            "weights"
        )
    phase_length(cfg)


def phase_length(cfg: BpoConfig) -> int:
    """K. Raises InputError for a number of phases that is not from 1 to the number of steps."""
    steps = cfg.train.steps
    phases = steps if cfg.phases == "all" else cfg.phases
    if not 1 <= phases <= steps:
        raise InputError(f"phases = {phases}: expected 1 to {steps} (--train.steps), or all for one every step")
    return ceil(steps / phases)


def phases_of(cfg: BpoConfig) -> int:
    """The phases that there are: fewer than asked for where K steps each fill the run with fewer."""
    return ceil(cfg.train.steps / phase_length(cfg))


def other_reference(cfg: BpoConfig) -> ModelRef | None:
    """The model that --reference names, if it names one. Raises InputError for one with another tokenizer."""
    if cfg.reference in OWN:
        return None
    other = resolve(cfg.reference)
    check_same_tokenizer(resolve(cfg.policy), other)
    return other


def align(
    start: ModelRef,
    prompts: "Sequence[Prompt]",
    before: "Sequence[Group]",
    judges: Judges,
    cfg: BpoConfig,
    *,
    reference: ModelRef | None,
    stage: "Stage",
) -> Path:
    """The T steps. `before`: answers of the start model to the held-out prompts."""
    from prefloop.train.learner import Learner, batch_of_step
    from prefloop.train.losses import parse_loss
    from prefloop.train.objective import PairObjective
    from prefloop.train.proximal import ProximalLearner

    objective = PairObjective(parse_loss(cfg.loss, beta=cfg.beta))
    learner = Learner(start, [], objective=objective, config=cfg.train, compute=cfg.compute, seed=cfg.seed, stage=stage)
    online = ProximalLearner(learner, members=cfg.members, reference=reference or cfg.reference, ema=cfg.ema,
                             seed=cfg.seed)  # fmt: skip
    k = phase_length(cfg)
    with OnlineLoop(online, before, judges, cfg, ask=preferences, look=evaluate, description=f"{cfg.loss} by phases",
                    stage=stage) as loop:  # fmt: skip
        for step in loop.steps():
            if online.phase == step // k:  # not again where a run was stopped after the refresh of this very step
                online.refresh()
            batch = [prompts[i] for i in batch_of_step(len(prompts), cfg.train.batch_size, step, cfg.seed)]
            seed = derive_seed(cfg.seed, "step", step)
            groups = online.sample(distinct(batch), k=2, sampling=cfg.sampling, seed=seed)
            gap = loop.sampler_gap(step, groups)
            pairs, labelled = loop.pairs(step, groups)
            counts = counts_of(labelled) | lengths_of_pairs(pairs)
            figures = online.step(pairs, step) if pairs else {}
            loop.done({"step": step + 1, "phase": online.phase, **lengths(groups), **gap, **counts, **figures})
    return loop.conclude()


def estimate_feedback(cfg: BpoConfig) -> list[str]:
    """What --dry-run prints (`estimate_online`)."""
    check_options(cfg)
    return estimate_online(cfg, "bpo")
