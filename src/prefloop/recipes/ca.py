"""CA: conditional alignment, supervised fine-tuning on prompts that say the reward of the answer (arXiv 2308.12050).

1. Collect answers to prompts: the data's (of preference pairs, both), and the start model's own with --samples.
2. Score each: r(x, y).
3. Standardise over the whole data set: r' = (r - mean) / std.
4. Write r' into the prompt, with a fixed number of decimals: "{input} <rm_score>: {reward} ".
5. Minimise -log pi(y | x, r'), on the tokens of the answer alone: the prompt and the reward in it are no target.
6. At inference ask for a high reward: the saved chat template writes the target where step 4 wrote the reward.

Departures: see docs/methods/ca.md.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from prefloop.data.condition import Condition
from prefloop.errors import InputError
from prefloop.evaluate.targets import by_target
from prefloop.feedback.scorer import score_by
from prefloop.models import ModelRef, resolve
from prefloop.pairs.rewards import demonstrations, scores_of, standardise
from prefloop.recipes.scored import (
    ScoredConfig,
    demo_options,
    load_answers,
    load_judges,
    own_template,
    rewarded,
    supervised_round,
)
from prefloop.recipes.steps import conclude, fitting, look_at
from prefloop.sample.stage import sample
from prefloop.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefloop.feedback.annotator import Annotator
    from prefloop.records import Group, Prompt
    from prefloop.run import Round, Run


class CaConfig(ScoredConfig):
    """Options of `prefloop ca`."""

    condition: Condition = Field(default_factory=Condition)
    targets: tuple[float, ...] = Field(
        default=(), description="other rewards to ask for once, to see whether the answers follow: 1 2 3 4 5"
    )

    @model_validator(mode="after")
    def _different_targets(self) -> Self:
        asked = [self.condition.written(target) for target in (*self.targets, self.condition.target)]
        if not all(map(math.isfinite, self.targets)) or len(set(asked)) < len(asked):
            raise ValueError(
                f"targets = {self.targets}: expected numbers that differ with {self.condition.decimals} decimals, also "
                f"from condition.target = {self.condition.target:g}"
            )
        return self


def demo() -> CaConfig:
    """The packaged small model on both answers of the packaged pairs, conditioned on the score of a rule."""
    condition = Condition(target=1.5)
    return CaConfig(reward="rule:helpful-short", condition=condition, targets=(-1.5,), **demo_options())


def ca(cfg: CaConfig, run: "Run") -> ModelRef:
    """Run CA; returns the final model, RUN/model."""
    policy = resolve(cfg.policy)
    own_template(policy)
    judges = load_judges(cfg, run)
    if cfg.targets and not judges.evaluator:
        raise InputError("--targets needs who scores the answers to them; name an --evaluator, such as a reward model")
    if cfg.targets and judges.reward and judges.evaluator is not judges.reward:
        raise InputError(
            f"--targets with --evaluator {cfg.evaluator}: what answers get is told in standard deviations of the "
            f"training rewards, so who scores them must be who gave these, {cfg.reward}; leave --evaluator or "
            "--targets out"
        )
    if cfg.targets and not cfg.look_at.answers:
        raise InputError("--targets with --look-at.answers 0: nobody is asked; give a number of answers")
    answers, held_out = load_answers(cfg, run, policy, condition=cfg.condition)
    look = partial(look_at, run, policy, [], cfg, prompts=held_out, evaluator=judges.evaluator)

    before = look("start", policy)
    round = run.round(1)
    scored, scale = rewarded(cfg, round, policy, answers, judges.reward)
    standard = standardise(scored, scale)
    highest = max(scores_of(standard))
    if cfg.condition.target > highest:
        run.note(f"the target {cfg.condition.target:g} is beyond the highest reward of the data, {highest:.2f}: the "
                 "model has to extrapolate; see --targets")  # fmt: skip
    conditioned = round.stage("conditioned", fitting, cfg.condition.each(standard), policy)
    trained = supervised_round(round, policy, demonstrations(conditioned), cfg, scale=scale, condition=cfg.condition)
    after = look("round-1", trained)
    if cfg.targets and judges.evaluator:
        asked = [
            ask_for(cfg, round, trained.asking_for(target), [group.prompt for group in before], judges.evaluator)
            for target in cfg.targets
        ]
        round.stage("targets", by_target, (*cfg.targets, cfg.condition.target), [*asked, after], scale)
    return conclude(run, trained)


def ask_for(
    cfg: CaConfig, round: "Round", model: ModelRef, prompts: "Sequence[Prompt]", evaluator: "Annotator"
) -> "list[Group]":
    """Scored answers of a model that is asked for some reward, to the prompts and with the seeds of every look."""
    assert model.reward is not None
    at = f"asked-for-{cfg.condition.written(model.reward)}"
    answers = round.stage(f"{at}/answers", sample, model, prompts, k=1, sampling=cfg.sampling,
                          seed=derive_seed(cfg.seed, "answers"), compute=cfg.compute, engine=cfg.engine,
                          server=cfg.server)  # fmt: skip
    return round.stage(f"{at}/rewards", score_by, answers, evaluator)
