"""Which engine is taken: what `auto` says, and what a named engine that cannot is refused with."""

from collections.abc import Iterator

import pytest

from prefloop.errors import InputError
from prefloop.models import ModelRef
from prefloop.sample import openvino
from prefloop.sample.engines import ENGINES, EngineSetting, choose_engine, load_engine
from prefloop.sample.openvino import OpenVinoEngine
from prefloop.sample.sampling import Sampling
from tests.sample.engines import PROMPTS, stopping_folder

SETTING = EngineSetting()


@pytest.fixture
def gemma(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelRef]:
    """A model folder that says it is a Gemma 2."""
    config = {"model_type": "gemma2"}
    monkeypatch.setattr(openvino, "model_config", lambda ref: config)
    yield stopping_folder()


def test_auto_takes_openvino_on_a_cpu_for_a_family_that_it_covers() -> None:
    assert choose_engine("auto", stopping_folder(), Sampling(), SETTING) == ("openvino", "the fastest there is for cpu")


def test_auto_says_what_it_passed_over_and_why(gemma: ModelRef) -> None:
    name, why = choose_engine("auto", gemma, Sampling(), SETTING)
    assert name == "transformers"
    assert why.startswith("not openvino: its architecture is 'gemma2', not one of llama, qwen2, qwen3; ")


def test_auto_passes_over_an_engine_that_draws_otherwise() -> None:
    name, why = choose_engine("auto", stopping_folder(), Sampling(min_p=0.1, top_p=0.9), SETTING)
    assert name == "transformers" and "min_p before top_p" in why


def test_auto_passes_over_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    name, why = choose_engine("auto", stopping_folder(), Sampling(), SETTING)
    assert name == "transformers" and "pip install 'prefloop[openvino]'" in why


def test_a_named_engine_that_cannot_is_refused_with_the_reason(gemma: ModelRef) -> None:
    with pytest.raises(InputError, match=r"engine 'openvino' cannot be used: its architecture is 'gemma2'"):
        choose_engine("openvino", gemma, Sampling(), SETTING)


def test_an_unknown_engine_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        InputError, match=r"unknown engine 'transformer'; expected one of auto, .*Did you mean 'transformers'"
    ):
        choose_engine("transformer", stopping_folder(), Sampling(), SETTING)


@pytest.mark.parametrize("name", ["transformers", "openvino", "scripted"])
def test_an_engine_is_loaded_by_name_and_samples(name: str) -> None:
    assert name in ENGINES
    engine = load_engine(name, stopping_folder(), SETTING)
    [group] = engine.sample(PROMPTS[:1], k=2, sampling=Sampling(max_new_tokens=4), seed=0)
    engine.close()
    assert len(group.responses) == 2


def test_openvino_is_loaded_with_the_models_context() -> None:
    engine = load_engine("openvino", stopping_folder(), SETTING)
    assert isinstance(engine, OpenVinoEngine) and engine.context == 1024
