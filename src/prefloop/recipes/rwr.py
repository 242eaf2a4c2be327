"""RWR: reward-weighted regression, supervised fine-tuning with a weight for every answer (arXiv 2308.12050).

1. Collect answers to prompts: the data's (of preference pairs, both), and the start model's own with --samples.
2. Score each: r(x, y).
3. Standardise over the whole data set: r' = (r - mean) / std.
4. Weight each: w = exp(r' / tau), at most `clip`, divided by the mean of all weights.
5. Minimise -w log pi(y|x), on the tokens of the answer alone.

On data drawn from mu the optimum is pi(y|x) ~ mu(y|x) exp(r' / tau): with mu = pi_ref and tau = beta, that of
reinforcement learning under a KL penalty, and of DPO.

Departures: see docs/methods/rwr.md.
"""

from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from prefloop.models import ModelRef, resolve
from prefloop.pairs.rewards import standardise, weighted
from prefloop.recipes.scored import ScoredConfig, demo_options, load_answers, load_judges, rewarded, supervised_round
from prefloop.recipes.steps import conclude, look_at

if TYPE_CHECKING:
    from prefloop.run import Run


class RwrConfig(ScoredConfig):
    """Options of `prefloop rwr`."""

    temperature: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="tau, in standard deviations of the rewards; small is greedy",
    )
    clip: float | None = Field(default=20.0, gt=0, description="largest exp(r'/tau); None does not clip")


def demo() -> RwrConfig:
    """The packaged small model on both answers of the packaged pairs, weighted by a rule."""
    return RwrConfig(reward="rule:helpful-short", **demo_options())


def rwr(cfg: RwrConfig, run: "Run") -> ModelRef:
    """Run RWR; returns the final model, RUN/model."""
    policy = resolve(cfg.policy)
    judges = load_judges(cfg, run)
    answers, held_out = load_answers(cfg, run, policy)
    look = partial(look_at, run, policy, [], cfg, prompts=held_out, evaluator=judges.evaluator)

    look("start", policy)
    round = run.round(1)
    scored, scale = rewarded(cfg, round, policy, answers, judges.reward)
    items = round.stage("weighted", weighted, standardise(scored, scale), temperature=cfg.temperature, clip=cfg.clip)
    trained = supervised_round(round, policy, items, cfg, scale=scale)
    look("round-1", trained)
    return conclude(run, trained)
