"""PPO with a reward of whole answers: RLHF (Ouyang et al. 2022, arXiv 2203.02155; Schulman et al. 2017, 1707.06347).

Start: an instruction-tuned model pi_ref = pi, prompts, a reward r(x, y): a reward model, a rule, whatever scores one
answer. Values V: a model of its own, made from the start model (or a reward model) with a head of one output. Step t:

1. Draw a batch of prompts; sample one answer y to each from the current policy, pi_old.
2. Score them. An answer that was cut at its limit loses --ppo.missing-eos-penalty.
3. The reward of a token is -beta (log pi_old - log pi_ref), and r on top at the last.
4. Advantages A and returns G by GAE from the values as they are, V_old; A is whitened over the batch.
5. For some epochs, minibatch by minibatch, one optimiser step on each of

       L_pi = -min(kappa A, clip(kappa, 1 - eps, 1 + eps) A)              kappa = pi / pi_old
       L_V  = 1/2 max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2)

   (means over tokens).
6. With --ppo.kl-target, beta follows the KL divergence (Ziegler et al. 2019).

RLAIF is the same with a reward model that was trained on an annotator's labels.

Why values of their own, and not a head on the policy's trunk: the value loss then never moves the policy, so that all
that is said of L_pi is said of the policy. No coefficient weighs the two losses; the value model has a learning rate.
With --train.lora.rank policy, reference and values are adapters on one base, which is in memory once; a model that
--value names shares what it has in common with it.

Departures: AdamW with one learning rate a model; sampling at temperature 1, because the log-probabilities that PPO
compares are those of temperature 1; values start at 0 where no reward model gives them a head.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from prefloop.config import Config
from prefloop.errors import InputError
from prefloop.feedback.options import AnnotatorName, Feedback
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, resolve
from prefloop.recipes.online import Judges, OnlineLoop, distinct, lengths, load_both
from prefloop.recipes.steps import LookAt, check_room, conclude, look_at
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed, generator
from prefloop.train.config import Compute, Train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefloop.records import Group, Prompt
    from prefloop.run import Run, Stage
    from prefloop.train.learner import Learner
    from prefloop.train.ppo import ActorCritic, Rollout


class Ppo(Config):
    """How the policy is improved on a batch of answers."""

    epochs: int = Field(default=4, ge=1, description="passes over the answers of a step (TRL: 4)")
    minibatches: int = Field(default=1, ge=1, description="optimiser steps a pass (TRL: 1)")
    clip: float = Field(default=0.2, gt=0, description="eps of the policy (paper: 0.2)")
    value_clip: float = Field(default=0.2, gt=0, description="eps of the values, in reward units (TRL: 0.2)")
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount a token")
    lam: float = Field(default=0.95, ge=0, le=1, description="lambda of GAE (TRL: 0.95)")
    whiten: bool = Field(default=True, description="advantages of mean 0 and standard deviation 1 over the batch")
    kl_target: float | None = Field(
        default=None, gt=0, description="nats an answer that beta is steered to; none: beta stays"
    )
    kl_horizon: int = Field(default=10_000, ge=1, description="answers over which beta is steered (Ziegler: 10,000)")
    missing_eos_penalty: float = Field(default=0.0, ge=0, description="taken from the reward of an answer that was cut")
    value_learning_rate: float = Field(default=1e-5, gt=0, description="peak, of the value model")


class PpoConfig(Config):
    """Options of `prefloop ppo`."""

    policy: str = Field(default="", description="pi_ref, the instruction-tuned model to start from")
    value: str = Field(default="", description="what the values start from, such as a reward model; else the policy")
    prompts: str = Field(default="", description="prompts: a file, a data set folder or hub name, or seed:train")
    held_out: str = Field(default="", description="prompts to look at models with; a tenth of them when left out")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    annotator: AnnotatorName = ""
    evaluator: str = Field(
        default="", description="who scores the answers that models are looked at with; the annotator when left out"
    )
    feedback: Feedback = Field(default_factory=Feedback)
    beta: float = Field(default=0.05, ge=0, description="price of a nat of drift from pi_ref (TRL: 0.05)")
    ppo: Ppo = Field(default_factory=Ppo)
    seed: int = Field(default=0, ge=0, description="of every random choice")
    sampling: Sampling = Field(default_factory=Sampling)
    look_at: LookAt = Field(default_factory=LookAt)
    train: Train = Field(
        default_factory=lambda: Train(
            steps=500, batch_size=64, learning_rate=3e-6, warmup_steps=10, validation_pairs=0, checkpoint_every=10
        ),
        description="every step is one batch of prompts and all its updates (TRL: learning rate 3e-6)",
    )
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)


def demo() -> PpoConfig:
    """The packaged small model, and a rule that likes answers of 25 words which keep to the prompt."""
    return PpoConfig(
        policy="smollm2-135m",
        prompts="seed:train",
        held_out="seed:held_out",
        annotator="rule:helpful-short",
        evaluator="rule:helpful-short",
        ppo=Ppo(epochs=2, value_learning_rate=2e-5, missing_eos_penalty=0.5),
        sampling=Sampling(max_new_tokens=32),
        look_at=LookAt(answers=12, shown=4),
        train=Train(steps=8, batch_size=6, learning_rate=1e-5, warmup_steps=1, validation_pairs=0, checkpoint_every=2),
    )


def ppo(cfg: PpoConfig, run: "Run") -> ModelRef:
    """Run PPO; returns the final model, RUN/model."""
    start = resolve(cfg.policy)
    prompts, held_out = load_both(cfg, run)
    check_options(cfg, run)
    check_room([*prompts, *held_out], start, cfg.sampling.max_new_tokens)
    values = start_of_values(cfg, start)
    check_room(prompts, values, cfg.sampling.max_new_tokens)
    judges = load_scorers(cfg, run)
    look = partial(look_at, run, start, [], cfg, prompts=held_out, evaluator=judges.evaluator)

    if not look("start", start):
        run.note("warning: no held-out prompts, so no rewards of own answers; see --held-out and --look-at.answers")
    folder = run.round(1).stage("model", reinforce, start, values, prompts, judges, cfg)
    trained = ModelRef.of(folder.path, name="round-1")
    look("round-1", trained)
    return conclude(run, trained)


def check_options(cfg: Any, run: "Run") -> None:
    """Raises InputError for a target that beta cannot be steered to, and warns of samples that are not of pi_old."""
    if cfg.ppo.kl_target is not None and not cfg.beta:
        raise InputError(
            f"ppo.kl_target = {cfg.ppo.kl_target:g} with beta = 0: beta is steered by factors and would stay 0; "
            "give --beta a value to begin with, or leave --ppo.kl-target out"
        )
    ways = [*(["temperature"] if cfg.sampling.temperature != 1 else []), *cfg.sampling.truncations]
    if ways:
        said = ", ".join(f"{name} {getattr(cfg.sampling, name):g}" for name in ways)
        run.note(f"warning: answers are sampled with {said}, and log pi_old is of temperature 1 without truncation: "
                 "kappa and the KL divergence are biased; leave it out")  # fmt: skip


def start_of_values(cfg: Any, start: ModelRef) -> ModelRef:
    """The model that --value names, or `start`. Raises InputError for one that cannot give values of its answers."""
    from prefloop.data.chat import same_tokenizer
    from prefloop.models import load_tokenizer
    from prefloop.train.scalar import check_has_classifier

    values = resolve(cfg.value) if cfg.value else start
    check_has_classifier(values)
    difference = same_tokenizer(load_tokenizer(start), load_tokenizer(values))
    if difference:
        raise InputError(
            f"--value {values.name} and --policy {start.name} have different tokenizers ({difference}); values are of "
            "the policy's own tokens: name a model, or a reward model, made from the same language model"
        )
    return values


def load_scorers(cfg: Any, run: "Run") -> Judges:
    """Who gives the reward, and who scores the answers that models are looked at with.

    Raises InputError for an annotator that cannot score one answer alone.
    """
    from prefloop.feedback.registry import load_annotator, load_meter
    from prefloop.feedback.scorer import scores_alone
    from prefloop.run import Stage

    if not cfg.annotator:
        raise InputError("--annotator is missing: name who scores, such as rule:helpful-short or reward-model:MODEL")
    meter, stage = load_meter(cfg.feedback, run=run), Stage(name="feedback", run=run)
    load = partial(load_annotator, feedback=cfg.feedback, compute=cfg.compute, meter=meter, stage=stage)
    annotator = load(cfg.annotator)
    evaluator = load(cfg.evaluator) if cfg.evaluator not in ("", cfg.annotator) else annotator
    for option, one in (("annotator", annotator), ("evaluator", evaluator)):
        if not scores_alone(one):
            raise InputError(
                f"--{option} {one.name} only says which of two answers is better, and a reward is of one: train a "
                "reward model on its labels (prefloop reward-model) and name reward-model:RUN/model"
            )
    if annotator.identity == evaluator.identity:
        run.note(f"warning: the answers that models are looked at with are scored by {annotator.name}, which trains "
                 "the model and flatters it; name another --evaluator")  # fmt: skip
    return Judges(annotator, evaluator)


def reinforce(
    start: ModelRef,
    value_start: ModelRef,
    prompts: "Sequence[Prompt]",
    judges: Judges,
    cfg: Any,
    also: ModelRef | None = None,
    *,
    stage: "Stage",
) -> Path:
    """Stage: all steps, from and against `start`. `also`: another model that the drift is measured from (MPO)."""
    from prefloop.models import load_model
    from prefloop.train.learner import batch_of_step
    from prefloop.train.ppo import ActorCritic

    if len(prompts) < cfg.train.batch_size:
        stage.note(f"{len(prompts)} prompts, fewer than --train.batch-size {cfg.train.batch_size}: each is answered "
                   "once a step")  # fmt: skip
    online = ActorCritic(*learners(start, value_start, cfg, stage))
    policy = online.learner
    further = None
    if also and also.fingerprint != start.fingerprint:
        further = load_model(also, device=str(policy.model.device)).requires_grad_(False)
    with OnlineLoop(online, (), judges, cfg, description="ppo", stage=stage) as loop:
        for step in loop.steps():
            batch = [prompts[i] for i in batch_of_step(len(prompts), cfg.train.batch_size, step, cfg.seed)]
            seed = derive_seed(cfg.seed, "step", step)
            groups = online.sample(distinct(batch), k=1, sampling=cfg.sampling, seed=seed)
            beta = beta_of_step(cfg, loop.log)
            row: dict[str, Any] = {"step": step + 1, "beta": beta, **lengths(groups), **loop.sampler_gap(step, groups)}
            scores = loop.scores(step, groups)
            rollouts = experience(groups, scores, online, cfg, beta=beta)
            row |= {"unscored": dict(Counter(score for score in scores if isinstance(score, str)))}
            row |= figures(rollouts)
            if also and rollouts:
                row |= {"kl_start": kl_from(further, also.name, rollouts, policy)}
            loop.done(row | (update(online, rollouts, step, cfg) if rollouts else {}))
    return loop.conclude(counts)


def kl_from(further: "PreTrainedModel | None", name: str, rollouts: "Sequence[Rollout]", policy: "Learner") -> float:
    """Nats an answer from another model than the reference; none: it is the reference itself."""
    if further is None:
        return float(np.mean([rollout.kl for rollout in rollouts]))
    there = zip(rollouts, policy.tokens(rollouts, further, name=name), strict=True)
    return float(np.mean([sum(rollout.logps) - sum(theirs) for rollout, theirs in there]))


def counts(log: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Answers of all steps with a score, and those without by reason."""
    unscored = Counter()
    for row in log:
        unscored.update({f"answers without a score: {reason}": n for reason, n in row["unscored"].items()})
    return {"answers": sum(row["answers"] for row in log), **unscored}


