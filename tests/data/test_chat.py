"""Token ids of prompts and responses under tokenizers of four manners, and tokenizers that cannot be used."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prefloop.data.chat import ChatFormat, check_prompt_length, same_tokenizer
from prefloop.records import Prompt, Response
from tests.data.rows import message_of, turns
from tests.tiny import CHATML, LLAMA3, Template, add_bos_to_text, tiny_tokenizer

FAMILIES: list[Template | None] = ["chatml", "llama3", "zephyr", None]
CHAT = {family: ChatFormat(tiny_tokenizer(family)) for family in FAMILIES}
CONVERSATION = Prompt.of(turns("hi ", "yes", "why?", system="Be kind."), id="p-1")
RENDERED = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\nyes"
              "<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user"
              "<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nwhy?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "zephyr": "<|system|>\nBe kind.</s>\n<|user|>\nhi </s>\n<|assistant|>\nyes</s>\n<|user|>\nwhy?</s>\n"
              "<|assistant|>\n",
    None: "Be kind.\n\nUser:\nhi \n\nAssistant:\nyes\n\nUser:\nwhy?\n\nAssistant:\n",
}  # fmt: skip


def decoded(chat: ChatFormat, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids))


def added_vocab(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}


def id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    return tokenizer.get_vocab()[token]


def with_template(family: Template | None, template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_is_the_rendered_conversation_and_the_opening(family: Template | None) -> None:
    ids = CHAT[family].prompt_ids(CONVERSATION)
    assert decoded(CHAT[family], ids) == RENDERED[family]
    assert all(type(id) is int for id in ids)


@pytest.mark.parametrize("family", ["chatml", "llama3", "zephyr"])
def test_special_tokens_of_the_template_are_single_ids(family: Template) -> None:
    chat = CHAT[family]
    ids = chat.prompt_ids(CONVERSATION)
    rendered = RENDERED[family]
    for token, id in added_vocab(chat.tokenizer).items():
        assert ids.count(id) == rendered.count(token)


@pytest.mark.parametrize(
    ("family", "end", "description"),
    [
        ("chatml", "<|im_end|>", "chat template of the tokenizer, begins with <|im_start|>, "
                                 "end of turn <|im_end|> (258)"),
        ("llama3", "<|eot_id|>", "chat template of the tokenizer, begins with <|begin_of_text|>, "
                                 "end of turn <|eot_id|> (260)"),
        ("zephyr", "</s>", "chat template of the tokenizer, without the <s> that plain text begins with, "
                           "end of turn </s> (258)"),
        (None, "<|endoftext|>", 'no chat template: plain "User: ... Assistant: ..." form, '
                                "end of turn <|endoftext|> (256)"),
    ],
)  # fmt: skip
def test_end_of_turn_and_description(family: Template | None, end: str, description: str) -> None:
    chat = CHAT[family]
    assert chat.end_token_id == id_of(chat.tokenizer, end)
    assert chat.stop_token_ids == {chat.end_token_id}
    assert chat.description == description


def test_end_of_turn_is_the_templates_and_eos_stops_too() -> None:
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.eos_token = "<|end_of_text|>"
    chat = ChatFormat(tokenizer)
    assert chat.end_token_id == id_of(tokenizer, "<|eot_id|>")
    assert chat.stop_token_ids == {id_of(tokenizer, t) for t in ("<|eot_id|>", "<|end_of_text|>")}
    assert chat.response_ids("a")[1:] == [chat.end_token_id]


def test_template_without_end_of_turn_takes_eos() -> None:
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    chat = ChatFormat(with_template("chatml", template))
    assert chat.end_token_id == chat.tokenizer.eos_token_id


def test_no_token_that_ends_a_response_is_refused() -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = None
    assert message_of(lambda: ChatFormat(tokenizer)) == (
        "the tokenizer has no token that ends a response (no end of turn in a chat template, no EOS token); "
        "set eos_token in tokenizer_config.json"
    )


@pytest.mark.parametrize("prefix", ["{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"])
def test_doubled_bos_is_made_one_and_said(prefix: str) -> None:
    chat = ChatFormat(with_template("llama3", prefix + LLAMA3))
    assert chat.prompt_ids(CONVERSATION) == CHAT["llama3"].prompt_ids(CONVERSATION)
    assert "begins with <|begin_of_text|>, written more than once by the template and kept once," in chat.description


def test_bos_that_opens_every_turn_is_kept_in_every_turn() -> None:
    ids = CHAT["chatml"].prompt_ids(CONVERSATION)
    assert ids.count(id_of(CHAT["chatml"].tokenizer, "<|im_start|>")) == 5


def test_plain_form_takes_a_bos_where_text_takes_one() -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    plain = ChatFormat(tokenizer).prompt_ids(CONVERSATION)
    assert plain == CHAT[None].prompt_ids(CONVERSATION)
    add_bos_to_text(tokenizer.backend_tokenizer, "<s>")
    chat = ChatFormat(tokenizer)
    assert chat.prompt_ids(CONVERSATION) == [tokenizer.bos_token_id, *plain]
    assert "form, begins with <s>, end of turn" in chat.description
    assert chat.response_ids("a") == CHAT[None].response_ids("a")


def test_template_that_refuses_a_system_message() -> None:
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    chat = ChatFormat(with_template("chatml", refusal + CHATML))
    assert message_of(lambda: chat.prompt_ids(CONVERSATION)) == (
        "prompt 'p-1' has a system message, which the model's chat template does not take (System role not supported); "
        "put its text into the first user message"
    )
    assert decoded(chat, chat.prompt_ids(Prompt.of("hi"))).startswith("<|im_start|>user\nhi<|im_end|>")


def test_template_that_refuses_something_else() -> None:
    refusal = "{% if messages | length > 2 %}{{ raise_exception('one turn\nonly') }}{% endif %}"
    chat = ChatFormat(with_template("chatml", refusal + CHATML))
    assert message_of(lambda: chat.prompt_ids(CONVERSATION)) == (
        "prompt 'p-1' cannot be rendered by the model's chat template (one turn only); "
        "change the conversation or use a model whose template takes it"
    )
    assert message_of(lambda: ChatFormat(with_template("chatml", "{{ raise_exception('never') }}"))) == (
        "the model's chat template cannot render a user's message and an answer (never); "
        "repair chat_template in the model folder"
    )


def test_template_that_renders_past_answers_in_another_way_is_said() -> None:
    thinking = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>{% endif")
    assert thinking != CHATML
    chat = ChatFormat(with_template("chatml", thinking))
    assert "past answers are rendered unlike the one asked for" in chat.description
    assert chat.end_token_id == id_of(chat.tokenizer, "<|im_end|>")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=50, deadline=None)
@given(
    text=st.text() | st.sampled_from([" two  spaces ", "a , b 's .", "<|im_end|>", "x</s>y", "<|eot_id|>\n", "👩‍🚀"])
)
def test_response_decodes_to_its_text(family: Template | None, text: str) -> None:
    chat = CHAT[family]
    ids = chat.response_ids(text)
    assert chat.decode(ids) == text
    assert chat.decode(chat.response_ids(text, finished=False)) == text
    # One byte is one token here; text that looks like a special token is bytes as well.
    assert len(ids) == len(text.encode()) + 1
    assert [id for id in ids if id >= 256] == [chat.end_token_id]


def test_end_token_is_there_exactly_when_the_response_ended() -> None:
    chat = CHAT["chatml"]
    body = chat.response_ids("Red.", finished=False)
    assert chat.end_token_id not in body
    given_one = chat.with_token_ids(Response(text=" Red.\n"))
    assert given_one.token_ids == (*body, chat.end_token_id)
    assert given_one.text == " Red.\n"
    assert chat.with_token_ids(Response(text="Red.", finish_reason="stop")).token_ids == (*body, chat.end_token_id)
    assert chat.with_token_ids(Response(text="Red.", finish_reason="length")).token_ids == tuple(body)
    assert chat.with_token_ids(Response(text=" ")).token_ids == (chat.end_token_id,)


def test_sampled_ids_are_never_made_again() -> None:
    sampled = Response(text="Red.", token_ids=(7, 8), finish_reason="stop")
    assert CHAT["chatml"].with_token_ids(sampled) is sampled


def test_decode_leaves_out_special_tokens_and_keeps_whitespace() -> None:
    chat = CHAT["llama3"]
    start = id_of(chat.tokenizer, "<|start_header_id|>")
    ids = chat.response_ids(" a\n", finished=False)
    assert chat.decode([*ids, start, *ids, chat.end_token_id]) == " a\n a\n"
    assert chat.decode([]) == ""


def test_decode_never_cleans_up_spaces() -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    assert tokenizer.decode(tokenizer.encode("a , b .")) == "a, b."
    chat = ChatFormat(tokenizer)
    assert chat.decode(chat.response_ids("a , b .")) == "a , b ."


def test_decode_leaves_out_an_end_token_that_is_not_marked_special() -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_tokens(["<done>"])
    chat = ChatFormat(tokenizer)
    chat.stop_token_ids = frozenset({id_of(tokenizer, "<done>")})
    assert chat.decode([*chat.response_ids("a", finished=False), *chat.stop_token_ids]) == "a"


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokenizer(family: Template | None) -> None:
    assert same_tokenizer(tiny_tokenizer(family), tiny_tokenizer(family)) is None


def test_padding_token_does_not_make_tokenizers_differ() -> None:
    changed = tiny_tokenizer("chatml")
    changed.pad_token = "<|endoftext|>"
    assert same_tokenizer(tiny_tokenizer("chatml"), changed) is None


def test_different_tokenizers_are_told_apart() -> None:
    plain = tiny_tokenizer("chatml")
    assert same_tokenizer(plain, tiny_tokenizer("llama3")) == "vocabularies of 259 and 261 tokens"
    assert (
        same_tokenizer(plain, tiny_tokenizer("zephyr"))
        == "token '<|endoftext|>' is id 256 in one and missing in the other"
    )
    other = tiny_tokenizer("chatml")
    other.eos_token = "<|endoftext|>"
    assert same_tokenizer(plain, other) == "eos_token_id is 258 in one and 256 in the other"
    other = tiny_tokenizer("chatml")
    add_bos_to_text(other.backend_tokenizer, "<|im_start|>")
    assert same_tokenizer(plain, other) == "different ids for the text 'The quick brown fox jumps over'"
    assert same_tokenizer(plain, with_template("chatml", "")) == "only one has a chat template"
    other = with_template("chatml", "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML)
    assert same_tokenizer(plain, other) == "the chat templates render a prompt differently"
    other_end = "{% if message['role'] == 'user' %}<|im_end|>\n{% else %}<|endoftext|>\n{% endif %}{% endfor"
    assert CHATML.count("<|im_end|>\n{% endfor") == 1
    other = with_template("chatml", CHATML.replace("<|im_end|>\n{% endfor", other_end))
    assert same_tokenizer(plain, other) == "the chat templates end a turn with different tokens"


def test_prompt_that_does_not_fit() -> None:
    prompt = Prompt.of("hi", id="p-1")
    check_prompt_length([0] * 90, 10, 100, prompt)
    check_prompt_length([0] * 900, 10, None, prompt)
    assert message_of(lambda: check_prompt_length([0] * 91, 10, 100, prompt)) == (
        "prompt 'p-1' has 91 tokens; with 10 new ones it does not fit the model's context of 100; "
        "shorten it or lower max_new_tokens to 9"
    )
    assert message_of(lambda: check_prompt_length([0] * 100, 10, 100, prompt)) == (
        "prompt 'p-1' has 100 tokens; with 10 new ones it does not fit the model's context of 100; "
        "shorten it or leave it out"
    )
