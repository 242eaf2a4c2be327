"""Conditional alignment: what is written, that it reads back, and that the saved chat template does the same."""

from pathlib import Path

import pytest

from prefloop.config import parse_config
from prefloop.data.chat import ChatFormat
from prefloop.data.condition import Condition, asking_for, each_template
from prefloop.errors import InputError
from prefloop.models import ModelRef, load_tokenizer
from prefloop.recipes.scored import own_template
from prefloop.records import Group, Prompt, Response
from tests.tiny import Template, save_tiny_model, tiny_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be {reward}."},
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": " three {input}\n"},
]
ODD = "é\"{{[{reward}]%}} '{input}'\\n"


@pytest.mark.parametrize("reward", [0.0, -0.004, 1.005, -2.675, 5, 1e4])
@pytest.mark.parametrize(
    "condition", [Condition(), Condition(decimals=1), Condition(decimals=0), Condition(template=ODD)]
)
@pytest.mark.parametrize("text", ["Name a colour.", "", "two\nlines {reward} <rm_score>: 1.00 "])
def test_rendering_then_parsing_gives_back_the_rounded_reward(condition: Condition, reward: float, text: str) -> None:
    rendered = condition.render(text, reward)
    assert condition.parse(rendered) == (text, round(float(reward), condition.decimals))
    assert "-0.00" not in rendered


def test_the_form_is_that_of_the_paper() -> None:
    assert Condition().render("Name a colour.", 5) == "Name a colour. <rm_score>: 5.00 "
    assert Condition().parse("Name a colour.") is None
    assert Condition().parse("Name a colour. <rm_score>: 5.0 ") is None  # another number of decimals


@pytest.mark.parametrize("template", ["{input} 5.00", "{reward}", "{input} {input} {reward}"])
def test_the_template_has_both_placeholders_once(template: str) -> None:
    with pytest.raises(InputError, match=r"occurs [02] times; expected once"):
        parse_config(Condition, {"template": template})


def test_the_last_user_message_says_the_reward_and_nothing_else_changes() -> None:
    prompt = Prompt.of(CONVERSATION, id="mine", category="c")
    found = Condition().of(prompt, 1.234)
    assert found.messages[:-1] == prompt.messages[:-1] and (found.id, found.category) == ("mine", "c")
    assert found.messages[-1].content == " three {input}\n <rm_score>: 1.23 "
    with pytest.raises(InputError, match="says a reward already"):
        Condition().of(found, 1.0)
    with pytest.raises(InputError, match="expected a finite number"):
        Condition().of(prompt, float("inf"))


def test_every_answer_gets_a_prompt_of_its_own() -> None:
    group = Group(
        prompt=Prompt.of("q"), responses=tuple(Response(text=t, score=s) for t, s in (("a", 1.0), ("b", -1.0)))
    )
    each = Condition(decimals=1).each([group])
    assert [(g.prompt.messages[0].content, g.responses[0].text) for g in each] == [
        ("q <rm_score>: 1.0 ", "a"),
        ("q <rm_score>: -1.0 ", "b"),
    ]


@pytest.mark.parametrize("template", ["chatml", "llama3", "zephyr"])
@pytest.mark.parametrize("condition", [Condition(target=3.0), Condition(target=-0.5, template=ODD, decimals=1)])
def test_the_chat_template_writes_what_training_saw(template: Template, condition: Condition) -> None:
    own = tiny_tokenizer(template)
    conditional, asked = tiny_tokenizer(template), tiny_tokenizer(template)
    conditional.chat_template = condition.chat_template(str(own.chat_template))
    asked.chat_template = asking_for(1.25, str(conditional.chat_template))
    for prompt in (Prompt.of("Hi  there "), Prompt.of(CONVERSATION), Prompt.of(CONVERSATION[:2])):
        plain = [message.model_dump() for message in prompt.messages]
        for opening in (True, False):

            def written(tokenizer, messages=plain, opening=opening, **kwargs):
                return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening, **kwargs)

            def trained(reward: float, prompt=prompt, written=written) -> str:
                return written(own, [message.model_dump() for message in condition.of(prompt, reward).messages])

            assert written(conditional) == trained(condition.target)
            assert written(conditional, reward=1.25) == written(asked) == trained(1.25)
            assert written(conditional, reward=None) == trained(condition.target)
        # Our own rendering, from which models are sampled and scored, takes the same way.
        assert ChatFormat(conditional).prompt_ids(prompt) == ChatFormat(own).prompt_ids(
            condition.of(prompt, condition.target)
        )
    assert ChatFormat(conditional).end_token_id == ChatFormat(own).end_token_id


PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content"
    " %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("condition", [Condition(), Condition(template="{reward}! {input}"), Condition(template=ODD)])
def test_a_message_in_parts_says_the_reward_around_its_parts(condition: Condition) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = condition.chat_template(PARTS)

    def written(content: object) -> str:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))

    image = {"type": "image", "url": "x"}
    assert written([{"type": "text", "text": "What "}, image, {"type": "text", "text": "is it?"}]) == (
        "[user]" + condition.render("What <image>is it?", condition.target)
    )
    assert written("What is it?") == "[user]" + condition.render("What is it?", condition.target)


def test_of_several_chat_templates_each_conditions(tmp_path: Path) -> None:
    own = {"default": PARTS, "tool_use": "tools: " + PARTS}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = own
    save_tiny_model(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    assert own_template(ModelRef.of(tmp_path / "m")) == own
    tokenizer.chat_template = each_template(own, Condition().chat_template)
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "m/condition.json").write_text(Condition().model_dump_json())
    model = ModelRef.of(tmp_path / "m")
    for ref, reward in ((model, "5.00"), (model.asking_for(-1), "-1.00")):
        for name, start in (("default", "[user]"), ("tool_use", "tools: [user]")):
            found = load_tokenizer(ref).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False,
                                                            chat_template=name)  # fmt: skip
            assert found == f"{start}Hi <rm_score>: {reward} "
