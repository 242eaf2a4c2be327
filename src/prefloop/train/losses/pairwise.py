"""Losses of a policy against its reference: pair log-probabilities in, one value per pair out.

h = rho(y_w) - rho(y_l), rho(y) = log pi(y|x) - log pi_ref(y|x), summed over tokens unless a name or an argument says
otherwise. `p` is P(chosen is preferred): the loss is p times the loss of the pair as it is plus 1 - p times the loss of
the pair with chosen and rejected exchanged (`exo` alone puts it elsewhere). `weight` multiplies the pair's loss. A loss
that gives either no meaning does not take it; `prefloop.train.losses.LOSSES` says why.

No reduction, no metrics, no logging. Legend: B pairs. docs/losses.md has gradients, values at zero and uses.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.train.losses.logps import PairLogps, Soft, needed

CAP = 30.0
"""Of exponents in f-divergences: beyond e^30 the exponential goes on as its tangent, so that nothing overflows."""


def logistic(margin: Float[Tensor, " B"], p: Soft = 1.0) -> Float[Tensor, " B"]:
    """-p log sigmoid(margin) - (1 - p) log sigmoid(-margin): cross-entropy of a Bradley-Terry preference."""
    return -p * logsigmoid(margin) - (1.0 - p) * logsigmoid(-margin)


def either(loss: Callable[[PairLogps], Tensor], logps: PairLogps, p: Soft) -> Float[Tensor, " B"]:
    """p times the loss of the pairs, 1 - p times that of the pairs with the other label."""
    return p * loss(logps) + (1.0 - p) * loss(logps.swapped)


def within(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError for a hyper-parameter outside [low, high)."""
    if not low <= value < high:
        raise ValueError(f"{name} = {value}: should be at least {low} and less than {high}")


