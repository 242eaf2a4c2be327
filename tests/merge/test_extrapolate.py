"""ExPO's arithmetic on files: every invariant of the method, what stays untouched, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from prefloop.errors import InputError
from prefloop.merge.extrapolate import (
    adapter_obstacle,
    check_ancestor,
    distance,
    extrapolate,
    places,
    scaled_adapter,
    stepped,
    structure_of,
)
from prefloop.models import ModelRef, load_model, load_tokenizer, require_peft, resolve
from prefloop.run import Stage
from tests.tiny import save_tiny_model, tiny_tokenizer

WEIGHTS = "model.safetensors"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
Tensors = dict[str, Tensor]


def changed(source: Path, target: Path, change: Callable[[Tensors], Tensors]) -> ModelRef:
    """A copy of a model folder with other tensors in its one file."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / WEIGHTS)), target / WEIGHTS, metadata={"format": "pt"})
    return ModelRef.of(target)


def trained(tensors: Tensors, size: float = 1e-3, seed: int = 5) -> Tensors:
    """As after a training: every number moved by some `size` of it, or so."""
    noise = torch.Generator().manual_seed(seed)
    return {name: t + size * torch.randn(t.shape, generator=noise).to(t.dtype) for name, t in tensors.items()}


def as_dtype(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t.to(dtype) for name, t in tensors.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef.of(save_tiny_model(tmp_path_factory.mktemp("base") / "tiny", seed=1))


@pytest.fixture(scope="module")
def aligned(base: ModelRef, tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    def change(tensors: Tensors) -> Tensors:
        moved = trained(tensors)
        moved[NORM][0] = -0.0  # its sign must survive a step of nothing
        return moved

    return changed(base.path, tmp_path_factory.mktemp("aligned") / "tiny", change)


def at(base: ModelRef, aligned: ModelRef, alpha: float, folder: Path) -> Tensors:
    extrapolate(base, aligned, alpha, folder)
    return load_file(folder / WEIGHTS)


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_alpha_0_is_the_aligned_model_bit_for_bit(base: ModelRef, aligned: ModelRef, tmp_path: Path) -> None:
    extrapolate(base, aligned, 0.0, tmp_path / "m")
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == (aligned.path / WEIGHTS).read_bytes()
    assert ModelRef.of(tmp_path / "m").fingerprint == aligned.fingerprint  # configuration and tokenizer too


def test_every_chat_template_goes_along(base: ModelRef, aligned: ModelRef, tmp_path: Path) -> None:
    several = changed(aligned.path, tmp_path / "several", lambda tensors: tensors)
    tokenizer = load_tokenizer(several)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(several.path)
    extrapolate(base, several, 0.0, tmp_path / "m")
    assert load_tokenizer(ModelRef.of(tmp_path / "m")).chat_template == tokenizer.chat_template
    before = ModelRef.of(several.path).fingerprint
    tokenizer.chat_template["tool_use"] += "!"
    tokenizer.save_pretrained(several.path)
    assert ModelRef.of(several.path).fingerprint != before


def test_alpha_minus_1_is_the_base_to_rounding(base: ModelRef, aligned: ModelRef, tmp_path: Path) -> None:
    back, theta_0 = at(base, aligned, -1.0, tmp_path / "m"), load_file(base.path / WEIGHTS)
    theta_1 = load_file(aligned.path / WEIGHTS)
    for name, tensor in back.items():
        rounding = torch.finfo(torch.float32).eps * torch.maximum(theta_0[name].abs(), theta_1[name].abs())
        assert ((tensor - theta_0[name]).abs() <= rounding).all(), name


@pytest.mark.parametrize("alpha", [0.3, 25.0, -0.5])
def test_the_step_is_alpha_times_the_difference(
    base: ModelRef, aligned: ModelRef, alpha: float, tmp_path: Path
) -> None:
    theta_0, theta_1 = flat(load_file(base.path / WEIGHTS)), flat(load_file(aligned.path / WEIGHTS))
    step = flat(at(base, aligned, alpha, tmp_path / "m")) - theta_1
    assert float(step.norm() / (theta_1 - theta_0).norm()) == pytest.approx(abs(alpha), rel=1e-5)
    torch.testing.assert_close(step, alpha * (theta_1 - theta_0), rtol=0, atol=1e-6 * (1 + abs(alpha)))


def test_two_steps_compose_to_a_plus_b_plus_ab(base: ModelRef, aligned: ModelRef, tmp_path: Path) -> None:
    a, b = 0.3, 0.5
    extrapolate(base, aligned, a, tmp_path / "a")
    twice = at(base, ModelRef.of(tmp_path / "a"), b, tmp_path / "ab")
    once = at(base, aligned, a + b + a * b, tmp_path / "once")
    torch.testing.assert_close(flat(twice), flat(once), rtol=0, atol=1e-6)


def test_tied_embeddings_stay_tied_however_they_are_stored(base: ModelRef, aligned: ModelRef, tmp_path: Path) -> None:
    once = at(base, aligned, 0.5, tmp_path / "once")
    assert "lm_head.weight" not in once
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head.weight.data, once[EMBEDDING])
    # Some trainers store the tied weight twice; the base does not.
    both = changed(aligned.path, tmp_path / "both", lambda t: {**t, "lm_head.weight": t[EMBEDDING].clone()})
    check_ancestor(base, both)
    twice = at(base, both, 0.5, tmp_path / "twice")
    assert torch.equal(twice["lm_head.weight"], once[EMBEDDING]) and torch.equal(twice[EMBEDDING], once[EMBEDDING])


def test_names_are_those_that_transformers_loads(tmp_path: Path) -> None:
    """Folders of a hub may hold the weights of the base model alone: `wte.weight` for `transformer.wte.weight`."""
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=20, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "full")
    full = ModelRef.of(tmp_path / "full")
    aligned = changed(full.path, tmp_path / "aligned", trained)
    mask = {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4)}

    def bare(tensors: Tensors) -> Tensors:
        return {name.removeprefix("transformer."): t for name, t in tensors.items()} | mask

    old = changed(full.path, tmp_path / "old", bare)
    assert "wte.weight" in load_file(old.path / WEIGHTS)
    check_ancestor(old, aligned)
    assert distance(old, aligned) == distance(full, aligned)
    expected = at(full, aligned, 1.5, tmp_path / "expected")
    assert flat(at(old, aligned, 1.5, tmp_path / "m")).equal(flat(expected))
    # The other way round the files stay those of the aligned model: its names, its masks.
    late = changed(aligned.path, tmp_path / "late", bare)
    found = at(full, late, 1.5, tmp_path / "m2")
    assert all(found[name.removeprefix("transformer.")].equal(value) for name, value in expected.items())
    assert found["h.0.attn.bias"].equal(mask["h.0.attn.bias"])
    both = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("expected", "m2")]
    assert all(both[0][name].equal(both[1][name]) for name in both[0])
    # A weight that is missing is told by its name there.
    without = changed(
        full.path, tmp_path / "without", lambda t: bare({k: v for k, v in t.items() if "ln_f.w" not in k})
    )
    with pytest.raises(InputError, match=r"transformer\.ln_f\.weight is in aligned .* but not in base"):
        check_ancestor(without, aligned)


