"""A language model learns to judge from labelled pairs (OSP, Zhai et al. 2024): supervised on the token of the option.

Every pair is asked about in both orders, in the very words and token ids in which a local judge asks
(`feedback/judge.py`), and

    loss = -log pi(right option | question, stub of the answer)

The stub's own tokens, which a judge is given, carry no loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefloop.data.chat import ChatFormat
from prefloop.feedback.annotator import Comparison
from prefloop.feedback.instructions import load_instruction
from prefloop.feedback.judge import label_ids, message_ids
from prefloop.models import ModelRef, context_of, load_tokenizer
from prefloop.records import Demonstration, Pair, Prompt, Response
from prefloop.run import Stage
from prefloop.train.logprobs import ResponseLogps
from prefloop.train.objective import SupervisedObjective


@dataclass(frozen=True)
class OptionObjective(SupervisedObjective):
    """-weight log pi of the last token of every response, a mean over demonstrations."""

    normalise: Literal["token", "sequence"] = "sequence"

    kind: ClassVar = "judgements"

    @property
    def identity(self) -> str:
        return "the token of the option"

    def losses(self, items: Sequence[Demonstration], logps: ResponseLogps) -> tuple[Tensor, dict[str, Tensor]]:
        weight = torch.tensor([item.weight for item in items], device=logps.sums.device)
        nll = -logps.tokens[logps.counts.cumsum(0) - 1]
        return weight * nll, {"nll": nll.detach()}


def judgements_to_learn(
    pairs: Sequence[Pair], model: ModelRef, *, instruction: str, version: str = "", stage: Stage | None = None
) -> list[Demonstration]:
    """Both orders of every pair as a question, with the stub and the right option as the answer.

    The right option is the likelier one of a soft label, with 2 |p - 1/2| of the pair's weight; a tie teaches nothing.
    `version`: the instruction's hash, which tells a stage that its file has changed.
    A pair whose question does not fit the model's context, or spells a special token (which a demonstration cannot
    keep as text), is left out and counted. Raises InputError where the options cannot be told apart by one token.
    """
    stage = stage or Stage.detached()
    chat, context, asked = ChatFormat(load_tokenizer(model)), context_of(model), load_instruction(instruction)
    stub_ids, labels = label_ids(chat, asked)
    options = list(zip(asked.labels, labels, strict=True))
    if asked.answering.invert:
        options.reverse()
    found: list[Demonstration] = []
    for pair in pairs:
        if pair.p == 0.5:
            stage.count("pairs left out: neither answer is preferred")
            continue
        better, worse = (pair.chosen, pair.rejected) if pair.p > 0.5 else (pair.rejected, pair.chosen)
        weight = pair.weight * 2 * abs(pair.p - 0.5)
        first = Comparison(pair.prompt, better, worse)
        # Both have the id of the pair's prompt, so that what is held out is held out in both orders.
        prompts = [Prompt.of(asked.render(order), id=pair.prompt.id) for order in (first, first.swapped)]
        ids = [tuple(chat.prompt_ids(prompt)) for prompt in prompts]
        if any(message_ids(chat, prompt.messages[0].content) != own for prompt, own in zip(prompts, ids, strict=True)):
            stage.count("pairs left out: the question spells a special token")
        elif context is not None and max(map(len, ids)) + len(stub_ids) + 1 > context:
            stage.count(f"pairs left out: longer than the context of {context} tokens")
        else:
            answers = [
                Response(text=asked.stub + label, token_ids=(*stub_ids, id), finish_reason="length")
                for label, id in options
            ]
            found += [Demonstration(prompt=p, response=r, weight=weight) for p, r in zip(prompts, answers, strict=True)]
    stage.count("judgements to learn from", len(found))
    return found
