"""What all configurations share: frozen, validated, unknown keys refused with the nearest name."""

from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prefloop.errors import InputError, did_you_mean

C = TypeVar("C", bound="Config")


FREE: dict[str, Any] = {"free": True}


def free(**field: Any) -> Any:
    """A `Field` for an option that changes no result, such as a budget or a time-out: a run that was started with one
    value of it may go on with another.
    """
    return Field(json_schema_extra=FREE, **field)


class Config(BaseModel):
    """Base of every configuration. Validated once, never changed afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = list(cls.model_fields)
            for key in data:
                if key not in known:
                    raise ValueError(f"unknown option {key!r} in {cls.__name__}.{did_you_mean(str(key), known)}")
        return data

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed; nested fields by double underscore (`train__steps=3`)."""
        data = self.model_dump()
        for path, value in changes.items():
            *parents, last = path.split("__")
            target = data
            for parent in parents:
                target = target[parent]
            target[last] = value
        return parse_config(type(self), data)

    @classmethod
    def free_options(cls, prefix: str = "") -> set[str]:
        """The dotted names of the options that change no result (`free`)."""
        names = set()
        for name, field in cls.model_fields.items():
            if field.json_schema_extra == FREE:
                names.add(prefix + name)
            elif isinstance(field.annotation, type) and issubclass(field.annotation, Config):
                names |= field.annotation.free_options(f"{prefix}{name}.")
        return names

    def identity(self) -> dict[str, Any]:
        """Plain data of every option that may change a result."""
        data = self.model_dump(mode="json")
        for path in self.free_options():
            *parents, last = path.split(".")
            target = data
            for parent in parents:
                target = target[parent]
            del target[last]
        return data

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_config(cls: type[C], data: dict[str, Any], *, origin: str = "") -> C:
    """`cls` from plain data. Raises InputError with one line that names the option, the value and what is allowed."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{origin + ': ' if origin else ''}{first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error in one line: `replay_fraction = 1.5: should be at most 1`."""
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" or not problem["loc"]:
        return message
    name = ".".join(str(part) for part in problem["loc"])
    return f"{name} = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A configuration file as plain data. Raises InputError when it is missing or not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"config file not found: {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of options, found {type(data).__name__}")
    return data
