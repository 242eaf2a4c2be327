"""MPO in two stages: DPO on the easy pairs, PPO on the hard prompts (Gou and Nguyen 2024, arXiv 2403.19443).

Not the loss mixture of the same name (arXiv 2411.10442).

1. Take a start model pi_SFT, preference pairs, and a reward model r trained on such pairs.
2. Score every pair, delta = r(x, y_w) - r(x, y_l), and split: easy where delta is above a threshold, hard otherwise (so
   also where r contradicts the label, which stage 2 does not use).
3. Stage 1: DPO on the easy pairs against pi_SFT gives pi_DPO.
4. Stage 2: PPO on the prompts of the hard pairs, from pi_DPO and with pi_DPO as its reference. The drift from pi_SFT is
   logged beside that from pi_DPO.

A reward model is too sure of the pairs that it was trained on: give pairs with cross-fitted scores (prefloop
reward-model --folds, RUN/cross-fit/pairs.jsonl). Pairs without scores are scored by the annotator.

Departures: the paper's threshold is not known to us; by default about 65 % of the pairs are easy. In units of the
margins' standard deviation it means the same for every reward model.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prefloop.config import Config
from prefloop.feedback.options import AnnotatorName, Feedback
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, resolve
from prefloop.recipes.dpo import dpo_round
from prefloop.recipes.online import check_nothing_to_watch
from prefloop.recipes.ppo import Ppo, check_options, load_scorers, reinforce, start_of_values
from prefloop.recipes.steps import LookAt, check_room, conclude, look_at, offline_and_held_out, prompts_of
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Train

if TYPE_CHECKING:
    from prefloop.feedback.annotator import Annotator
    from prefloop.records import Pair
    from prefloop.run import Run, Stage


class Easy(Config):
    """Stage 1: DPO on the easy pairs."""

    beta: float = Field(default=0.1, gt=0, description="of DPO")
    train: Train = Field(default_factory=Train)


class MpoConfig(Config):
    """Options of `prefloop mpo`."""

    policy: str = Field(default="", description="pi_SFT, the model to start from: hub id, folder, .gguf file")
    value: str = Field(default="", description="what the values start from, such as a reward model; else pi_DPO")
    pairs: str = Field(default="", description="preference pairs, with scores or without: a file, a data set folder")
    held_out: str = Field(default="", description="pairs to look at models with; a tenth of the pairs when left out")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    annotator: AnnotatorName = ""
    evaluator: str = Field(
        default="", description="who scores the answers that models are looked at with; the annotator when left out"
    )
    feedback: Feedback = Field(default_factory=Feedback)
    threshold: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="easy pairs have a larger margin, in standard deviations; none: see --easy-share",
    )
    easy_share: float = Field(default=0.65, ge=0, le=1, description="of the pairs, where no threshold is given")
    margin: Literal["signed", "abs"] = Field(
        default="signed", description="signed: a contradicted label makes a pair hard; abs: only its size counts"
    )
    easy: Easy = Field(default_factory=Easy)
    beta: float = Field(default=0.05, ge=0, description="of PPO: price of a nat of drift from pi_DPO")
    ppo: Ppo = Field(default_factory=Ppo)
    seed: int = Field(default=0, ge=0, description="of every random choice")
    sampling: Sampling = Field(default_factory=Sampling)
    look_at: LookAt = Field(default_factory=LookAt)
    train: Train = Field(
        default_factory=lambda: Train(
            steps=500, batch_size=64, learning_rate=3e-6, warmup_steps=10, validation_pairs=0, checkpoint_every=10
        ),
        description="of PPO: every step is one batch of prompts and all its updates",
    )
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)


def demo() -> MpoConfig:
    """The packaged small model on the packaged pairs, with a rule in the reward model's place."""
    return MpoConfig(
        policy="smollm2-135m",
        pairs="seed:train",
        held_out="seed:held_out",
        annotator="rule:helpful-short",
        easy=Easy(
            train=Train(
                steps=8, batch_size=4, learning_rate=5e-6, warmup_steps=2, validation_pairs=8, validate_every=8,
                checkpoint_every=8,
            )
        ),
        ppo=Ppo(epochs=2, value_learning_rate=2e-5, missing_eos_penalty=0.5),
        sampling=Sampling(max_new_tokens=32),
        look_at=LookAt(answers=12, shown=4),
        train=Train(steps=4, batch_size=6, learning_rate=1e-5, warmup_steps=1, validation_pairs=0, checkpoint_every=2),
    )  # fmt: skip


def mpo(cfg: MpoConfig, run: "Run") -> ModelRef:
    """Run MPO; returns the final model, RUN/model."""
    from prefloop.pairs.margins import find_split

    check_nothing_to_watch(cfg)
    start = resolve(cfg.policy)
    check_options(cfg, run)
    values = start_of_values(cfg, start)
    judges = load_scorers(cfg, run)
    pairs, held_out = offline_and_held_out(cfg, run, start)
    for model in (start, values):
        check_room(prompts_of([*pairs, *held_out]), model, cfg.sampling.max_new_tokens)
    look = partial(look_at, run, start, held_out, cfg, beta=cfg.easy.beta, evaluator=judges.evaluator)

    look("start", start)
    scored = run.stage("data/scored", with_scores, pairs, judges.annotator)
    split = run.stage("data/split", find_split, scored, threshold=cfg.threshold, easy=cfg.easy_share, margin=cfg.margin)
    easy = [pair for pair in scored if split.is_easy(pair)]
    hard = prompts_of([pair for pair in scored if not split.is_easy(pair)])
    run.note(f"{split.easy} easy pairs, {split.hard} hard ones: the margin is parted at {split.threshold:.3g} standard "
             f"deviations ({split.cut:.3g})")  # fmt: skip

    policy = start
    if easy:
        policy = dpo_round(run.round(1), start, start, easy, beta=cfg.easy.beta, train=cfg.easy.train,
                           compute=cfg.compute, seed=derive_seed(cfg.seed, "dpo"))  # fmt: skip
        look("round-1", policy)
    if hard:
        folder = run.round(2).stage("model", reinforce, policy, values if cfg.value else policy, hard, judges, cfg,
                                    also=start)  # fmt: skip
        policy = ModelRef.of(folder.path, name="round-2")
        look("round-2", policy)
    return conclude(run, policy)


def with_scores(pairs: "Sequence[Pair]", annotator: "Annotator", *, stage: "Stage") -> "list[Pair]":
    """Stage: the pairs with the scores that they bring, or, unless all have some, with the annotator's."""
    from prefloop.feedback.scorer import score_by
    from prefloop.records import Group

    def scored(pair: "Pair", scores: Sequence[float | None]) -> "Pair":
        return pair.model_copy(update={"chosen_score": scores[0], "rejected_score": scores[1]})

    if all(None not in pair.scores for pair in pairs):
        stage.note("the margins are those of the pairs' own scores")
        return [scored(pair, pair.scores) for pair in pairs]
    stage.note(f"the margins are those of {annotator.name}; of a reward model that was trained on these pairs they are "
               "too large: cross-fit it (prefloop reward-model --folds)")  # fmt: skip
    groups = score_by([Group(prompt=p.prompt, responses=p.responses) for p in pairs], annotator, stage=stage)
    found = [[response.score for response in group.responses] for group in groups]
    return [scored(pair, scores) for pair, scores in zip(pairs, found, strict=True) if None not in scores]
