"""Annotators by name, in one table.

rule:NAME                          a shipped rule (feedback/rules.py)
rule:module:function               a function of the user's
reward-model:MODEL                 a sequence classifier with one output
implicit-reward:POLICY,REFERENCE   a DPO-trained model and the one it was trained from
file:PATH                          judgements already made
judge:MODEL                        a language model that runs here
api:MODEL                          a language model behind an OpenAI-compatible server
ONE+OTHER+...                      votes of several
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from prefloop.errors import InputError, did_you_mean
from prefloop.feedback.annotator import Annotator
from prefloop.feedback.cache import JudgementCache
from prefloop.feedback.meter import USAGE, Meter, Prices
from prefloop.feedback.options import Feedback
from prefloop.models import resolve
from prefloop.run import Run, Stage
from prefloop.train.config import Compute


@dataclass
class Setting:
    """What annotators are made with."""

    feedback: Feedback
    compute: Compute
    meter: Meter
    stage: Stage
    given_cache: JudgementCache | None = None

    @cached_property
    def cache(self) -> JudgementCache:
        """The one that was given, or the user's; opened only for annotators that keep their answers."""
        return self.given_cache or JudgementCache()


def load_annotator(
    name: str,
    feedback: Feedback,
    *,
    compute: Compute,
    meter: Meter | None = None,
    cache: JudgementCache | None = None,
    stage: Stage | None = None,
) -> Annotator:
    """The annotator of this name; its models are loaded, and what is used is noted.

    Without `meter` and `cache`, those that the options describe. Raises InputError for what cannot be used.
    """
    setting = Setting(feedback, compute, meter or load_meter(feedback), stage or Stage.detached(), cache)
    members = [_load_one(member, setting) for member in split_names(name)]
    if len(members) == 1:
        return members[0]
    from prefloop.feedback.votes import Votes

    return Votes(members, weights=feedback.weights, quorum=feedback.quorum)


def load_meter(feedback: Feedback, *, run: Run | None = None, role: str = "feedback") -> Meter:
    """A meter with the prices and the budget of the options.

    In a `run`, what its earlier processes have used counts, and what is used is kept in RUN/usage/ROLE.json, which the
    report shows; every budget of a run has a role of its own. Raises InputError for a budget of money without prices.
    """
    if feedback.budget_money is not None and not feedback.prices:
        raise InputError(
            f"budget_money = {feedback.budget_money:g}: there are no prices to count it by; give a file of prices, "
            "or set budget_calls"
        )
    prices = Prices.read(feedback.prices) if feedback.prices else None
    file = run.path / USAGE / f"{role}.json" if run else None
    return Meter(prices, budget_calls=feedback.budget_calls, budget_money=feedback.budget_money, file=file)


def split_names(text: str) -> list[str]:
    """The annotators in `rule:short+judge:some/model`; a + inside a path or a model's name stays.

    >>> split_names("rule:short+judge:models/a+b")
    ['rule:short', 'judge:models/a+b']
    """
    return re.split(rf"\+(?=(?:{'|'.join(ANNOTATORS)}):)", text)


def _load_one(text: str, setting: Setting) -> Annotator:
    kind, _, rest = text.partition(":")
    if kind not in ANNOTATORS or not rest:
        known = ", ".join(f"{kind}:..." for kind in ANNOTATORS)
        raise InputError(f"annotator {text!r}: expected one of {known}.{did_you_mean(kind, list(ANNOTATORS))}")
    return ANNOTATORS[kind](rest, setting)


def _rule(name: str, setting: Setting) -> Annotator:
    from prefloop.feedback.rule import load_rule

    annotator = load_rule(name, scale=setting.feedback.scale)
    setting.stage.note(annotator.description)
    return annotator


def _reward_model(name: str, setting: Setting) -> Annotator:
    from prefloop.feedback.reward_model import RewardModel

    annotator = RewardModel(resolve(name), compute=setting.compute)
    setting.stage.note(f"{annotator.name}: {annotator.chat.description}")
    return annotator


def _implicit_reward(names: str, setting: Setting) -> Annotator:
    from prefloop.feedback.implicit_reward import ImplicitReward
    from prefloop.recipes.steps import two_models

    policy, comma, reference = names.partition(",")
    if not (policy and comma and reference):
        raise InputError(f"annotator 'implicit-reward:{names}': expected implicit-reward:POLICY,REFERENCE")
    models = two_models(policy, reference)
    return ImplicitReward(*models, beta=setting.feedback.beta, compute=setting.compute)


def _file(path: str, setting: Setting) -> Annotator:
    from prefloop.feedback.judgement_file import JudgementFile

    annotator = JudgementFile(path)
    setting.stage.note(annotator.description)
    return annotator


def _local_judge(model: str, setting: Setting) -> Annotator:
    from prefloop.feedback.judge import load_local_judge

    return load_local_judge(
        model,
        instruction=setting.feedback.instruction,
        compute=setting.compute,
        cache=setting.cache,
        meter=setting.meter,
        stage=setting.stage,
    )


def _api_judge(model: str, setting: Setting) -> Annotator:
    from prefloop.feedback.api_judge import Decoding, load_api_judge
    from prefloop.feedback.chat_server import Patience
    from prefloop.feedback.options import fields_of

    feedback = setting.feedback
    return load_api_judge(
        model,
        instruction=feedback.instruction,
        base_url=feedback.base_url,
        api_key_env=feedback.api_key_env,
        cache=setting.cache,
        meter=setting.meter,
        concurrency=feedback.concurrency,
        patience=Patience(timeout=feedback.timeout),
        decoding=Decoding(
            votes=feedback.votes, temperature=feedback.vote_temperature, extra=fields_of(feedback.request)
        ),
        stage=setting.stage,
    )


ANNOTATORS: dict[str, Callable[[str, Setting], Annotator]] = {
    "rule": _rule,
    "reward-model": _reward_model,
    "implicit-reward": _implicit_reward,
    "file": _file,
    "judge": _local_judge,
    "api": _api_judge,
}
"""What stands before the colon -> (what stands after it, setting) -> annotator."""
