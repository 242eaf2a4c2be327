"""Several members that learn side by side, and the frozen mean of them that samples for all: what BPO trains.

    behaviour   the mean of the members' weights at the last refresh: samples, and (BPO) is the reference
    member i    the start model with an adapter of its own (or all weights, where there is one member): trained
    merged      the mean of the members' weights now: looked at, and saved in the end

With W the start weights and dW_i the weight change of member i, the mean is W + 1/n sum_i dW_i. The mean of the factors
A_i and B_i apart would be another model: for n identical members n times too far, for independent ones 1/sqrt(n) of it
in the wrong direction (docs/methods/bpo.md).

One model and one set of trainable weights are in memory for all members: they take turns in it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefloop.models import ModelRef, choose_device, load_model, write_model
from prefloop.records import Group, Pair, Prompt
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed
from prefloop.train.learner import Learner
from prefloop.train.online import OnlineLearner, _base, copy_weights, with_logps
from prefloop.train.optim import make_optimizer

Weights = dict[str, Tensor]
"""Trainable weights by name."""


class ProximalLearner(OnlineLearner):
    """n members over one `Learner`. `refresh` takes the behaviour model; `step` trains every member on the same pairs.

    `reference`: "behaviour" (BPO), "start" (online direct alignment), "ema" (a moving mean of behaviour models), or
    another model, frozen. Several members need an adapter (`Train.lora`): each would be a whole model.
    """

    def __init__(
        self, learner: Learner[Pair], *, members: int = 1, reference: str | ModelRef = "behaviour", ema: float = 1.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(learner)
        device = choose_device(learner.compute.device)

        def frozen(ref: ModelRef) -> Any:
            return load_model(ref, device=device).requires_grad_(False)

        self.behaviour_model = frozen(learner.policy)
        self.phase = 0
        self.kind = reference if isinstance(reference, str) else "other"
        self.ema = ema
        self.other: Any = None  # the moving mean, or the other model
        if self.kind in ("ema", "other"):
            self.other = frozen(learner.policy if isinstance(reference, str) else reference)
        self._mark = reference.fingerprint if isinstance(reference, ModelRef) else learner.policy.fingerprint
        self._merged = frozen(learner.policy) if members > 1 else None
        self._stale = False
        self.optimizers = [learner.optimizer]
        self.members: list[Weights] = [dict(learner.trained)]
        if members > 1:
            self.members = [self._clone(), *(self._fresh(derive_seed(seed, "member", i)) for i in range(1, members))]
            trained = [weight for _, weight in learner.trained]
            self.optimizers += [make_optimizer(learner.config, trained) for _ in range(1, members)]
        self.taken = self._taken()

    def _clone(self) -> Weights:
        return {name: weight.detach().clone() for name, weight in self.learner.trained}

    @torch.no_grad()
    def _fresh(self, seed: int) -> Weights:
        """The weights of an adapter that begins elsewhere: another random A, and B = 0, so it changes nothing yet."""
        torch.manual_seed(seed)
        for module in self.learner.model.modules():
            if hasattr(module, "reset_lora_parameters"):
                for adapter in module.active_adapters:
                    module.reset_lora_parameters(adapter, init_lora_weights=True)
        return self._clone()

    def refresh(self) -> None:
        """A phase begins: the merged model is the behaviour model from here on, and moves the mean of them."""
        self._write_mean(self.members, self.behaviour_model)
        if self.kind == "ema":
            copy_weights(self.behaviour_model, self.other, share=self.ema)
        self.taken = self._taken()
        self.phase += 1

    def _taken(self) -> list[Weights]:
        """The members that the behaviour model is the mean of. Where all weights are trained, it is the one itself."""
        if not self.adapter:
            return [dict(self.behaviour_model.named_parameters())]
        return [_kept(member) for member in self.members]

    @torch.no_grad()
    def _write_mean(self, members: Sequence[Weights], target: Any) -> None:
        """Write W + 1/n sum_i dW_i into `target`."""
        if not self.adapter:
            copy_weights(self.learner.model, target)
            return
        live = self._clone()
        for i, member in enumerate(members):
            self._put(member)
            copy_weights(_base(self.learner.model), target, share=1.0 / (i + 1))
        self._put(live)

    @torch.no_grad()
    def _put(self, weights: Weights) -> None:
        for name, weight in self.learner.trained:
            weight.copy_(weights[name])

    @contextmanager
    def _turn(self, i: int) -> Iterator[None]:
        """Member i is the model in training; one alone always is."""
        if len(self.members) == 1:
            yield
            return
        self._put(self.members[i])
        self.learner.optimizer = self.optimizers[i]
        yield
        with torch.no_grad():
            for name, weight in self.learner.trained:
                self.members[i][name].copy_(weight)

    def merged(self) -> Any:
        """The merged model as it is now."""
        if self._merged is None:
            return self.learner.model
        if self._stale:
            self._write_mean(self.members, self._merged)
            self._stale = False
        return self._merged

    def step(self, pairs: Sequence[Pair], step: int) -> dict[str, float]:
        """One optimiser step of every member on the same pairs; the means of their figures.

        The reference's log-probabilities are computed once, before any member moves.
        """
        known = self.with_reference_logps(pairs)
        figures = []
        for i in range(len(self.members)):
            with self._turn(i):
                figures.append(self.learner.step(known, step))
        self._stale = True
        return {name: sum(one[name] for one in figures) / len(figures) for name in figures[0]}

    def with_reference_logps(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs with the log-probabilities of the reference."""
        groups = self.learner.tokenise(pairs)
        if self.kind == "start":
            found = self.reference_logps(groups)
        else:
            found = self.logps_under(self.behaviour_model if self.other is None else self.other, groups)
        # In the first phase all three are the start model, and the learner checks that h = 0 before its first update.
        moved = self.phase > 1 and self.kind in ("behaviour", "ema")
        return with_logps(pairs, found, f"{self.kind} {self.phase}" if moved else self._mark)

    def sample(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seed: int, current: bool = False
    ) -> list[Group]:
        """K answers to every prompt, of the behaviour model; `current`: of the merged model as it is now."""
        self.learner.free_gradients()
        model = _base(self.merged() if current else self.behaviour_model)
        if self.copy is None:
            return self._engine(model).sample(prompts, k=k, sampling=sampling, seed=seed)
        copy_weights(model, self.copy)
        return self.engine.sample(prompts, k=k, sampling=sampling, seed=seed)

    def drift(self, groups: Sequence[Group]) -> tuple[list[float], list[float]]:
        """`OnlineLearner.drift` of the merged model, from the start model."""
        return self._compared(groups, self.merged(), self.reference_logps(self._items(groups)))

    def further_drift(self, groups: Sequence[Group]) -> dict[str, list[float]]:
        """The same from the behaviour model: how far this phase has come."""
        base = self.logps_under(self.behaviour_model, self._items(groups))
        return {"log_ratio_to_behaviour_per_token": self._compared(groups, self.merged(), base)[0]}

    def sampler_gap(self, groups: Sequence[Group]) -> list[float]:
        """Of the behaviour model's answers, under the behaviour model."""
        return self._gap_of(groups, self.behaviour_model)

    def write(self, folder: Path) -> None:
        """Save the merged model as an ordinary transformers folder."""
        if self._merged is None:
            self.learner.write(folder)
        else:
            write_model(folder, self.merged(), self.learner.tokenizer)

    def state(self) -> dict[str, Any]:
        """Members, their optimisers, and what the behaviour model and the moving mean are made of."""
        several = len(self.members) > 1
        return {
            "phase": self.phase,
            "members": self.members if several else [],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers] if several else [],
            "taken": self.taken,
            "ema": dict(self.other.named_parameters()) if self.kind == "ema" else {},
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Take up a `state`; the learner's own weights and optimiser were read before it."""
        self.phase = state["phase"]
        for member, found in zip(self.members, state["members"], strict=False):  # one member is the learner's own
            _copy(found, member)
        for optimizer, found in zip(self.optimizers, state["optimizers"], strict=False):
            optimizer.load_state_dict(found)
        if self.adapter:
            self._write_mean(state["taken"], self.behaviour_model)
            self.taken = [_kept(member) for member in state["taken"]]
        else:
            _copy(state["taken"][0], self.taken[0])
        if self.kind == "ema":
            _copy(state["ema"], dict(self.other.named_parameters()))
        self._stale = True


def _kept(weights: Weights) -> Weights:
    """A copy that only checkpoints need, so not on the accelerator."""
    return {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}


def _copy(source: Weights, target: Weights) -> None:
    for name, weight in source.items():
        target[name].copy_(weight)
