"""DICE: bootstrapping with DPO implicit rewards (Chen et al. 2024, arXiv 2406.09760).

Start: a DPO-trained model pi(0), the reference pi(-1) it was trained against, and its offline preference pairs.
Without a reference the given model is pi(-1), and a DPO round on the offline pairs makes pi(0).

Round t = 1..R:
1. Sample K answers to every prompt from pi(t-1); drop unfinished and out-of-range ones.
2. Score each: s = log pi(t-1) - log pi(t-2), summed over its tokens.
3. Find alpha* for which the mean length of winners equals that of losers; rank by s - alpha* |y|  (Eq. 5, 6).
4. Pair the best with the worst answer to each prompt.
5. Replay: a fraction gamma of the pairs comes from the offline set, on prompts that are not drawn already.
6. DPO from pi(t-1) against a frozen pi(t-1), for a fixed number of steps: pi(t).

The DPO reference of round t is pi(t-1), whose log-probabilities step 2 has just computed for every generated pair, so
no reference model is in memory while training.

Departures from the released code (docs/methods/dice.md says more): alpha* is exact instead of a grid point; every draw
is seeded; warm-up, which that code asks for and its scheduler ignores, takes place; sampled token ids are scored
and trained on as they are, not decoded and encoded again; gamma = 1 works.
"""

from functools import partial
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from prefloop.config import Config
from prefloop.feedback.implicit_reward import implicit_reward
from prefloop.feedback.scorer import Scores, load_function, score_with
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, resolve
from prefloop.pairs.filters import keep_finished, keep_scored
from prefloop.pairs.length import LengthCoefficient, fixed_coefficient, length_coefficient
from prefloop.pairs.replay import mix
from prefloop.pairs.select import best_vs_worst, check_score_spread, debias_length
from prefloop.recipes.dpo import dpo_round
from prefloop.recipes.steps import (
    LookAt,
    check_room,
    conclude,
    load_own_prompts,
    look_at,
    offline_and_held_out,
    prompts_of,
    some,
    two_models,
)
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.sample.stage import sample
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Train

if TYPE_CHECKING:
    from prefloop.records import Group, Pair, Prompt
    from prefloop.run import Round, Run


class Filters(Config):
    """Which sampled answers may become pairs (dossier of the released code; lengths in code points)."""

    min_chars: int = Field(default=3, ge=0, description="an answer has more characters than this (DICE: 3)")
    max_chars: int = Field(default=6700, ge=1, description="and fewer than this (DICE: 6700)")
    min_valid: int = Field(default=8, ge=2, description="a prompt with fewer answers left is dropped (DICE: 8 of 16)")


class DiceConfig(Config):
    """Options of `prefloop dice`. The defaults are the paper's (Zephyr setting)."""

    policy: str = Field(default="", description="pi(0), DPO-trained; the model to start from without --reference")
    reference: str = Field(default="", description="pi(-1), the model that pi(0) was DPO-trained from")
    pairs: str = Field(default="", description="offline pairs: a file, a data set folder or hub name, or seed:train")
    prompts: str = Field(default="", description="prompts to sample on; those of the pairs when left out (paper)")
    held_out: str = Field(
        default="",
        description="pairs to look at models with; a tenth of the pairs when left out",
    )
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    rounds: int = Field(default=2, ge=1, description="R (paper: 2)")
    k: int = Field(default=16, ge=2, description="K answers a prompt (paper: 16)")
    prompts_per_round: int | None = Field(default=None, ge=1, description="draw so many; all when left out (paper)")
    alpha: float | Literal["auto"] = Field(default="auto", description="length coefficient; auto: alpha*, 0: none")
    length_unit: Literal["chars", "tokens"] = Field(default="chars", description="unit of |y| (paper: chars)")
    replay_fraction: float = Field(default=0.5, ge=0, le=1, description="gamma: share of offline pairs (paper: 0.5)")
    beta: float = Field(default=0.1, gt=0, description="DPO's beta (paper: 0.1; tuned over 0.01 and 0.1)")
    training_reference: Literal["round_start", "start"] = Field(
        default="round_start",
        description="DPO reference of a round: pi(t-1) (paper), or pi(-1), fixed (a baseline)",
    )
    scorer: str = Field(default="implicit_reward", description="or module:function, such as an LLM judge")
    seed: int = Field(default=0, ge=0, description="of every random choice")
    sampling: Sampling = Field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9, max_new_tokens=2048))
    filters: Filters = Field(default_factory=Filters)
    look_at: LookAt = Field(default_factory=LookAt)
    start: Train = Field(default_factory=Train, description="the DPO round that makes pi(0), without --reference")
    train: Train = Field(default_factory=Train, description="every DICE round")
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.filters.min_valid > self.k:
            raise ValueError(
                f"filters.min_valid = {self.filters.min_valid} is more than k = {self.k}: every prompt would be "
                "dropped; raise k, or lower filters.min_valid"
            )
        if self.alpha != "auto" and not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha = {self.alpha}: expected auto, or a number of at least 0")
        return self


