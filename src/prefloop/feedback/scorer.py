"""Scores of single responses: from a user's own function, or from an annotator that has them.

    def score(groups: list[Group]) -> list[list[float | None]]      # one per response, higher is better

None means that this response could not be scored; it is dropped and counted, never given a made-up number.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard

from prefloop.errors import InputError
from prefloop.feedback.annotator import Annotator
from prefloop.records import Group
from prefloop.run import Stage

Scores = Callable[[Sequence[Group]], Sequence[Sequence[float | None]]]


class ScoringAnnotator(Annotator, Protocol):
    """An annotator whose preferences come from a score of each response by itself.

    `judges` is "response", or "pair" for one of this kind that compares after all (a rule of two responses).
    """

    judges: str

    def scores(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """One number per response, in order, higher is better; None for what it cannot score.

        Each depends on its own prompt and response and on nothing else in the list.
        """
        ...


def gives_scores(annotator: Annotator) -> TypeGuard[ScoringAnnotator]:
    return getattr(annotator, "judges", None) == "response" and hasattr(annotator, "scores")


def require_scores(annotator: Annotator, *, why: str) -> ScoringAnnotator:
    """The annotator, if it scores single responses. Raises InputError saying `why` a preference is not enough."""
    if gives_scores(annotator):
        return annotator
    raise InputError(
        f"annotator {annotator.name} only says which of two answers is preferred; {why}: name rule:NAME (a rule of one "
        "answer), reward-model:MODEL or implicit-reward:POLICY,REFERENCE, one of them alone"
    )


def load_function(name: str, *, what: str = "scorer", others: str = "'implicit_reward' or ") -> Callable[..., Any]:
    """The function that `module:function` names. Raises InputError saying which part is missing.

    `what` it is for and the `others` that could stand in its place are for the message.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InputError(f"{what} {name!r}: expected {others}'module:function'")
    sys.path.insert(0, os.getcwd())  # a module beside the data, as `python -m` would find it
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"{what} {name!r}: module {module_name!r} cannot be imported ({error})") from None
    finally:
        sys.path.pop(0)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{what} {name!r}: module {module_name!r} has no function {function_name!r}")
    return function


def score_with(groups: Sequence[Group], function: Scores, *, stage: Stage | None = None) -> list[Group]:
    """The groups with `score` from `function`; a None or NaN becomes a failure with a reason.

    Raises InputError when the function does not return one row per group with one number per response.
    """
    stage = stage or Stage.detached()
    table = list(function(groups))
    if len(table) != len(groups):
        raise InputError(f"the scorer returned {len(table)} rows for {len(groups)} prompts; expected one row each")
    scored = []
    for group, row in zip(groups, table, strict=True):
        if len(row) != len(group.responses):
            raise InputError(
                f"the scorer returned {len(row)} scores for the {len(group.responses)} responses to prompt "
                f"{group.prompt.id!r}; expected one per response (None where it has none)"
            )
        responses = tuple(
            response.model_copy(update={"score": None, "failure": "the scorer gave none"})
            if score is None or not math.isfinite(score)
            else response.model_copy(update={"score": float(score)})
            for response, score in zip(group.responses, row, strict=True)
        )
        scored.append(group.model_copy(update={"responses": responses}))
    return scored


def score_by(groups: Sequence[Group], annotator: ScoringAnnotator, *, stage: Stage | None = None) -> list[Group]:
    """`score_with` the annotator's own scores."""
    return score_with(groups, annotator.scores, stage=stage)
