"""Our losses beside those of TRL, by running TRL's own code on the same log-probabilities.

To import TRL takes long, so this is among the slow tests (`make test-slow`, which installs the extra `bench`).
What TRL computes otherwise, and who is right, is in docs/losses.md.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prefloop.train.losses import AnswerLogps, PairLogps, parse_loss
from prefloop.train.losses.unpaired import kto
from tests.train.test_loss_table import example

pytestmark = [
    pytest.mark.slow,
    # Raised by whichever test imports it first, so it would depend on their order.
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]

OPTIONS = {
    "beta": 0.1, "ld_alpha": None, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5, "use_weighting": False, "loss_weights": [1.0],
}  # fmt: skip


class Accelerator:
    device = torch.device("cpu")

    @staticmethod
    def gather(value: Tensor) -> Tensor:
        return value

    gather_for_metrics = gather


def tokens_of(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Per-token log-probabilities [2B, S] whose sums, tails and collisions are those of `logps`, and their mask."""
    lengths = torch.cat(logps.lengths)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    shared = torch.minimum(*logps.lengths).repeat(2)[:, None]
    assert logps.tail is not None
    sums, tails = torch.cat(logps[:2]), torch.cat(logps.tail[:2])
    beyond = mask & (torch.arange(mask.shape[1])[None] >= shared)
    spread = torch.where(
        beyond, (tails / beyond.sum(1).clamp(min=1))[:, None], ((sums - tails) / shared[:, 0])[:, None]
    )
    return spread * mask, mask


