"""The training round: a model folder and items to train on in, a trained model folder out.

What is minimised is an `Objective`. No reference model is in memory: its log-probabilities come with the pairs, or from
the model itself with its adapter switched off. Data order is a pure function of (seed, step), and a checkpoint holds
weights, optimiser and log, so a round that is killed ends in the same bytes.
"""

import math
import os
import shutil
import warnings
from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefloop.atomic import write_atomically
from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed, InputError
from prefloop.models import ModelRef, choose_device, load_tokenizer, require_peft, write_model
from prefloop.records import Item, Judged, Prompt, Response
from prefloop.run import Stage
from prefloop.seeds import derive_seed, generator
from prefloop.train.attention import shared_prefix
from prefloop.train.checkpoint import load_checkpoint, save_checkpoint
from prefloop.train.checks import check_finite, check_gradients, check_movement
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.logprobs import Path as LogpsPath
from prefloop.train.logprobs import ResponseLogps, choose_path, config_obstacle, rows
from prefloop.train.memory import reused_memory
from prefloop.train.objective import I, Objective
from prefloop.train.optim import learning_rate, make_optimizer, unit_step
from prefloop.train.packing import TokenGroup
from prefloop.train.reference import Pass, choose_dtype, fill_in, model_pass
from prefloop.train.scalar import scalar_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING_LOG = "training_log.jsonl"


