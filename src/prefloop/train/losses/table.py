"""All losses by the name that `--loss` takes, and what such a text means.

simpo                        a loss with the hyper-parameters of its paper
simpo:gamma=1.6,beta=2.5     others
dpo+0.2*nll_mean             a weighted sum, each term with its own hyper-parameters
"""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from prefloop.errors import InputError, did_you_mean
from prefloop.train.losses import pairwise, reference_free
from prefloop.train.losses.logps import PairLogps, Soft
from prefloop.train.losses.unpaired import AnswerLogps, kto

Need = Literal["reference", "tail", "collision", "gap", "reference_sample"]
"""What a loss needs beside the policy's log-probabilities: those of the reference; both over the tokens beyond the
shorter answer's length; log sum_v pi(v)^2; the scores of both answers; which answer the reference gave.
"""


def needing(*needs: Need) -> frozenset[Need]:
    """The needs as a set of the right type."""
    return frozenset(needs)


REFERENCE, FREE = needing("reference"), needing()
SORTED = "it sorts the batch, so that its terms belong to no pair"


class Loss(NamedTuple):
    """A row of the table.

    line: when to use it. coupled: a pair's loss depends on the batch's other pairs. per_token: its margin is one of
    means over tokens. no_p, no_weight: why it takes no soft labels or no weights. unpaired: it is one of answers, not
    of pairs.
    """

    function: Callable[..., Tensor]
    line: str
    needs: frozenset[Need] = REFERENCE
    coupled: bool = False
    per_token: bool = False
    no_p: str = ""
    no_weight: str = ""
    unpaired: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Hyper-parameters and their defaults, as the function names them."""
        own = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in own if one.kind is one.KEYWORD_ONLY and one.name not in LABELS}

    @property
    def beta(self) -> float | None:
        """The default beta; None where the loss has none."""
        return self.options.get("beta")


LABELS = ("p", "weight")

LOSSES: dict[str, Loss] = {
    "dpo": Loss(pairwise.dpo, "the default; soft labels by p"),
    "cdpo": Loss(pairwise.cdpo, "labels of which a share epsilon is wrong: a bounded margin"),
    "robust_dpo": Loss(
        pairwise.robust_dpo,
        "rDPO: labels that flip at a known rate epsilon, corrected without bias",
        no_p="it corrects hard labels for a known flip rate, and a soft label is not a flipped one; use cdpo or dpo",
    ),
    "spce": Loss(pairwise.spce, "preference strengths p from a judge (OSP)"),
    "wdpo": Loss(
        pairwise.wdpo,
        "scored pairs: a large gap counts more (OPTune)",
        needs=needing("reference", "gap"),
        no_p="its pairs are ordered by the scores that weigh them",
    ),
    "ipo": Loss(pairwise.ipo, "near-deterministic labels, where DPO over-fits; on sums (OAIF)"),
    "ipo_mean": Loss(pairwise.ipo_mean, "IPO on means over tokens, as TRL and BPO have it", per_token=True),
    "slic": Loss(pairwise.slic, "hinge: stops once a pair is apart by 1/beta (OAIF's beta)"),
    "length_dpo": Loss(pairwise.length_dpo, "R-DPO: answers that grow too long; a charge alpha a token"),
    "ld_dpo": Loss(
        pairwise.ld_dpo,
        "LD-DPO: answers that grow too long; tokens beyond the shorter one count less",
        needs=needing("reference", "tail"),
    ),
    "ln_dpo": Loss(pairwise.ln_dpo, "DPO on means over tokens (Tulu 3)", per_token=True),
    "dpop": Loss(pairwise.dpop, "chosen answers that DPO makes less likely, as in pairs which differ in a few tokens"),
    "wpo": Loss(pairwise.wpo, "off-policy pairs: those the policy would sample itself count more",
                needs=needing("reference", "collision")),
    "exo": Loss(pairwise.exo, "reverse KL to the labels: seeks a mode instead of covering all"),
    "sppo_hard": Loss(pairwise.sppo_hard, "iterations of self-play; each answer has its own target"),
    "sppo_soft": Loss(pairwise.sppo_soft, "the same with win rates p as targets"),
    "apo_zero": Loss(pairwise.apo_zero, "chosen answers that are better than the model's own"),
    "apo_down": Loss(pairwise.apo_down, "chosen answers that are worse than the model's own"),
    "nca": Loss(pairwise.nca, "keeps the likelihood of chosen answers up"),
    "bco_pair": Loss(pairwise.bco_pair, "a classifier of good against bad; a part of MPO's mixture"),
    "discopop": Loss(pairwise.discopop, "found by search; not convex: undecided pairs are pushed back"),
    "f_dpo": Loss(pairwise.f_dpo, "another divergence from the reference: forward KL, JS, alpha"),
    "aot": Loss(pairwise.aot, "the whole distribution of margins moves up, not their mean", coupled=True,
                no_p=SORTED, no_weight=SORTED),
    "aot_unpaired": Loss(pairwise.aot_unpaired, "the same between all chosen and all rejected answers", coupled=True,
                         no_p=SORTED, no_weight=SORTED),
    "simpo": Loss(reference_free.simpo, "no reference, so no pass of one; means over tokens, a target margin", FREE,
                  per_token=True),
    "orpo": Loss(reference_free.orpo, "no reference: imitation and preference at once, from a base model", FREE,
                 per_token=True),
    "cpo": Loss(reference_free.cpo, "no reference: DPO with a uniform one, and imitation", FREE),
    "slic_hf": Loss(reference_free.slic_hf, "no reference: a hinge on log-probabilities, and imitation", FREE),
    "nll_mean": Loss(reference_free.nll_mean, "to add: likelihood of chosen answers, a token (RPO, IRPO)", FREE,
                     per_token=True),
    "nll_sum": Loss(reference_free.nll_sum, "to add: likelihood of chosen answers, whole", FREE),
    "xpo_bonus": Loss(pairwise.xpo_bonus, "to add: exploration, lowers answers that the reference gave (XPO)",
                      needing("reference_sample")),
    "kto": Loss(kto, "single answers called good or bad; a pair gives one of each", coupled=True, unpaired=True),
}  # fmt: skip
"""Losses by name."""

SHORT = {
    "hinge": "slic:beta=0.05",
    "irpo": "dpo+nll_mean",
    "rpo": "dpo+0.005*nll_mean",
    "xpo": "dpo+0.00001*xpo_bonus",
    "mpo_mix": "0.8*dpo+0.2*bco_pair+nll_mean",
}
"""Names for some losses with their usual hyper-parameters (RSO; IRPO; RPO; TRL's XPO; InternVL's mixture)."""

NOT_NEGATIVE = ("penalty", "desirable", "undesirable", "scale", "odds", "nll")
"""Hyper-parameters that would turn a loss round below 0."""

TERM = re.compile(r"(?:(?P<share>\d[\d.]*(?:e-?\d+)?)\*)?(?P<name>[a-z_]+)(?::(?P<options>[^+*:]+))?")


@dataclass(frozen=True)
class Term:
    """A loss of the table with a coefficient and all its hyper-parameters."""

    share: float
    name: str
    options: dict[str, Any]

    @property
    def row(self) -> Loss:
        return LOSSES[self.name]

    def __call__(self, logps: Any, **labels: Soft) -> Tensor:
        allowed = {"p": not self.row.no_p, "weight": not self.row.no_weight}
        given = {name: value for name, value in labels.items() if allowed[name]}
        return self.row.function(logps, **self.options, **given)


@dataclass(frozen=True)
class ChosenLoss:
    """What a `--loss` text says: a weighted sum of losses of the table.

    Called as a loss of the table is, with labels where `no_p` and `no_weight` are empty.
    """

    terms: tuple[Term, ...]

    def __call__(self, logps: Any, *, p: Soft = 1.0, weight: Soft = 1.0) -> Tensor:
        values = [term(logps, p=p, weight=weight) for term in self.terms]
        if len(values) == 1 and self.terms[0].share == 1.0:
            return values[0]
        return torch.stack([term.share * value for term, value in zip(self.terms, values, strict=True)]).sum(0)

    def __str__(self) -> str:
        """The text in full, every hyper-parameter named."""
        said: list[str] = []
        for term in self.terms:
            options = ",".join(f"{name}={value}" for name, value in term.options.items())
            share = "" if term.share == 1.0 else f"{term.share!r}*"
            said.append(share + term.name + (f":{options}" if options else ""))
        return "+".join(said)

    @property
    def scale(self) -> Term:
        """The term in whose units the margin is logged: the first that has a beta, else the first."""
        return next((term for term in self.terms if "beta" in term.options), self.terms[0])

    @property
    def beta(self) -> float | None:
        """Of `scale`."""
        return self.scale.options.get("beta")

    @property
    def needs(self) -> frozenset[Need]:
        found: set[Need] = set()
        for term in self.terms:
            found |= term.row.needs
        return frozenset(found)

    @property
    def referenced(self) -> bool:
        """Whether margins are of the log-ratio to a reference, not of the policy's log-probabilities alone."""
        return "reference" in self.needs or self.unpaired

    @property
    def coupled(self) -> bool:
        return any(term.row.coupled for term in self.terms)

    @property
    def per_token(self) -> bool:
        return self.scale.row.per_token

    @property
    def unpaired(self) -> bool:
        return self.terms[0].row.unpaired

    @property
    def no_p(self) -> str:
        """Why soft labels are refused, with the loss's name; empty where they are taken."""
        return next((f"{term.name}: {term.row.no_p}" for term in self.terms if term.row.no_p), "")

    @property
    def no_weight(self) -> str:
        """Why weights are refused, likewise."""
        return next((f"{term.name}: {term.row.no_weight}" for term in self.terms if term.row.no_weight), "")


