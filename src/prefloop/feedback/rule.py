"""Annotators that are Python functions: of one response (a score, higher is better), or of a pair (a preference).

    def score(prompt: Prompt, response: Response) -> float | None
    def preference(prompt: Prompt, a: Response, b: Response) -> float | None      # P(a is preferred) in [0, 1]

Which of the two a function is shows in the number of arguments that it must be given; one that hides it (`*args`)
declares it with an attribute, `function.judges = "response"` or `"pair"`. None is an abstention. Two scores become a
preference by comparison, 1, 0 or 1/2 when equal, or with a `scale` by the Bradley-Terry sigmoid:

    p(a > b) = sigmoid((score(a) - score(b)) / scale)
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from prefloop import __version__
from prefloop.errors import InputError, did_you_mean
from prefloop.feedback.annotator import Comparison, Judgement, abstention, ask_different, in_both_orders, sigmoid
from prefloop.feedback.rules import RULES
from prefloop.feedback.scorer import load_function
from prefloop.fingerprints import fingerprint
from prefloop.progress import Advance, ignore
from prefloop.records import Prompt, Response

Judges = Literal["response", "pair"]
NO_ANSWER = "the rule gave no answer"


class RuleAnnotator:
    """Judges by a function; `judges` says of what. Raises InputError when that cannot be told.

    What the function itself raises ends the run (InputError): a mistake in it would meet every question.
    """

    def __init__(self, function: Callable[..., Any], name: str, *, scale: float | None = None) -> None:
        self.function, self.scale = function, scale
        self.name = f"rule:{name}"
        self.judges = what_it_judges(function, self.name)
        self.identity = f"{self.name} {_source_of(function, self.name)} scale={scale} prefloop {__version__}"

    @property
    def description(self) -> str:
        """`rule:short: a score of each response, the higher wins`."""
        if self.judges == "pair":
            return f"{self.name}: a preference between two responses, asked in both orders"
        return f"{self.name}: a score of each response, {'the higher wins' if self.scale is None else 'by sigmoid'}"

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        def ask(different: Sequence[Comparison]) -> list[Judgement]:
            judgements = (
                in_both_orders(lambda orders: [self._prefer(order) for order in orders], different)
                if self.judges == "pair"
                else [self._compare(comparison) for comparison in different]
            )
            advance(len(different))
            return judgements

        return ask_different(ask, comparisons, advance)

    def score(self, answers: Sequence[tuple[Prompt, Response]]) -> list[float | str]:
        """The function's number for every answer; for a function of one response (`judges` is "response")."""
        found = [self._call(prompt, response) for prompt, response in answers]
        return [NO_ANSWER if number is None else number for number in found]

    def _compare(self, comparison: Comparison) -> Judgement:
        a, b = (self._call(comparison.prompt, response) for response in (comparison.a, comparison.b))
        return abstention(NO_ANSWER) if a is None or b is None else Judgement(p=by_scores(a, b, self.scale))

    def _prefer(self, comparison: Comparison) -> Judgement:
        q = self._call(comparison.prompt, comparison.a, comparison.b)
        if q is not None and not 0 <= q <= 1:
            raise InputError(f"{self.name} returned {q:g} for a pair; expected P(a is preferred) in [0, 1], or None")
        return abstention(NO_ANSWER) if q is None else Judgement(p=q)

    def _call(self, *args: Any) -> float | None:
        """The function's number; None and what is not finite are no answer."""
        try:
            value = self.function(*args)
        except Exception as error:  # whatever a user's code may raise
            prompt = args[0].id
            raise InputError(f"{self.name} failed on prompt {prompt!r} ({type(error).__name__}: {error})") from error
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise InputError(f"{self.name} returned {value!r} ({kind}); expected a number, or None") from None
        return number if math.isfinite(number) else None


def load_rule(name: str, *, scale: float | None = None) -> RuleAnnotator:
    """The shipped rule of that name, or the user's `module:function`. Raises InputError for neither."""
    if ":" in name:
        return RuleAnnotator(load_function(name, what="rule", others=""), name, scale=scale)
    if name not in RULES:
        raise InputError(
            f"unknown rule {name!r}; expected one of {', '.join(RULES)}, or module:function."
            f"{did_you_mean(name, list(RULES))}"
        )
    return RuleAnnotator(RULES[name], name, scale=scale)


def by_scores(a: float, b: float, scale: float | None) -> float:
    """P(a is preferred) of two scores, of which the higher is better.

    >>> by_scores(3.0, 1.0, None), by_scores(1.0, 1.0, None), round(by_scores(3.0, 1.0, 2.0), 4)
    (1.0, 0.5, 0.7311)
    """
    if scale is not None:
        return sigmoid((a - b) / scale)
    return 0.5 if a == b else float(a > b)


def what_it_judges(function: Callable[..., Any], name: str) -> Judges:
    """What a rule declares, or what the number of its required arguments says."""
    expected = 'expected (prompt, response) or (prompt, a, b), or an attribute judges = "response" or "pair"'
    declared = getattr(function, "judges", None)
    if declared in ("response", "pair"):
        return cast(Judges, declared)
    if declared is not None:
        raise InputError(f"{name} declares judges = {declared!r}; {expected}")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise InputError(f"{name} has no signature that can be read; {expected}") from None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    if len(required) not in (2, 3):
        raise InputError(f"{name} takes ({', '.join(required)}); {expected}")
    return "response" if len(required) == 2 else "pair"


def _source_of(function: Callable[..., Any], name: str) -> str:
    try:
        return fingerprint(function)
    except TypeError as error:
        raise InputError(f"{name} cannot be told from other rules ({error}); write it as a plain function") from None
