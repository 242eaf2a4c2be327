"""What the supervised recipes share: answers with rewards in, a model trained on some of them, or on all, out.

    sft   every answer                       fa   the answers with a high reward
    rwr   every answer, with a weight        ca   every answer, its prompt saying the reward

FA, RWR and CA are the offline methods of Hu et al. 2023 (arXiv 2308.12050); docs/methods has a page for each.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from prefloop.atomic import write_atomically
from prefloop.config import Config
from prefloop.data.condition import CONDITION, REWARD_SCALE, ChatTemplate, Condition, each_template
from prefloop.errors import InputError
from prefloop.feedback.options import Feedback
from prefloop.feedback.scorer import score_by, scores_alone
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, load_tokenizer
from prefloop.pairs.filters import keep_finished, keep_scored
from prefloop.pairs.rewards import RewardScale, reward_scale
from prefloop.pairs.tables import has_score
from prefloop.recipes.steps import (
    LookAt,
    check_room,
    fitting,
    held_back,
    load_own_prompts,
    prompts_of,
    said,
    split_off,
    tell_epochs,
)
from prefloop.records import Demonstration, Group, Prompt
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.sample.stage import sample
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Train

if TYPE_CHECKING:
    from prefloop.feedback.annotator import Annotator
    from prefloop.run import Round, Run, Stage
    from prefloop.train.objective import SupervisedObjective


def paper_train() -> Train:
    """The setting of the same authors' toolkits: AdamW, 5e-6, weight decay 0.01, batches of 128."""
    return Train(batch_size=128, learning_rate=5e-6, weight_decay=0.01)


class SupervisedConfig(Config):
    """Options that all supervised recipes have."""

    policy: str = Field(default="", description="the model to train: hub id, folder, .gguf file or smollm2-135m")
    data: str = Field(
        default="",
        description="prompts with answers: rows, conversations, pairs or groups; a file, a data set, seed:train",
    )
    held_out: str = Field(
        default="", description="prompts to look at models with, not trained on; a tenth of the data's when left out"
    )
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    normalise: Literal["token", "sequence"] = Field(
        default="token",
        description="a batch's loss is a mean over its response tokens, or the sum of each answer's, averaged",
    )
    evaluator: str = Field(
        default="", description="who scores the answers that models are looked at with: an annotator, as for rewards"
    )
    feedback: Feedback = Field(default_factory=Feedback, description="how annotators judge")
    seed: int = Field(default=0, ge=0, description="of every random choice")
    sampling: Sampling = Field(default_factory=lambda: Sampling(temperature=0.9))
    look_at: LookAt = Field(default_factory=LookAt)
    train: Train = Field(default_factory=paper_train)
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)


class ScoredConfig(SupervisedConfig):
    """Options of the recipes that train on rewards."""

    reward: str = Field(
        default="column",
        description="of the answers: column (the data's own), or who scores them: rule:NAME, reward-model:MODEL, "
        "implicit-reward:POLICY,REFERENCE; one that only compares (judge:, api:, file:) gives win probabilities",
    )
    samples: int = Field(
        default=0, ge=0, description="answers of the start model to every prompt, besides the data's (paper: up to 16)"
    )


def demo_options() -> dict[str, Any]:
    """What the demos share: the packaged small model on both answers of the packaged pairs, a rule as the reward."""
    return {
        "policy": "smollm2-135m",
        "data": "seed:train",
        "held_out": "seed:held_out",
        "sampling": Sampling(temperature=0.7, top_p=0.9, max_new_tokens=64),
        "look_at": LookAt(answers=12, shown=4),
        "train": Train(
            steps=16, batch_size=8, learning_rate=2e-5, warmup_steps=2, validation_pairs=8, validate_every=8,
            checkpoint_every=4,
        ),
    }  # fmt: skip


class Judges(NamedTuple):
    """Who scores the data (None: it has its own rewards), and answers that models are looked at with (None: no one)."""

    reward: "Annotator | None"
    evaluator: "Annotator | None"


