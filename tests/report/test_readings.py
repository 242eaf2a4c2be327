"""Every pattern at its threshold: what is said on one side of it, and nothing on the other."""

from pathlib import Path
from typing import Any

import pytest

from prefloop.evaluate.targets import Asked
from prefloop.report.readings import judge_counts, read, slot_share, tail_mean
from prefloop.report.story import Round, Story
from tests.report.runs import checkup, evaluation, steps


def story(*rounds: Round, recipe: str = "dice", stages: dict[str, Any] | None = None, **config: Any) -> Story:
    return Story(Path("run"), recipe, config, {}, stages or {}, list(rounds))


def said(told: Story) -> list[str]:
    return [reading.text for reading in read(told)]


def remedies(told: Story) -> list[str]:
    return [option for reading in read(told) for option, _ in reading.remedies]


def trained(**figures: float) -> Round:
    """100 steps of the same figures."""
    return Round("round-1", training=[{"step": i, **figures} for i in range(1, 101)])


def test_a_healthy_run_shows_no_pattern() -> None:
    assert said(story(Round("start", checkup=checkup()), Round("round-1", checkup=checkup()))) == []
    assert said(story(trained(margin=0.5, chosen_change=0.5, rejected_change=-1.0))) == []


@pytest.mark.parametrize(
    ("chosen", "rejected", "falls"), [(-0.1, -0.2, True), (0.1, -0.2, False), (-0.2, -0.1, False), (-0.1, -0.1, False)]
)
def test_both_log_probabilities_fall(chosen: float, rejected: float, falls: bool) -> None:
    looked = story(Round("round-1", checkup=checkup(chosen_change=chosen, rejected_change=rejected)))
    online = story(trained(chosen_change=chosen, rejected_change=rejected), recipe="oaif")
    for told in (looked, online):
        assert [text.startswith("chosen and rejected both became less likely") for text in said(told)] == [True] * falls
    # IPO's target is offered where there is such an option.
    assert ("--loss ipo" in remedies(online)) == falls and "--loss ipo" not in remedies(looked)


@pytest.mark.parametrize(
    ("loss", "pulled"), [("dpo", True), ("dpo+simpo", True), ("kto", True), ("simpo:gamma=0.3", False), ("orpo", False)]
)
def test_a_higher_beta_is_a_remedy_where_there_is_a_reference(loss: str, pulled: bool) -> None:
    falls = Round("round-1", checkup=checkup(chosen_change=-0.1, rejected_change=-0.2, kl_per_token=(2.0, 1.5, 3.0)))
    told = remedies(story(falls, recipe="dpo", loss=loss, beta=None))
    assert told.count("--beta") == 2 * pulled and "--train.steps" in told


def test_what_the_held_out_pairs_say_comes_before_the_training_log() -> None:
    falling = trained(chosen_change=-5.0, rejected_change=-9.0)
    both = Round("round-1", checkup=checkup(), training=falling.training)
    assert said(story(both)) == []


@pytest.mark.parametrize(("low", "grows"), [(110.1, True), (110.0, False)])
def test_length_grows_beyond_both_intervals(low: float, grows: bool) -> None:
    last = Round("round-2", checkup=checkup(length_chars=(150.0, low, 190.0)))
    for recipe, option in (("dice", "--alpha auto"), ("oaif", "--feedback.instruction helpfulness-short")):
        told = story(Round("start", checkup=checkup()), last, recipe=recipe)
        assert ["from 100 characters to 150 (round-2)" in text for text in said(told)] == [True] * grows
        assert (option in remedies(told)) == grows


@pytest.mark.parametrize(("low", "left"), [(1.01, True), (1.0, False)])
def test_a_model_that_left_its_start(low: float, left: bool) -> None:
    told = story(Round("round-1", checkup=checkup(kl_per_token=(2.0, low, 3.0))))
    assert ["7.4 times likelier than under the start model (round-1)" in text for text in said(told)] == [True] * left


@pytest.mark.parametrize(
    ("loss", "margin", "saturated"),
    [("dpo", 3.0, True), ("dpo", 2.9, False), ("slic", 1.0, True), ("slic", 0.9, False), ("ipo", 50.0, False)],
)
def test_margins_saturate_by_the_loss(loss: str, margin: float, saturated: bool) -> None:
    told = story(trained(margin=margin), loss=loss)
    assert ["margins are saturated" in text for text in said(told)] == [True] * saturated
    if loss == "dpo":  # the recipes dice and dpo have no option of that name
        assert said(story(trained(margin=margin))) == said(told)


@pytest.mark.parametrize(("steps", "option"), [(0, "--train.epochs"), (300, "--train.steps")])
def test_saturated_rewards_name_the_option_that_said_how_long(steps: int, option: str) -> None:
    told = remedies(story(trained(margin=3.0), recipe="reward-model", train={"steps": steps}))
    assert option in told and {"--train.epochs", "--train.steps"} - {option} - {*told}


