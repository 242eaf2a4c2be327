"""Decoding settings: what is accepted, and what a wrong one says."""

from typing import Any

import pytest

from prefloop.config import parse_config
from prefloop.errors import InputError
from prefloop.sample.sampling import Sampling


def test_defaults_draw_from_the_model_itself() -> None:
    sampling = Sampling()
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (1.0, 1.0, 256)
    assert sampling.top_k is None and sampling.min_p is None
    assert not sampling.truncates


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_each_truncation_is_seen(option: dict[str, Any]) -> None:
    assert parse_config(Sampling, option).truncates


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature = -0.1: .*greater than or equal to 0"),
        ({"temperature": float("nan")}, r"temperature = nan"),
        ({"temperature": 1e-4}, r"temperature = 0.0001: expected 0 .* or at least 0.001; use 0"),
        ({"top_p": 0}, r"top_p = 0: .*greater than 0"),
        ({"top_p": 1.1}, r"top_p = 1.1: .*less than or equal to 1"),
        ({"top_k": 0}, r"top_k = 0: .*greater than or equal to 1"),
        ({"min_p": 1.5}, r"min_p = 1.5: .*less than or equal to 1"),
        ({"max_new_tokens": 0}, r"max_new_tokens = 0: .*greater than or equal to 1"),
        ({"repetition_penalty": 1.1}, r"unknown option 'repetition_penalty' in Sampling"),
        ({"temprature": 1}, r"unknown option 'temprature' in Sampling. Did you mean 'temperature'\?"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config(Sampling, options)