def load_judges(cfg: SupervisedConfig, run: "Run") -> Judges:
    """The annotators of a run. Raises InputError, before anything is computed, for what cannot be used."""
    from prefloop.feedback.registry import load_annotator, load_meter
    from prefloop.run import Stage

    meter = load_meter(cfg.feedback, run=run)
    load = partial(load_annotator, feedback=cfg.feedback, compute=cfg.compute, meter=meter,
                   stage=Stage(name="feedback", run=run))  # fmt: skip
    name = cfg.reward if isinstance(cfg, ScoredConfig) else "column"
    if isinstance(cfg, ScoredConfig) and name == "column" and cfg.samples:
        raise InputError(
            f"samples = {cfg.samples} with reward = column: sampled answers have no reward in the data; name who "
            "scores them, such as --reward rule:helpful-short or reward-model:MODEL"
        )
    reward = None if name == "column" else load(name)
    # One and the same where both have one name, so that nothing is loaded or paid twice.
    evaluator = load(cfg.evaluator) if cfg.evaluator not in ("", name) else reward
    if evaluator and not scores_alone(evaluator):
        said = f"{evaluator.name} only compares two answers, so it cannot score the one that a model is looked at with"
        if cfg.evaluator:
            raise InputError(f"--evaluator: {said}; name a rule, a reward model or an implicit reward")
        run.note(f"{said}: no rewards of own answers; see --evaluator")
        evaluator = None
    if reward and not scores_alone(reward):
        run.note(
            f"{reward.name} only compares two answers: a reward is the mean probability of being preferred over the "
            "prompt's other answers, and says nothing between prompts"
        )
    return Judges(reward, evaluator)


