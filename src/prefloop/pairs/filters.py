"""Which responses may become pairs or demonstrations: finished ones of usable length, with a score, with a high one.

`keep_finished` goes before scoring, so that no scoring is spent on answers that will be dropped; `keep_scored` goes
after it. A response is counted under the first reason that applies, and kept and dropped responses sum to those that
came in.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from math import inf

from prefloop.errors import InputError
from prefloop.pairs.tables import has_score
from prefloop.records import Group, Response
from prefloop.run import Stage

Reason = str | None
"""Why a response is dropped; None when it is kept."""


def keep_finished(
    groups: Sequence[Group],
    *,
    min_chars: int = 3,
    max_chars: int = 6700,
    min_valid: int = 2,
    stage: Stage | None = None,
) -> list[Group]:
    """Drop responses that stopped on the token limit or whose stripped text is not strictly between the two lengths.

    Lengths are in code points; the defaults are those of the released DICE code, which also sets `min_valid`, the
    fewest responses with which a prompt is kept, to 8 of 16.
    """
    if max_chars - min_chars < 2:
        raise InputError(
            f"min_chars = {min_chars}, max_chars = {max_chars}: no length lies strictly between; raise max_chars"
        )
    return _keep(groups, lambda response: _unusable(response, min_chars, max_chars), min_valid, stage)


def keep_scored(groups: Sequence[Group], *, min_valid: int = 2, stage: Stage | None = None) -> list[Group]:
    """Drop responses without a finite score, counted with their `failure`, then prompts with too few left."""
    return _keep(groups, _unscored, min_valid, stage)


def keep_above(groups: Sequence[Group], *, threshold: float, stage: Stage | None = None) -> list[Group]:
    """Drop responses whose score is not above the threshold, which may be infinite, and prompts with none left."""
    stage = stage or Stage.detached()

    def low(response: Response) -> Reason:
        return None if response.score is not None and response.score > threshold else f"reward at most {threshold:g}"

    return _shared_out(groups, _keep(groups, low, 1, stage), stage)


def keep_best(groups: Sequence[Group], *, stage: Stage | None = None) -> list[Group]:
    """Best of n: of every prompt the response with the highest score, of equal ones the first."""
    stage = stage or Stage.detached()
    kept = [
        Group(
            prompt=group.prompt, responses=(max(group.responses, key=lambda r: -inf if r.score is None else r.score),)
        )
        for group in groups
    ]
    dropped = sum(len(group.responses) for group in groups) - len(kept)
    if dropped:
        stage.count("responses dropped: another answer to the prompt is better", dropped)
    stage.count("responses kept", len(kept))
    return _shared_out(groups, kept, stage)


def _shared_out(groups: Sequence[Group], kept: list[Group], stage: Stage) -> list[Group]:
    """What is kept, after its share is measured."""
    before, after = (sum(len(group.responses) for group in part) for part in (groups, kept))
    stage.figure("share kept", after / before if before else 0.0)
    return kept


def _unusable(response: Response, min_chars: int, max_chars: int) -> Reason:
    if response.finish_reason == "length":
        return "unfinished"
    if response.length_chars <= min_chars:
        return "too short"
    return "too long" if response.length_chars >= max_chars else None


def _unscored(response: Response) -> Reason:
    if has_score(response):
        return None
    return f"no score ({response.failure})" if response.failure else "no score"


def _keep(
    groups: Sequence[Group], reason_to_drop: Callable[[Response], Reason], min_valid: int, stage: Stage | None
) -> list[Group]:
    """The groups with the responses for which there is no reason, where at least `min_valid` are left."""
    if min_valid < 1:
        raise InputError(f"min_valid = {min_valid}: should be at least 1, and 2 for pairs")
    stage = stage or Stage.detached()
    reasons: Counter[str] = Counter()
    kept: list[Group] = []
    lost = 0
    for group in groups:
        verdicts = [(response, reason_to_drop(response)) for response in group.responses]
        reasons.update(reason for _, reason in verdicts if reason)
        responses = tuple(response for response, reason in verdicts if not reason)
        if len(responses) >= min_valid:
            kept.append(Group(prompt=group.prompt, responses=responses))
        else:
            lost += len(responses)
    for reason, n in sorted(reasons.items()):
        stage.count(f"responses dropped: {reason}", n)
    if lost:
        stage.count("responses dropped: with their prompt", lost)
    if len(kept) < len(groups):
        stage.count(f"prompts dropped: fewer than {min_valid} valid responses", len(groups) - len(kept))
    stage.count("responses kept", sum(len(group.responses) for group in kept))
    stage.count("prompts kept", len(kept))
    return kept