def learners(
    start: ModelRef, value_start: ModelRef, cfg: Any, stage: "Stage"
) -> "tuple[Learner[Rollout], Learner[Rollout]]":
    """The policy and the value model in training. The schedules count optimiser steps."""
    from prefloop.train.learner import Learner
    from prefloop.train.ppo import PolicyObjective, ValueObjective
    from prefloop.train.scalar import shared_bytes

    updates = cfg.ppo.epochs * cfg.ppo.minibatches
    train = cfg.train.replace(steps=cfg.train.steps * updates, warmup_steps=cfg.train.warmup_steps * updates)
    new = partial(Learner, data=[], compute=cfg.compute, seed=cfg.seed, stage=stage)
    policy = new(start, objective=PolicyObjective(cfg.ppo.clip), config=train)
    base = policy.model if cfg.train.lora.rank else None
    values = new(value_start, objective=ValueObjective(cfg.ppo.value_clip, base), seed=derive_seed(cfg.seed, "values"),
                 config=train.replace(learning_rate=cfg.ppo.value_learning_rate))  # fmt: skip
    shared = shared_bytes(values.model, policy.model)
    if shared:
        stage.note(f"policy, reference and values share {shared / 1e6:.0f} MB of frozen weights")
    return policy, values


def beta_of_step(cfg: Any, log: Sequence[Mapping[str, Any]]) -> float:
    """Step 6: a function of the log, so that a run which is continued goes on with the same beta."""
    from prefloop.train.ppo import adapted

    if not log:
        return cfg.beta
    last = log[-1]
    if cfg.ppo.kl_target is None or not last["answers"]:
        return last["beta"]
    return adapted(
        last["beta"], last["kl"], target=cfg.ppo.kl_target, horizon=cfg.ppo.kl_horizon, answers=last["answers"]
    )


