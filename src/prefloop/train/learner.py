"""The training round: a model folder and pairs with reference log-probabilities in, a trained model folder out.

No reference model is in memory: its log-probabilities come with the pairs, or from the model itself with its adapter
switched off. Data order is a pure function of (seed, step), and a checkpoint holds weights, optimiser and log, so a
round that is killed ends in the same bytes.
"""

import math
import os
import shutil
import warnings
from collections import ChainMap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefloop.atomic import write_atomically
from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed, InputError
from prefloop.models import ModelRef, choose_device, load_model, load_tokenizer, require_peft, write_model
from prefloop.records import Pair, Prompt, Response
from prefloop.run import Stage
from prefloop.seeds import derive_seed, generator
from prefloop.train.attention import shared_prefix
from prefloop.train.checkpoint import load_checkpoint, save_checkpoint
from prefloop.train.checks import check_finite, check_gradients, check_movement, check_pairs, check_zero_margin
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.logprobs import Path as LogpsPath
from prefloop.train.logprobs import choose_path, config_obstacle, response_logps, rows
from prefloop.train.losses import PairLogps, pair_metrics
from prefloop.train.memory import reused_memory
from prefloop.train.optim import learning_rate, make_optimizer, unit_step
from prefloop.train.packing import TokenGroup
from prefloop.train.reference import Pass, choose_dtype, fill_in, model_pass, token_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss = Callable[..., Tensor]
TRAINING_LOG = "training_log.jsonl"


