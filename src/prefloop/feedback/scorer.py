"""Scores of responses, higher is better: from a user's own function, or from an annotator.

    def score(groups: list[Group]) -> list[list[float | None]]      # one per response

None means that this response could not be scored; it is dropped and counted, never given a made-up number.

An annotator that judges one response at a time (`ScoresResponses`: a rule, a reward model, an implicit reward) gives
its own score. One that only compares two gives a response the mean probability of being preferred over the prompt's
other responses, which tells the answers to one prompt apart and says nothing between prompts.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal, Protocol, runtime_checkable

from prefloop.errors import InputError
from prefloop.feedback.annotator import Annotator, Comparison
from prefloop.records import Group, Prompt, Response
from prefloop.run import Stage

Scores = Callable[[Sequence[Group]], Sequence[Sequence[float | None]]]

NO_OTHER = "the annotator only compares two answers, and the prompt has no other"


@runtime_checkable
class ScoresResponses(Protocol):
    """An annotator that can tell how good one response is, where `judges` is "response"."""

    judges: Literal["response", "pair"]

    def score(self, answers: Sequence[tuple[Prompt, Response]]) -> list[float | str]:
        """A score of every answer, or why there is none."""
        ...


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


def scores_alone(annotator: Annotator) -> bool:
    """Whether an annotator can score a response without another to compare it with."""
    return isinstance(annotator, ScoresResponses) and annotator.judges == "response"


def score_by(groups: Sequence[Group], annotator: Annotator, *, stage: Stage | None = None) -> list[Group]:
    """The groups with `score` from an annotator; where it gives none, a failure with the reason, which is counted.

    An annotator that only compares: the mean over the prompt's other responses of P(this one is preferred), which sums
    to half the number of responses where it never abstains. A prompt takes n (n - 1) / 2 questions.
    """
    stage = stage or Stage.detached()
    flat = [(group.prompt, response) for group in groups for response in group.responses]
    if isinstance(annotator, ScoresResponses) and annotator.judges == "response":
        with stage.progress(1, unit="pass", description=f"scored by {annotator.name}") as advance:
            found = annotator.score(flat)
            advance(1)
    else:
        found = _win_probabilities(groups, annotator, stage)
    scores = iter(found)
    scored = [
        group.model_copy(update={"responses": tuple(_scored(r, next(scores), stage) for r in group.responses)})
        for group in groups
    ]
    stage.count("answers scored", sum(r.score is not None for group in scored for r in group.responses))
    return scored


def _win_probabilities(groups: Sequence[Group], annotator: Annotator, stage: Stage) -> list[float | str]:
    from prefloop.feedback.stage import ask

    places = [(g, i, j) for g, group in enumerate(groups) for i, j in combinations(range(len(group.responses)), 2)]
    questions = [Comparison(groups[g].prompt, groups[g].responses[i], groups[g].responses[j]) for g, i, j in places]
    won: list[list[list[float]]] = [[[] for _ in group.responses] for group in groups]
    reasons: dict[tuple[int, int], str] = {}
    for (g, i, j), judgement in zip(places, ask(questions, annotator, stage=stage), strict=True):
        if judgement.p is None:
            reasons |= {(g, i): str(judgement.reason), (g, j): str(judgement.reason)}
        else:
            won[g][i].append(judgement.p)
            won[g][j].append(1.0 - judgement.p)
    return [
        math.fsum(values) / len(values) if values else reasons.get((g, i), NO_OTHER)
        for g, own in enumerate(won)
        for i, values in enumerate(own)
    ]


def _scored(response: Response, found: float | str, stage: Stage) -> Response:
    if isinstance(found, str):
        stage.count(f"answers without a score: {found}")
        return response.model_copy(update={"score": None, "failure": found})
    return response.model_copy(update={"score": found, "failure": None})
