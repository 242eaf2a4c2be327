"""Single answers called good or bad, from pairs, and what their drift from the reference is estimated by."""

from collections.abc import Iterator, Sequence

from prefloop.data.chat import ChatFormat
from prefloop.errors import InputError
from prefloop.models import ModelRef, context_of, load_tokenizer
from prefloop.records import Answer, Pair, Response


def answers_of(items: Sequence[Pair] | Sequence[Answer]) -> list[Answer]:
    """A good and a bad answer of every pair; of a soft label, with P(good) = p and 1 - p. Answers stay as they are."""
    answers = []
    for item in items:
        if isinstance(item, Answer):
            answers.append(item)
            continue
        for response, p in zip(item.responses, (item.p, 1.0 - item.p), strict=True):
            answers.append(Answer(prompt=item.prompt, response=response, p=p, weight=item.weight))
    return answers


def good_and_bad(answers: Sequence[Answer]) -> list[Pair]:
    """A pair for every prompt that has both: its first good answer and its first bad one."""
    found: dict[str, list[Response | None]] = {}
    prompts = {answer.prompt.id: answer.prompt for answer in reversed(answers)}
    for answer in answers:
        both = found.setdefault(answer.prompt.id, [None, None])
        side = 0 if answer.p > 0.5 else 1
        both[side] = both[side] or answer.response
    return [
        Pair(prompt=prompts[id], chosen=good, rejected=bad, source="offline")
        for id, (good, bad) in found.items()
        if good and bad and not good.same_as(bad)
    ]


def mismatched(answers: Sequence[Answer], model: ModelRef) -> list[Answer]:
    """The answers, each with the next response in the list that is to another prompt and fits the model's context.

    A good answer takes a good one and a bad answer a bad one where there is any, so that drift is estimated on both as
    they are among the answers. After the last answer comes the first. Raises InputError where an answer finds none.
    """
    chat, context = ChatFormat(load_tokenizer(model)), context_of(model)
    found = []
    for i, answer in enumerate(answers):
        room = context - len(chat.prompt_ids(answer.prompt)) if context else None
        response = next((one.response for alike in (True, False) for one in _after(answers, i, alike=alike)
                         if room is None or one.response.length_tokens <= room), None)  # fmt: skip
        if response is None:
            raise InputError(
                f"prompt {answer.prompt.id!r}: kto estimates drift by answers to other prompts, and none is there that "
                "fits; give more prompts, or shorter ones"
            )
        new = answer.model_copy(update={"mismatched": response})
        # What was computed for another mismatched response does not hold for this one.
        same = answer.mismatched is not None and answer.mismatched == response
        found.append(new if same else new.model_copy(update={"reference": None, "reference_logps": None}))
    return found


def _after(answers: Sequence[Answer], i: int, *, alike: bool) -> Iterator[Answer]:
    """The answers to other prompts, from the one after answer i round to the one before it, of its label or not."""
    own = answers[i]
    for k in range(1, len(answers)):
        one = answers[(i + k) % len(answers)]
        if one.prompt.id != own.prompt.id and ((one.p > 0.5) == (own.p > 0.5)) == alike:
            yield one
