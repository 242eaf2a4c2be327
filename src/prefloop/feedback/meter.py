"""Calls, tokens and money of annotators, and the budget that stops them.

Money is counted by a table of prices that the user gives; where a model has no price it is unknown, never zero. A run
that a budget has stopped goes on when the same command is given again with a larger one: what was used before counts,
because a run's meters keep their counts in its folder (`usage_of` reads them), and what the cache answers is free.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from prefloop.atomic import write_atomically
from prefloop.config import Config, parse_config, read_yaml
from prefloop.errors import BudgetReached, InputError, did_you_mean

USAGE = "usage"
"""In a run folder: what its annotators have used, a file a meter."""
KEEP_EVERY = 1.0
"""Seconds between two writings while questions are answered: no more than that is lost when a process is killed."""


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
        """Plain data, for a file or a report."""
        return {**vars(self), "faults": dict(sorted(self.faults.items()))}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Tally":
        return cls(**{**data, "faults": Counter(data["faults"])})

    def __add__(self, other: "Tally") -> "Tally":
        money = None if self.money is None or other.money is None else self.money + other.money
        names = ("calls", "cache_hits", "tokens_in", "tokens_out", "calls_without_usage")
        counts = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Tally(**counts, money=money, faults=self.faults + other.faults)


class Meter:
    """Counts what annotators use, by annotator, from any thread. `reserve` before a call, `add` or `release` after it.

        held = meter.reserve(model, tokens_in=estimate, tokens_out=1)      # BudgetReached: the call is not made
        answer = ask()                                                     # failed: meter.release(held)
        meter.add(name, 1, answer.tokens_in, answer.tokens_out, model, held)

    What is reserved counts against the budget like what is spent, so calls that are under way at the same time cannot
    go beyond it together.

    With a `file`, what is in it from earlier counts too, and all that is counted goes into it: about once a second, and
    with `keep`, which an annotator calls when its questions are answered or have failed.
    """

    def __init__(
        self,
        prices: Prices | None = None,
        *,
        budget_calls: int | None = None,
        budget_money: float | None = None,
        file: Path | None = None,
    ) -> None:
        self.prices = prices or Prices()
        self.budget_calls, self.budget_money = budget_calls, budget_money
        self.tallies: dict[str, Tally] = {}
        self._lock = threading.Lock()
        self._calls = 0  # with those that are reserved, as the money
        self._money = 0.0
        self._spent = 0.0
        self._file = file
        self._kept_at = time.monotonic()
        self._new = False
        if file and file.is_file():
            self._spent, self.tallies = _counted_in(file)
            self._money = self._spent
            self._calls = sum(tally.calls for tally in self.tallies.values())

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
            self._spent += cost or 0.0
            tally = self._tally(annotator)
            tally.calls += calls
            tally.tokens_in += tokens_in or 0
            tally.tokens_out += tokens_out or 0
            tally.money = None if cost is None or tally.money is None else tally.money + cost
            tally.calls_without_usage += 0 if known else calls
            self._changed()

    def add_hits(self, annotator: str, n: int) -> None:
        """Questions that the cache answered, at no cost."""
        with self._lock:
            self._tally(annotator).cache_hits += n
            self._changed()

    def add_fault(self, annotator: str, kind: str) -> None:
        """A call that was not answered, or not usefully: `kind` is such as `status 429`, `timeout`, `malformed`."""
        with self._lock:
            self._tally(annotator).faults[kind] += 1
            self._changed()

    def keep(self) -> None:
        """Write what is new into the file. Raises InputError where that is impossible."""
        with self._lock:
            if self._new:
                self._write()

    def summary(self) -> dict[str, dict[str, Any]]:
        """What every annotator has used, as plain data."""
        with self._lock:
            return {name: tally.to_json() for name, tally in self.tallies.items()}

    def describe(self) -> str:
        """One line: `small-judge: 40 calls, 12 answers from the cache, 9000 + 40 tokens, money 0.0014`."""
        with self._lock:
            return described(self.tallies)

    def _changed(self) -> None:
        self._new = True
        if time.monotonic() - self._kept_at >= KEEP_EVERY:
            self._write()

    def _write(self) -> None:
        if self._file:
            tallies = {name: tally.to_json() for name, tally in self.tallies.items()}
            # Known money apart: a tally of which a part is unknown has none.
            write_atomically(self._file, json.dumps({"money": self._spent, "tallies": tallies}) + "\n")
        self._kept_at, self._new = time.monotonic(), False

    def _give_back(self, held: Reservation) -> None:
        self._calls -= held.calls
        self._money -= held.money

    def _tally(self, annotator: str) -> Tally:
        return self.tallies.setdefault(annotator, Tally())


def usage_of(run: Path) -> dict[str, Tally]:
    """What annotators have used in a run, by annotator, in all processes that worked on it. Raises InputError for a
    damaged file.
    """
    used: dict[str, Tally] = {}
    for file in sorted((run / USAGE).glob("*.json")):
        for name, tally in _counted_in(file)[1].items():
            used[name] = used[name] + tally if name in used else tally
    return used


def _counted_in(file: Path) -> tuple[float, dict[str, Tally]]:
    """Known money, and tallies by annotator."""
    try:
        counted = json.loads(file.read_text(encoding="utf-8"))
        return float(counted["money"]), {name: Tally.from_json(data) for name, data in counted["tallies"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{file} is damaged (not the counts that prefloop writes); delete it to count from zero"
        ) from None


def described(tallies: Mapping[str, Tally]) -> str:
    """One line of what annotators have used, by annotator."""
    return "; ".join(f"{name}: {_described(tally)}" for name, tally in tallies.items()) or "nothing was asked"


def _described(tally: Tally) -> str:
    parts = [
        f"{tally.calls} calls",
        f"{tally.cache_hits} answers from the cache",
        f"{tally.tokens_in} + {tally.tokens_out} tokens",
        "money unknown (no price)" if tally.money is None else f"money {tally.money:.4g}",
        *(f"{n} calls whose tokens are unknown" for n in [tally.calls_without_usage] if n),
        *(f"{n} {kind}" for kind, n in sorted(tally.faults.items())),
    ]
    return ", ".join(parts)