def parse_loss(text: str, *, beta: float | None = None) -> ChosenLoss:
    """The loss that `text` names; `beta` for every term that has one and does not set its own.

    Raises InputError in one line for an unknown name or hyper-parameter and for a value out of range.
    """
    # Python writes 1e+20: that plus begins no term.
    terms = tuple(_terms(re.sub(r"(?<=\de)\+(?=\d)", "", text.replace(" ", ""))))
    if len(terms) > 1 and any(term.row.unpaired for term in terms):
        raise InputError(f"loss = {text!r}: kto is a loss of single answers and cannot be summed with others")
    if beta is not None:
        if not any("beta" in term.row.options for term in terms):
            raise InputError(f"beta = {beta}: the loss {text} has none; leave it out")
        if not any("beta" in term.row.options and "beta" not in term.options for term in terms):
            full = "+".join(SHORT.get(part, part) for part in text.split("+"))
            raise InputError(f"beta = {beta}: the loss {full} sets its own; leave one of them out")
        terms = tuple(_with(term, beta) for term in terms)
    filled = tuple(Term(term.share, term.name, term.row.options | term.options) for term in terms)
    for term in filled:
        _try(term)
    return ChosenLoss(filled)


def _terms(text: str) -> list[Term]:
    terms: list[Term] = []
    for part in text.split("+"):
        found = TERM.fullmatch(part)
        if not found:
            raise InputError(
                f"loss = {text!r}: {part!r} is no term; expected such as simpo, simpo:gamma=1.6 or dpo+0.2*nll_mean"
            )
        share, name = _number(f"loss = {text!r}: the weight", found["share"] or "1"), found["name"]
        if share == 0.0:
            raise InputError(f"loss = {text!r}: a term with weight 0 does nothing; leave it out")
        if name in SHORT:
            if found["options"]:
                raise InputError(f"loss = {text!r}: {name} is short for {SHORT[name]}; write that out to set options")
            terms += [Term(share * term.share, term.name, term.options) for term in _terms(SHORT[name])]
        elif name in LOSSES:
            terms.append(Term(share, name, _options(name, found["options"] or "")))
        else:
            names = [*LOSSES, *SHORT]
            raise InputError(f"unknown loss {name!r}.{did_you_mean(name, names)} Losses: {', '.join(names)}")
    return terms


