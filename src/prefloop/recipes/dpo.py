"""DPO: Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290).

1. Take a start model, a reference (the start model itself unless another is given) and pairs (x, y_w, y_l).
2. Compute log pi_ref of every response, once.
3. Minimise -log sigmoid(beta [log pi/pi_ref (y_w) - log pi/pi_ref (y_l)]).

Departures from the paper: AdamW in place of RMSprop; no reference model is in memory while training.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prefloop.config import Config
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, resolve
from prefloop.pairs.replay import hold_out
from prefloop.recipes.steps import LookAt, conclude, look_at, offline_and_held_out, two_models
from prefloop.records import Pair
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Train

if TYPE_CHECKING:
    from prefloop.run import Round, Run


class DpoConfig(Config):
    """Options of `prefloop dpo`."""

    policy: str = Field(default="", description="the model to train: hub id, folder, .gguf file or smollm2-135m")
    reference: str = Field(default="", description="the reference model, where it is not the policy itself")
    pairs: str = Field(default="", description="preference pairs: a file, a data set folder or hub name, or seed:train")
    held_out: str = Field(
        default="",
        description="pairs to look at models with; a tenth of the pairs when left out",
    )
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (paper: 0.1)")
    seed: int = Field(default=0, ge=0, description="of every random choice")
    sampling: Sampling = Field(default_factory=Sampling, description="of the answers that are looked at")
    look_at: LookAt = Field(default_factory=LookAt)
    train: Train = Field(default_factory=Train)
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)


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
    if cfg.reference:
        policy, reference = two_models(cfg.policy, cfg.reference)
    else:
        policy = reference = resolve(cfg.policy)
    pairs, held_out = offline_and_held_out(cfg, run, reference)
    look = partial(look_at, run, reference, held_out, cfg, beta=cfg.beta)

    look("start", reference)
    if cfg.reference:
        look("round-0", policy)
    policy = dpo_round(run.round(1), policy, reference, pairs, beta=cfg.beta, train=cfg.train, compute=cfg.compute,
                       seed=derive_seed(cfg.seed, "dpo"))  # fmt: skip
    look("round-1", policy)
    return conclude(run, policy)


def dpo_round(
    round: "Round",
    policy: ModelRef,
    reference: ModelRef,
    pairs: Sequence[Pair],
    *,
    beta: float,
    train: Train,
    compute: Compute,
    seed: int,
) -> ModelRef:
    """One DPO training of `policy` against a frozen `reference`; the trained model is ROUND/model.

    Reference log-probabilities that the pairs already carry for this reference are used as they are. The others are
    computed first, or, where the reference is the base of the adapter in training, while that is in memory. At most a
    quarter of the pairs is held out to watch.
    """
    from prefloop.train.learner import fit
    from prefloop.train.losses import dpo as dpo_loss
    from prefloop.train.objective import PairObjective
    from prefloop.train.reference import with_reference_logps

    adapter_off = train.lora.rank > 0 and reference.fingerprint == policy.fingerprint
    if not adapter_off:
        pairs = round.stage("training_pairs", with_reference_logps, pairs, reference, compute=compute)
    watched = min(train.validation_pairs, len(pairs) // 4)
    if watched < train.validation_pairs:
        round.run.note(f"{round.label}: {watched} validation pairs, a quarter of {len(pairs)}, not the "
                       f"{train.validation_pairs} asked for")  # fmt: skip
    training, validation = hold_out(pairs, watched, seed=seed)
    folder = round.stage(
        "model",
        fit,
        policy,
        training,
        validation,
        objective=PairObjective(partial(dpo_loss, beta=beta), beta),
        config=train,
        compute=compute,
        seed=seed,
        adapter_off=adapter_off,
    )
    return ModelRef.of(folder.path, name=f"{round.label}")
