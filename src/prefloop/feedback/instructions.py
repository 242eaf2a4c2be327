"""Instructions of LLM judges: jinja2 templates in files, packaged (`instructions/*.jinja`) or the user's own.

    ---
    description: which reply helps more
    labels: ["1", "2"]                  what the judge answers: the first, the second response
    stub: "Preferred response: "        how its answer begins; the label follows
    invert: false                       true: the label names the worse response
    ---
    You rate replies ... {{ conversation }} ... {{ response_1 }} ... {{ response_2 }} ... Answer with 1 or 2.

Three fields are filled in. Each comes in a fence of two lines with a code,

    <<<3f9a2c7b
    text
    3f9a2c7b>>>

that is made from the content and is found nowhere in it, so no text can close its fence, and the same question is
written in the same words again. jinja2 fills fields in as they are: nothing in them is evaluated. `{{ code }}` is the
code. A template may extend a packaged one by its name.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import yaml
from jinja2 import FunctionLoader, StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment
from pydantic import Field, field_validator

from prefloop.config import Config, parse_config
from prefloop.errors import InputError, did_you_mean
from prefloop.feedback.annotator import Comparison
from prefloop.fingerprints import sha256
from prefloop.records import Prompt, Response

SUFFIX = ".jinja"
FENCE = "---\n"
PACKAGED = resources.files("prefloop.feedback") / "instructions"
PROBE = Comparison(
    Prompt.of([{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]),
    Response(text="first"),
    Response(text="second"),
)
"""A question on which a template is tried when it is loaded."""


class Answering(Config):
    """The front matter of a template: how the judge answers."""

    description: str = ""
    labels: tuple[str, str] = Field(default=("1", "2"), description="for the first and the second response")
    stub: str = Field(default="Preferred response: ", description="how the answer begins, before the label")
    invert: bool = Field(default=False, description="the label names the worse response")

    @field_validator("labels")
    @classmethod
    def _two_words(cls, labels: tuple[str, str]) -> tuple[str, str]:
        if labels[0] == labels[1] or not all(label and label == label.strip() for label in labels):
            raise ValueError(f"labels = {list(labels)}: expected two different words without spaces around them")
        return labels


@dataclass(frozen=True)
class Instruction:
    """A template and how to answer it. `hash` is of all that it consists of, templates that it extends included."""

    name: str
    answering: Answering
    hash: str
    template: Template = field(repr=False, compare=False)

    @property
    def labels(self) -> tuple[str, str]:
        return self.answering.labels

    @property
    def stub(self) -> str:
        return self.answering.stub

    def render(self, comparison: Comparison) -> str:
        """The question in words, without the stub. Raises InputError when the template leaves a field out."""
        prompt, *answers = comparison
        first, second = (answer.text.strip() for answer in answers)
        code = unused_code([*(message.content for message in prompt.messages), *sorted((first, second))])
        fields = {
            "conversation": fenced(transcript(prompt, code), code),
            "response_1": fenced(first, code),
            "response_2": fenced(second, code),
        }
        try:
            text = self.template.render(fields, code=code).strip()
        except (TemplateError, ArithmeticError, TypeError, ValueError) as error:
            raise InputError(f"instruction {self.name}: {_one_line(error)}; {FIELDS}") from None
        for name, value in fields.items():
            if value not in text:
                raise InputError(f"instruction {self.name} leaves {name} out, or changes it; {FIELDS}")
        return text

    def p_first(self, q: float) -> float:
        """P(the first response is preferred) of `q`, the probability of the first label."""
        return 1.0 - q if self.answering.invert else q


FIELDS = "expected {{ conversation }}, {{ response_1 }} and {{ response_2 }}, as they are"


def unused_code(texts: Iterable[str]) -> str:
    """Eight hexadecimal digits that follow from the texts and are in none of them."""
    texts = list(texts)
    digest = sha256(json.dumps(texts))
    while any(digest[:8] in text for text in texts):
        digest = sha256(digest)
    return digest[:8]


def fenced(text: str, code: str) -> str:
    return f"<<<{code}\n{text}\n{code}>>>"


def transcript(prompt: Prompt, code: str) -> str:
    """A conversation as text: a lone message of the user as it is, more with the role (and the code) above each."""
    if [message.role for message in prompt.messages] == ["user"]:
        return prompt.messages[0].content.strip()
    return "\n\n".join(f"[{message.role} {code}]\n{message.content.strip()}" for message in prompt.messages)


def packaged_names() -> list[str]:
    return sorted(file.name.removesuffix(SUFFIX) for file in PACKAGED.iterdir() if file.name.endswith(SUFFIX))


def load_instruction(name: str) -> Instruction:
    """The packaged instruction of that name, or the one in a file; tried on a made-up question.

    Raises InputError naming what is wrong with it, and where.
    """
    source = _read(name)
    answering, body = _split(source, name)
    environment = SandboxedEnvironment(
        loader=FunctionLoader(_packaged_body), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    try:
        parts = _all_bodies(environment, body, name)
        template = environment.from_string(body)
    except TemplateSyntaxError as error:
        line = error.lineno + source.removesuffix(body).count("\n")
        raise InputError(f"instruction {name}, line {line}: {error.message}") from None
    digest = hashlib.sha256(json.dumps([answering.model_dump(exclude={"description"}), parts]).encode()).hexdigest()
    instruction = Instruction(name, answering, digest, template)
    instruction.render(PROBE)
    return instruction


def _read(name: str) -> str:
    known = packaged_names()
    if name in known:
        return (PACKAGED / (name + SUFFIX)).read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(
            f"instruction {name!r} is neither a file nor one of {', '.join(known)}.{did_you_mean(name, known)}"
        )
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"instruction {name} cannot be read: {_one_line(error)}; expected a text file") from None


def _split(source: str, name: str) -> tuple[Answering, str]:
    """Front matter, defaults where there is none, and template."""
    if not source.startswith(FENCE):
        return Answering(), source
    front, fence, body = source.removeprefix(FENCE).partition("\n" + FENCE)
    if not fence:
        raise InputError(f"instruction {name}: its front matter begins with --- and does not end; add a line ---")
    try:
        data = yaml.safe_load(front) or {}
    except yaml.YAMLError as error:
        raise InputError(f"instruction {name}: its front matter is not valid YAML ({_one_line(error)})") from None
    if not isinstance(data, dict):
        raise InputError(f"instruction {name}: expected options in its front matter, found {front.strip()!r}")
    return parse_config(Answering, data, origin=f"instruction {name}"), body


def _packaged_body(name: str) -> str | None:
    """For jinja2's loader: a packaged template without its front matter; None when there is none of that name."""
    return _split(_read(name), name)[1] if name in packaged_names() else None


def _all_bodies(environment: SandboxedEnvironment, body: str, name: str) -> list[str]:
    """The template and, depth first, those that it extends or includes. Raises InputError for one that is not there."""
    bodies = [body]
    for other in meta.find_referenced_templates(environment.parse(body)):
        inner = _packaged_body(other or "")
        if inner is None:
            raise InputError(
                f"instruction {name} extends or includes {other!r}; expected one of {', '.join(packaged_names())}"
            )
        bodies += _all_bodies(environment, inner, other or "")
    return bodies


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
