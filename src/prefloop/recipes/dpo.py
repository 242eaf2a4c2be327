"""DPO: Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290).

1. Take a start model, a reference (the start model itself unless another is given) and pairs (x, y_w, y_l).
2. Compute log pi_ref of every response, once.
3. Minimise -log sigmoid(beta [log pi/pi_ref (y_w) - log pi/pi_ref (y_l)]).

--loss takes another loss of `prefloop.train.losses` in place of step 3's; step 2 computes what that loss needs, nothing
for one without a reference (docs/losses.md).

Departures from the paper: AdamW in place of RMSprop; no reference model is in memory while training.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from prefloop.config import Config
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, resolve
from prefloop.pairs.answers import answers_of, mismatched
from prefloop.recipes.steps import (
    LookAt,
    answers_and_held_out,
    conclude,
    has_answers,
    held_back,
    look_at,
    offline_and_held_out,
    two_models,
)
from prefloop.records import Answer, Pair, Prompt
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, LossName, Train, check_loss

if TYPE_CHECKING:
    from prefloop.run import Round, Run


class DpoConfig(Config):
    """Options of `prefloop dpo`."""

    policy: str = Field(default="", description="the model to train: hub id, folder, .gguf file or smollm2-135m")
    reference: str = Field(default="", description="the reference model, where it is not the policy itself")
    pairs: str = Field(
        default="",
        description="preference pairs: a file, a data set folder or hub name, or seed:train; for kto answers too",
    )
    held_out: str = Field(
        default="",
        description="pairs to look at models with; a tenth of the pairs when left out",
    )
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    loss: LossName = "dpo"
    beta: float | None = Field(
        default=None,
        gt=0,
        description="strength of the pull to the reference; none: that of the loss (dpo: 0.1, paper)",
    )
    seed: int = Field(default=0, ge=0, description="of every random choice")
    sampling: Sampling = Field(default_factory=Sampling, description="of the answers that are looked at")
    look_at: LookAt = Field(default_factory=LookAt)
    train: Train = Field(default_factory=Train)
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)

    @model_validator(mode="after")
    def _known_loss(self) -> Self:
        check_loss(self.loss, self.beta)
        return self


def demo() -> DpoConfig:
    """The packaged small model on the packaged pairs: some minutes on two CPU cores."""
    return DpoConfig(
        policy="smollm2-135m",
        pairs="seed:train",
        held_out="seed:held_out",
        sampling=Sampling(temperature=0.7, top_p=0.9, max_new_tokens=64),
        train=Train(
            steps=24, batch_size=4, learning_rate=5e-6, warmup_steps=2, validation_pairs=8, validate_every=12,
            checkpoint_every=12,
        ),
    )  # fmt: skip


def dpo(cfg: DpoConfig, run: "Run") -> ModelRef:
    """Train `cfg.policy` on `cfg.pairs`; returns the final model, RUN/model."""
    from prefloop.train.losses import parse_loss
    from prefloop.train.objective import check_labels

    if cfg.reference:
        policy, reference = two_models(cfg.policy, cfg.reference)
    else:
        policy = reference = resolve(cfg.policy)
    loss = parse_loss(cfg.loss, beta=cfg.beta)
    prompts: list[Prompt] = []
    if loss.unpaired and has_answers(cfg.pairs):
        pairs, held_out, prompts = answers_and_held_out(cfg, run, reference)
    else:
        check = None if loss.unpaired else partial(check_labels, loss=loss)
        pairs, held_out = offline_and_held_out(cfg, run, reference, check=check)
    if loss.unpaired:
        mismatched(answers_of(pairs), policy)  # an answer that finds none is told before anything is computed
    look = partial(look_at, run, reference, held_out, cfg, beta=loss.beta or 1.0, per_token=loss.per_token,
                   referenced=loss.referenced, prompts=prompts)  # fmt: skip

    look("start", reference)
    if cfg.reference:
        look("round-0", policy)
    policy = dpo_round(run.round(1), policy, reference, pairs, loss=cfg.loss, beta=cfg.beta, train=cfg.train,
                       compute=cfg.compute, seed=derive_seed(cfg.seed, "dpo"))  # fmt: skip
    look("round-1", policy)
    return conclude(run, policy)


def dpo_round(
    round: "Round",
    policy: ModelRef,
    reference: ModelRef,
    pairs: Sequence[Pair] | Sequence[Answer],
    *,
    loss: str = "dpo",
    beta: float | None = None,
    train: Train,
    compute: Compute,
    seed: int,
) -> ModelRef:
    """One training of `policy` against a frozen `reference`; the trained model is ROUND/model.

    Reference log-probabilities that the pairs already carry for this reference are used as they are. The others are
    computed first, or, where the reference is the base of the adapter in training, while that is in memory; a loss
    without a reference needs none. At most a quarter of the pairs is held out to watch. `loss` and `beta` are those of
    `parse_loss`.
    """
    from prefloop.train.learner import fit
    from prefloop.train.losses import parse_loss
    from prefloop.train.objective import AnswerObjective, PairObjective, check_labels
    from prefloop.train.reference import with_reference_logps

    chosen = parse_loss(loss, beta=beta)
    objective = AnswerObjective(chosen) if chosen.unpaired else PairObjective(chosen)
    adapter_off = objective.referenced and train.lora.rank > 0 and reference.fingerprint == policy.fingerprint
    items: Sequence[Any] = pairs
    if chosen.unpaired:
        items = mismatched(answers_of(pairs), policy)
    else:
        check_labels(items, chosen)
    if objective.referenced and not adapter_off:
        items = round.stage(f"training_{objective.kind}", with_reference_logps, items, reference, compute=compute,
                            prefixes=objective.prefixes)  # fmt: skip
    training, validation = held_back(round, items, train, seed=seed, kind=objective.kind)
    folder = round.stage(
        "model",
        fit,
        policy,
        training,
        validation,
        objective=objective,
        config=train,
        compute=compute,
        seed=seed,
        adapter_off=adapter_off,
    )
    return ModelRef.of(folder.path, name=f"{round.label}")
