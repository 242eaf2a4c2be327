"""Annotators by name."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefloop.config import parse_config
from prefloop.errors import BudgetReached, InputError
from prefloop.feedback.annotator import Annotator
from prefloop.feedback.meter import usage_of
from prefloop.feedback.options import Feedback
from prefloop.feedback.registry import ANNOTATORS, load_annotator, load_meter, split_names
from prefloop.feedback.votes import Votes
from prefloop.recipes import expo, osp
from prefloop.recipes.expo import ExpoConfig
from prefloop.recipes.fa import FaConfig
from prefloop.recipes.oaif import OaifConfig
from prefloop.recipes.osp import OspConfig, load_evaluator
from prefloop.recipes.scored import load_judges
from prefloop.run import Run, Stage
from tests.feedback.annotators import COMPARISONS, COMPUTE, save_tiny_reward_model
from tests.feedback.judge_server import JudgeServer
from tests.sample.engines import stopping_folder
from tests.tiny import save_tiny_model


class Noted(Stage):
    """A stage that keeps its notes."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def loaded(text: str, **options):
    stage = Noted()
    return load_annotator(text, Feedback(**options), compute=COMPUTE, stage=stage), stage.notes


def test_rules_by_name_and_by_function_say_what_they_judge() -> None:
    shipped, said = loaded("rule:short")
    assert shipped.name == "rule:short" and said == ["rule:short: a score of each response, the higher wins"]
    own, said = loaded("rule:tests.feedback.annotators:prefers_a_vowel")
    assert own.name == "rule:tests.feedback.annotators:prefers_a_vowel"
    assert said == [f"{own.name}: a preference between two responses, asked in both orders"]


def test_options_reach_the_annotator(tmp_path: Path) -> None:
    hard, _ = loaded("rule:short")
    soft, _ = loaded("rule:short", scale=3.0)
    assert hard.identity != soft.identity
    policy, reference = save_tiny_model(tmp_path / "a", seed=1), save_tiny_model(tmp_path / "b", seed=2)
    mild, strong = (loaded(f"implicit-reward:{policy},{reference}", beta=beta)[0] for beta in (0.001, 1.0))
    for small, large in zip(mild.judge(COMPARISONS), strong.judge(COMPARISONS), strict=True):
        assert small.p is not None and large.p is not None
        assert abs(small.p - 0.5) < abs(large.p - 0.5)


def test_a_reward_model_and_a_file_by_name(tmp_path: Path) -> None:
    folder = save_tiny_reward_model(tmp_path / "reward")
    reward, said = loaded(f"reward-model:{folder}")
    assert reward.name == f"reward-model:{folder}" and "chat template of the tokenizer" in said[0]
    file = tmp_path / "people.jsonl"
    file.write_text(json.dumps({"prompt": "?", "a": "x", "b": "y", "preference": 1}) + "\n", encoding="utf-8")
    people, said = loaded(f"file:{file}")
    assert people.name == f"file:{file}" and said == [f"file:{file}: judgements of 1 comparisons"]


def test_several_vote() -> None:
    votes, _ = loaded("rule:short+rule:finishes+rule:varied", weights=(3.0, 1.0, 1.0), quorum=2)
    assert isinstance(votes, Votes)
    assert votes.name == "rule:short + rule:finishes + rule:varied"
    assert (votes.weights, votes.quorum) == ((3.0, 1.0, 1.0), 2)
    with pytest.raises(InputError, match="quorum = 3: expected 1 to 2"):
        loaded("rule:short+rule:long", quorum=3)