def dpo(logps: PairLogps, *, beta: float = 0.1, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """Direct preference optimisation (Rafailov et al. 2023, Eq. 7; beta 0.1: section 6), soft labels where `p` < 1.

        loss = -p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h)

    ln 2 at h = 0; slope there -beta (p - 1/2).

    >>> import torch
    >>> zero = torch.zeros(1)
    >>> round(dpo(PairLogps(zero, zero, zero, zero)).item(), 6)
    0.693147
    """
    return weight * logistic(beta * logps.h, p)


def cdpo(
    logps: PairLogps, *, beta: float = 0.1, epsilon: float = 0.1, p: Soft = 1.0, weight: Soft = 1.0
) -> Float[Tensor, " B"]:
    """Conservative DPO (Mitchell 2023): DPO whose labels are taken to be wrong with probability `epsilon`.

    The soft label is p (1 - epsilon) + (1 - p) epsilon; h is pulled to ln((1 - epsilon)/epsilon)/beta. `epsilon` 0.1 is
    ours: the note names none.
    """
    within("epsilon", epsilon, 0.0, 0.5)
    return weight * logistic(beta * logps.h, p * (1.0 - epsilon) + (1.0 - p) * epsilon)


def robust_dpo(logps: PairLogps, *, beta: float = 0.1, epsilon: float = 0.1, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """rDPO (Chowdhury et al. 2024, Eq. 12; beta 0.1, epsilon 0.1): unbiased where labels flip with rate `epsilon`.

        loss = [-(1 - epsilon) log sigmoid(beta h) + epsilon log sigmoid(-beta h)] / (1 - 2 epsilon)

    Its mean over flips is DPO's loss. Not bounded below.
    """
    within("epsilon", epsilon, 0.0, 0.5)
    margin = beta * logps.h
    return weight * (-(1.0 - epsilon) * logsigmoid(margin) + epsilon * logsigmoid(-margin)) / (1.0 - 2.0 * epsilon)


def ipo(logps: PairLogps, *, beta: float = 1.0, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """Identity preference optimisation (Azar et al. 2024, Eq. 17; OAIF Eq. 2), on log-probabilities summed over tokens.

        loss = p (h - 1 / (2 beta))^2 + (1 - p) (h + 1 / (2 beta))^2

    `beta` is the paper's tau: h is pulled to 1 / (2 beta) and not beyond. 1 / (4 beta^2) at h = 0; slope -1 / beta
    times (2 p - 1). OAIF uses 1.0.
    """
    return weight * _squares(logps.h, 1.0 / (2.0 * beta), p)


def ipo_mean(logps: PairLogps, *, beta: float = 0.1, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """IPO on log-ratios averaged over each response's tokens, as BPO's code (beta 0.1) and TRL compute it."""
    return weight * _squares(logps.per_token.h, 1.0 / (2.0 * beta), p)


def _squares(h: Tensor, target: float, p: Soft) -> Tensor:
    return p * (h - target) ** 2 + (1.0 - p) * (h + target) ** 2


def slic(logps: PairLogps, *, beta: float = 0.002, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """The hinge of SLiC (Zhao et al. 2023) on the log-ratio, without its likelihood term (RSO; OAIF Eq. 3).

        loss = p max(0, 1 - beta h) + (1 - p) max(0, 1 + beta h)

    1 at h = 0, slope -beta (2 p - 1) there. It stops at h = 1 / beta: 500 nats with OAIF's 0.002.
    """
    margin = beta * logps.h
    return weight * (p * (1.0 - margin).clamp(min=0) + (1.0 - p) * (1.0 + margin).clamp(min=0))


def spce(logps: PairLogps, *, beta: float = 0.1, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """Soft-preference cross-entropy (OSP, Zhai et al. 2024): DPO's with `p` the strength of the preference.

    h is pulled to logit(p) / beta, where the loss is the entropy of p. `beta` is DPO's; the paper's was not seen.
    """
    return dpo(logps, beta=beta, p=p, weight=weight)


def wdpo(
    logps: PairLogps, *, beta: float = 0.1, scale: float = 1.0, shape: str = "linear", weight: Soft = 1.0
) -> Float[Tensor, " B"]:
    """Weighted DPO (OPTune, Chen et al. 2024): DPO times a weight that grows with the gap of the scores.

        linear: scale max(0, gap)        sigmoid: sigmoid(scale gap)        none: 1

    The paper's form and scale are not confirmed; `linear` and 1 are our reading.
    """
    gap = needed(logps.gap, "the scores of both answers")
    weights = {"linear": scale * gap.clamp(min=0), "sigmoid": torch.sigmoid(scale * gap), "none": torch.ones_like(gap)}
    if shape not in weights:
        raise ValueError(f"shape = {shape!r}: should be one of {', '.join(weights)}")
    return weight * weights[shape] * dpo(logps, beta=beta)


def length_dpo(
    logps: PairLogps, *, beta: float = 0.1, alpha: float = 0.01, p: Soft = 1.0, weight: Soft = 1.0
) -> Float[Tensor, " B"]:
    """R-DPO (Park et al. 2024): length-regularised DPO.

        margin = beta h + alpha (|y_w| - |y_l|)

    With `alpha` > 0 a chosen answer that is longer gets a smaller gradient. `alpha` 0.01 a token is ours.
    """
    chosen, rejected = logps.lengths
    return weight * logistic(beta * logps.h + alpha * (chosen - rejected), p)


def ld_dpo(
    logps: PairLogps, *, beta: float = 0.1, alpha: float = 0.5, p: Soft = 1.0, weight: Soft = 1.0
) -> Float[Tensor, " B"]:
    """LD-DPO (Liu et al. 2024): tokens beyond the length of the shorter answer count `alpha` times (1: DPO; 0: not at
    all). 0.5 is suggested for models after instruction tuning.
    """
    within("alpha", alpha, 0.0, 1.0 + 1e-9)
    if logps.tail is None:
        raise ValueError("these pair log-probabilities come without those of the tail, which ld_dpo needs")
    return weight * logistic(beta * (logps.h - (1.0 - alpha) * logps.tail.h), p)


def ln_dpo(logps: PairLogps, *, beta: float = 5.0, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """Length-normalised DPO (Tulu 3, Lambert et al. 2024; beta 5): DPO on log-ratios averaged over tokens."""
    return weight * logistic(beta * logps.per_token.h, p)


def dpop(
    logps: PairLogps, *, beta: float = 0.3, penalty: float = 50.0, p: Soft = 1.0, weight: Soft = 1.0
) -> Float[Tensor, " B"]:
    """DPO-positive (Smaug, Pal et al. 2024): a chosen answer that gets less likely than under the reference costs.

        margin = beta (h - penalty max(0, -rho(y_w)))

    `penalty` is the paper's lambda (5 to 50).
    """

    def hard(logps: PairLogps) -> Tensor:
        return logistic(beta * (logps.h - penalty * (-logps.chosen_ratio).clamp(min=0)))

    return weight * either(hard, logps, p)


def wpo(logps: PairLogps, *, beta: float = 0.01, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """Weighted preference optimisation (Zhou et al. 2024, Eq. 2; beta 0.01): DPO times `wpo_weights`."""
    return weight * wpo_weights(logps) * logistic(beta * logps.h, p)


def wpo_weights(logps: PairLogps) -> Float[Tensor, " B"]:
    """How much the policy would itself have sampled the pair, w(y_w) w(y_l), without gradient.

        w(y) = exp mean_t [log pi(y_t) - log sum_v pi(v)^2]

    1 for uniform and for sure next-token distributions; may exceed 1.
    """
    chosen, rejected = logps.lengths
    collision = "log sum_v pi(v)^2"
    log_weight = (logps.policy_chosen - needed(logps.chosen_collision, collision)) / chosen
    log_weight = log_weight + (logps.policy_rejected - needed(logps.rejected_collision, collision)) / rejected
    return log_weight.detach().exp()


def exo(
    logps: PairLogps, *, beta: float = 0.1, epsilon: float = 1e-3, p: Soft = 1.0, weight: Soft = 1.0
) -> Float[Tensor, " B"]:
    """EXO-pref for two answers (Ji et al. 2024, Eq. 16; epsilon 1e-3): reverse KL from the policy's preference q to the
    label's.

        q = sigmoid(beta h),  t = p (1 - epsilon) + (1 - p) epsilon,  loss = q log(q/t) + (1 - q) log((1 - q)/(1 - t))

    `p` moves the target, not a mixture of losses. Zero at beta h = logit(t).
    """
    within("epsilon", epsilon, 1e-12, 0.5)
    margin = beta * logps.h
    # Both sides of the target: 1 - (1 - epsilon) would leave few digits of epsilon.
    target, rest = (
        torch.as_tensor(one * (1.0 - epsilon) + (1.0 - one) * epsilon, dtype=margin.dtype, device=margin.device).log()
        for one in (p, 1.0 - p)
    )
    log_q, log_rest = logsigmoid(margin), logsigmoid(-margin)
    return weight * (log_q.exp() * (log_q - target) + log_rest.exp() * (log_rest - rest))


def sppo_hard(logps: PairLogps, *, beta: float = 1e-3, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """Self-play preference optimisation (Wu et al. 2024, Eq. 4.7; beta = 1/eta = 1e-3) with hard win rates.

        loss = (rho(y_w) - 1/(2 beta))^2 + (rho(y_l) + 1/(2 beta))^2

    Each answer is regressed on its own target; the reference is the policy of the iteration before.
    """

    def hard(logps: PairLogps) -> Tensor:
        return (logps.chosen_ratio - 0.5 / beta) ** 2 + (logps.rejected_ratio + 0.5 / beta) ** 2

    return weight * either(hard, logps, p)


def sppo_soft(logps: PairLogps, *, beta: float = 1e-3, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """SPPO with soft win rates: targets (p - 1/2)/beta and (1/2 - p)/beta. The gradients are those of `sppo_hard`."""
    target = (p - 0.5) / beta
    return weight * ((logps.chosen_ratio - target) ** 2 + (logps.rejected_ratio + target) ** 2)


def apo_zero(logps: PairLogps, *, beta: float = 0.1, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """Anchored preference optimisation, zero (D'Oosterlinck et al. 2024, Eq. 7; beta 0.1): chosen up, rejected down.

    loss = 1 - sigmoid(beta rho(y_w)) + sigmoid(beta rho(y_l))
    """

    def hard(logps: PairLogps) -> Tensor:
        return 1.0 - torch.sigmoid(beta * logps.chosen_ratio) + torch.sigmoid(beta * logps.rejected_ratio)

    return weight * either(hard, logps, p)


def apo_down(logps: PairLogps, *, beta: float = 0.1, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """Anchored preference optimisation, down (Eq. 8): both down, rejected further; for answers worse than the model's.

    loss = sigmoid(beta rho(y_w)) + 1 - sigmoid(beta h)
    """

    def hard(logps: PairLogps) -> Tensor:
        return torch.sigmoid(beta * logps.chosen_ratio) + 1.0 - torch.sigmoid(beta * logps.h)

    return weight * either(hard, logps, p)


def nca(logps: PairLogps, *, beta: float = 0.1, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """Noise-contrastive alignment for pairs (Chen et al. 2024): keeps the chosen answer's likelihood up.

    loss = -log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l),    r = beta rho
    """

    def hard(logps: PairLogps) -> Tensor:
        won, lost = beta * logps.chosen_ratio, beta * logps.rejected_ratio
        return -logsigmoid(won) - 0.5 * logsigmoid(-won) - 0.5 * logsigmoid(-lost)

    return weight * either(hard, logps, p)


def bco_pair(
    logps: PairLogps, *, beta: float = 0.1, shift: float = 0.0, p: Soft = 1.0, weight: Soft = 1.0
) -> Float[Tensor, " B"]:
    """Binary classifier optimisation on pairs (Jung et al. 2024): a classifier of good against bad, beta rho its logit.

        loss = -log sigmoid(beta rho(y_w) - shift) - log sigmoid(-(beta rho(y_l) - shift))

    `shift` is the paper's delta, there a running mean of rewards; 0, as everybody uses it on pairs.
    """

    def hard(logps: PairLogps) -> Tensor:
        return -logsigmoid(beta * logps.chosen_ratio - shift) - logsigmoid(shift - beta * logps.rejected_ratio)

    return weight * either(hard, logps, p)


def discopop(
    logps: PairLogps, *, beta: float = 0.1, tau: float = 0.05, p: Soft = 1.0, weight: Soft = 1.0
) -> Float[Tensor, " B"]:
    """DiscoPOP (Lu et al. 2024, Eq. 5; tau 0.05), found by a language model: logistic below zero, exponential above.

    m = beta h,  s = sigmoid(m / tau),  loss = (1 - s) (-log sigmoid(m)) + s exp(-m)

    Not convex: at h = 0 the slope is beta [(1 - ln 2) / (4 tau) - 3/4] > 0. With `tau` above 1 the loss of a pair on
    the wrong side would grow exponentially.
    """
    within("tau", tau, 1e-6, 1.0 + 1e-9)

    def hard(margin: Tensor) -> Tensor:
        gate = margin / tau
        # exp(-m) s as one exponential: the first factor alone overflows where the second is zero.
        return torch.sigmoid(-gate) * -logsigmoid(margin) + (logsigmoid(gate) - margin).exp()

    margin = beta * logps.h
    return weight * (p * hard(margin) + (1.0 - p) * hard(-margin))


def f_dpo(
    logps: PairLogps,
    *,
    beta: float = 0.1,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    p: Soft = 1.0,
    weight: Soft = 1.0,
) -> Float[Tensor, " B"]:
    """f-DPO (Wang et al. 2024): the regulariser is a divergence other than the reverse KL; f'(pi/pi_ref) replaces rho.

        reverse_kl  rho        forward_kl  -e^-rho        js  log sigmoid(rho)        alpha  -e^(-alpha rho) / alpha

    Constants cancel. `alpha`, in (0, 1), is the paper's; TRL's coefficient is 1 - alpha. It matters to `alpha` only.
    """
    within("alpha", alpha, 1e-6, 1.0)
    scores: dict[str, Callable[[Tensor], Tensor]] = {
        "reverse_kl": lambda rho: rho,
        "forward_kl": lambda rho: -capped_exp(-rho),
        "js": logsigmoid,
        "alpha": lambda rho: -capped_expm1(-alpha * rho) / alpha,
    }
    if divergence not in scores:
        raise ValueError(f"divergence = {divergence!r}: should be one of {', '.join(scores)}")
    score = scores[divergence]
    return weight * logistic(beta * (score(logps.chosen_ratio) - score(logps.rejected_ratio)), p)


def capped_exp(x: Tensor) -> Tensor:
    """e^x, and its tangent beyond `CAP`."""
    below = x.clamp(max=CAP)
    return below.exp() * (1.0 + (x - below))


def capped_expm1(x: Tensor) -> Tensor:
    """`capped_exp` less one, exact near 0: what is left of e^(-alpha rho) / alpha, where alpha is small, is rho."""
    below = x.clamp(max=CAP)
    return below.expm1() + below.exp() * (x - below)


def aot(logps: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """Alignment via optimal transport, paired (Melnyk et al. 2024): the batch's distribution of log pi(y_w) - log
    pi(y_l) dominates that of the reference.

        loss_i = -log sigmoid(beta (u_(i) - v_(i))),   u, v: the two differences, each sorted over the batch
    """
    own = logps.policy_chosen - logps.policy_rejected
    reference = needed(logps.reference_chosen, "reference log-probabilities") - needed(
        logps.reference_rejected, "reference log-probabilities"
    )
    return logistic(beta * (own.sort().values - reference.sort().values))


def aot_unpaired(logps: PairLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """AOT, unpaired: rho of the chosen answers dominates rho of the rejected ones, each sorted over the batch."""
    return logistic(beta * (logps.chosen_ratio.sort().values - logps.rejected_ratio.sort().values))


def xpo_bonus(logps: PairLogps, *, p: Soft = 1.0, weight: Soft = 1.0) -> Float[Tensor, " B"]:
    """XPO's exploration bonus (Xie et al. 2024): log pi of the answer that the reference gave, which is lowered.

    To be added to DPO with a small coefficient (TRL: 1e-5). The label plays no part, so `p` changes nothing.
    """
    of_chosen = needed(logps.chosen_is_reference_sample, "which answer the reference gave")
    return weight * torch.where(of_chosen, logps.policy_chosen, logps.policy_rejected)
