"""OPTune: efficient online preference tuning (Chen et al. 2024, arXiv 2406.07657).

Start: an instruction-tuned model pi(0), a fixed set of N prompts, an annotator that scores single answers.
Iteration t = 1..T:
1. t = 1: sample K answers to every prompt from pi(0) and score them.
2. t > 1: order the prompts by the reward of their stored answers. Sample and score anew, from pi(t-1), for the
   ceil(rho N) prompts with the lowest; the others keep their answers and scores as they are. Low rewards are where new
   answers are likely to gain most, and sampling is what an iteration mostly costs.
3. Pair the best with the worst stored answer to each prompt; gap = r(x, y_w) - r(x, y_l).
4. wDPO from pi(t-1) against pi(0), for a fixed number of steps: pi(t).

       loss = w(gap) (-log sigmoid(beta h)),        h = log pi/pi(0) (y_w|x) - log pi/pi(0) (y_l|x)

rho = 1 and w = 1 is iterative DPO; rho = 0 is DPO on the answers of pi(0).

The paper leaves the order's key, w, its scale and the reference open; they are options (docs/methods/optune.md says
which defaults, and why). Departures: AdamW in place of RMSprop; two answers that are the same make no pair; the
log-probabilities of pi(0) are computed once for a pair, however often it is reused.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prefloop.artifacts import read_artifact
from prefloop.config import Config
from prefloop.errors import InputError
from prefloop.feedback.options import AnnotatorName, Feedback
from prefloop.feedback.scorer import score_by, scores_alone
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, resolve
from prefloop.pairs.filters import keep_scored
from prefloop.pairs.select import best_vs_worst
from prefloop.pairs.tables import has_score
from prefloop.pairs.weights import Weights, weigh
from prefloop.recipes.dpo import dpo_round
from prefloop.recipes.steps import LookAt, check_room, conclude, look_at, prompts_and_held_out, some
from prefloop.records import Group, Pair, Prompt
from prefloop.run import Run, Stage
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.sample.stage import sample
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Train

if TYPE_CHECKING:
    from prefloop.feedback.annotator import Annotator

Key = Literal["pair", "mean", "max", "min"]


class OptuneConfig(Config):
    """Options of `prefloop optune`. The defaults are the paper's where it says (docs/methods/optune.md)."""

    policy: str = Field(default="", description="pi(0), the instruction-tuned model to start from")
    prompts: str = Field(default="", description="prompts: a file, a data set folder or hub name, or seed:train")
    held_out: str = Field(default="", description="prompts to look at models with; a tenth of them when left out")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    n_prompts: int | None = Field(default=None, ge=1, description="N, drawn once; all when left out (paper: 48,000)")
    annotator: AnnotatorName = ""
    feedback: Feedback = Field(default_factory=Feedback)
    rounds: int = Field(default=3, ge=1, description="T, iterations (paper: 3)")
    k: int = Field(default=2, ge=2, description="K answers a prompt (paper: unseen)")
    regenerate: float = Field(
        default=0.5, ge=0, le=1, description="rho: share of the prompts, lowest rewards first, with new answers (swept)"
    )
    key: Key = Field(
        default="pair",
        description="reward that orders prompts: mean of the pair (best and worst), mean, max (that of the chosen "
        "answer) or min of all stored answers (paper: unseen)",
    )
    weights: Weights = Field(default_factory=Weights)
    beta: float = Field(default=0.1, gt=0, description="beta1, of DPO (paper: unseen)")
    training_reference: Literal["start", "round_start"] = Field(
        default="start", description="reference of every iteration: pi(0), or pi(t-1) (paper: unseen)"
    )
    seed: int = Field(default=0, ge=0, description="of every random choice")
    sampling: Sampling = Field(default_factory=lambda: Sampling(top_p=0.9, max_new_tokens=512))
    look_at: LookAt = Field(default_factory=LookAt)
    train: Train = Field(
        default_factory=lambda: Train(steps=375, batch_size=128, warmup_steps=38, validation_pairs=0),
        description="of every iteration; the default is one pass over 48,000 prompts",
    )
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)


def paper() -> OptuneConfig:
    """The paper's setting, as far as it is known: needs GPUs. Give --prompts and --annotator reward-model:MODEL."""
    return OptuneConfig(policy="alignment-handbook/zephyr-7b-sft-full")


def demo() -> OptuneConfig:
    """The packaged small model, and a rule that likes answers of 25 words which keep to the prompt."""
    return OptuneConfig(
        policy="smollm2-135m",
        prompts="seed:train",
        held_out="seed:held_out",
        n_prompts=32,
        annotator="rule:helpful-short",
        sampling=Sampling(top_p=0.9, max_new_tokens=64),
        look_at=LookAt(answers=12, shown=4),
        train=Train(steps=4, batch_size=8, learning_rate=1e-5, warmup_steps=1, validation_pairs=0, checkpoint_every=2),
    )