def test_a_plus_inside_a_name_stays() -> None:
    assert split_names("rule:short+file:a+b.jsonl+rule:c+d:e") == ["rule:short", "file:a+b.jsonl", "rule:c+d:e"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"annotator '': expected one of rule:"),
        ("short", r"annotator 'short': expected one of rule:"),
        ("rule:", r"annotator 'rule:': expected one of rule:"),
        ("ruel:short", r"Did you mean 'rule'\?"),
        ("reward_model:x", r"Did you mean 'reward-model'\?"),
        ("implicit-reward:x", r"'implicit-reward:x': expected implicit-reward:POLICY,REFERENCE"),
        ("file:no_such_file.jsonl", r"no_such_file\.jsonl: no such file"),
        ("rule:short+rule:", r"annotator 'rule:': expected"),
    ],
)
def test_names_that_lead_nowhere(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loaded(text)


def test_every_kind_of_the_option_help_is_in_the_table() -> None:
    said = OaifConfig.model_fields["annotator"].description or ""
    assert [kind for kind in ANNOTATORS if f"{kind}:" not in said] == []


def test_the_meter_has_the_prices_and_budgets_of_the_options(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("small: {input: 1, output: 2}\n", encoding="utf-8")
    meter = load_meter(Feedback(prices=str(file), budget_calls=3, budget_money=0.5))
    assert meter.prices.cost("small", 1_000_000, 0) == 1.0
    assert (meter.budget_calls, meter.budget_money) == (3, 0.5)
    with pytest.raises(InputError, match=r"budget_money = 5: there are no prices to count it by"):
        load_meter(Feedback(budget_money=5))


@pytest.mark.parametrize("options", [{"labels": "firm"}, {"scale": 0}, {"quorum": 0}, {"budget_calls": -1}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))} = "):
        parse_config(Feedback, options)


def test_options_rules_and_files_need_no_torch() -> None:
    code = (
        "import sys; from prefloop.feedback.registry import load_annotator; from prefloop.train.config import Compute\n"
        "from prefloop.feedback.options import Feedback\n"
        "load_annotator('rule:short+rule:long', Feedback(), compute=Compute())\n"
        "print([name for name in ('torch', 'transformers', 'openai', 'datasets') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "https://me:hunter22@host/v1"}, "base_url has a user name, a password or a query in it"),
        ({"base_url": "https://host/v1?key=hunter22"}, "base_url has a user name, a password or a query in it"),
        ({"api_key_env": "sk-hunter22"}, "api_key_env is not the name of an environment variable"),
        ({"request": "{"}, "request = '{': not JSON"),
        ({"request": "[1]"}, r"request = '\[1\]': expected a JSON object"),
    ],
)
def test_a_secret_in_the_wrong_option_is_refused_and_not_shown(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        parse_config(Feedback, options)
    assert "hunter22" not in str(refused.value)


def test_request_and_votes_reach_the_server() -> None:
    with JudgeServer() as server:
        options = {
            "base_url": server.url,
            "request": '{"seed": null, "user": "me"}',
            "votes": 3,
            "vote_temperature": 0.4,
        }
        annotator, _ = loaded("api:small", **options)
        annotator.judge(COMPARISONS[:1])
        bodies = server.answered
    assert len(bodies) == 6  # three votes in both orders
    assert all("seed" not in body and (body["user"], body["temperature"]) == ("me", 0.4) for body in bodies)


def first_of_fa(url: str, run: Run) -> Annotator | None:
    return load_judges(FaConfig(reward="api:small", feedback=poor(url)), run).reward


def annotator_of_expo(url: str, run: Run) -> Annotator | None:
    return expo.load_judge(ExpoConfig(annotator="api:small", feedback=poor(url)), run).annotator


def evaluator_of_osp(url: str, run: Run) -> Annotator | None:
    return load_evaluator(OspConfig(evaluator="api:small", evaluation=poor(url)), run)


def judge_of_osp(url: str, run: Run) -> Annotator | None:
    return osp.load_judge(OspConfig(annotator="api:small", feedback=poor(url)), run, stopping_folder())


def poor(url: str) -> Feedback:
    return Feedback(base_url=url, concurrency=1, budget_calls=3)


@pytest.mark.parametrize("load", [first_of_fa, annotator_of_expo, evaluator_of_osp, judge_of_osp])
def test_a_budget_is_the_runs_and_not_the_processs(
    load: Callable[[str, Run], Annotator | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    with JudgeServer() as server:
        for _ in range(3):
            with pytest.raises(BudgetReached, match=r"3 calls is used up \(3 made\)"):
                with Run.open(tmp_path / "run", recipe="any", config=Feedback()) as run:
                    annotator = load(server.url, run)
                    assert annotator is not None
                    annotator.judge(COMPARISONS)
        assert len(server.answered) == 3
    assert [tally.calls for tally in usage_of(tmp_path / "run").values()] == [3]
