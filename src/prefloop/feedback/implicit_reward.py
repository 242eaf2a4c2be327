"""The implicit reward of a DPO-trained model and its reference (DICE §2; Rafailov et al. 2023, Eq. 5).

    score(x, y) = log pi(y|x) - log pi_ref(y|x)        summed over response tokens, end token included

The score is the raw log-ratio, without beta, as in the released DICE code: beta changes no ranking within a prompt, and
a length coefficient found on this score says so (`beta_inside=False`). Multiply by beta for the reward of the paper.
"""

from collections.abc import Sequence

from prefloop.models import ModelRef
from prefloop.records import Group
from prefloop.run import Stage
from prefloop.train.config import Compute


def implicit_reward(
    groups: Sequence[Group],
    policy: ModelRef,
    reference: ModelRef,
    *,
    compute: Compute,
    stage: Stage | None = None,
) -> list[Group]:
    """The groups with `policy_logp`, `reference_logp` and `score` on every response.

    One model is in memory at a time. That `policy` sampled the answers was checked when it did (sample/handover.py).
    """
    from prefloop.train.reference import logps_under

    stage = stage or Stage.detached()
    items = [(group.prompt, group.responses) for group in groups]
    policy_logps = logps_under(policy, items, compute=compute, part="policy", stage=stage)
    reference_logps = logps_under(reference, items, compute=compute, part="reference", stage=stage)
    scored = []
    for group, ours, theirs in zip(groups, policy_logps, reference_logps, strict=True):
        responses = tuple(
            response.model_copy(update={"policy_logp": a, "reference_logp": b, "score": a - b})
            for response, a, b in zip(group.responses, ours, theirs, strict=True)
        )
        scored.append(group.model_copy(update={"responses": responses}))
    return scored