def test_only_the_last_tenth_of_the_steps_decides() -> None:
    rows = [{"step": i, "margin": 9.0 if i <= 90 else 0.0} for i in range(1, 101)]
    assert tail_mean(Round("round-1", training=rows), "margin") == 0.0
    assert tail_mean(Round("round-1", training=steps(4, margin=4.0)), "margin") == 2.5
    assert tail_mean(Round("round-1"), "margin") is None


def test_a_judge_that_follows_the_slot() -> None:
    # 30 of 60: Wilson's interval is [0.377, 0.623].
    told = story(trained(pairs=1, consistent=0, first_slot=0, second_slot=0), annotator="judge:small")
    assert said(told) == []
    rows = [{"step": 1, "pairs": 60, "consistent": 30, "first_slot": 20, "second_slot": 10}]
    told = story(Round("round-1", training=rows), annotator="judge:small")
    (reading,) = read(told)
    assert reading.where == ("judge:small",) and "in 50 % of the questions [38, 62]" in reading.text
    assert ("prefloop judge check" in remedies(told)) and ("--feedback.labels soft" in remedies(told))
    counts = judge_counts(told)
    assert counts == {"pairs": 60, "consistent": 30, "first_slot": 20, "second_slot": 10}
    assert slot_share(counts) == pytest.approx((0.5, 0.3773502, 0.6226498), abs=1e-4)
    assert slot_share({"pairs": 3}) is None
    # 20 of 60: the interval [0.227, 0.459] reaches below 1/4.
    rows = [{"step": 1, "pairs": 60, "consistent": 40, "first_slot": 5, "second_slot": 15}]
    assert said(story(Round("round-1", training=rows))) == []


@pytest.mark.parametrize(("abstained", "told"), [(3, True), (2, False)])
def test_a_judge_that_abstains(abstained: int, told: bool) -> None:
    rows = [{"step": 1, "pairs": 9 - abstained, "tie": 1, "abstained": abstained}]
    texts = said(story(Round("round-1", training=rows), annotator="judge:small"))
    assert [f"no answer to {abstained} of 10 questions" in text for text in texts] == [True] * told


@pytest.mark.parametrize(("kept", "told"), [(15, True), (16, False)])
def test_few_prompts_become_pairs(kept: int, told: bool) -> None:
    counts = {"responses kept": 90, "prompts kept": kept, "prompts dropped: fewer than 3 valid responses": 32 - kept}
    texts = said(story(Round("round-1"), stages={"round-1/valid": {"counts": counts}}))
    assert [f"{kept} of 32 in round-1" in text for text in texts] == [True] * told


def test_win_rates_that_part() -> None:
    def online(rate: float, annotators: float, evaluator: str) -> list[str]:
        rows = [{"step": 8, "evaluation": evaluation(rate, annotators)}]
        return said(story(Round("round-1", training=rows), recipe="oaif", annotator="rule:a", evaluator=evaluator))

    assert online(0.8, 0.9, "rule:b") == []
    (text,) = online(0.3, 0.9, "rule:b")
    assert "sees the model win (0.90)" in text and "sees it lose (0.30)" in text
    assert online(0.41, 0.9, "rule:b") == []  # its interval reaches 1/2
    for same in ("", "rule:a"):
        (text,) = online(0.3, 0.9, same)
        assert "by the annotator that trains the model (rule:a)" in text


@pytest.mark.parametrize(("share", "few"), [(0.099, True), (0.1, False)])
def test_few_answers_carry_the_weight(share: float, few: bool) -> None:
    told = story(Round("round-1", figures={"effective share": share}), recipe="rwr")
    assert [text.startswith("few answers carry the weight") for text in said(told)] == [True] * few
    assert ("--temperature" in remedies(told)) == few


@pytest.mark.parametrize(("low", "deaf"), [(0.6, True), (0.61, False)])
def test_a_conditional_model_that_does_not_listen(low: float, deaf: bool) -> None:
    asked = [Asked(target=-1.0, answers=8, reward=(0.4, 0.2, 0.6), length_chars=90.0),
             Asked(target=2.0, answers=8, reward=(0.8, low, 1.0), length_chars=80.0)]  # fmt: skip
    told = story(Round("round-1", asked=asked), recipe="ca")
    assert ["asked for 2 0.80 standard deviations" in text for text in said(told)] == [True] * deaf
    assert said(story(Round("round-1", asked=asked[:1]), recipe="ca")) == []


def test_remedies_name_only_options_that_the_recipe_has() -> None:
    gone = Round("round-1", checkup=checkup(kl_per_token=(1.5, 1.2, 1.8)))
    assert "--beta" in remedies(story(gone, beta=0.1)) and "--beta" not in remedies(story(gone, recipe="sft"))
