"""The model: its size and shape, known before a single weight is loaded."""

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from prefloop.data.chat import ChatFormat
from prefloop.errors import InputError
from prefloop.models import ModelRef, context_length
from prefloop.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelFacts(Record):
    """A model's shape. parameters: all of them, tied ones once; context: in tokens, None when it does not say."""

    name: str
    architecture: str
    parameters: int
    layers: int
    vocabulary: int
    context: int | None = None
    dtype_on_disk: str
    tokens: str


def outline(ref: ModelRef) -> "PreTrainedModel":
    """The model without its weights (torch's meta device): a model larger than the memory can be looked at too.

    Raises InputError when the folder's configuration is not that of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(ref.path, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model {ref.name}: {ref.path / 'config.json'} does not describe a causal language model that "
            f"transformers knows ({reason}); check the file, or use another model"
        ) from None


def look_at_model(ref: ModelRef, model: "PreTrainedModel", chat: ChatFormat) -> ModelFacts:
    """The facts of a model, loaded or in outline."""
    config = model.config.get_text_config()
    return ModelFacts(
        name=ref.name,
        architecture=type(model).__name__,
        parameters=sum(weight.numel() for weight in model.parameters()),
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        context=context_length(model),
        dtype_on_disk=dtype_on_disk(ref, model),
        tokens=chat.description,
    )


def dtype_on_disk(ref: ModelRef, model: "PreTrainedModel") -> str:
    """The dtypes of the weights as their files say it (`F32`, `BF16, F32`); of other files, as the configuration does.

    Raises InputError when a file is damaged.
    """
    found: set[str] = set()
    for file in sorted(ref.path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}
        except SafetensorError as error:
            raise InputError(f"model {ref.name}: {file} is damaged ({error}); get the file again") from None
    return ", ".join(sorted(found)) or str(model.config.dtype).removeprefix("torch.")