def experience(
    groups: "Sequence[Group]", scores: Sequence[float | str], online: "ActorCritic", cfg: Any, *, beta: float
) -> "list[Rollout]":
    """Steps 3 and 4: the scored answers with advantages and returns; one without a score is left out."""
    from prefloop.train.ppo import Rollout, with_advantages

    rollouts = [
        Rollout(prompt=group.prompt, response=group.responses[0], score=score,
                penalty=0.0 if group.responses[0].finish_reason == "stop" else cfg.ppo.missing_eos_penalty)
        for group, score in zip(groups, scores, strict=True)
        if not isinstance(score, str)
    ]  # fmt: skip
    if not rollouts:
        return []
    known = (online.learner.tokens(rollouts), online.reference_tokens(rollouts), online.values.tokens(rollouts))
    rollouts = [
        replace(rollout, logps=tuple(logps), reference_logps=tuple(reference), values=tuple(value))
        for rollout, logps, reference, value in zip(rollouts, *known, strict=True)
    ]
    options = cfg.ppo
    return with_advantages(rollouts, beta=beta, gamma=options.gamma, lam=options.lam, whiten=options.whiten)


def figures(rollouts: "Sequence[Rollout]") -> dict[str, Any]:
    """What a step's answers say before they are learned from. KL in nats an answer."""
    from prefloop.train.ppo import explained_variance

    if not rollouts:
        return {"answers": 0}
    explained = explained_variance(rollouts)
    return {
        "answers": len(rollouts),
        "reward": float(np.mean([rollout.score for rollout in rollouts])),
        "reward_std": float(np.std([rollout.score for rollout in rollouts])),
        "kl": float(np.mean([rollout.kl for rollout in rollouts])),
        **({} if explained is None else {"explained_variance": explained}),
    }


def update(online: "ActorCritic", rollouts: "Sequence[Rollout]", step: int, cfg: Any) -> dict[str, float]:
    """Step 5; returns the means of what its optimiser steps say."""
    options = cfg.ppo
    rows: list[dict[str, float]] = []
    for epoch in range(options.epochs):
        order = generator(cfg.seed, "minibatches", step, epoch).permutation(len(rollouts))
        for i, part in enumerate(np.array_split(order, min(options.minibatches, len(rollouts)))):
            # In their own order: one minibatch of all is then laid out as it was for pi_old, and rounds as that did.
            chosen = [rollouts[j] for j in np.sort(part)]
            n = (step * options.epochs + epoch) * options.minibatches + i
            # One set of gradients at a time: where all weights are trained, each is as large as a model.
            ours = online.learner.step(chosen, n)
            online.learner.free_gradients()
            theirs = online.values.step(chosen, n)
            online.values.free_gradients()
            rows.append(
                {"policy_loss": ours.pop("loss"), **ours, "value_loss": theirs.pop("loss"),
                 "value_clip_fraction": theirs["value_clip_fraction"], "value_grad_norm": theirs["grad_norm"]}
            )  # fmt: skip
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