def of_trl(logps: PairLogps, loss_type: str | list[str], **options: Any) -> float:
    """The mean loss that `DPOTrainer._compute_loss` finds for these log-probabilities."""
    from trl.trainer.dpo_trainer import DPOTrainer

    tokens, mask = tokens_of(logps)
    collision = torch.cat([logps.chosen_collision, logps.rejected_collision]) / mask.sum(1)
    outputs = SimpleNamespace(
        log_probs=tokens, log_sum_sq_probs=collision[:, None] * mask, entropy=tokens, mean_logits=tokens, is_top1=mask
    )
    given = {**OPTIONS, "loss_types": [loss_type] if isinstance(loss_type, str) else loss_type, **options}
    model = SimpleNamespace(training=True)
    trainer = SimpleNamespace(
        model=model, accelerator=Accelerator, aux_loss_enabled=False, precompute_ref_logps=True, _total_train_tokens=0,
        _tp_size=1, _metrics={"train": defaultdict(list)}, args=SimpleNamespace(discopop_tau=0.05), **given,
    )  # fmt: skip
    reference = list(logps[2:4])
    if given["ld_alpha"] is not None and logps.tail is not None:
        reference = [a - (1 - given["ld_alpha"]) * b for a, b in zip(reference, logps.tail[2:4], strict=True)]
    # One prompt token before every response.
    whole = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], dim=1)
    inputs = {"completion_mask": whole, "input_ids": whole, "attention_mask": torch.ones_like(whole),
              "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}  # fmt: skip
    call: Any = DPOTrainer._compute_loss
    return call(trainer, Model(outputs), inputs, False).item()


class Model:
    def __init__(self, outputs: Any) -> None:
        self.outputs = outputs

    def __call__(self, **_: Any) -> Any:
        return self.outputs


AGREE: list[tuple[str, str | list[str], dict[str, Any]]] = [
    ("dpo", "sigmoid", {}),
    ("dpo:beta=0.3", "sigmoid", {"beta": 0.3}),
    ("slic:beta=0.1", "hinge", {}),
    ("ipo_mean", "ipo", {}),
    ("exo", "exo_pair", {"label_smoothing": 1e-3}),
    ("nca", "nca_pair", {}),
    ("robust_dpo", "robust", {"label_smoothing": 0.1}),
    ("bco_pair", "bco_pair", {}),
    ("sppo_hard", "sppo_hard", {"beta": 1e-3}),
    ("aot", "aot", {}),
    ("aot_unpaired", "aot_unpaired", {}),
    ("apo_zero", "apo_zero", {}),
    ("apo_down", "apo_down", {}),
    ("discopop", "discopop", {}),
    ("ln_dpo", "sigmoid_norm", {"beta": 5.0}),
    ("f_dpo:divergence=forward_kl", "sigmoid", {"f_divergence_type": "forward_kl"}),
    ("f_dpo:divergence=js", "sigmoid", {"f_divergence_type": "js_divergence"}),
    ("f_dpo:divergence=alpha,alpha=0.3", "sigmoid",
     {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}),
    ("ld_dpo:alpha=0.3", "sigmoid", {"ld_alpha": 0.3}),
    ("wpo:beta=0.1", "sigmoid", {"use_weighting": True}),
    ("0.8*dpo+0.2*bco_pair", ["sigmoid", "bco_pair"], {"loss_weights": [0.8, 0.2]}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "loss_type", "options"), AGREE, ids=[text for text, *_ in AGREE])
def test_the_same_numbers_as_trl(text: str, loss_type: str | list[str], options: dict[str, Any]) -> None:
    logps = example(20, dtype=torch.float32)  # TRL's alpha-divergence knows no float64
    assert parse_loss(text)(logps).mean().item() == pytest.approx(of_trl(logps, loss_type, **options), rel=2e-6)


def test_where_trl_differs() -> None:
    """As docs/losses.md lists it; each of these would show if a later TRL agreed."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logps = example(21)
    # IPO is on means in DPOTrainer, on sums in CPOTrainer.
    assert abs(parse_loss("ipo:beta=0.1")(logps).mean().item() - of_trl(logps, "ipo")) > 1.0
    # Its likelihood term is a mean over the batch's tokens, ours over answers.
    tokens = logps.policy_chosen.sum() / logps.lengths[0].sum()
    assert of_trl(logps, "sft") == pytest.approx(-tokens.item())
    assert abs(parse_loss("nll_mean")(logps).mean().item() + tokens.item()) > 1e-3
    # SimPO: the same loss of a hard label; under label smoothing the target margin does not change sides there.
    call: Any = CPOTrainer.cpo_loss
    means = logps.per_token
    for smoothing in (0.0, 0.2):
        trainer = SimpleNamespace(alpha=0.0, accelerator=Accelerator, simpo_gamma=1.0, beta=2.0, loss_type="simpo",
                                  label_smoothing=smoothing)  # fmt: skip
        theirs = call(trainer, means.policy_chosen, means.policy_rejected)[0]
        ours = parse_loss("simpo")(logps, p=1 - smoothing)
        assert torch.allclose(ours, theirs) == (smoothing == 0.0)
    # CPO and ORPO: the preference terms are ours, the likelihood terms are means over tokens, ORPO's of the prompt too.
    trainer = SimpleNamespace(alpha=0.0, accelerator=Accelerator, beta=0.1, loss_type="sigmoid", label_smoothing=0.0)
    theirs = call(trainer, logps.policy_chosen, logps.policy_rejected)[0]
    torch.testing.assert_close(parse_loss("cpo:alpha=0")(logps), theirs)
    odds: Any = ORPOTrainer.odds_ratio_loss
    theirs = odds(SimpleNamespace(beta=0.1, accelerator=Accelerator), means.policy_chosen, means.policy_rejected)[0]
    ours = parse_loss("orpo")(logps) - parse_loss("nll_mean")(logps)
    torch.testing.assert_close(ours.float(), -theirs.float(), rtol=1e-4, atol=1e-6)


def test_kto_is_trls() -> None:
    from trl.trainer.kto_trainer import KTOTrainer

    generator = torch.Generator().manual_seed(3)
    policy, reference, other, other_reference = -20 * torch.rand(4, 6, generator=generator)
    good = torch.tensor([True, False, True, True, False, False])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=Accelerator, aux_loss_enabled=False, calculate_KL=True,
        precompute_ref_logps=True, loss_type="kto", beta=0.1, desirable_weight=1.3, undesirable_weight=0.7, _tp_size=1,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _compute_kl_logps=lambda *_: other,
    )  # fmt: skip
    mask = torch.ones(6, 2, dtype=torch.long)
    outputs = SimpleNamespace(log_probs=policy[:, None], entropy=policy[:, None], mean_logits=policy[:, None],
                              is_top1=mask[:, 1:].bool())  # fmt: skip
    inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask, "label": good,
              "ref_logps": reference, "ref_KL_logps": other_reference}  # fmt: skip
    call: Any = KTOTrainer._compute_loss
    theirs = call(trainer, Model(outputs), inputs, False).item()
    ours = kto(AnswerLogps(policy, reference, other, other_reference), desirable=1.3, undesirable=0.7, p=good.float())
    assert ours.mean().item() == pytest.approx(theirs, rel=1e-6)
