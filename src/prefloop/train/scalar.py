"""Models that give numbers: a language model's trunk under a head with one output, in place of the vocabulary.

    v_t = w . h_t (+ b)        h_t: the trunk's last hidden state at token t

Read at the last token of a conversation it is a reward (`last_values`), read where each response token is predicted it
is the value of the state before that token (`response_values`). Both go through the same packing and attention as
log-probabilities do: a prompt is computed once and its responses branch from it.

Such a model is what transformers calls a sequence classifier with one label, and is saved as one.

Legend: R responses, T predicted response tokens, D hidden size.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
)

from prefloop.errors import InputError
from prefloop.models import ModelRef, _one_line, _quiet_transformers, load_tokenizer
from prefloop.seeds import derive_seed
from prefloop.train.logprobs import Path, ResponseLogps, _decoder, autocast, response_hidden
from prefloop.train.packing import TokenGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NO_CLASSIFIER = "expected a causal language model that transformers has a sequence classifier of"


def check_has_classifier(ref: ModelRef) -> None:
    """Raises InputError, from the configuration alone, for a model that transformers has no sequence classifier of, and
    for a classifier with several outputs.
    """
    config = AutoConfig.from_pretrained(ref.path, local_files_only=True)
    classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if classifier and config.num_labels != 1:
        raise InputError(
            f"no reward or value model can be made of {ref.name}: it is a classifier with {config.num_labels} labels; "
            "expected a causal language model, or a reward model, which has one"
        )
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(f"no reward or value model can be made of {ref.name} ({config.model_type}); {NO_CLASSIFIER}")


def load_scalar_model(
    ref: ModelRef, *, head_std: float = 0.0, seed: int = 0, base: "PreTrainedModel | None" = None, device: str = "cpu"
) -> "PreTrainedModel":
    """The sequence classifier with one output over the trunk of a causal language model, float32, for evaluation.

    The head of a folder that is one already is kept. A new one is normal with standard deviation `head_std`; 0: all its
    outputs are 0. The padding token becomes the tokenizer's: transformers reads the last token that is not it.
    `base`: a model in memory with the same trunk, whose frozen weights are taken where they are equal, so that they
    are there once. Train adapters then, never those weights.
    Raises InputError for a model that transformers has no sequence classifier of.
    """
    try:
        config = AutoConfig.from_pretrained(ref.path, local_files_only=True)
        # The library's word for how many outputs there are; a plain language model's folder says 2.
        config.num_labels = 1
        config.get_text_config().pad_token_id = load_tokenizer(ref).pad_token_id
        with _quiet_transformers():
            loaded, info = AutoModelForSequenceClassification.from_pretrained(
                ref.path, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no reward or value model can be made of {ref.name}: {_one_line(error)}; {NO_CLASSIFIER}"
        ) from None
    model: Any = loaded
    name, head = scalar_head(model)
    missing = {key for key in info["missing_keys"] if not key.startswith(f"{name}.")}
    if missing:
        raise InputError(f"model {ref.name} has no weights for {min(missing)}; its files may be truncated")
    if info["missing_keys"]:
        generator = torch.Generator().manual_seed(derive_seed(seed, "head"))
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * head_std)
            if head.bias is not None:
                head.bias.zero_()
    if base is not None:
        _take_frozen(model, base)
    return model.to(torch.device(device)).eval()


def scalar_head(model: Any) -> tuple[str, nn.Linear]:
    """The name and the layer of the head (through a LoRA wrapper). Raises InputError for a model without one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    heads = [(name, layer) for name, layer in inner.named_children() if name != inner.base_model_prefix]
    if len(heads) != 1 or not isinstance(heads[0][1], nn.Linear) or heads[0][1].out_features != 1:
        raise InputError(
            f"a {type(inner).__name__} has no head that is one linear layer with one output; "
            "take a causal language model, or a reward model made from one"
        )
    return heads[0]


def response_values(
    model: "PreTrainedModel", groups: Sequence[TokenGroup], *, path: Path = "shared", dtype: str = "float32"
) -> ResponseLogps:
    """The value of the state before every response token, group by group, in place of its log-probability;
    differentiable, float32.
    """
    with autocast(model.device, dtype):
        hidden, _, counts = response_hidden(model, groups, path=path)
    return ResponseLogps.of(_apply_head(model, hidden), counts)


def last_values(
    model: "PreTrainedModel", groups: Sequence[TokenGroup], *, path: Path = "shared", dtype: str = "float32"
) -> Float[Tensor, " R"]:
    """The value at the last token of every whole conversation (`ending_in_a_probe`); differentiable, float32."""
    with autocast(model.device, dtype):
        hidden, _, counts = response_hidden(model, groups, path=path)
    return _apply_head(model, hidden.index_select(0, counts.cumsum(0) - 1))


def _apply_head(model: "PreTrainedModel", hidden: Tensor) -> Tensor:
    """[T, D] -> [T], always in float32."""
    return InFloat32(scalar_head(model)[1])(hidden).squeeze(-1)


class InFloat32(nn.Module):
    """A linear layer outside of autocast: a reward is a small difference of large sums, and bfloat16 would leave it
    three digits.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.layer(hidden.float())


PROBE = 0
"""A token that stands for the one that would come next: it is predicted, and never goes through the model."""


def conversations_group(conversations: Sequence[Sequence[int]], pad_id: int | None) -> TokenGroup:
    """Whole conversations as one group: what all begin with is the prompt, the rest of each a response.

    Each ends in `PROBE`, so that its last own token is one that predicts (`last_values`). Padding tokens at the end are
    left out: transformers reads the last token that is none, and later ones cannot change what a causal model says.
    """
    cut = [_without_padding(ids, pad_id) for ids in conversations]
    same = [len(set(tokens)) == 1 for tokens in zip(*cut, strict=False)]
    shared = [*same, False].index(False)
    return TokenGroup(cut[0][:shared], tuple((*ids[shared:], PROBE) for ids in cut))


def _without_padding(ids: Sequence[int], pad_id: int | None) -> tuple[int, ...]:
    end = len(ids)
    while end > 1 and ids[end - 1] == pad_id:
        end -= 1
    return tuple(ids[:end])


def _take_frozen(model: "PreTrainedModel", base: "PreTrainedModel") -> None:
    """Frozen weights of the base's trunk in place of the equal ones of the model's, wherever they are."""
    # Where an adapter lies around a layer, its weight is that of the `base_layer`.
    known = {name.replace(".base_layer.", "."): weight for name, weight in _decoder(base).named_parameters()}
    for name, weight in _decoder(model).named_parameters():
        twin = known.get(name)
        if twin is not None and not twin.requires_grad and torch.equal(weight, twin.to(weight.device)):
            weight.data = twin.data


def shared_bytes(model: "PreTrainedModel", other: "PreTrainedModel") -> int:
    """Bytes of weights that two models have in common in memory."""
    places = {weight.data_ptr() for weight in other.parameters()}
    return sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.data_ptr() in places)