def paper() -> DiceConfig:
    """The paper's Zephyr setting as published: needs GPUs. Give --pairs and --held-out."""
    return DiceConfig(policy="HuggingFaceH4/zephyr-7b-beta", reference="HuggingFaceH4/mistral-7b-sft-beta")


def demo() -> DiceConfig:
    """The packaged small model and seed data: two rounds in minutes on two CPU cores."""
    train = Train(
        steps=12,
        batch_size=4,
        learning_rate=5e-6,
        warmup_steps=2,
        validation_pairs=4,
        validate_every=6,
        checkpoint_every=6,
    )
    return DiceConfig(
        policy="smollm2-135m",
        pairs="seed:train",
        held_out="seed:held_out",
        k=8,
        prompts_per_round=32,
        sampling=Sampling(temperature=0.7, top_p=0.9, max_new_tokens=80),
        filters=Filters(min_valid=3),
        look_at=LookAt(answers=12, shown=4),
        start=train.replace(steps=20, checkpoint_every=10),
        train=train,
    )


def dice(cfg: DiceConfig, run: "Run") -> ModelRef:
    """Run DICE; returns the final model, RUN/model."""
    scorer = None if cfg.scorer == "implicit_reward" else load_function(cfg.scorer)
    policy, reference = two_models(cfg.policy, cfg.reference) if cfg.reference else (None, resolve(cfg.policy))
    start = reference
    own_prompts = load_own_prompts(cfg.prompts, cfg.on_bad_row, run)
    offline, held_out = offline_and_held_out(cfg, run, start)
    prompts = own_prompts or prompts_of(offline)
    check_room([*prompts, *prompts_of(held_out)], start, cfg.sampling.max_new_tokens)
    look = partial(look_at, run, start, held_out, cfg, beta=cfg.beta)

    look("start", start)
    if policy is None:
        policy = dpo_round(run.round(0), start, start, offline, beta=cfg.beta, train=cfg.start, compute=cfg.compute,
                           seed=derive_seed(cfg.seed, "dpo", 0))  # fmt: skip
    look("round-0", policy)

    for t in range(1, cfg.rounds + 1):
        round = run.round(t)
        generated: list[Pair] = []
        if cfg.replay_fraction < 1:
            drawn = some(prompts, cfg.prompts_per_round, derive_seed(cfg.seed, "prompts", t))
            seed = derive_seed(cfg.seed, "sample", t)
            generated = bootstrap(cfg, round, policy, reference, drawn, scorer, seed=seed)
        mixed = round.stage("mixed", mix, generated, offline, fraction=cfg.replay_fraction,
                            seed=derive_seed(cfg.seed, "mix", t))  # fmt: skip
        trained = dpo_round(
            round,
            policy,
            policy if cfg.training_reference == "round_start" else start,
            mixed,
            beta=cfg.beta,
            train=cfg.train,
            compute=cfg.compute,
            seed=derive_seed(cfg.seed, "dpo", t),
        )
        policy, reference = trained, policy
        look(f"round-{t}", policy)
    return conclude(run, policy)


def bootstrap(
    cfg: DiceConfig,
    round: "Round",
    policy: ModelRef,
    reference: ModelRef,
    prompts: "list[Prompt]",
    scorer: Scores | None,
    *,
    seed: int,
) -> "list[Pair]":
    """Steps 1 to 4: pairs that the model makes for itself, with their log-probabilities under `policy` = pi(t-1)."""
    groups = round.stage("groups", sample, policy, prompts, k=cfg.k, sampling=cfg.sampling, seed=seed,
                         compute=cfg.compute, engine=cfg.engine, server=cfg.server)  # fmt: skip
    valid = round.stage("valid", keep_finished, groups, **cfg.filters.model_dump())
    if scorer is None:
        scored = round.stage("feedback", implicit_reward, valid, policy, reference, compute=cfg.compute)
        check_score_spread(scored)
    else:
        scored = round.stage("feedback", score_with, valid, scorer)
        scored = round.stage("scored", keep_scored, scored, min_valid=cfg.filters.min_valid)
    coefficient = round.stage("length", find_coefficient, scored, alpha=cfg.alpha, unit=cfg.length_unit)
    return round.stage("pairs", best_vs_worst, debias_length(scored, coefficient), reference=policy.fingerprint)


def find_coefficient(
    groups: "list[Group]", *, alpha: float | Literal["auto"], unit: Literal["chars", "tokens"]
) -> LengthCoefficient:
    """alpha* (Eq. 6) for `alpha="auto"`, else the figures of the given alpha."""
    return length_coefficient(groups, unit=unit) if alpha == "auto" else fixed_coefficient(groups, alpha, unit=unit)
