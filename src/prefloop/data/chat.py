"""Token ids of prompts and responses, made in one place.

A prompt is rendered by the tokenizer's chat template, with the opening of the assistant's turn. A response from a file
is tokenised apart from it and the ids are joined, so the boundary is never searched for in text. The end token is there
exactly when the response really ended. Ids that a model sampled are never made again from their text.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from prefloop.errors import InputError
from prefloop.records import Prompt, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTINEL = "prefloop-sentinel-answer"
"""An answer that no template treats specially; what a template writes after it ends a turn."""

PLAIN_HEADINGS = {"system": "", "user": "User:\n", "assistant": "Assistant:\n", "tool": "Tool:\n"}
"""What stands before each message where the tokenizer has no chat template."""

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " two  spaces, a\ttab\nand line\n\nends ",
    "def f(x):\n    return {'a': [1, 2.50, 1_000]}  # 100%",
    "naïve café, Grüße, Ελλάδα, Привет, 你好，世界, مرحبا, 👩‍🚀",
    "https://example.org/?q=1&r=<tag>#x",
)
"""Texts on which two tokenizers must agree to count as the same."""


class ChatFormat:
    """How one tokenizer writes conversations.

    `end_token_id` ends a response that really ended; `stop_token_ids` end sampling (the end token and the tokenizer's
    EOS); `description` says in one line what was found. Without a chat template a plain form is used, and said.
    Raises InputError for a tokenizer that has no token to end a response with.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        self.bos_token_id = cast(int | None, tokenizer.bos_token_id)
        eos = cast(int | None, tokenizer.eos_token_id)
        end = self._find_end() if self.has_template else None
        end = eos if end is None else end
        if end is None:
            raise InputError(
                "the tokenizer has no token that ends a response (no end of turn in a chat template, no EOS token); "
                "set eos_token in tokenizer_config.json"
            )
        self.end_token_id = end
        self.stop_token_ids = frozenset({end} if eos is None else {end, eos})
        self.description = self._describe()

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids that a model answers to: the conversation and the opening of the assistant's turn.

        The template decides whether there is a BOS; a doubled one at the start is made one. Raises InputError when the
        template refuses the conversation (as some do with a system message).
        """
        messages: list[dict[str, str]] = [message.model_dump() for message in prompt.messages]
        if not self.has_template:
            return self._plain_ids(messages)
        import jinja2

        try:
            return self._single_bos(self._template_ids(messages, opening=True))
        except jinja2.TemplateError as error:
            reason = " ".join(str(error).split())
            if messages[0]["role"] == "system" and self._renders(messages[1:]):
                raise InputError(
                    f"prompt {prompt.id!r} has a system message, which the model's chat template does not take "
                    f"({reason}); put its text into the first user message"
                ) from None
            raise InputError(
                f"prompt {prompt.id!r} cannot be rendered by the model's chat template ({reason}); "
                "change the conversation or use a model whose template takes it"
            ) from None

    def response_ids(self, text: str, *, finished: bool = True) -> list[int]:
        """The ids of a response: its text apart from any prompt, and the end token when it is finished.

        Text that looks like a special token stays text, so a response can neither end early nor open a turn.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [*ids, self.end_token_id] if finished else list(ids)

    def with_token_ids(self, response: Response) -> Response:
        """The response with token ids: its own, or those of its stripped text (no end token after finish "length")."""
        if response.token_ids is not None:
            return response
        ids = self.response_ids(response.text.strip(), finished=response.finish_reason != "length")
        return response.model_copy(update={"token_ids": tuple(ids)})

    def own_ids(self, response: Response) -> Response:
        """The response with ids of this tokenizer: those it has where they say its text, else those of its text.

        Another model's tokenizer may have sampled it, whose ids would be read as other words.
        """
        ids = response.token_ids
        foreign = ids is not None and (not ids or max(ids) >= len(self.tokenizer))
        if foreign or (ids and self.decode(ids).strip() != response.text.strip()):
            response = response.model_copy(update={"token_ids": None})
        return self.with_token_ids(response)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response, without end token and special tokens; whitespace is kept."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token(self, token_id: int) -> str:
        """`<|im_end|> (2)`."""
        return f"{self.tokenizer.convert_ids_to_tokens(token_id)} ({token_id})"

    def _template_ids(self, messages: list[dict[str, str]], *, opening: bool) -> list[int]:
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=opening, tokenize=True, return_dict=False
        )
        return list(cast(list[int], ids))

    def _renders(self, messages: list[dict[str, str]]) -> bool:
        import jinja2

        try:
            self._template_ids(messages, opening=True)
        except jinja2.TemplateError:
            return False
        return True

    def _plain_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The plain form: system text, then `User:`, `Assistant:` and their text on lines of their own.

        The opening ends with a line end, so a stripped response begins as it would inside running text.
        """
        parts = [PLAIN_HEADINGS[message["role"]] + message["content"] for message in messages]
        text = "\n\n".join([*parts, PLAIN_HEADINGS["assistant"]])
        ids = cast(list[int], self.tokenizer.encode(text, add_special_tokens=False))
        return [self.bos_token_id, *ids] if self.bos_token_id is not None and self._text_begins_with_bos() else ids

    def _text_begins_with_bos(self) -> bool:
        return self.bos_token_id is not None and self.tokenizer.encode("a")[:1] == [self.bos_token_id]

    def _single_bos(self, ids: list[int]) -> list[int]:
        """Without what doubles the BOS at the start. Models that open every turn with their BOS have it once there."""
        while self.bos_token_id is not None and ids[:2] == [self.bos_token_id] * 2:
            ids = ids[1:]
        return ids

    def _find_end(self) -> int | None:
        """The first special token that the template writes after an assistant's answer."""
        import jinja2

        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
        try:
            text = cast(str, self.tokenizer.apply_chat_template(messages, tokenize=False))
        except jinja2.TemplateError as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"the model's chat template cannot render a user's message and an answer ({reason}); "
                "repair chat_template in the model folder"
            ) from None
        tail = text.rpartition(SENTINEL)[2]
        ids = cast(list[int], self.tokenizer.encode(tail, add_special_tokens=False))
        return next((id for id in ids if id in special_ids(self.tokenizer)), None)

    def _describe(self) -> str:
        end = f"end of turn {self.token(self.end_token_id)}"
        if not self.has_template:
            begin = f", begins with {self.tokenizer.bos_token}" if self._text_begins_with_bos() else ""
            return f'no chat template: plain "User: ... Assistant: ..." form{begin}, {end}'
        messages = [{"role": "user", "content": "a"}]
        raw = self._template_ids(messages, opening=True)
        ids = self._single_bos(raw)
        said = ["chat template of the tokenizer"]
        if ids[0] == self.bos_token_id:
            said.append(f"begins with {self.tokenizer.bos_token}")
        elif self._text_begins_with_bos():
            said.append(f"without the {self.tokenizer.bos_token} that plain text begins with")
        if len(ids) < len(raw):
            said.append("written more than once by the template and kept once")
        answered = self._single_bos(
            self._template_ids([*messages, {"role": "assistant", "content": SENTINEL}], opening=False)
        )
        if answered[: len(ids)] != ids:
            said.append("past answers are rendered unlike the one asked for")
        return ", ".join([*said, end])


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The ids of tokens that are no text: BOS, EOS and their like, and every added token marked special."""
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    return set(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}


def same_tokenizer(a: "PreTrainedTokenizerBase", b: "PreTrainedTokenizerBase") -> str | None:
    """None when two tokenizers give the same ids for text and conversations, otherwise what differs, in one line.

    Vocabulary, BOS, EOS, chat template and the ids of PROBES are compared. The padding token is not: no padding enters
    a log-probability, and training programs change it freely.
    """
    difference = vocabulary_difference(a, b)
    if difference:
        return difference
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(a, name) != getattr(b, name):
            return f"{name} is {getattr(a, name)} in one and {getattr(b, name)} in the other"
    for text in PROBES:
        if a.encode(text) != b.encode(text):
            return f"different ids for the text {text[:30]!r}"
    if bool(a.chat_template) != bool(b.chat_template):
        return "only one has a chat template"
    conversation = Prompt.of(PROBES[0])
    if ChatFormat(a).prompt_ids(conversation) != ChatFormat(b).prompt_ids(conversation):
        return "the chat templates render a prompt differently"
    if ChatFormat(a).end_token_id != ChatFormat(b).end_token_id:
        return "the chat templates end a turn with different tokens"
    return None


def vocabulary_difference(a: "PreTrainedTokenizerBase", b: "PreTrainedTokenizerBase") -> str | None:
    """None when every token has the same id in both, otherwise what differs, in one line."""
    first, second = a.get_vocab(), b.get_vocab()
    if len(first) != len(second):
        return f"vocabularies of {len(first)} and {len(second)} tokens"
    for token, id in sorted(first.items(), key=lambda item: item[1]):
        if second.get(token) != id:
            return f"token {token!r} is id {id} in one and {second.get(token, 'missing')} in the other"
    return None


def check_prompt_length(prompt_ids: Sequence[int], max_new_tokens: int, context: int | None, prompt: Prompt) -> None:
    """Raises InputError when a prompt and `max_new_tokens` more do not fit `context` tokens (None: no limit known)."""
    if context is None or len(prompt_ids) + max_new_tokens <= context:
        return
    room = context - len(prompt_ids)
    fix = f"shorten it or lower max_new_tokens to {room}" if room > 0 else "shorten it or leave it out"
    raise InputError(
        f"prompt {prompt.id!r} has {len(prompt_ids)} tokens; with {max_new_tokens} new ones it does not fit the "
        f"model's context of {context}; {fix}"
    )
