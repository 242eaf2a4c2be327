"""Calls, tokens and money of annotators, and the budget that stops them.

Money is counted by a table of prices that the user gives; where a model has no price it is unknown, never zero. A run
that a budget has stopped goes on when the same command is given again with a larger one: what was used before counts
(`to_json` and `resume`), and what the cache answers is free.
"""

import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from prefloop.config import Config, parse_config, read_yaml
from prefloop.errors import BudgetReached, InputError, did_you_mean


class Price(Config):
    """Of one model, for a million tokens, in any currency."""

    input: float = Field(ge=0, allow_inf_nan=False, description="money for a million tokens of questions")
    output: float = Field(ge=0, allow_inf_nan=False, description="money for a million tokens of answers")


class Prices(Config):
    """Prices by model name, all in one currency. In a YAML file, one line a model:

    small-judge: {input: 0.15, output: 0.60}
    """

    models: dict[str, Price] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "Prices":
        """The prices in a YAML file. Raises InputError for anything else."""
        return parse_config(cls, {"models": read_yaml(path)}, origin=str(path))

    def cost(self, model: str | None, tokens_in: int, tokens_out: int) -> float | None:
        """Money for these tokens; None when the price of the model is unknown. No model: it runs here, at no charge.

        >>> Prices(models={"small-judge": Price(input=0.15, output=0.60)}).cost("small-judge", 2_000_000, 1_000_000)
        0.9
        """
        if model is None:
            return 0.0
        price = self.models.get(model)
        return None if price is None else (tokens_in * price.input + tokens_out * price.output) / 1e6


class Reservation(NamedTuple):
    """What calls that are under way may cost: `calls`, and `money` (0 where the price is unknown)."""

    calls: int
    money: float


