"""Models that give numbers: a language model's trunk under a head with one output, in place of the vocabulary.

    v_t = w . h_t (+ b)        h_t: the trunk's last hidden state at token t

Read at the last token of a conversation it is a reward (`last_values`), read where each response token is predicted it
is the value of the state before that token (`response_values`). Both go through the same packing and attention as
log-probabilities do: a prompt is computed once and its responses branch from it.

Such a model is what transformers calls a sequence classifier with one label, and is saved as one.

Legend: R responses, T predicted response tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

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
    refused = f"no reward or value model can be made of {ref.name}"

    def with_one_output(config: Any) -> None:
        # The library's word for how many outputs there are; a plain language model's folder says 2.
        config.num_labels = 1
        text, tokenizer = config.get_text_config(), load_tokenizer(ref)
        text.pad_token_id = tokenizer.pad_token_id
        if (tokenizer.pad_token_id or 0) >= text.vocab_size:
            raise InputError(
                f"{refused}: its tokenizer pads with {tokenizer.pad_token!r} ({tokenizer.pad_token_id}), and the model "
                f"has {text.vocab_size} tokens; resize its embeddings, or make another token the tokenizer's pad_token"
            )

    model, missing = _load_classifier(ref, with_one_output, refused, NO_CLASSIFIER)
    name, head = scalar_head(model)
    of_the_trunk = [key for key in missing if not key.startswith(f"{name}.")]
    if of_the_trunk:
        raise InputError(f"model {ref.name} has no weights for {of_the_trunk[0]}; its files may be truncated")
    if missing:
        generator = torch.Generator().manual_seed(derive_seed(seed, "head"))
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * head_std)
            if head.bias is not None:
                head.bias.zero_()
    if base is not None:
        _take_frozen(model, base)
    return model.to(torch.device(device)).eval()


def load_reward_model(ref: ModelRef, *, device: str = "cpu") -> "PreTrainedModel":
    """The sequence classifier in a folder, float32, frozen, for evaluation; its head stays so under autocast.

    Raises InputError when it is no reward model.
    """
    expected = "expected a reward model: a sequence classifier with one output (num_labels 1)"

    def checked(config: Any) -> None:
        if config.num_labels != 1:
            made_for = ", ".join(config.architectures or ["an unknown architecture"])
            raise InputError(f"model {ref.name} ({made_for}) has {config.num_labels} labels; {expected}")
        # A conversation goes through once: nothing would read the keys and values that decoders keep by default.
        for part in (config, config.get_text_config()):
            if hasattr(part, "use_cache"):
                part.use_cache = False

    model, missing = _load_classifier(ref, checked, f"model {ref.name} cannot be loaded from {ref.path}", expected)
    if missing:
        names = ", ".join(missing)
        raise InputError(f"model {ref.name} has no weights for {names}, its scores would be random; {expected}")
    heads = [(name, layer) for name, layer in model.named_modules() if getattr(layer, "out_features", None) == 1]
    for name, layer in heads:
        model.set_submodule(name, InFloat32(layer))
    return model.to(torch.device(device)).eval().requires_grad_(False)


def _load_classifier(
    ref: ModelRef, prepare: Callable[[Any], None], refused: str, expected: str
) -> tuple[Any, list[str]]:
    """The classifier of a folder whose configuration `prepare` has seen, and the weights that its files lack, sorted.

    Where there is none, an InputError: `refused`, the reason, and what was `expected`.
    """
    try:
        config = AutoConfig.from_pretrained(ref.path, local_files_only=True)
        prepare(config)
        with _quiet_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                ref.path, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{refused}: {_one_line(error)}; {expected}") from None
    return model, sorted(info["missing_keys"])


def reads_last_token(model: "PreTrainedModel") -> bool:
    """Whether what a classifier says of a conversation is `last_values` of it, seen on one row: not where it pools
    tokens, or has more than one layer over its trunk, as encoders do.
    """
    ids = tuple(range(1, 9))
    try:
        scalar_head(model)
        with torch.no_grad():
            found = last_values(model, [conversations_group([ids], pad_id_of(model))], path="padded")
            said = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
    except (AttributeError, RuntimeError, TypeError, ValueError):  # an InputError is a ValueError
        return False
    return torch.allclose(found, said, rtol=1e-3, atol=1e-4)


def pad_id_of(model: "PreTrainedModel") -> int | None:
    """The token that a classifier passes over at the end of a row."""
    return cast(int | None, getattr(model.config.get_text_config(), "pad_token_id", None))


def scalar_head(model: Any) -> tuple[str, nn.Linear]:
    """The name and the layer of the head (through a LoRA wrapper, and `InFloat32`). Raises InputError for a model
    without one.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    heads = [
        (name, layer.layer if isinstance(layer, InFloat32) else layer)
        for name, layer in inner.named_children()
        if name != inner.base_model_prefix
    ]
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
    """The value at the last token of every whole conversation (`conversations_group`); differentiable, float32."""
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
