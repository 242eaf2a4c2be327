"""Calls, tokens, money, and the budget that stops an annotator."""

import json
import threading
from pathlib import Path

import pytest

from prefloop.errors import BudgetReached, InputError
from prefloop.feedback import meter as meters
from prefloop.feedback.meter import USAGE, Meter, Price, Prices, usage_of

PRICES = Prices(models={"small": Price(input=0.15, output=0.60), "big": Price(input=5.0, output=15.0)})


def test_money_is_by_the_price_of_the_model() -> None:
    meter = Meter(PRICES)
    meter.add("judge", 1, 2_000_000, 1_000_000, "small")
    meter.add("judge", 2, 100_000, 0, "big")
    meter.add("other", 1, 10, 20, "small")
    tallies = meter.summary()
    assert tallies["judge"]["calls"] == 3
    assert (tallies["judge"]["tokens_in"], tallies["judge"]["tokens_out"]) == (2_100_000, 1_000_000)
    assert tallies["judge"]["money"] == pytest.approx(0.30 + 0.60 + 0.50)
    assert tallies["other"]["money"] == pytest.approx((10 * 0.15 + 20 * 0.60) / 1e6)


def test_without_a_price_money_is_unknown_and_never_zero() -> None:
    meter = Meter(PRICES)
    meter.add("judge", 1, 100, 1, "small")
    meter.add("judge", 1, 100, 1, "unheard-of")
    meter.add("judge", 1, 100, 1, "small")
    assert meter.summary()["judge"]["money"] is None
    assert "money unknown (no price)" in meter.describe()


def test_a_model_that_runs_here_costs_nothing_under_any_budget() -> None:
    meter = Meter(budget_money=0.0)
    meter.add("local", 1, 100, 1, None, meter.reserve(None, tokens_in=100, tokens_out=1))
    assert meter.summary()["local"]["money"] == 0.0


def test_answers_from_the_cache_are_counted_apart_and_cost_nothing() -> None:
    meter = Meter(PRICES, budget_calls=1, budget_money=0.0)
    meter.add_hits("judge", 40)
    tally = meter.summary()["judge"]
    assert (tally["cache_hits"], tally["calls"], tally["money"]) == (40, 0, 0.0)


def test_faults_are_counted_by_kind() -> None:
    meter = Meter()
    for kind in ("timeout", "status 429", "timeout"):
        meter.add_fault("judge", kind)
    assert meter.summary()["judge"]["faults"] == {"status 429": 1, "timeout": 2}
    assert meter.describe() == (
        "judge: 0 calls, 0 answers from the cache, 0 + 0 tokens, money 0, 1 status 429, 2 timeout"
    )


def test_the_budget_of_calls_stops_before_the_call_that_goes_beyond_it() -> None:
    meter = Meter(budget_calls=3)
    meter.add("judge", 2, 10, 1, "any", meter.reserve("any", 2))
    with pytest.raises(BudgetReached, match=r"the budget of 3 calls is used up \(2 made\).*run the same command again"):
        meter.reserve("any", 2)
    meter.reserve("any")
    with pytest.raises(BudgetReached):
        meter.reserve("any")


def test_the_budget_of_money_stops_before_the_call_that_goes_beyond_it() -> None:
    meter = Meter(PRICES, budget_money=1.0)
    held = meter.reserve("big", tokens_in=100_000, tokens_out=10_000)
    assert held.money == pytest.approx(0.65)
    with pytest.raises(BudgetReached, match=r"the budget of 1 is used up: 0\.65 spent, and the next call costs about"):
        meter.reserve("big", tokens_in=100_000, tokens_out=0)
    meter.add("judge", 1, 100_000, 0, "big", held)
    meter.reserve("big", tokens_in=99_000, tokens_out=0)


def test_a_call_that_was_not_answered_gives_its_budget_back() -> None:
    meter = Meter(PRICES, budget_calls=1, budget_money=0.01)
    meter.release(meter.reserve("big", tokens_in=1000, tokens_out=100))
    meter.add("judge", 1, 1000, 100, "big", meter.reserve("big", tokens_in=1000, tokens_out=100))
    assert meter.summary()["judge"]["calls"] == 1


