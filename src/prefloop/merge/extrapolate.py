"""ExPO's arithmetic (Zheng et al. 2024, arXiv 2404.16792): weights beyond an aligned model, seen from its ancestor.

    theta = theta_1 + alpha (theta_1 - theta_0)

Tensor by tensor out of safetensors files, in float32, rounded once to the dtype of theta_1. What is written are
theta_1's own files with other numbers in the places of its weights: names, shards, dtypes, buffers, configuration and
tokenizer stay theta_1's. In memory is one tensor at a time.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefloop.data.chat import vocabulary_difference
from prefloop.errors import InputError, OutOfRange
from prefloop.merge.distance import UNLIKELY, Distance
from prefloop.models import ModelRef, has_tokenizer, load_tokenizer, model_config, skeleton
from prefloop.run import Stage

BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "additional_chat_templates/*.jinja")
"""Files of theta_1 that go with the weights. Its training log and its card are not those of the new model."""


@dataclass(frozen=True)
class Structure:
    """What the files of an architecture mean: names as transformers loads them, what is tied, what is no weight.

    parameters: names; tied: name -> the name it is tied to; buffers: names; prefix: of the base model (`transformer`,
    `model`), which files may leave out; ignored: patterns of what old files hold and nobody loads.
    """

    parameters: frozenset[str]
    tied: dict[str, str]
    buffers: frozenset[str]
    prefix: str
    ignored: tuple[str, ...]

    def loaded_as(self, stored: str) -> str | None:
        """The name under which a stored tensor is loaded; None for one that is no weight. A name that the architecture
        does not have stays as it is.
        """
        names = (stored, f"{self.prefix}.{stored}", stored.removeprefix(f"{self.prefix}."))
        for name in names:
            if name in self.parameters:
                return name
        dropped = any(name in self.buffers for name in names) or any(re.search(p, stored) for p in self.ignored)
        return None if dropped else stored


class Weights:
    """The weights of a model folder by name, read one at a time; what is no weight (a buffer) is not among them.

    A weight that is tied to another has the other's name, whether or not the files hold it twice; where they hold two
    that differ, they are two, as transformers takes them, whatever the configuration says.
    """

    def __init__(self, ref: ModelRef, structure: Structure, stack: ExitStack) -> None:
        self.ref, self.structure, self.tied = ref, structure, dict(structure.tied)
        twice: dict[str, tuple[Any, str]] = {}
        self._places: dict[str, tuple[Any, str]] = {}
        for file in weight_files(ref):
            try:
                handle: Any = stack.enter_context(safe_open(file, "pt"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} cannot be read ({error}); it may be truncated: get it again") from None
            for stored in map(str, handle.keys()):
                own = structure.loaded_as(stored)
                if own is None or not handle.get_slice(stored).get_dtype().startswith(("F", "BF")):
                    continue
                name = self.tied.get(own, own)
                if name == own or name not in self._places:
                    self._places[name] = handle, stored
                if name != own:
                    twice[own] = handle, stored
        for own, (handle, stored) in twice.items():
            source, its_name = self._places[self.tied[own]]
            if its_name != stored and not torch.equal(source.get_tensor(its_name), handle.get_tensor(stored)):
                del self.tied[own]
                self._places[own] = handle, stored

    def name_of(self, stored: str) -> str | None:
        """The name of the weight that a stored tensor is; None where it is none."""
        own = self.structure.loaded_as(stored)
        name = None if own is None else self.tied.get(own, own)
        return name if name in self._places else None

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places or self.tied.get(name) in self._places

    def _place(self, name: str) -> tuple[Any, str]:
        """Where a weight is; where it is tied here, and apart in the model asked about, its source's place."""
        return self._places[name if name in self._places else self.tied[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        handle, stored = self._place(name)
        return tuple(handle.get_slice(stored).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        handle, stored = self._place(name)
        return handle.get_tensor(stored)


def weight_files(ref: ModelRef) -> list[Path]:
    """The safetensors files that transformers would load. Raises InputError when there are none, or a shard is gone."""
    index = ref.path / "model.safetensors.index.json"
    if (ref.path / "model.safetensors").is_file():
        return [ref.path / "model.safetensors"]
    if not index.is_file():
        raise InputError(
            f"{ref.name} has no model.safetensors, nor an index of its shards; save it so (save_pretrained)"
        )
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (ref.path / name).is_file()]
    if missing:
        raise InputError(f"{ref.name} is not whole: {missing[0]} is missing; get it again")
    return [ref.path / name for name in names]


@contextmanager
def opened(base: ModelRef, aligned: ModelRef) -> Iterator[tuple[Weights, Weights]]:
    """The weights of both models, by the names of the aligned one. Raises InputError for quantised ones."""
    for ref in (base, aligned):
        if model_config(ref).get("quantization_config"):
            raise InputError(
                f"{ref.name} has quantised weights, which have no line to go on along; give it unquantised"
            )
    structure = structure_of(aligned)
    with ExitStack() as stack:
        yield Weights(base, structure, stack), Weights(aligned, structure, stack)


def structure_of(ref: ModelRef) -> Structure:
    """The structure of a model's architecture."""
    model = skeleton(ref)
    sources: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        source = sources.setdefault(id(weight), name)
        if source != name:
            tied[name] = source
    return Structure(
        parameters=frozenset(name for name, _ in model.named_parameters(remove_duplicate=False)),
        tied=tied,
        buffers=frozenset(name for name, _ in model.named_buffers()),
        prefix=model.base_model_prefix,
        ignored=(*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *OLD_BUFFERS),
    )


OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"\.masked_bias$")
"""What old files of any architecture may hold and transformers leaves out."""


def check_ancestor(base: ModelRef, aligned: ModelRef) -> None:
    """Raises InputError when `base` cannot be what `aligned` was trained from, or when both are the same.

    An ancestor has the same architecture, the same vocabulary, and weights of the same names and shapes; the first one
    that differs is named.
    """
    if base.weights == aligned.weights:
        raise same_weights(base, aligned)
    kinds = [str(model_config(ref).get("model_type")) for ref in (base, aligned)]
    if kinds[0] != kinds[1]:
        raise InputError(f"base {base.name} is a {kinds[0]} and aligned {aligned.name} a {kinds[1]}; {NO_ANCESTOR}")
    with opened(base, aligned) as (theta_0, theta_1):
        check_same_names_and_shapes(theta_0, theta_1)
    if has_tokenizer(base):
        difference = vocabulary_difference(load_tokenizer(base), load_tokenizer(aligned))
        if difference:
            raise InputError(
                f"base {base.name} and aligned {aligned.name} have different vocabularies ({difference}); {NO_ANCESTOR}"
            )


def same_weights(base: ModelRef, aligned: ModelRef) -> InputError:
    return InputError(
        f"base {base.name} and aligned {aligned.name} have the same weights: there is nothing to extrapolate; give the "
        "model before its alignment, and the one after it"
    )


def distance(base: ModelRef, aligned: ModelRef, *, stage: Stage | None = None) -> Distance:
    """Stage: how far `aligned` is from `base`, which has passed `check_ancestor`.

    Raises InputError when no weight differs, whatever the files look like, and for one that is not finite.
    """
    stage = stage or Stage.detached()
    with opened(base, aligned) as (theta_0, theta_1):
        moves, norms = {}, {}
        with stage.progress(len(theta_1.names), unit="weights", description="distance") as advance:
            for name in theta_1.names:
                wide = torch.promote_types(theta_1[name].dtype, torch.float32)
                before, after = theta_0[name].to(wide), theta_1[name].to(wide)
                norms[name] = float(torch.linalg.vector_norm(before, dtype=torch.float64))
                moves[name] = float(torch.linalg.vector_norm(after - before, dtype=torch.float64))
                if not moves[name] < float("inf"):
                    raise InputError(f"{name} holds numbers that are not finite in {base.name} or {aligned.name}")
                advance(1)
    changed = sum(move > 0 for move in moves.values())
    if not changed:
        raise same_weights(base, aligned)
    shares = {name: moves[name] / norms[name] if norms[name] else float(moves[name] > 0) for name in moves}
    farthest = max(shares, key=lambda name: shares[name])
    found = Distance(
        relative=_norm(moves) / max(_norm(norms), torch.finfo(torch.float32).tiny),
        farthest=farthest,
        farthest_relative=shares[farthest],
        weights=len(moves),
        changed=changed,
    )
    stage.figure("distance of the aligned model, as a share of the base's norm", found.relative)
    stage.note(
        f"{aligned.name} is {found.relative:.3g} of the base's norm away from it; {changed} of {len(moves)} weights "
        f"changed, {farthest} most ({found.farthest_relative:.3g})"
    )
    if found.relative > UNLIKELY:
        stage.note(
            f"warning: that is far for an alignment (over {UNLIKELY:g}; unrelated models are at about 1.4); is "
            f"{base.name} the very model that {aligned.name} was trained from?"
        )
    return found


NO_ANCESTOR = "the base must be the very model that the aligned one was trained from"


def check_same_names_and_shapes(theta_0: Weights, theta_1: Weights) -> None:
    """Raises InputError that names the first weight, in the order of the aligned model's files, that differs."""
    for name in theta_1.names:
        if name not in theta_0:
            raise InputError(
                f"{name} is in aligned {theta_1.ref.name} but not in base {theta_0.ref.name}; {NO_ANCESTOR}"
            )
        if theta_0.shape(name) != theta_1.shape(name):
            shapes = [" x ".join(map(str, weights.shape(name))) for weights in (theta_0, theta_1)]
            raise InputError(
                f"{name} is {shapes[0]} in base {theta_0.ref.name} and {shapes[1]} in aligned {theta_1.ref.name}; "
                f"{NO_ANCESTOR}, without tokens added on the way"
            )
    for name in theta_0.names:
        if name not in theta_1:
            raise InputError(
                f"{name} is in base {theta_0.ref.name} but not in aligned {theta_1.ref.name}; {NO_ANCESTOR}"
            )


def _norm(parts: dict[str, float]) -> float:
    return sum(part**2 for part in parts.values()) ** 0.5


def stepped(theta_0: Tensor, theta_1: Tensor, alpha: float) -> Tensor:
    """theta_1 + alpha (theta_1 - theta_0) of any one shape, in the dtype of theta_1, computed in float32 or wider.

    Where the step is zero theta_1 stays as it is to the last bit: the sign of a zero too.

    >>> stepped(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]), alpha=2.0)
    tensor([2.5000, 2.0000])
    """
    wide = torch.promote_types(torch.promote_types(theta_0.dtype, theta_1.dtype), torch.float32)
    end = theta_1.to(wide)
    step = alpha * (end - theta_0.to(wide))
    return torch.where(step == 0, theta_1, (end + step).to(theta_1.dtype))


def extrapolate(base: ModelRef, aligned: ModelRef, alpha: float, folder: Path) -> None:
    """Write theta(alpha) as an ordinary transformers folder: alpha = 0 is `aligned`, alpha = -1 `base` to rounding.

    The two have passed `check_ancestor`. Raises OutOfRange when a weight leaves the range of its dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_beside(aligned.path, folder)
    with opened(base, aligned) as (theta_0, theta_1):
        for file in weight_files(aligned):
            shutil.copyfile(file, folder / file.name)
            with (folder / file.name).open("r+b") as out:
                for stored, place in places(file).items():
                    name = theta_1.name_of(stored)
                    if name is None:
                        continue
                    value = stepped(theta_0[name], theta_1[name], alpha)
                    if not torch.isfinite(value).all():
                        raise OutOfRange(f"alpha = {alpha:g} takes {name} out of the range of {value.dtype}; lower it")
                    out.seek(place)
                    out.write(value.reshape(-1).view(torch.uint8).numpy().data)


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what goes with weights."""
    for file in sorted({file for pattern in BESIDE for file in source.glob(pattern)}):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def places(file: Path) -> dict[str, int]:
    """Where the bytes of every tensor in a safetensors file begin.

    The format: eight bytes with the length of a JSON header, the header with offsets from its own end, the tensors.
    """
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def extrapolated(base: ModelRef, aligned: ModelRef, alpha: float, *, stage: Stage) -> Path:
    """Stage: the model at `alpha`."""
    assert stage.output is not None
    extrapolate(base, aligned, alpha, stage.output)
    return stage.output


def adapter_obstacle(adapter: Path) -> str | None:
    """Why an adapter folder does not scale like a plain LoRA; None when it does."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        return f"it is a {config.get('peft_type')} adapter, and only LoRA is linear in what it adds"
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return "it has no adapter_model.safetensors"
    others = [name for name in places(file) if not any(part in name for part in (*FIRST, *SECOND))]
    return f"besides its low-rank matrices it holds {others[0]}" if others else None


FIRST, SECOND = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")
"""In the names of the two factors of Delta W = scaling B A; the first maps the input."""


def scaled_adapter(adapter: Path, alpha: float, *, stage: Stage) -> Path:
    """Stage: the LoRA adapter whose Delta W is (1 + alpha) times as large: the factors B are, rounded once.

    On the same base it is `extrapolate`: theta_1 = theta_0 + Delta W, so theta = theta_0 + (1 + alpha) Delta W.
    """
    assert stage.output is not None
    stage.output.mkdir(parents=True, exist_ok=True)
    copy_beside(adapter, stage.output)
    factors = load_file(adapter / "adapter_model.safetensors")
    scaled = {
        name: ((1 + alpha) * factor.float()).to(factor.dtype) if any(part in name for part in SECOND) else factor
        for name, factor in factors.items()
    }
    save_file(scaled, stage.output / "adapter_model.safetensors", metadata={"format": "pt"})
    return stage.output