def load_answers(
    cfg: SupervisedConfig,
    run: "Run",
    model: ModelRef,
    *,
    rejected: bool = True,
    condition: Condition | None = None,
) -> tuple[list[Group], list[Prompt]]:
    """The answers to train on with the model's token ids, and the prompts to look at models with; none is in both.

    Raises InputError, before anything is computed, where rewards of the data are asked for and it has none, and for a
    prompt that leaves no room for its answer, or none with a reward written into it by `condition`.
    """
    from prefloop.data.groups import load_groups

    if not cfg.data:
        raise InputError("--data is missing: name a file, a data set folder or hub name, or seed:train")
    groups: list[Group] = said(load_groups(cfg.data, on_bad_row=cfg.on_bad_row, rejected=rejected), run)
    held_out = load_own_prompts(cfg.held_out, cfg.on_bad_row, run)
    if not held_out:
        prompts = prompts_of(groups)
        held_out = split_off(prompts, min(256, len(prompts) // 10), derive_seed(cfg.seed, "held out"))[1]
    apart = {prompt.messages for prompt in held_out}
    own = [group for group in groups if group.prompt.messages not in apart]
    if not own:
        raise InputError(f"{cfg.data}: all prompts are held out; nothing is left to train on")
    if len(own) < len(groups):
        run.note(f"{len(groups) - len(own)} prompts left out of training: they are held out")
    if isinstance(cfg, ScoredConfig) and cfg.reward == "column":
        check_rewards(own, cfg.data)
    check_room(held_out, model, cfg.sampling.max_new_tokens)
    if isinstance(cfg, ScoredConfig) and cfg.samples:
        check_room(prompts_of(own), model, cfg.sampling.max_new_tokens)
    if condition:
        asked = [condition.of(prompt, condition.target) for prompt in held_out]
        check_room(asked, model, cfg.sampling.max_new_tokens)
        check_room([condition.of(prompt, LONGEST_REWARD) for prompt in prompts_of(own)], model, 1)
    return run.stage("data/answers", fitting, own, model), held_out


LONGEST_REWARD = -10.0
"""Standardised rewards take no more room: one beyond ten standard deviations needs over a hundred answers."""


def check_rewards(groups: Sequence[Group], source: str) -> None:
    """Raises InputError where no answer of the data has a reward."""
    from prefloop.data.groups import REWARDS

    if not any(has_score(response) for group in groups for response in group.responses):
        raise InputError(
            f"--reward column: no answer in {source} has a reward; give them in a column ({', '.join(REWARDS)}; of "
            "pairs chosen_score and rejected_score), or name who scores them, such as --reward rule:helpful-short or "
            "reward-model:MODEL"
        )


def rewarded(
    cfg: ScoredConfig, round: "Round", policy: ModelRef, answers: Sequence[Group], judge: "Annotator | None"
) -> tuple[list[Group], RewardScale]:
    """All answers that have a reward, with it, and the mean and standard deviation of the rewards."""
    if cfg.samples:
        sampled = round.stage("groups", sample, policy, prompts_of(answers), k=cfg.samples, sampling=cfg.sampling,
                              seed=derive_seed(cfg.seed, "sample"), compute=cfg.compute, engine=cfg.engine,
                              server=cfg.server)  # fmt: skip
        answers = round.stage("collected", collect, answers, sampled)
    if judge:
        answers = round.stage("scored", score_by, answers, judge)
    scored = round.stage("rewarded", keep_scored, answers, min_valid=1)
    scale = round.stage("scale", reward_scale, scored, reward=judge.name if judge else "column of the data")
    return scored, scale


def collect(given: Sequence[Group], sampled: Sequence[Group], *, stage: "Stage") -> list[Group]:
    """The data's answers and the finished sampled ones, by prompt."""
    from prefloop.data.groups import merged

    return merged([*given, *keep_finished(sampled, min_chars=0, max_chars=sys.maxsize, min_valid=1, stage=stage)])


def supervised_round(
    round: "Round",
    policy: ModelRef,
    items: Sequence[Demonstration],
    cfg: SupervisedConfig,
    *,
    scale: RewardScale | None = None,
    condition: Condition | None = None,
) -> ModelRef:
    """Supervised training of `policy` on demonstrations; the trained model is ROUND/model.

    What rewards were standardised with is saved in its folder; with a `condition`, its chat template asks for the
    target. At most a quarter of the demonstrations is held out to watch, whole prompts.
    """
    from prefloop.train.objective import SupervisedObjective

    seed = derive_seed(cfg.seed, "supervised")
    training, validation = held_back(round, items, cfg.train, seed=seed, kind="demonstrations")
    tell_epochs(round, cfg.train, len(training), kind="answers")
    folder = round.stage(
        "model",
        fit_supervised,
        policy,
        training,
        validation,
        objective=SupervisedObjective(cfg.normalise),
        config=cfg.train,
        compute=cfg.compute,
        seed=seed,
        scale=scale,
        condition=condition,
    )
    return ModelRef.of(folder.path, name=round.label)


def fit_supervised(
    policy: ModelRef,
    training: Sequence[Demonstration],
    validation: Sequence[Demonstration],
    *,
    objective: "SupervisedObjective",
    config: Train,
    compute: Compute,
    seed: int,
    scale: RewardScale | None,
    condition: Condition | None,
    stage: "Stage",
) -> Path:
    """`fit`, and in the model's folder what belongs to its rewards."""
    from prefloop.train.learner import fit

    folder = fit(policy, training, validation, objective=objective, config=config, compute=compute, seed=seed,
                 stage=stage)  # fmt: skip
    if scale:
        write_atomically(folder / REWARD_SCALE, scale.to_json() + "\n")
    if condition:
        tokenizer = load_tokenizer(policy)
        tokenizer.chat_template = each_template(own_template(policy), condition.chat_template)
        tokenizer.save_pretrained(folder)
        write_atomically(folder / CONDITION, condition.model_dump_json() + "\n")
    return folder


def own_template(model: ModelRef) -> ChatTemplate:
    """The chat templates of a model's tokenizer. Raises InputError when there is none, or when it conditions."""
    if (model.path / CONDITION).is_file():
        raise InputError(
            f"model {model.name} is conditional already ({CONDITION}): its chat template writes a reward into "
            "every prompt; name the model that it was trained from"
        )
    template: ChatTemplate | None = load_tokenizer(model).chat_template
    if not template:
        raise InputError(
            f"model {model.name} has no chat template, in which the conditioning would be saved; "
            "name one that has been tuned on conversations, or set chat_template in its tokenizer"
        )
    return template
