"""The training round: a model folder and pairs with reference log-probabilities in, a trained model folder out.

No reference model is in memory: its log-probabilities come with the pairs. Data order is a pure function of
(seed, step), and a checkpoint holds weights, optimiser and log, so a round that is killed ends in the same bytes.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefloop.atomic import write_atomically
from prefloop.data.chat import ChatFormat
from prefloop.errors import CheckFailed
from prefloop.models import ModelRef, choose_device, load_model, load_tokenizer, require_peft, write_model
from prefloop.records import Pair
from prefloop.run import Stage
from prefloop.seeds import derive_seed, generator
from prefloop.train.checkpoint import load_checkpoint, save_checkpoint
from prefloop.train.config import Compute, Lora, Train
from prefloop.train.logprobs import Path as LogpsPath
from prefloop.train.logprobs import choose_path, response_logps, rows
from prefloop.train.losses import PairLogps, pair_metrics
from prefloop.train.packing import TokenGroup
from prefloop.train.reference import choose_dtype, token_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss = Callable[..., Tensor]
TRAINING_LOG = "training_log.jsonl"


class Learner:
    """One model in training. `step(pairs)` is one optimiser step; `evaluate(pairs)` changes nothing."""

    def __init__(
        self,
        policy: ModelRef,
        sample_of_data: Sequence[Pair],
        *,
        loss: Loss,
        beta: float,
        config: Train,
        compute: Compute,
        seed: int,
    ) -> None:
        self.policy, self.loss, self.beta, self.config = policy, loss, beta, config
        self.tokenizer = load_tokenizer(policy)
        self.chat = ChatFormat(self.tokenizer)
        device = choose_device(compute.device)
        self.dtype = choose_dtype(compute, device)
        self.tokens_per_forward = compute.tokens_per_forward
        model: Any = load_model(policy, device=device)
        # The model stays in evaluation mode: dropout would make the policy differ from its own reference at step 0.
        self.model = add_lora(model, config.lora, seed) if config.lora.rank else model
        self.trained = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [weight for _, weight in self.trained],
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=config.weight_decay,
            fused=device != "mps",
        )
        self.path: LogpsPath
        self.path, self.why = choose_path(self.model, self._groups(sample_of_data[:2]))

    def _groups(self, pairs: Sequence[Pair]) -> list[TokenGroup]:
        return [token_group(self.chat, pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]

    def _logps(self, pairs: Sequence[Pair], groups: Sequence[TokenGroup]) -> PairLogps:
        policy = response_logps(self.model, groups, path=self.path, dtype=self.dtype).sums
        known = [pair.reference_logps for pair in pairs]
        reference = torch.tensor(known, dtype=torch.float32, device=policy.device)
        return PairLogps(policy[0::2], policy[1::2], reference[:, 0], reference[:, 1])

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to the peak, then constant; `step` counts from 0."""
        return self.config.learning_rate * min(1.0, (step + 1) / max(1, self.config.warmup_steps))

    def step(self, pairs: Sequence[Pair], step: int) -> dict[str, float]:
        """One optimiser step on the mean loss of `pairs`, in as many passes as the token budget asks for."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        groups = self._groups(pairs)
        sums: dict[str, float] = {}
        for row in rows(groups, self.tokens_per_forward, path=self.path):
            chunk = [pairs[i] for i in row]
            logps = self._logps(chunk, [groups[i] for i in row])
            losses = self._losses(logps, chunk)
            if step == 0:
                self._check_zero_margin(logps, chunk)
            # Divided by the whole batch, not by the chunk: the gradient does not depend on how memory cut it.
            (losses.sum() / len(pairs)).backward()
            _add(sums, losses, logps, self.beta)
        norm = float(torch.nn.utils.clip_grad_norm_([w for _, w in self.trained], self.config.max_grad_norm))
        if step == 0:
            self._check_gradients()
        if not math.isfinite(norm):
            ids = ", ".join(pair.prompt.id for pair in pairs)
            raise CheckFailed(f"the gradient of step {step + 1} is not finite; its pairs are those of prompts {ids}")
        self.optimizer.step()
        means = {name: total / len(pairs) for name, total in sums.items()}
        return {**means, "grad_norm": norm, "learning_rate": self.learning_rate(step)}

    def _losses(self, logps: PairLogps, pairs: Sequence[Pair]) -> Tensor:
        device = logps.policy_chosen.device
        p = torch.tensor([pair.p for pair in pairs], device=device)
        weight = torch.tensor([pair.weight for pair in pairs], device=device)
        return self.loss(logps, p=p, weight=weight)

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Mean loss, accuracy, margin and log-probability changes over `pairs`."""
        groups = self._groups(pairs)
        sums: dict[str, float] = {}
        for row in rows(groups, self.tokens_per_forward, path=self.path):
            chunk = [pairs[i] for i in row]
            logps = self._logps(chunk, [groups[i] for i in row])
            _add(sums, self._losses(logps, chunk), logps, self.beta)
        return {name: total / len(pairs) for name, total in sums.items()}

    def _check_zero_margin(self, logps: PairLogps, pairs: Sequence[Pair]) -> None:
        """Before the first update the policy is its reference (D1), if that is the one the pairs were given."""
        if any(pair.reference != self.policy.fingerprint for pair in pairs):
            return
        scale = torch.stack(list(logps[:2])).detach().abs().amax(0)
        allowed = 1e-3 + 1e-5 * scale if self.dtype == "float32" else 0.5 + 2e-2 * scale
        h = logps.h.detach()
        worst = int((h.abs() - allowed).argmax())
        if float(h[worst].abs()) > float(allowed[worst]):
            raise CheckFailed(
                f"before the first update the policy should equal its reference, but the pair of prompt "
                f"{pairs[worst].prompt.id!r} has h = {float(h[worst]):.4f} nats (at most {float(allowed[worst]):.4f} "
                "expected); the reference log-probabilities belong to another model, tokenizer or precision"
            )

    def _check_gradients(self) -> None:
        without = [name for name, weight in self.trained if weight.grad is None]
        if without:
            raise CheckFailed(
                f"{len(without)} trainable weights got no gradient in the first step (such as {without[0]}); "
                "they would stay as they are: freeze them, or report this model's architecture"
            )

    def write(self, folder: Path) -> None:
        """Save the model as an ordinary transformers folder, adapters merged in float32."""
        model: Any = self.model.merge_and_unload() if self.config.lora.rank else self.model
        write_model(folder, model, self.tokenizer)