class Learner(Generic[I]):
    """One model in training. `step(items, step)` is one optimiser step; `evaluate(items)` changes nothing.

    `data`: all items that are known beforehand, trained on or watched. They are tokenised once, here, and the longest
    of them counts in the choice of the path.
    """

    def __init__(
        self,
        policy: ModelRef,
        data: Sequence[I],
        *,
        objective: Objective[I],
        config: Train,
        compute: Compute,
        seed: int,
        stage: Stage | None = None,
    ) -> None:
        self.policy, self.objective, self.config, self.compute = policy, objective, config, compute
        self.stage = stage or Stage.detached()
        self.tokenizer = load_tokenizer(policy)
        self.chat = ChatFormat(self.tokenizer)
        self.known = dict(zip(map(_content, data), self.tokenise(data), strict=True))
        device = choose_device(compute.device)
        self.dtype = choose_dtype(compute, device)
        model: Any = objective.load(policy, device)
        if config.gradient_checkpointing:
            recompute_activations(model)
        # The model stays in evaluation mode: dropout would make the policy differ from its own reference at step 0.
        self.model = add_lora(model, config.lora, seed) if config.lora.rank else model
        self.trained = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        self.optimizer = make_optimizer(config, [weight for _, weight in self.trained])
        self.unmoved = dict(self.trained)
        self._updates: int | None = None  # since the very first one, where that was made in this process
        self.path: LogpsPath
        self.path, self.why = choose_path(self.model, list(self.known.values()))
        if config.compile:
            compile_layers(self.model)

    def tokenise(self, items: Sequence[I]) -> list[TokenGroup]:
        """The token ids of items, checked (`Objective.check`)."""
        groups = [self.objective.group(self.chat, item) for item in items]
        self.objective.check(items, groups, self.chat)
        return groups

    def _groups(self, items: Sequence[I]) -> list[TokenGroup]:
        new = [item for item in items if _content(item) not in self.known]
        groups = dict(zip(map(_content, new), self.tokenise(new), strict=True)) if new else {}
        known = ChainMap(groups, self.known)
        return [known[_content(item)] for item in items]

    def path_of(self, groups: Sequence[TokenGroup]) -> LogpsPath:
        """The path of one batch, whatever came before it: what is proven of the model holds for rows that its
        configuration lets share.
        """
        return "padded" if self.path == "padded" or config_obstacle(self.model, groups) else "shared"

    def with_reference_logps(self, items: Sequence[Judged], *, prefixes: bool = False) -> list[Judged]:
        """Items with the log-probabilities of `policy`, which is this model with its adapter switched off."""

        def adapter_off(groups: Sequence[TokenGroup], part: str) -> Pass:
            with self.model.disable_adapter():
                return model_pass(groups, self.model, self.policy.name, compute=self.compute, part=part,
                                  stage=self.stage)  # fmt: skip

        return fill_in(
            items,
            self.policy,
            adapter_off,
            source="computed with the adapter off",
            why="the reference is the model that the adapter is trained on, and it is in memory",
            compute=self.compute,
            prefixes=prefixes,
            stage=self.stage,
        )

    def step(self, items: Sequence[I], step: int) -> dict[str, float]:
        """One optimiser step on the mean loss of `items`, in as many passes as the token budget asks for.

        `step` counts from 0. Items that are not of `data` are tokenised and checked here.
        """
        rate = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.free_gradients()
        groups = self._groups(items)
        path = self.path_of(groups)
        first = not self.optimizer.state  # no update has been made, in this process or before its checkpoint
        if first:
            self._updates = 0
        size = self.objective.size(items, groups)
        sums: dict[str, float] = {}
        # Around the backward pass too: layers that are computed again there must attend as they did before.
        with shared_prefix(self.model) if path == "shared" else nullcontext():
            for row, logps in self._passes(items, groups, path):
                chunk = [items[i] for i in row]
                losses, metrics = self.objective.losses(chunk, logps)
                if first:
                    self.objective.before_first_update(chunk, logps, policy=self.policy.fingerprint, dtype=self.dtype)
                # Divided by the whole batch, not by the chunk: the gradient does not depend on how memory cut it.
                (losses.sum() / size).backward()
                _add(sums, losses, metrics)
        norm = float(torch.nn.utils.clip_grad_norm_([w for _, w in self.trained], self.config.max_grad_norm))
        if first:
            check_gradients(self.trained)
        if not math.isfinite(norm):
            ids = ", ".join(item.prompt.id for item in items)
            raise CheckFailed(f"the gradient of step {step + 1} is not finite; its items are those of prompts {ids}")
        with self._movement(rate):
            self.optimizer.step()
        self._tell_unmoved()
        return {**_means(sums, len(items), size), "grad_norm": norm, "learning_rate": rate}

    def free_gradients(self) -> None:
        """Those of the last step, which nothing reads any more: as large as all trained weights."""
        self.optimizer.zero_grad(set_to_none=True)

    def _movement(self, rate: float) -> AbstractContextManager[None]:
        """The check of the first updates that every weight moves. An online method may have steps without any."""
        if self._updates is None or self._updates >= self.objective.first_steps:
            return nullcontext()
        moved = partial(unit_step, self.config)
        return check_movement(self.unmoved, moved, rate=rate, peak=self.config.learning_rate)

    def _tell_unmoved(self) -> None:
        """After an update: once, a note of weights that should have had a gradient by now."""
        if self._updates is None:
            return
        self._updates += 1
        if self._updates == self.objective.first_steps and self.unmoved:
            self.stage.note(
                f"{len(self.unmoved)} trainable weights had no gradient but zero in the first {self._updates} steps "
                f"(such as {next(iter(self.unmoved))}): experts that no token was sent to, or parts of the model that "
                "the loss does not reach"
            )

    def _passes(
        self, items: Sequence[I], groups: Sequence[TokenGroup], path: LogpsPath
    ) -> Iterator[tuple[list[int], ResponseLogps]]:
        """Indices of items that go through the model together, and the log-probabilities of their responses; of all
        items at once where the objective couples them.
        """
        cut = rows(groups, self.compute.tokens_per_forward, path=path)
        if self.objective.coupled and len(cut) > 1:
            yield list(range(len(items))), self._joined(items, groups, path, cut)
        else:
            for row in cut:
                yield row, self._logps([items[i] for i in row], [groups[i] for i in row], path)

    def _joined(
        self, items: Sequence[I], groups: Sequence[TokenGroup], path: LogpsPath, cut: Sequence[Sequence[int]]
    ) -> ResponseLogps:
        """The log-probabilities of a whole batch in a graph that keeps no activations: its backward pass computes the
        batch again, one row at a time.
        """
        pieces: list[list[Tensor]] = [[] for _ in items]
        collisions: list[list[Tensor]] = [[] for _ in items]
        for row in cut:
            part = [items[i] for i in row], [groups[i] for i in row], path
            logps: Any = checkpoint(self._logps, *part, use_reentrant=False, preserve_rng_state=False)
            for kept, values in ((pieces, logps.tokens), (collisions, logps.collision)):
                each = iter(() if values is None else values.split(logps.counts.tolist()))
                for i in row:
                    kept[i] = list(islice(each, len(groups[i].responses)))
        flat, known = list(chain(*pieces)), list(chain(*collisions))
        counts = torch.tensor([len(piece) for piece in flat], device=flat[0].device)
        return ResponseLogps.of(torch.cat(flat), counts, collision=torch.cat(known) if known else None)

    def _logps(self, items: Sequence[I], groups: Sequence[TokenGroup], path: LogpsPath) -> ResponseLogps:
        logps = self.objective.read(self.model, groups, path=path, dtype=self.dtype)
        sums = iter(logps.sums.tolist())
        own = [list(islice(sums, len(group.responses))) for group in groups]
        check_finite(own, [item.prompt.id for item in items], "the model in training", what=self.objective.reads)
        return logps

    @torch.no_grad()
    def tokens(
        self, items: Sequence[I], model: "PreTrainedModel | None" = None, *, name: str = "the model in training"
    ) -> list[list[float]]:
        """What the model (or another of its kind) says of every response token, item by item; nothing is learned.

        `name` of that model, for the message of the CheckFailed that a number which is none raises.
        """
        groups = self._groups(items)
        path = self.path_of(groups)
        found: dict[int, list[float]] = {}
        for row in rows(groups, self.compute.tokens_per_forward, path=path):
            own = [groups[i] for i in row]
            said = self.objective.tokens(self.model if model is None else model, own, path=path, dtype=self.dtype)
            parts = [part.tolist() for part in said.split([group.predicted for group in own])]
            ids = [items[i].prompt.id for i in row]
            check_finite([[sum(part)] for part in parts], ids, name, what=self.objective.reads)
            found.update(zip(row, parts, strict=True))
        return [found[i] for i in range(len(items))]

    @torch.no_grad()
    def evaluate(self, items: Sequence[I]) -> dict[str, float]:
        """Mean loss and metrics over `items`; where the objective couples items, over batches as in training."""
        groups = self._groups(items)
        path = self.path_of(groups)
        together = self.config.batch_size if self.objective.coupled else len(items)
        sums: dict[str, float] = {}
        for start in range(0, len(items), together):
            batch, own = items[start : start + together], groups[start : start + together]
            for row, logps in self._passes(batch, own, path):
                _add(sums, *self.objective.losses([batch[i] for i in row], logps))
        return _means(sums, len(items), self.objective.size(items, groups))

    def write(self, folder: Path) -> None:
        """Save the model as an ordinary transformers folder, adapters merged in float32."""
        model: Any = self.model.merge_and_unload() if self.config.lora.rank else self.model
        write_model(folder, model, self.tokenizer)