def optune(cfg: OptuneConfig, run: Run) -> ModelRef:
    """Run OPTune; returns the final model, RUN/model."""
    start = policy = resolve(cfg.policy)
    annotator = load_scorer(cfg, run)
    prompts, held_out = prompts_and_held_out(cfg, run)
    prompts = some(prompts, cfg.n_prompts, derive_seed(cfg.seed, "prompts"))
    check_room([*prompts, *held_out], start, cfg.sampling.max_new_tokens)
    look = partial(look_at, run, start, [], cfg, beta=cfg.beta, prompts=held_out, evaluator=annotator)

    look("start", start)
    stored: list[Group] = []
    for t in range(1, cfg.rounds + 1):
        round = run.round(t)
        anew = prompts if t == 1 else lowest(stored, cfg.regenerate, cfg.key)
        seed = derive_seed(cfg.seed, "sample", t)
        fresh = round.stage("groups", sample, policy, anew, k=cfg.k, sampling=cfg.sampling, seed=seed,
                            compute=cfg.compute, engine=cfg.engine, server=cfg.server)  # fmt: skip
        scored = round.stage("feedback", score_by, fresh, annotator)
        stored = round.stage("stored", refresh, stored, scored, version=t - 1)
        usable = round.stage("scored", keep_scored, stored, min_valid=2)
        pairs = round.stage("pairs", best_vs_worst, usable)
        weighted = round.stage("weighted", weigh, pairs, cfg.weights)
        policy = dpo_round(
            round,
            policy,
            start if cfg.training_reference == "start" else policy,
            remember(weighted, trained_on(run, t - 1)),
            beta=cfg.beta,
            train=cfg.train,
            compute=cfg.compute,
            seed=derive_seed(cfg.seed, "dpo", t),
        )
        look(f"round-{t}", policy)
    return conclude(run, policy)


def load_scorer(cfg: OptuneConfig, run: Run) -> "Annotator":
    """The annotator. Raises InputError, before anything is computed, for one without scores of single answers."""
    from prefloop.feedback.registry import load_annotator

    if not cfg.annotator:
        raise InputError("--annotator is missing: name who scores, such as rule:helpful-short or reward-model:MODEL")
    stage = Stage(name="feedback", run=run)
    annotator = load_annotator(cfg.annotator, cfg.feedback, compute=cfg.compute, stage=stage)
    if not scores_alone(annotator):
        raise InputError(
            f"annotator {annotator.name} only compares two answers; OPTune orders prompts, and weighs pairs, by "
            "rewards of single answers: name rule:NAME (a rule of one answer), reward-model:MODEL or "
            "implicit-reward:POLICY,REFERENCE, one of them alone"
        )
    return annotator


def lowest(stored: Sequence[Group], fraction: float, key: Key) -> list[Prompt]:
    """The prompts of the ceil(`fraction` N) groups with the smallest keys, equal ones by id; in the order of `stored`.

    A prompt without two scores has no pair to lose, and comes first.
    """
    n = math.ceil(Fraction(str(fraction)) * len(stored))  # through the text, so that 0.1 of 30 is 3
    ordered = sorted(stored, key=lambda group: (reward_key(group, key), group.prompt.id))
    drawn = {group.prompt.id for group in ordered[:n]}
    return [group.prompt for group in stored if group.prompt.id in drawn]


def reward_key(group: Group, key: Key) -> float:
    """The reward that a prompt is ordered by; minus infinity with fewer than two scores.

    >>> from prefloop.records import Prompt, Response
    >>> group = Group(prompt=Prompt.of("?"), responses=tuple(Response(text=str(s), score=s) for s in (1.0, 2.0, 6.0)))
    >>> [reward_key(group, key) for key in ("pair", "mean", "max", "min")]
    [3.5, 3.0, 6.0, 1.0]
    """
    scores = [response.score for response in group.responses if response.score is not None and has_score(response)]
    if len(scores) < 2:
        return -math.inf
    low, high = min(scores), max(scores)
    return {"pair": (low + high) / 2, "mean": math.fsum(scores) / len(scores), "max": high, "min": low}[key]


def refresh(
    stored: Sequence[Group], fresh: Sequence[Group], *, version: int, stage: Stage | None = None
) -> list[Group]:
    """`stored` with the `fresh` groups, made by pi(`version`), in the place of older ones; the others as they are."""
    stage = stage or Stage.detached()
    made = {
        group.prompt.id: group.model_copy(
            update={"responses": tuple(r.model_copy(update={"version": version}) for r in group.responses)}
        )
        for group in fresh
    }
    groups = [made.get(group.prompt.id, group) for group in stored] or list(made.values())
    stage.count("prompts with new answers", len(made))
    stage.count("prompts with stored answers", len(groups) - len(made))
    for name, part in (("mean reward of new answers", list(made.values())), ("mean reward of all answers", groups)):
        scores = [r.score for group in part for r in group.responses if r.score is not None]
        if scores:
            stage.figure(name, math.fsum(scores) / len(scores))
    return groups


def remember(pairs: Sequence[Pair], known: Sequence[Pair]) -> list[Pair]:
    """The pairs with the reference log-probabilities that the same pair had in `known`, and whose they were."""
    had = {(pair.prompt.id, pair.chosen, pair.rejected): pair for pair in known}
    found = [had.get((pair.prompt.id, pair.chosen, pair.rejected)) for pair in pairs]
    return [
        pair.model_copy(update={"reference_logps": old.reference_logps, "reference": old.reference}) if old else pair
        for pair, old in zip(pairs, found, strict=True)
    ]


def trained_on(run: Run, t: int) -> list[Pair]:
    """The pairs of iteration t as they were trained on; none where there is no such iteration, or no file of them."""
    name = f"round-{t}/training_pairs"
    return read_artifact(run.path, name, run.manifest[name]["artifact"]) if name in run.manifest else []