class Learner:
    """One model in training. `step(pairs, step)` is one optimiser step; `evaluate(pairs)` changes nothing.

    `data`: all pairs that are known beforehand, trained on or watched. They are tokenised once, here, and the longest
    of them counts in the choice of the path.
    """

    def __init__(
        self,
        policy: ModelRef,
        data: Sequence[Pair],
        *,
        loss: Loss,
        beta: float,
        config: Train,
        compute: Compute,
        seed: int,
        stage: Stage | None = None,
    ) -> None:
        self.policy, self.loss, self.beta, self.config, self.compute = policy, loss, beta, config, compute
        self.stage = stage or Stage.detached()
        self.tokenizer = load_tokenizer(policy)
        self.chat = ChatFormat(self.tokenizer)
        self.known = dict(zip(map(_content, data), self.tokenise(data), strict=True))
        device = choose_device(compute.device)
        self.dtype = choose_dtype(compute, device)
        model: Any = load_model(policy, device=device)
        if config.gradient_checkpointing:
            recompute_activations(model)
        # The model stays in evaluation mode: dropout would make the policy differ from its own reference at step 0.
        self.model = add_lora(model, config.lora, seed) if config.lora.rank else model
        self.trained = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        self.optimizer = make_optimizer(config, [weight for _, weight in self.trained])
        self.unmoved = dict(self.trained)
        self.path: LogpsPath
        self.path, self.why = choose_path(self.model, list(self.known.values()))
        if config.compile:
            compile_layers(self.model)

    def tokenise(self, pairs: Sequence[Pair]) -> list[TokenGroup]:
        """The token ids of pairs, checked (`check_pairs`)."""
        groups = [token_group(self.chat, pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
        check_pairs(pairs, groups, self.chat)
        return groups

    def _groups(self, pairs: Sequence[Pair]) -> list[TokenGroup]:
        new = [pair for pair in pairs if _content(pair) not in self.known]
        groups = dict(zip(map(_content, new), self.tokenise(new), strict=True)) if new else {}
        known = ChainMap(groups, self.known)
        return [known[_content(pair)] for pair in pairs]

    def path_of(self, groups: Sequence[TokenGroup]) -> LogpsPath:
        """The path of one batch, whatever came before it: what is proven of the model holds for rows that its
        configuration lets share.
        """
        return "padded" if self.path == "padded" or config_obstacle(self.model, groups) else "shared"

    def with_reference_logps(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Pairs with the log-probabilities of `policy`, which is this model with its adapter switched off."""

        def adapter_off(groups: Sequence[TokenGroup]) -> Pass:
            with self.model.disable_adapter():
                return model_pass(
                    groups, self.model, self.policy.name, compute=self.compute, part="reference", stage=self.stage
                )

        return fill_in(
            pairs,
            self.policy,
            adapter_off,
            source="computed with the adapter off",
            why="the reference is the model that the adapter is trained on, and it is in memory",
            compute=self.compute,
            stage=self.stage,
        )

    def step(self, pairs: Sequence[Pair], step: int) -> dict[str, float]:
        """One optimiser step on the mean loss of `pairs`, in as many passes as the token budget asks for.

        `step` counts from 0. Pairs that are not of `data` are tokenised and checked here.
        """
        rate = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        groups = self._groups(pairs)
        path = self.path_of(groups)
        first = not self.optimizer.state  # no update has been made, in this process or before its checkpoint
        sums: dict[str, float] = {}
        # Around the backward pass too: layers that are computed again there must attend as they did before.
        with shared_prefix(self.model) if path == "shared" else nullcontext():
            for row in rows(groups, self.compute.tokens_per_forward, path=path):
                chunk = [pairs[i] for i in row]
                logps = self._logps(chunk, [groups[i] for i in row], path)
                losses = self._losses(logps, chunk)
                if first:
                    check_zero_margin(logps, chunk, policy=self.policy.fingerprint, dtype=self.dtype)
                # Divided by the whole batch, not by the chunk: the gradient does not depend on how memory cut it.
                (losses.sum() / len(pairs)).backward()
                _add(sums, losses, logps, self.beta)
        norm = float(torch.nn.utils.clip_grad_norm_([w for _, w in self.trained], self.config.max_grad_norm))
        if first:
            check_gradients(self.trained)
        if not math.isfinite(norm):
            ids = ", ".join(pair.prompt.id for pair in pairs)
            raise CheckFailed(f"the gradient of step {step + 1} is not finite; its pairs are those of prompts {ids}")
        with self._movement(step, rate):
            self.optimizer.step()
        means = {name: total / len(pairs) for name, total in sums.items()}
        return {**means, "grad_norm": norm, "learning_rate": rate}

    def _movement(self, step: int, rate: float) -> AbstractContextManager[None]:
        """The check of the first two steps that every weight moves."""
        if step > 1:
            return nullcontext()
        moved = partial(unit_step, self.config)
        return check_movement(self.unmoved, moved, rate=rate, peak=self.config.learning_rate)

    def _logps(self, pairs: Sequence[Pair], groups: Sequence[TokenGroup], path: LogpsPath) -> PairLogps:
        policy = response_logps(self.model, groups, path=path, dtype=self.dtype).sums
        check_finite(policy.reshape(-1, 2).tolist(), [pair.prompt.id for pair in pairs], "the model in training")
        known = [pair.reference_logps for pair in pairs]
        reference = torch.tensor(known, dtype=torch.float32, device=policy.device)
        return PairLogps(policy[0::2], policy[1::2], reference[:, 0], reference[:, 1])

    def _losses(self, logps: PairLogps, pairs: Sequence[Pair]) -> Tensor:
        device = logps.policy_chosen.device
        p = torch.tensor([pair.p for pair in pairs], device=device)
        weight = torch.tensor([pair.weight for pair in pairs], device=device)
        return self.loss(logps, p=p, weight=weight)

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Mean loss, accuracy, margin and log-probability changes over `pairs`."""
        groups = self._groups(pairs)
        path = self.path_of(groups)
        sums: dict[str, float] = {}
        for row in rows(groups, self.compute.tokens_per_forward, path=path):
            chunk = [pairs[i] for i in row]
            logps = self._logps(chunk, [groups[i] for i in row], path)
            _add(sums, self._losses(logps, chunk), logps, self.beta)
        return {name: total / len(pairs) for name, total in sums.items()}

    def write(self, folder: Path) -> None:
        """Save the model as an ordinary transformers folder, adapters merged in float32."""
        model: Any = self.model.merge_and_unload() if self.config.lora.rank else self.model
        write_model(folder, model, self.tokenizer)


def add_lora(model: "PreTrainedModel", lora: Lora, seed: int) -> Any:
    """`model` with trainable low-rank adapters on its linear layers and everything else frozen."""
    peft = require_peft()
    torch.manual_seed(derive_seed(seed, "lora"))
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # peft asks transformers under a name that transformers deprecates: nothing that our user could change.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, settings).eval()


def _content(pair: Pair) -> tuple[Prompt, Response, Response]:
    """What a pair's token ids are made of: a pair that gains reference log-probabilities keeps them."""
    return pair.prompt, pair.chosen, pair.rejected


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


def _add(sums: dict[str, float], losses: Tensor, logps: PairLogps, beta: float) -> None:
    values = {"loss": losses.detach(), **pair_metrics(logps, beta=beta)._asdict()}
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + float(value.sum())


def batch_of_step(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of step `step` (from 0): a new permutation of all n pairs each epoch, batches running across epochs."""
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
    pairs: Sequence[Pair],
    validation: Sequence[Pair],
    *,
    loss: Loss,
    beta: float,
    config: Train,
    compute: Compute,
    seed: int,
    adapter_off: bool = False,
    stage: Stage,
) -> Path:
    """Train `policy` on pairs with reference log-probabilities; returns the folder of the trained model.

    `adapter_off`: the reference is `policy` itself and an adapter is trained; pairs that do not carry its
    log-probabilities yet get them here, with the adapter switched off.
    `training_log.jsonl` in it has a line a step (means over the batch) and a line a look at the validation pairs.
    Raises CheckFailed when there is nothing to train on, or a self-check fails.
    """
    if not pairs:
        raise CheckFailed("there are no pairs to train on; the counts of earlier stages say where they were dropped")
    data, n = [*pairs, *validation], len(pairs)
    learner = Learner(policy, data, loss=loss, beta=beta, config=config, compute=compute, seed=seed, stage=stage)
    stage.event("path", model=policy.name, path=learner.path, why=learner.why)
    if adapter_off:
        data = learner.with_reference_logps(data)
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
            if step == 1 and learner.unmoved:
                stage.note(_without_gradient(list(learner.unmoved)))
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


def _without_gradient(names: Sequence[str]) -> str:
    return (
        f"{len(names)} trainable weights had no gradient but zero in the first two steps (such as {names[0]}): experts "
        "that no token was sent to, or parts of the model that the loss does not reach"
    )


def write_training_log(path: Path, log: list[dict[str, Any]]) -> None:
    import json

    write_atomically(path, "".join(json.dumps(row) + "\n" for row in log))
