"""Single answers called good or bad, from pairs, and what their drift from the reference is estimated by."""

from collections.abc import Sequence
from itertools import chain

from prefloop.data.chat import ChatFormat
from prefloop.errors import InputError
from prefloop.models import ModelRef, context_of, load_tokenizer
from prefloop.records import Answer, Pair


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


def mismatched(answers: Sequence[Answer], model: ModelRef) -> list[Answer]:
    """The answers, each with the next response in the list that is to another prompt and fits the model's context.

    After the last answer comes the first. Raises InputError where an answer finds none.
    """
    chat, context = ChatFormat(load_tokenizer(model)), context_of(model)
    found = []
    for i, answer in enumerate(answers):
        room = context - len(chat.prompt_ids(answer.prompt)) if context else None
        others = (one for one in chain(answers[i + 1 :], answers[:i]) if one.prompt.id != answer.prompt.id)
        response = next((one.response for one in others if room is None or one.response.length_tokens <= room), None)
        if response is None:
            raise InputError(
                f"prompt {answer.prompt.id!r}: kto estimates drift by answers to other prompts, and none is there that "
                "fits; give more prompts, or shorter ones"
            )
        found.append(answer.model_copy(update={"mismatched": response}))
    return found
