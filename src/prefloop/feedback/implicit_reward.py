"""The implicit reward of a DPO-trained model and its reference (DICE §2; Rafailov et al. 2023, Eq. 5).

    score(x, y) = log pi(y|x) - log pi_ref(y|x)        summed over response tokens, end token included

The score is the raw log-ratio, without beta, as in the released DICE code: beta changes no ranking within a prompt, and
a length coefficient found on this score says so (`beta_inside=False`). Multiply by beta for the reward of the paper.
"""

from collections.abc import Sequence

import numpy as np

from prefloop.errors import CheckFailed
from prefloop.models import ModelRef
from prefloop.records import Group, Response
from prefloop.run import Stage
from prefloop.train.config import Compute

# Mean gap per token, in nats, between the sampler's and the trainer's log-probability of the sampled ids. A working
# bfloat16 sampler was seen at 0.03; a wrong temperature, template or checkpoint gives several tenths.
SAMPLER_TOLERANCE = 0.15


def implicit_reward(
    groups: Sequence[Group],
    policy: ModelRef,
    reference: ModelRef,
    *,
    compute: Compute,
    stage: Stage | None = None,
) -> list[Group]:
    """The groups with `policy_logp`, `reference_logp` and `score` on every response.

    One model is in memory at a time. Raises CheckFailed when the sampler's own log-probabilities, where it gave any,
    show that it did not sample from `policy`.
    """
    from prefloop.train.reference import logps_under

    stage = stage or Stage.detached()
    items = [(group.prompt, group.responses) for group in groups]
    policy_logps = logps_under(policy, items, compute=compute, part="policy", stage=stage)
    _check_sampler(groups, policy_logps, policy, stage)
    reference_logps = logps_under(reference, items, compute=compute, part="reference", stage=stage)
    scored = []
    for group, ours, theirs in zip(groups, policy_logps, reference_logps, strict=True):
        responses = tuple(
            response.model_copy(update={"policy_logp": a, "reference_logp": b, "score": a - b})
            for response, a, b in zip(group.responses, ours, theirs, strict=True)
        )
        scored.append(group.model_copy(update={"responses": responses}))
    return scored


def _check_sampler(groups: Sequence[Group], logps: list[list[float]], policy: ModelRef, stage: Stage) -> None:
    pairs = [
        (response, logp)
        for group, row in zip(groups, logps, strict=True)
        for response, logp in zip(group.responses, row, strict=True)
        if response.sampling_logp is not None
    ]
    if not pairs:
        return
    gaps = np.array([abs(_sampling_logp(response) - logp) / response.length_tokens for response, logp in pairs])
    mean, p99 = float(gaps.mean()), float(np.quantile(gaps, 0.99))
    stage.event("sampler_gap", mean_per_token=mean, p99_per_token=p99, responses=len(pairs))
    if mean > SAMPLER_TOLERANCE:
        raise CheckFailed(
            f"the sampler's log-probabilities differ from those of {policy.name} by {mean:.3f} nats a token on average "
            f"(at most {SAMPLER_TOLERANCE} expected): the answers were not sampled from this model and "
            "chat template; sample again, or score with the model that sampled"
        )


def _sampling_logp(response: Response) -> float:
    assert response.sampling_logp is not None
    return response.sampling_logp
