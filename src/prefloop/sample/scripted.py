"""An engine without a model: answers come from a function or a table. For tests, and for dry runs of a whole loop."""

from collections.abc import Callable, Mapping, Sequence

from prefloop.data.chat import ChatFormat
from prefloop.errors import InputError
from prefloop.progress import Advance, ignore
from prefloop.records import Group, Prompt, Response
from prefloop.sample.engine import check_request, checked_prompt_ids, ends, finish_reason
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed

Script = Callable[[Prompt, int, int], str]
"""(prompt, k, seed) -> text of answer `k`; the seed is this answer's own."""


class ScriptedEngine:
    """An `Engine` whose texts are scripted and whose token ids are real: those that `chat` gives to the text.

    `script` is a function, or a mapping from prompt id to the texts of answers 0, 1, ... A text with more than
    `max_new_tokens` tokens is cut there and has finish_reason "length". There are no `sampling_logps`.

    Example:
        engine = ScriptedEngine(chat, {"p-1": ["Red.", "Blue."]})
        engine.sample([Prompt.of("Name a colour.", id="p-1")], k=2, sampling=Sampling(), seed=0)
    """

    def __init__(
        self, chat: ChatFormat, script: Script | Mapping[str, Sequence[str]], *, context: int | None = None
    ) -> None:
        self.chat = chat
        self.script = script if callable(script) else _look_up(script)
        self.context = context
        self.tolerance: float | None = None

    def close(self) -> None:
        """Nothing is held."""

    def prompt_lengths(self, prompts: Sequence[Prompt], *, sampling: Sampling) -> list[int]:
        return [len(ids) for ids in checked_prompt_ids(self.chat, prompts, sampling, self.context)]

    def sample(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seed: int, advance: Advance = ignore
    ) -> list[Group]:
        check_request(prompts, k)
        self.prompt_lengths(prompts, sampling=sampling)
        groups = []
        for prompt in prompts:
            texts = [self.script(prompt, i, derive_seed(seed, "answer", prompt.id, i)) for i in range(k)]
            groups.append(Group(prompt=prompt, responses=tuple(self._response(text, sampling) for text in texts)))
            advance(k)
        return groups

    def _response(self, text: str, sampling: Sampling) -> Response:
        ids = self.chat.response_ids(text)[: sampling.max_new_tokens]
        end = next((n for n in range(1, len(ids)) if ends(self.chat, ids[:n], sampling)), len(ids))
        ids = ids[:end]
        return Response(
            text=self.chat.decode(ids), token_ids=tuple(ids), finish_reason=finish_reason(self.chat, ids, sampling)
        )


def _look_up(texts: Mapping[str, Sequence[str]]) -> Script:
    def script(prompt: Prompt, k: int, seed: int) -> str:
        if prompt.id not in texts:
            raise InputError(f"the script has no answers to prompt {prompt.id!r}; add them to the mapping")
        if k >= len(texts[prompt.id]):
            raise InputError(
                f"the script has {len(texts[prompt.id])} answers to prompt {prompt.id!r}, and answer {k + 1} was asked "
                "for; add answers or lower k"
            )
        return texts[prompt.id][k]

    return script


def echo(prompt: Prompt, k: int, seed: int) -> str:
    """The script of `engine="scripted"`: the last message from a seeded word on, so that answers differ in length."""
    words = prompt.messages[-1].content.split() or ["..."]
    return f"Answer {k + 1}: " + " ".join(words[seed % len(words) :])
