"""Ranked pairing (OSP, Zhai et al. 2024, arXiv 2405.14103): n answers judged against one baseline answer, then paired.

    s_i = P(y_i > y_base)            u_i = logit s_i            p_ij = sigmoid(u_i - u_j)

Under Bradley-Terry, s_i = sigmoid(r_i - r_base), so that u_i - u_j is the difference of two rewards and p_ij is what a
direct comparison would say. n - 1 comparisons (the baseline is one of the n, with u = 0) or n (it is another answer)
give all n (n - 1) / 2 strengths.
"""

import math
from collections.abc import Sequence
from typing import Literal

from prefloop.feedback.annotator import Comparison, Judgement, around_half, sigmoid
from prefloop.feedback.stage import Labels, label
from prefloop.pairs.tables import has_score
from prefloop.records import Group, Pair, Response
from prefloop.run import Stage

Pairing = Literal["all", "best_vs_rest", "mirrored"]
SURE = 1e-6
"""Strengths are kept this far from 0 and 1, where a judge that is certain would have an infinite reward."""


def tempered(judgement: Judgement, temperature: float) -> float | None:
    """P(a is preferred) with the judge's logits divided by `temperature`; None for an abstention.

    Of an annotator with slots, the logit of each order is divided and then the two are averaged.

    >>> round(tempered(Judgement(p=0.8), 2.0), 4)       # the odds 4 become 2
    0.6667
    """
    if judgement.p is None:
        return None
    if judgement.q_ab is None or judgement.q_ba is None:
        return _cooled(judgement.p, temperature)
    return around_half((_cooled(judgement.q_ab, temperature) - _cooled(judgement.q_ba, temperature)) / 2)


def _cooled(p: float, temperature: float) -> float:
    if temperature == 1 or p in (0, 1):
        return p
    return sigmoid((math.log(p) - math.log1p(-p)) / temperature)


def strength(s: float) -> float:
    """u = logit s, of an s no nearer to 0 or 1 than `SURE`.

    >>> strength(0.5), round(strength(1.0), 2)
    (0.0, 13.82)
    """
    s = min(max(s, SURE), 1 - SURE)
    return math.log(s) - math.log1p(-s)


def paired(ranked: Sequence[Response], pairing: Pairing) -> list[tuple[Response, Response]]:
    """The pairs of a ranking, best first: every one above every one below it, the best above all others, or the i-th
    best above the i-th worst.

    >>> a, b, c, d = (Response(text=text) for text in "abcd")
    >>> ["".join(r.text for r in two) for two in paired([a, b, c, d], "mirrored")]
    ['ad', 'bc']
    """
    n = len(ranked)
    if pairing == "mirrored":
        return [(ranked[i], ranked[n - 1 - i]) for i in range(n // 2)]
    above = range(n) if pairing == "all" else range(min(n, 1))
    return [(ranked[i], ranked[j]) for i in above for j in range(i + 1, n)]


def ranked_pairs(
    groups: Sequence[Group],
    *,
    pairing: Pairing,
    labels: Labels = "soft",
    reference: str | None = None,
    stage: Stage | None = None,
) -> list[Pair]:
    """Pairs of the responses ranked by their scores, which are the u_i; p = p_ij ("soft") or 1 ("hard").

    Equal scores keep the order of sampling. Responses without a score are left out and counted. Two answers that are
    the same, and pairs with p = 1/2, make no pair. `reference` is the fingerprint of the model whose log-probabilities
    the responses carry as `reference_logp`; the pairs carry them on.
    """
    stage = stage or Stage.detached()
    comparisons, judgements = [], []
    unranked = same = 0
    for group in groups:
        known = [response for response in group.responses if has_score(response)]
        unranked += len(group.responses) - len(known)
        for better, worse in paired(sorted(known, key=_u, reverse=True), pairing):
            if better.same_as(worse):
                same += 1
                continue
            comparisons.append(Comparison(group.prompt, better, worse))
            judgements.append(Judgement(p=sigmoid(_u(better) - _u(worse))))
    for reason, n in (("answers not ranked: no strength", unranked), ("pairs dropped: identical answers", same)):
        if n:
            stage.count(reason, n)
    pairs = label(comparisons, judgements, labels=labels, stage=stage)
    if pairs:
        stage.figure("mean strength p of the pairs", math.fsum(_u_gap(pair) for pair in pairs) / len(pairs))
    return [pair.model_copy(update=_known(pair, reference)) for pair in pairs]


def _u(response: Response) -> float:
    assert response.score is not None
    return response.score


def _u_gap(pair: Pair) -> float:
    return sigmoid(_u(pair.chosen) - _u(pair.rejected))


def _known(pair: Pair, reference: str | None) -> dict[str, object]:
    logps = (pair.chosen.reference_logp, pair.rejected.reference_logp)
    known: dict[str, object] = {"chosen_score": pair.chosen.score, "rejected_score": pair.rejected.score}
    return known if reference is None or None in logps else {**known, "reference_logps": logps, "reference": reference}
