"""Conditional alignment: a prompt that says which reward its answer has, and a chat template that asks for one.

    Name a colour. <rm_score>: 1.27         in training: the standardised reward of the answer that follows
    Name a colour. <rm_score>: 5.00         at inference: the reward that is asked for

The last user message of a prompt is rewritten. `chat_template` wraps a model's own chat template so that it does this
by itself: `tokenizer.apply_chat_template(messages, add_generation_prompt=True)` asks for the target, and
`reward=3` in its arguments for another.
"""

import json
import math
import re
from collections.abc import Callable, Sequence

from pydantic import Field, field_validator

from prefloop.config import Config
from prefloop.errors import InputError
from prefloop.records import Group, Prompt

CONDITION = "condition.json"
"""The file in a model's folder that says how it is conditioned."""
REWARD_SCALE = "reward_scale.json"
"""The file that says what the rewards it was trained on were standardised with."""
PLACEHOLDERS = ("{input}", "{reward}")


class Condition(Config):
    """How a reward is written into a prompt (2308.12050; the released code's form and target)."""

    template: str = Field(
        default="{input} <rm_score>: {reward} ", description="of the last user message: {input} once and {reward} once"
    )
    decimals: int = Field(
        default=2, ge=0, le=6, description="of a reward, always as many: another number is other tokens"
    )
    target: float = Field(
        default=5.0, allow_inf_nan=False, description="asked for at inference, in standard deviations above the mean"
    )

    @field_validator("template")
    @classmethod
    def _both_once(cls, template: str) -> str:
        for name in PLACEHOLDERS:
            if template.count(name) != 1:
                raise ValueError(f"template = {template!r}: {name} occurs {template.count(name)} times; expected once")
        return template

    def written(self, reward: float) -> str:
        """A reward as text.

        >>> [Condition().written(reward) for reward in (1.267, -0.001, 5)]
        ['1.27', '0.00', '5.00']
        """
        # Minus zero would be a second way to write zero.
        return f"{round(reward, self.decimals) + 0.0:.{self.decimals}f}"

    def render(self, text: str, reward: float) -> str:
        """A user message that says the reward of its answer. Raises InputError for a reward that is no finite number.

        >>> Condition().render("Name a colour.", 1.267)
        'Name a colour. <rm_score>: 1.27 '
        """
        if not math.isfinite(reward):
            raise InputError(f"reward {reward}: expected a finite number to condition on")
        values = {"{input}": text, "{reward}": self.written(reward)}
        return "".join(values.get(part, part) for part in self._parts)

    def parse(self, text: str) -> tuple[str, float] | None:
        """The message and the (rounded) reward of which `render` made `text`; None when it did not.

        >>> Condition().parse('Name a colour. <rm_score>: 1.27 ')
        ('Name a colour.', 1.27)
        """
        number = rf"-?\d+\.\d{{{self.decimals}}}" if self.decimals else r"-?\d+"
        groups = {"{input}": "(?P<input>.*)", "{reward}": f"(?P<reward>{number})"}
        found = re.fullmatch("".join(groups.get(part) or re.escape(part) for part in self._parts), text, re.DOTALL)
        return (found["input"], float(found["reward"])) if found else None

    def of(self, prompt: Prompt, reward: float) -> Prompt:
        """The prompt with the reward in its last user message; its id stays, so that all its answers keep together.

        Raises InputError for a prompt that says a reward already.
        """
        last = max(i for i, message in enumerate(prompt.messages) if message.role == "user")
        content = prompt.messages[last].content
        distinct = any(part.strip() for part in self._parts if part not in PLACEHOLDERS)
        if distinct and self.parse(content):
            raise InputError(
                f"prompt {prompt.id!r} says a reward already ({content[-40:]!r}); give the prompts as they were before"
            )
        message = prompt.messages[last].model_copy(update={"content": self.render(content, reward)})
        messages = (*prompt.messages[:last], message, *prompt.messages[last + 1 :])
        return prompt.model_copy(update={"messages": messages})

    def each(self, groups: Sequence[Group]) -> list[Group]:
        """A group for every answer, its prompt conditioned on the answer's score."""
        return [
            Group(prompt=self.of(group.prompt, response.score), responses=(response,))
            for group in groups
            for response in group.responses
            if response.score is not None
        ]

    def chat_template(self, own: str) -> str:
        """A model's `own` Jinja chat template behind lines that condition the last user message on the target.

        Messages rendered by it are those of `of`, to the character. A message in parts (of text, images) gets what
        stands before and after its {input} as parts of text.
        """
        value = "('%.Nf' | format((reward | float | round(N)) + 0))".replace("N", str(self.decimals))

        def written(parts: Sequence[str]) -> str:
            literals = (value if part == "{reward}" else json.dumps(part, ensure_ascii=False) for part in parts)
            return " ~ ".join(['""', *literals])

        place = self._parts.index("{input}")
        before, after = (written(parts) for parts in (self._parts[:place], self._parts[place + 1 :]))
        text = f"{before} ~ message['content'] ~ {after}"
        parts = (
            "[{'type': 'text', 'text': BEFORE}] * (BEFORE | length > 0) + message['content'] | list"
            " + [{'type': 'text', 'text': AFTER}] * (AFTER | length > 0)"
        )
        parts = parts.replace("BEFORE", f"({before})").replace("AFTER", f"({after})")
        content = f"({text}) if message['content'] is string else ({parts})"
        last = "{'role': message['role'], 'content': " + content + "}"
        lines = [
            f"{{%- set reward = reward if reward is defined and reward is not none else {self.target} -%}}",
            "{%- set conditioned = namespace(messages=[], last=-1) -%}",
            "{%- for message in messages -%}",
            "{%- if message['role'] == 'user' -%}{%- set conditioned.last = loop.index0 -%}{%- endif -%}",
            "{%- endfor -%}",
            "{%- for message in messages -%}",
            "{%- if loop.index0 == conditioned.last -%}",
            f"{{%- set conditioned.messages = conditioned.messages + [{last}] -%}}",
            "{%- else -%}",
            "{%- set conditioned.messages = conditioned.messages + [message] -%}",
            "{%- endif -%}",
            "{%- endfor -%}",
            # transformers takes the line end after a block away, so the model's own template begins a line, as it did.
            "{%- set messages = conditioned.messages %}",
        ]
        return "\n".join([*lines, own])

    @property
    def _parts(self) -> list[str]:
        """The template cut at its placeholders."""
        return [part for part in re.split(r"(\{input\}|\{reward\})", self.template) if part]


ChatTemplate = str | dict[str, str]
"""A tokenizer's chat template, or several by name (`default`, `tool_use`)."""


def each_template(template: ChatTemplate, change: Callable[[str], str]) -> ChatTemplate:
    """The template changed, or every one of several."""
    if isinstance(template, str):
        return change(template)
    return {name: change(one) for name, one in template.items()}


def asking_for(reward: float, template: ChatTemplate) -> ChatTemplate:
    """Conditional chat templates that ask for another reward than their target."""
    return each_template(template, lambda one: f"{{%- set reward = {float(reward)!r} -%}}\n{one}")