def add_lora(model: "PreTrainedModel", lora: Lora, seed: int) -> Any:
    """`model` with trainable low-rank adapters on its linear layers and everything else frozen."""
    peft = require_peft()
    torch.manual_seed(derive_seed(seed, "lora"))
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    ).eval()


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
    stage: Stage,
) -> Path:
    """Train `policy` on pairs with reference log-probabilities; returns the folder of the trained model.

    `training_log.jsonl` in it has a line a step (means over the batch) and a line a look at the validation pairs.
    Raises CheckFailed when there is nothing to train on, or a self-check fails.
    """
    if not pairs:
        raise CheckFailed("there are no pairs to train on; the counts of earlier stages say where they were dropped")
    learner = Learner(policy, pairs, loss=loss, beta=beta, config=config, compute=compute, seed=seed)
    stage.event("path", model=policy.name, path=learner.path, why=learner.why)
    start, log = load_checkpoint(stage.scratch, model=learner.model, optimizer=learner.optimizer)
    if start:
        stage.note(f"continuing from the checkpoint after step {start}")
    with stage.progress(config.steps, unit="steps", description="training") as advance:
        advance(start)
        for step in range(start, config.steps):
            batch = [pairs[i] for i in batch_of_step(len(pairs), config.batch_size, step, seed)]
            row = {"step": step + 1, **learner.step(batch, step)}
            log.append(row)
            stage.event("step", **row)
            last = step + 1 == config.steps
            if validation and (last or (step + 1) % config.validate_every == 0):
                log.append({"step": step + 1, "validation": learner.evaluate(validation)})
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