def _options(name: str, text: str) -> dict[str, Any]:
    """`gamma=1.6,beta=2.5` as the loss's hyper-parameters, each of its default's type."""
    known = LOSSES[name].options
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        option, _, value = part.partition("=")
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"loss {name}: unknown option {option!r}, {has}.{did_you_mean(option, list(known))}")
        if option in found:
            raise InputError(f"loss {name}: {option} is there twice; give it once")
        found[option] = value if isinstance(known[option], str) else _number(f"loss {name}: {option}", value)
    return found


def _number(what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{what} = {text!r}: expected a number")
    return value


def _with(term: Term, beta: float) -> Term:
    given = {"beta": beta} if "beta" in term.row.options else {}
    return Term(term.share, term.name, given | term.options)


def _try(term: Term) -> None:
    """Raises InputError for hyper-parameters that the loss itself refuses, or with which it overflows."""
    beta = term.options.get("beta", 1.0)
    if not 0.0 < beta < float("inf"):
        raise InputError(f"loss {term.name}: beta = {beta}: should be greater than 0")
    for name, value in term.options.items():
        if name in NOT_NEGATIVE and value < 0:
            raise InputError(f"loss {term.name}: {name} = {value}: should be at least 0")
    reference = torch.full((25,), -2.0 * FAR)
    one, other = ((reference + moved).requires_grad_() for moved in torch.cartesian_prod(PROBES, PROBES).unbind(1))
    count = torch.full((25,), 100)
    tail = PairLogps(one / 2, other / 2, reference / 2, reference / 2)
    collision, gap = -torch.ones(25) * 100, torch.ones(25)
    pairs = PairLogps(one, other, reference, reference, count, count, tail, collision, collision, gap, gap > 0)
    try:
        value = term(AnswerLogps(one, reference, other, reference) if term.row.unpaired else pairs)
    except ValueError as error:
        raise InputError(f"loss {term.name}: {error}") from None
    slopes = torch.autograd.grad(value.sum(), (one, other), materialize_grads=True)
    if not all(bool(found.isfinite().all()) for found in (value, *slopes)):
        said = ", ".join(f"{name} = {value}" for name, value in term.options.items())
        raise InputError(
            f"loss {term.name}: with {said} its value or "
            f"gradient is no finite number where an answer is {FAR:g} nats from its reference; choose others"
        )


FAR = 300.0
PROBES = torch.tensor([-FAR, -1.0, 0.0, 1.0, FAR])
"""log pi - log pi_ref of the answers that hyper-parameters are tried on."""