def add_lora(model: "PreTrainedModel", lora: Lora, seed: int) -> Any:
    """`model` with trainable low-rank adapters on its linear layers and everything else frozen.

    A head with one output, which is new, is trained itself.
    """
    peft = require_peft()
    torch.manual_seed(derive_seed(seed, "lora"))
    shared = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "target_modules": "all-linear"}
    name, head = scalar_head(model) if model.get_output_embeddings() is None else ("", None)
    own = {"exclude_modules": [name]} if head is not None else {"task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        # peft asks transformers under a name that transformers deprecates: nothing that our user could change.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**shared, **own)).eval()
    if head is not None:
        head.requires_grad_(True)
    return adapted


def _content(item: Item) -> tuple[Prompt, tuple[Response, ...]]:
    """What an item's token ids are made of: a pair that gains reference log-probabilities keeps them."""
    return item.prompt, item.responses


def compile_layers(model: "PreTrainedModel") -> None:
    """torch.compile of every layer that transformers marks, for rows of any length; attention stays as it is.

    All layers share their code, so one compilation serves them. Raises InputError for a model without such layers, or
    on a CPU without a C++ compiler.
    """
    if model.device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise InputError("train.compile = True needs a C++ compiler on a CPU, and neither g++ nor clang++ was found")
    for layer in _marked_layers(model, "train.compile"):
        layer.compile(dynamic=True)


def _marked_layers(model: "PreTrainedModel", option: str) -> "Sequence[torch.nn.Module]":
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise InputError(
            f"{option} = True: transformers marks no layers of {type(model).__name__} that could be taken one by one; "
            "leave it out, and lower compute.tokens_per_forward to save memory"
        )
    return layers


def recompute_activations(model: "PreTrainedModel") -> None:
    """Gradient checkpointing: every layer keeps its input alone, and the backward pass computes the layer again.

    transformers' own switch works on layers in training mode only, in which some families (OPT, Falcon) apply dropout.
    So the layers that transformers marks for it are wrapped here, and stay in evaluation mode.
    Raises InputError for a model without such layers.
    """
    for layer in _marked_layers(model, "train.gradient_checkpointing"):
        # Nothing random happens in evaluation mode, so no generator's state is kept for the second time.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def _add(sums: dict[str, float], losses: Tensor, metrics: dict[str, Tensor]) -> None:
    for name, value in {"loss": losses.detach(), **metrics}.items():
        sums[name] = sums.get(name, 0.0) + float(value.sum())


def _means(sums: dict[str, float], items: int, size: int) -> dict[str, float]:
    return {name: total / (size if name == "loss" else items) for name, total in sums.items()}


def batch_of_step(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of step `step` (from 0): a new permutation of all n items each epoch, batches running across epochs."""
    chosen = []
    orders: dict[int, Any] = {}
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, n)
        if epoch not in orders:
            orders[epoch] = generator(seed, "order", epoch).permutation(n)
        chosen.append(int(orders[epoch][offset]))
    return chosen


@reused_memory()
def fit(
    policy: ModelRef,
    items: Sequence[I],
    validation: Sequence[I],
    *,
    objective: Objective[I],
    config: Train,
    compute: Compute,
    seed: int,
    adapter_off: bool = False,
    stage: Stage,
) -> Path:
    """Train `policy` on items of the objective's kind; returns the folder of the trained model.

    `adapter_off`: the items have a reference, it is `policy` itself and an adapter is trained; items that do not carry
    its log-probabilities yet get them here, with the adapter switched off.
    `training_log.jsonl` in it has a line a step (means over the batch) and a line a look at the validation items.
    Raises CheckFailed when there is nothing to train on, or a self-check fails.
    """
    if not items:
        raise CheckFailed(f"there are no {objective.kind} to train on; the counts of earlier stages say where they "
                          "were dropped")  # fmt: skip
    data: list[Any] = [*items, *validation]
    n = len(items)
    learner = Learner(policy, data, objective=objective, config=config, compute=compute, seed=seed, stage=stage)
    stage.event("path", model=policy.name, path=learner.path, why=learner.why)
    if adapter_off:
        data = learner.with_reference_logps(data, prefixes=objective.prefixes)
    start, log = load_checkpoint(stage.scratch, model=learner.model, optimizer=learner.optimizer)
    if start:
        stage.note(f"continuing from the checkpoint after step {start}")
    with stage.progress(config.steps, unit="steps", description="training") as advance:
        advance(start)
        for step in range(start, config.steps):
            batch = [data[i] for i in batch_of_step(n, config.batch_size, step, seed)]
            row = {"step": step + 1, **learner.step(batch, step)}
            log.append(row)
            stage.event("step", **row)
            last = step + 1 == config.steps
            if validation and (last or (step + 1) % config.validate_every == 0):
                log.append({"step": step + 1, "validation": learner.evaluate(data[n:])})
                stage.event("validation", **log[-1])
            if stage.scratch and not last and (step + 1) % config.checkpoint_every == 0:
                save_checkpoint(stage.scratch, step=step + 1, model=learner.model, optimizer=learner.optimizer, log=log)
            advance(1)
    assert stage.output is not None
    stage.event("saving")
    learner.write(stage.output)
    write_training_log(stage.output / TRAINING_LOG, log)
    return stage.output


def write_training_log(path: Path, log: list[dict[str, Any]]) -> None:
    import json

    write_atomically(path, "".join(json.dumps(row) + "\n" for row in log))
