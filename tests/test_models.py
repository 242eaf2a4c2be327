"""From a name to a model folder, and back."""

import shutil
from pathlib import Path

import pytest
import torch

from prefloop.data.chat import ChatFormat
from prefloop.errors import InputError
from prefloop.models import (
    ModelRef,
    check_different,
    choose_device,
    load_model,
    load_tokenizer,
    resolve,
    write_model,
)
from prefloop.records import Prompt
from prefloop.sample.sampling import Sampling
from prefloop.sample.transformers import TransformersEngine
from tests.tiny import save_tiny_model


def test_a_folder_resolves_to_itself_and_its_fingerprint_follows_its_contents(tmp_path: Path) -> None:
    a = resolve(save_tiny_model(tmp_path / "a", seed=0))
    assert a.path == tmp_path / "a"
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    copy = resolve(tmp_path / "copy")
    assert (copy.fingerprint, copy.weights) == (a.fingerprint, a.weights)
    (tmp_path / "copy" / "README.md").write_text("a card changes nothing")
    assert resolve(tmp_path / "copy").fingerprint == a.fingerprint
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ 'another template' }}")
    other_template = resolve(tmp_path / "copy")
    assert other_template.weights == a.weights and other_template.fingerprint != a.fingerprint
    assert resolve(save_tiny_model(tmp_path / "b", seed=1)).weights != a.weights


def test_writing_and_loading_changes_no_weight(tmp_path: Path) -> None:
    ref = resolve(save_tiny_model(tmp_path / "a", seed=0))
    model = load_model(ref)
    write_model(tmp_path / "b", model, load_tokenizer(ref))
    again = load_model(resolve(tmp_path / "b"))
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not again.training and again.dtype == torch.float32


def test_a_lora_adapter_folder_is_merged_into_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    base = resolve(save_tiny_model(tmp_path / "base", seed=0))
    wrapped = peft.get_peft_model(load_model(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    wrapped.peft_config["default"].base_model_name_or_path = str(base.path)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = load_model(resolve(tmp_path / "adapter"))
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, wrapped(ids).logits, atol=1e-4)
        assert not torch.allclose(merged(ids).logits, load_model(base)(ids).logits, atol=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "has no config.json"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "has no weights"),
        (lambda folder: folder.write_text("x"), "is a file, but not a .gguf file"),
        (lambda folder: None, "is neither a folder nor a .gguf file here, nor a hub id"),
    ],
)
def test_what_is_no_model_says_so(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "thing")
    with pytest.raises(InputError, match=message):
        resolve(tmp_path / "thing")


def test_a_damaged_gguf_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFLOOP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match=r"broken\.gguf: cannot be read as a GGUF model"):
        resolve(tmp_path / "broken.gguf")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_same_weights_under_two_names_are_no_reward(tmp_path: Path) -> None:
    a = ModelRef.of(save_tiny_model(tmp_path / "a", seed=0))
    b = ModelRef.of(save_tiny_model(tmp_path / "b", seed=0))
    with pytest.raises(InputError, match="have the same weights"):
        check_different(a, b)
    check_different(a, ModelRef.of(save_tiny_model(tmp_path / "c", seed=1)))


def test_a_device_that_is_not_there_lists_those_that_are() -> None:
    assert choose_device("cpu") == "cpu"
    with pytest.raises(InputError, match=r"device 'tpu' is not available here; available: .*cpu"):
        choose_device("tpu")


def test_the_packaged_small_model_knows_the_capital_of_france() -> None:
    """The real model, through the GGUF conversion, the chat format and the engine."""
    ref = resolve("smollm2-135m")
    model = load_model(ref)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert model.config.tie_word_embeddings
    engine = TransformersEngine(model, ChatFormat(load_tokenizer(ref)))
    greedy = Sampling(temperature=0.0, max_new_tokens=16)
    (group,) = engine.sample([Prompt.of("What is the capital of France?")], k=1, sampling=greedy, seed=0)
    assert group.responses[0].text == "The capital of France is Paris."
    assert group.responses[0].finish_reason == "stop"