def test_where_the_server_does_not_say_its_tokens_the_estimate_is_charged() -> None:
    meter = Meter(PRICES, budget_money=0.02)
    meter.add("judge", 1, None, None, "big", meter.reserve("big", tokens_in=1000, tokens_out=1000))
    tally = meter.summary()["judge"]
    assert (tally["calls_without_usage"], tally["tokens_in"], tally["money"]) == (1, 0, pytest.approx(0.02))
    with pytest.raises(BudgetReached):
        meter.reserve("big", tokens_in=1000)


def test_a_budget_of_money_needs_the_price_of_the_model() -> None:
    with pytest.raises(InputError, match=r"price of model 'smal' is unknown.*budget_calls.*Did you mean 'small'\?"):
        Meter(PRICES, budget_money=1.0).reserve("smal", tokens_in=10)


def test_threads_cannot_go_beyond_the_budget_together() -> None:
    meter = Meter(PRICES, budget_calls=50)
    refused: list[int] = []

    def ask() -> None:
        for _ in range(20):
            try:
                meter.add("judge", 1, 1, 1, "small", meter.reserve("small", tokens_in=1, tokens_out=1))
            except BudgetReached:
                refused.append(1)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (meter.summary()["judge"]["calls"], len(refused)) == (50, 110)


def test_prices_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("small: {input: 0.15, output: 0.60}\norg/big-4.1:\n  input: 5\n  output: 15\n", encoding="utf-8")
    assert Prices.read(file).cost("org/big-4.1", 1_000_000, 0) == 5.0
    assert Prices.read(file).cost("unheard-of", 1, 1) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("small: {input: -1, output: 1}", r"prices\.yaml: models\.small\.input = -1: .*greater than or equal to 0"),
        ("small: {in: 1, output: 1}", r"prices\.yaml: .*unknown option 'in'"),
        ("small: 3", r"prices\.yaml: models\.small"),
    ],
)
def test_prices_that_cannot_be_used_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        Prices.read(file)


def test_a_meter_goes_on_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / USAGE / "feedback.json"
    first = Meter(PRICES, budget_calls=4, file=file)
    first.add("judge", 2, 1000, 100, "big", first.reserve("big", 2))
    first.add("other", 1, 10, 1, "unknown", first.reserve("unknown"))
    first.add_fault("judge", "timeout")
    assert not file.exists()  # about once a second, or when it is told to
    first.reserve("big")  # under way when the process ends: not counted
    first.keep()
    again = Meter(PRICES, budget_calls=4, budget_money=0.01, file=file)
    assert again.summary() == first.summary() and again.tallies["other"].money is None
    again.release(again.reserve("big"))
    with pytest.raises(BudgetReached, match=r"4 calls is used up \(3 made\)"):
        again.reserve("big", 2)
    with pytest.raises(BudgetReached, match=r"the budget of 0\.01 is used up: 0\.0065 spent"):
        again.reserve("big", tokens_in=1000)
    # An annotator of which a part is unknown: the part that is known stays spent.
    again.add("other", 1, 1000, 100, "big", again.reserve("big"))
    again.keep()
    assert json.loads(file.read_text())["money"] == pytest.approx(0.013)
    evaluation = Meter(PRICES, file=file.with_name("evaluation.json"))
    evaluation.add("judge", 1, 5, 1, "big")
    evaluation.add_hits("judge", 7)
    evaluation.keep()
    used = usage_of(tmp_path)
    assert list(used) == ["judge", "other"] and used["other"].money is None
    assert (used["judge"].calls, used["judge"].cache_hits, used["judge"].tokens_in) == (3, 7, 1005)
    assert used["judge"].money == pytest.approx(0.0065 + 40e-6) and used["judge"].faults == {"timeout": 1}
    file.write_text("[]")
    with pytest.raises(InputError, match=r"feedback\.json is damaged .*delete it to count from zero"):
        Meter(file=file)


def test_what_is_counted_is_written_while_questions_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meters, "KEEP_EVERY", 0.0)
    meter = Meter(file=tmp_path / USAGE / "feedback.json")
    for n in (1, 2):
        meter.add("judge", 1, 10, 1, "any", meter.reserve("any"))
        assert usage_of(tmp_path)["judge"].calls == n
