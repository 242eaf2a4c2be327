"""A model in training that is sampled from between its steps: the current weights, always.

The sampler is the transformers engine over the model itself, or over a copy in bfloat16 whose weights are written anew
before every call where sampling in half precision is faster. The reference is the model as it was at the start: kept
as a second model, or had from the model in training with its adapter switched off.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from prefloop.errors import CheckFailed
from prefloop.models import choose_device, choose_sampling_dtype, load_model
from prefloop.records import Group, Pair, Prompt
from prefloop.run import Stage
from prefloop.sample.sampling import Sampling
from prefloop.sample.transformers import HALF_TOLERANCE, TransformersEngine
from prefloop.train.learner import Learner
from prefloop.train.logprobs import response_logps, rows
from prefloop.train.packing import TokenGroup
from prefloop.train.reference import model_pass, token_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel


EXACT_TOLERANCE = 1e-4
"""Mean nats a token between sampler and trainer, where both compute in float32."""


class OnlineLearner:
    """A `Learner` with a sampler over its current weights and a frozen reference, its start model.

    `behaviour`: whose answers `sample` gives, the current model's or those of the start model (an offline baseline).
    """

    def __init__(self, learner: Learner[Any], *, behaviour: Literal["current", "start"] = "current") -> None:
        self.learner, self.behaviour = learner, behaviour
        compute, policy = learner.compute, learner.policy
        device = choose_device(compute.device)
        dtype = choose_sampling_dtype(device, compute.sampling_dtype)
        self.adapter = bool(learner.config.lora.rank)
        self.reference = None if self.adapter else load_model(policy, device=device).requires_grad_(False)
        self.copy = None if dtype == "float32" else load_model(policy, dtype=dtype, device=device)
        self._engines: dict[PreTrainedModel, TransformersEngine] = {}
        self.engine = self._engine(self.copy if self.copy is not None else _base(learner.model))

    def _engine(self, model: "PreTrainedModel") -> TransformersEngine:
        """The sampler over a model, always the same one: what it has proven of the model is not proven again."""
        if model not in self._engines:
            batch_size = self.learner.compute.sequences_per_batch
            self._engines[model] = TransformersEngine(model, self.learner.chat, batch_size=batch_size)
        return self._engines[model]

    def sample(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seed: int, current: bool = False
    ) -> list[Group]:
        """K answers to every prompt, of the current weights or as `behaviour` says; `current`: whatever it says."""
        self.learner.free_gradients()  # of the last step: the sampler's cache takes their place
        of_start = self.behaviour == "start" and not current
        if self.copy is not None:
            with self._switched_off() if of_start and self.adapter else nullcontext():
                copy_weights(
                    self.reference if of_start and self.reference is not None else _base(self.learner.model), self.copy
                )
            return self.engine.sample(prompts, k=k, sampling=sampling, seed=seed)
        if of_start and self.reference is not None:
            return self._engine(self.reference).sample(prompts, k=k, sampling=sampling, seed=seed)
        with self._switched_off() if of_start else nullcontext():
            return self.engine.sample(prompts, k=k, sampling=sampling, seed=seed)

    def _switched_off(self) -> AbstractContextManager[None]:
        """The start model, as the model in training with its adapter off."""
        return self.learner.model.disable_adapter()

    def step(self, pairs: Sequence[Pair], step: int) -> dict[str, float]:
        """One optimiser step on pairs that were just labelled (`Learner.step`)."""
        return self.learner.step(self.with_reference_logps(pairs) if self.learner.objective.referenced else pairs, step)

    def with_reference_logps(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs with the log-probabilities of the start model."""
        groups = self.learner.tokenise(pairs)
        found = self.reference_logps(groups)
        return with_logps(pairs, found, self.learner.policy.fingerprint)

    def reference_tokens(self, items: Sequence[Any]) -> list[list[float]]:
        """Log-probabilities under the start model of every response token, in nats, item by item (`Learner.tokens`)."""
        if self.reference is not None:
            return self.learner.tokens(items, self.reference, name="the reference")
        with self._switched_off():
            return self.learner.tokens(items, name="the reference")

    def reference_logps(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """Summed log-probabilities under the start model, in nats, response by response."""
        if self.reference is not None:
            return self.logps_under(self.reference, groups)
        with self._switched_off():
            return self.logps_under(self.learner.model, groups)

    def logps_under(self, model: Any, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """Summed log-probabilities under a frozen model in memory, in nats, response by response."""
        found = model_pass(
            groups, model, "the reference", compute=self.learner.compute, part="reference", stage=Stage.detached()
        )
        return found.sums

    def drift(self, groups: Sequence[Group]) -> tuple[list[float], list[float]]:
        """Of every response, a token: log pi - log pi_start, whose mean over own samples drawn at temperature 1
        estimates the KL divergence; and |log p(sampler) - log pi| of its tokens.
        """
        return self._compared(groups, self.learner.model, self.reference_logps(self._items(groups)))

    def further_drift(self, groups: Sequence[Group]) -> dict[str, list[float]]:
        """Other divergences of own answers, by the name they are logged under."""
        return {}

    def sampler_gap(self, groups: Sequence[Group]) -> list[float]:
        """|log p(sampler) - log p(trainer)| of every token, both of the model that `sample` drew the answers from."""
        return self._gap_of(groups, self.learner.model)

    def _gap_of(self, groups: Sequence[Group], model: Any) -> list[float]:
        """`sampler_gap` of answers that `model` gave."""
        return self._compared(groups, model, [[0.0] * len(group.responses) for group in groups])[1]

    def _items(self, groups: Sequence[Group]) -> list[TokenGroup]:
        return [token_group(self.learner.chat, group.prompt, group.responses) for group in groups]

    @torch.no_grad()
    def _compared(
        self, groups: Sequence[Group], model: Any, base: Sequence[Sequence[float]]
    ) -> tuple[list[float], list[float]]:
        """`drift` of `model` from the model whose summed log-probabilities are `base`."""
        learner, items = self.learner, self._items(groups)
        drift, gap = [], []
        path = learner.path_of(items)
        for row in rows(items, learner.compute.tokens_per_forward, path=path):
            logps = response_logps(model, [items[i] for i in row], path=path, dtype=learner.dtype)
            parts = iter(zip(logps.sums.tolist(), logps.tokens.split(logps.counts.tolist()), strict=True))
            for i in row:
                for response, before in zip(groups[i].responses, base[i], strict=True):
                    total, tokens = next(parts)
                    drift.append((total - before) / response.length_tokens)
                    if response.sampling_logps:
                        gap += (tokens.cpu() - torch.tensor(response.sampling_logps)).abs().tolist()
        return drift, gap

    def check_sampler(self, gaps: Sequence[float]) -> float:
        """The mean of `drift`'s gaps, in nats a token. Raises CheckFailed beyond what rounding explains: here both are
        the same weights in the same process, so in float32 next to nothing.
        """
        mean = sum(gaps) / len(gaps)
        exact = self.copy is None and self.learner.dtype == "float32"
        allowed = EXACT_TOLERANCE if exact else HALF_TOLERANCE
        if not mean <= allowed:
            raise CheckFailed(
                f"the sampler's log-probabilities of its own tokens differ from the trainer's by {mean:.4f} nats a "
                f"token on average, at most {allowed} expected; try --compute.sampling-dtype float32 and "
                "--compute.dtype float32"
            )
        return mean

    def write(self, folder: Path) -> None:
        """Save the model that was made (`Learner.write`)."""
        self.learner.write(folder)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the learner's own weights and optimiser: nothing here."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a `state`."""


def _base(model: Any) -> "PreTrainedModel":
    """The transformers model, through a LoRA wrapper; its layers carry the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def with_logps(pairs: Sequence[Pair], found: Sequence[Sequence[float]], reference: str) -> list[Pair]:
    """The pairs with their log-probabilities (chosen, rejected) under the model of that fingerprint."""
    return [
        pair.model_copy(update={"reference_logps": (a, b), "reference": reference})
        for pair, (a, b) in zip(pairs, found, strict=True)
    ]


@torch.no_grad()
def copy_weights(source: "PreTrainedModel", target: "PreTrainedModel", *, share: float = 1.0) -> None:
    """Write the weights of `source`, adapters added in, into `target` of the same architecture and any precision.

    `share` below 1 moves the target's weights only that part of the way. `source` is left as it is: merging an adapter
    and taking it out again would not give back the same bits.
    """
    weights = dict(target.named_parameters())

    def put(name: str, weight: torch.Tensor) -> None:
        if share == 1.0:
            weights[name].copy_(weight)
        else:
            weights[name].lerp_(weight.to(weights[name].dtype), share)

    adapted = {
        f"{name}.weight": module for name, module in source.named_modules() if hasattr(module, "get_delta_weight")
    }
    for name, weight in source.named_parameters():
        if name in weights and name not in adapted:
            put(name, weight)
    for name, module in adapted.items():
        layer: Any = module
        weight = layer.base_layer.weight
        for adapter in () if layer.disable_adapters else layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter)
        put(name, weight)