def test_a_buffer_that_only_old_files_hold_is_no_difference(base: ModelRef, aligned: ModelRef, tmp_path: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    check_ancestor(changed(base.path, tmp_path / "old", lambda t: {**t, **old}), aligned)


def test_buffers_and_whole_numbers_are_untouched(base: ModelRef, aligned: ModelRef, tmp_path: Path) -> None:
    buffer = "model.rotary_emb.inv_freq"
    assert buffer in structure_of(base).buffers

    def with_others(value: float) -> Callable[[Tensors], Tensors]:
        return lambda t: {**t, buffer: torch.full((4,), value), "steps": torch.tensor([int(value)])}

    before = changed(base.path, tmp_path / "before", with_others(1.0))
    after = changed(aligned.path, tmp_path / "after", with_others(3.0))
    found = at(before, after, 2.0, tmp_path / "m")
    assert found[buffer].tolist() == [3.0] * 4 and found["steps"].tolist() == [3]
    assert not torch.equal(found[NORM], load_file(after.path / WEIGHTS)[NORM])


def test_bfloat16_weights_are_computed_in_float32_and_rounded_once() -> None:
    # theta_1 - theta_0 = -511/512 takes nine bits, bfloat16 has eight: it would round to -1, and the sum to -1.
    theta_0, theta_1 = (torch.tensor([x], dtype=torch.bfloat16) for x in (1.0, 2.0**-9))
    assert (theta_1 + (theta_1 - theta_0)).item() == -1.0
    assert stepped(theta_0, theta_1, 1.0).item() == -255 / 256
    # Of weights that a training has moved by a few units of rounding, the formula in bfloat16 gets a third wrong.
    noise = torch.Generator().manual_seed(0)
    theta_0 = torch.randn(20_000, generator=noise).to(torch.bfloat16)
    theta_1 = (theta_0.double() * (1 + 0.01 * torch.randn(20_000, generator=noise).double())).to(torch.bfloat16)
    right = (1.3 * theta_1.double() - 0.3 * theta_0.double()).to(torch.bfloat16)
    assert (stepped(theta_0, theta_1, 0.3) != right).double().mean() < 1e-3  # of float32, rounded twice in a tie
    assert (1.3 * theta_1 - 0.3 * theta_0 != right).double().mean() > 0.2


def test_what_bfloat16_would_not_see_at_all_is_kept(base: ModelRef, aligned: ModelRef, tmp_path: Path) -> None:
    """float32 weights with differences of some 1e-4 of them: loaded in bfloat16 most are equal, and would not move."""
    near = changed(base.path, tmp_path / "near", lambda t: {n: w * (1 + 1e-4) for n, w in t.items()})
    theta_0, theta_1 = load_file(base.path / WEIGHTS), load_file(near.path / WEIGHTS)
    lost = [(theta_0[n].bfloat16() == theta_1[n].bfloat16()).double().mean() for n in theta_0]
    assert min(lost) > 0.9
    found = at(base, near, 10.0, tmp_path / "m")
    torch.testing.assert_close(flat(found), flat(theta_0) * (1 + 11e-4), rtol=1e-6, atol=0)


def test_the_dtype_is_that_of_the_aligned_model(base: ModelRef, aligned: ModelRef, tmp_path: Path) -> None:
    half = changed(aligned.path, tmp_path / "half", as_dtype(torch.bfloat16))
    found, theta_0, theta_1 = (
        at(base, half, 0.5, tmp_path / "m"),
        *map(load_file, (base.path / WEIGHTS, half.path / WEIGHTS)),
    )
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        exact = theta_1[name].float() + 0.5 * (theta_1[name].float() - theta_0[name])
        assert torch.equal(tensor, exact.to(torch.bfloat16))


def test_shards_of_either_side_make_no_difference(base: ModelRef, aligned: ModelRef, tmp_path: Path) -> None:
    whole = at(base, aligned, 0.5, tmp_path / "whole")
    for name, ref in (("base", base), ("aligned", aligned)):
        shutil.copytree(ref.path, tmp_path / name)
        (tmp_path / name / WEIGHTS).unlink()
        load_model(ref).save_pretrained(tmp_path / name, max_shard_size="20KB")
    sharded = ModelRef.of(tmp_path / "aligned")
    extrapolate(ModelRef.of(tmp_path / "base"), sharded, 0.5, tmp_path / "m")
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2 and [file.name for file in files] == [
        f.name for f in sorted(sharded.path.glob("*.safetensors"))
    ]
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    next(iter(files)).unlink()
    with pytest.raises(InputError, match="is not whole: model-00001"):
        check_ancestor(base, ModelRef.of(tmp_path / "m"))


def test_the_distance_is_that_of_all_weights(base: ModelRef, aligned: ModelRef) -> None:
    found = distance(base, aligned)
    theta_0, theta_1 = load_file(base.path / WEIGHTS), load_file(aligned.path / WEIGHTS)
    assert found.relative == pytest.approx(float((flat(theta_1) - flat(theta_0)).norm() / flat(theta_0).norm()))
    shares = {name: float((theta_1[name] - theta_0[name]).norm() / theta_0[name].norm()) for name in theta_0}
    assert found.farthest == max(shares, key=lambda name: shares[name])
    assert (found.weights, found.changed) == (len(theta_0), len(theta_0))


def test_models_that_share_nothing_are_warned_of(base: ModelRef, tmp_path: Path) -> None:
    said: list[str] = []

    class Heard(Stage):
        def note(self, text: str) -> None:
            said.append(text)

    found = distance(base, ModelRef.of(save_tiny_model(tmp_path / "other", seed=2)), stage=Heard())
    assert 1.2 < found.relative < 1.5
    assert said[-1].startswith("warning: that is far for an alignment")


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t, "have the same weights: there is nothing to extrapolate"),
        (as_dtype(torch.float64), "have the same weights: there is nothing to extrapolate"),
        (without(NORM), f"{NORM} is in base .* but not in aligned"),
        (lambda t: {**t, "model.extra.weight": torch.ones(2)}, "model.extra.weight is in aligned .* but not in base"),
        (
            lambda t: {**t, EMBEDDING: torch.ones(300, 32)},
            f"{EMBEDDING} is 259 x 32 in base .* and 300 x 32 in aligned",
        ),
        (lambda t: {**t, NORM: t[NORM] * float("nan")}, f"{NORM} holds numbers that are not finite"),
    ],
)
def test_what_cannot_be_an_ancestor_is_refused(
    base: ModelRef, change: Callable[[Tensors], Tensors], message: str, tmp_path: Path
) -> None:
    other = changed(base.path, tmp_path / "m", change)
    with pytest.raises(InputError, match=message):
        check_ancestor(base, other)
        distance(base, other)


