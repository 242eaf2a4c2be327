"""FA: filtering alignment, supervised fine-tuning on the answers with a high reward (arXiv 2308.12050).

1. Collect answers to prompts: the data's (of preference pairs, both), and the start model's own with --samples.
2. Score each: r(x, y).
3. Standardise over the whole data set: r' = (r - mean) / std.
4. Keep the answers with r' > c, or the best one to each prompt.
5. Minimise -log pi(y|x) on what is kept, on the tokens of the answer alone.

Departures: one pass, not the iterated variant that samples and filters again; see docs/methods/fa.md.
"""

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prefloop.models import ModelRef, resolve
from prefloop.pairs.filters import keep_above, keep_best
from prefloop.pairs.rewards import demonstrations, standardise
from prefloop.recipes.scored import ScoredConfig, demo_options, load_answers, load_judges, rewarded, supervised_round
from prefloop.recipes.steps import conclude, look_at

if TYPE_CHECKING:
    from prefloop.run import Run


class FaConfig(ScoredConfig):
    """Options of `prefloop fa`."""

    keep: Literal["threshold", "best"] = Field(
        default="threshold", description="answers above the threshold, or the best answer to each prompt"
    )
    threshold: float = Field(
        default=0.0, allow_inf_nan=False, description="c, in standard deviations above the mean (authors' toolkit: 0)"
    )


def demo() -> FaConfig:
    """The packaged small model on the better half of both answers of the packaged pairs, by a rule."""
    return FaConfig(reward="rule:helpful-short", **demo_options())


def fa(cfg: FaConfig, run: "Run") -> ModelRef:
    """Run FA; returns the final model, RUN/model."""
    policy = resolve(cfg.policy)
    judges = load_judges(cfg, run)
    answers, held_out = load_answers(cfg, run, policy)
    look = partial(look_at, run, policy, [], cfg, prompts=held_out, evaluator=judges.evaluator)

    look("start", policy)
    round = run.round(1)
    scored, scale = rewarded(cfg, round, policy, answers, judges.reward)
    if cfg.keep == "best":
        kept = round.stage("kept", keep_best, scored)
    else:
        kept = round.stage("kept", keep_above, standardise(scored, scale), threshold=cfg.threshold)
    trained = supervised_round(round, policy, demonstrations(kept), cfg, scale=scale)
    look("round-1", trained)
    return conclude(run, trained)