@dataclass
class Tally:
    """What one annotator has used. `money` is None when a model's price is unknown.

    `calls_without_usage`: answered calls whose tokens the server did not say; their money is the estimate.
    `faults`: calls that were not answered, or not usefully, by kind.
    """

    calls: int = 0
    cache_hits: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    money: float | None = 0.0
    calls_without_usage: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for an event log or a report."""
        return {**vars(self), "faults": dict(sorted(self.faults.items()))}


class Meter:
    """Counts what annotators use, by annotator, from any thread. `reserve` before a call, `add` or `release` after it.

        held = meter.reserve(model, tokens_in=estimate, tokens_out=1)      # BudgetReached: the call is not made
        answer = ask()                                                     # failed: meter.release(held)
        meter.add(name, 1, answer.tokens_in, answer.tokens_out, model, held)

    What is reserved counts against the budget like what is spent, so calls that are under way at the same time cannot
    go beyond it together.
    """

    def __init__(
        self, prices: Prices | None = None, *, budget_calls: int | None = None, budget_money: float | None = None
    ) -> None:
        self.prices = prices or Prices()
        self.budget_calls, self.budget_money = budget_calls, budget_money
        self.tallies: dict[str, Tally] = {}
        self._lock = threading.Lock()
        self._calls = 0
        self._money = 0.0

    def reserve(self, model: str | None, n_calls: int = 1, *, tokens_in: int = 0, tokens_out: int = 0) -> Reservation:
        """Hold the budget of calls that are about to be made; `tokens_in` and `tokens_out` are estimates for all.

        `model` is the name in the table of prices, None for one that runs here and costs no money.
        Raises BudgetReached when they would go beyond the budget, and InputError when there is a budget of money and
        the price of the model is unknown.
        """
        money = self.prices.cost(model, tokens_in, tokens_out)
        if money is None and self.budget_money is not None:
            raise InputError(
                f"budget_money = {self.budget_money:g}: the price of model {model!r} is unknown; add it to the file "
                f"of prices, or set budget_calls instead.{did_you_mean(str(model), list(self.prices.models))}"
            )
        with self._lock:
            self._check_budget(n_calls, money or 0.0)
            self._calls += n_calls
            self._money += money or 0.0
        return Reservation(n_calls, money or 0.0)

    def _check_budget(self, calls: int, money: float) -> None:
        fix = "what is answered is kept: raise the budget and run the same command again to continue"
        if self.budget_calls is not None and self._calls + calls > self.budget_calls:
            raise BudgetReached(f"the budget of {self.budget_calls} calls is used up ({self._calls} made); {fix}")
        if self.budget_money is not None and self._money + money > self.budget_money:
            raise BudgetReached(
                f"the budget of {self.budget_money:g} is used up: {self._money:.4g} spent, and the next call costs "
                f"about {money:.2g}; {fix}"
            )

    def release(self, held: Reservation) -> None:
        """Calls that were not made, or that were not answered, cost nothing."""
        with self._lock:
            self._give_back(held)

    def add(
        self,
        annotator: str,
        calls: int,
        tokens_in: int | None,
        tokens_out: int | None,
        model: str | None,
        held: Reservation | None = None,
    ) -> None:
        """Answered calls. Tokens are None where the server did not say; `held` is what `reserve` gave for the calls."""
        known = tokens_in is not None and tokens_out is not None
        cost = self.prices.cost(model, tokens_in or 0, tokens_out or 0)
        if cost is not None and not known and held is not None:
            cost = held.money
        with self._lock:
            if held is not None:
                self._give_back(held)
            self._calls += calls
            self._money += cost or 0.0
            tally = self._tally(annotator)
            tally.calls += calls
            tally.tokens_in += tokens_in or 0
            tally.tokens_out += tokens_out or 0
            tally.money = None if cost is None or tally.money is None else tally.money + cost
            tally.calls_without_usage += 0 if known else calls

    def add_hits(self, annotator: str, n: int) -> None:
        """Questions that the cache answered, at no cost."""
        with self._lock:
            self._tally(annotator).cache_hits += n

    def add_fault(self, annotator: str, kind: str) -> None:
        """A call that was not answered, or not usefully: `kind` is such as `status 429`, `timeout`, `malformed`."""
        with self._lock:
            self._tally(annotator).faults[kind] += 1

    def summary(self) -> dict[str, dict[str, Any]]:
        """What every annotator has used, as plain data."""
        with self._lock:
            return {name: tally.to_json() for name, tally in self.tallies.items()}

    def to_json(self) -> dict[str, Any]:
        """All that was counted, as plain data, for `resume`; while no call is under way."""
        with self._lock:
            tallies = {name: tally.to_json() for name, tally in self.tallies.items()}
            return {"calls": self._calls, "money": self._money, "tallies": tallies}

    def resume(self, counted: dict[str, Any]) -> None:
        """Go on from what an earlier process of the same run has counted."""
        with self._lock:
            self._calls, self._money = counted["calls"], counted["money"]
            self.tallies = {
                name: Tally(**{**tally, "faults": Counter(tally["faults"])})
                for name, tally in counted["tallies"].items()
            }

    def describe(self) -> str:
        """One line: `small-judge: 40 calls, 12 answers from the cache, 9000 + 40 tokens, money 0.0014`."""
        return "; ".join(_described(name, tally) for name, tally in self.summary().items()) or "nothing was asked"

    def _give_back(self, held: Reservation) -> None:
        self._calls -= held.calls
        self._money -= held.money

    def _tally(self, annotator: str) -> Tally:
        return self.tallies.setdefault(annotator, Tally())


def _described(name: str, tally: dict[str, Any]) -> str:
    money = "money unknown (no price)" if tally["money"] is None else f"money {tally['money']:.4g}"
    parts = [
        f"{tally['calls']} calls",
        f"{tally['cache_hits']} answers from the cache",
        f"{tally['tokens_in']} + {tally['tokens_out']} tokens",
        money,
        *(f"{n} calls whose tokens are unknown" for n in [tally["calls_without_usage"]] if n),
        *(f"{n} {kind}" for kind, n in tally["faults"].items()),
    ]
    return f"{name}: {', '.join(parts)}"