def configured(ref: ModelRef, folder: Path, **values: object) -> ModelRef:
    shutil.copytree(ref.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return ModelRef.of(folder)


def test_another_architecture_vocabulary_or_form_is_refused(base: ModelRef, aligned: ModelRef, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a mistral and aligned .* a llama"):
        check_ancestor(configured(base, tmp_path / "mistral", model_type="mistral"), aligned)
    with pytest.raises(InputError, match="quantised weights"):
        check_ancestor(base, configured(aligned, tmp_path / "q", quantization_config={"quant_method": "gptq"}))
    shutil.copytree(aligned.path, tmp_path / "words")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(tmp_path / "words")
    with pytest.raises(InputError, match=r"different vocabularies .*vocabularies of 259 and 260 tokens"):
        check_ancestor(base, ModelRef.of(tmp_path / "words"))
    shutil.copytree(aligned.path, tmp_path / "bin")
    (tmp_path / "bin" / WEIGHTS).rename(tmp_path / "bin/pytorch_model.bin")
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        check_ancestor(base, ModelRef.of(tmp_path / "bin"))
    (tmp_path / "words" / WEIGHTS).write_bytes((aligned.path / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read"):
        check_ancestor(base, ModelRef.of(tmp_path / "words"))


def test_a_weight_that_leaves_its_range_is_named(base: ModelRef, aligned: ModelRef, tmp_path: Path) -> None:
    half = changed(aligned.path, tmp_path / "half", as_dtype(torch.float16))
    with pytest.raises(InputError, match=r"alpha = 1e\+09 takes model\.\S+ out of the range of torch\.float16"):
        extrapolate(base, half, 1e9, tmp_path / "m")


def adapter_on(base: ModelRef, folder: Path, **options: object) -> Path:
    """A LoRA adapter on all linear layers and the embedding, whose B is not zero."""
    peft = require_peft()
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(load_model(base), settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.05)
    model.peft_config["default"].base_model_name_or_path = str(base.path)
    model.save_pretrained(folder)
    return folder


def test_scaling_a_lora_is_the_same_as_extrapolating_what_it_makes(base: ModelRef, tmp_path: Path) -> None:
    adapter = adapter_on(base, tmp_path / "adapter")
    full = at(base, resolve(adapter), 0.7, tmp_path / "full")
    scaled_adapter(adapter, 0.7, stage=Stage(output=tmp_path / "scaled"))
    other = load_file(resolve(tmp_path / "scaled").path / WEIGHTS)
    assert full.keys() == other.keys()
    torch.testing.assert_close(flat(full), flat(other), rtol=0, atol=1e-7)
    moved = [n for n in full if not torch.equal(full[n], load_file(base.path / WEIGHTS)[n])]
    assert len(moved) == 4 and adapter_obstacle(adapter) is None  # two layers, two projections


def test_adapters_that_are_not_linear_are_known(base: ModelRef, tmp_path: Path) -> None:
    saved = adapter_on(base, tmp_path / "saved", modules_to_save=["norm"])
    assert (
        adapter_obstacle(saved)
        == "besides its low-rank matrices it holds base_model.model.model.layers.0.input_layernorm.weight"
    )
    dora = adapter_on(base, tmp_path / "dora", use_dora=True)
    assert "lora_magnitude_vector" in str(adapter_obstacle(dora))
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    assert "it is a IA3 adapter" in str(adapter_obstacle(saved))


def test_tensors_begin_where_the_header_says(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5.0), "a": torch.tensor([7, 8])}
    save_file(tensors, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    found = places(tmp_path / "x.safetensors")
    assert data[found["a"] :][:16] == tensors["a"].numpy().tobytes()
    assert data[found["b"] :][:20] == tensors["b"].numpy().tobytes()
