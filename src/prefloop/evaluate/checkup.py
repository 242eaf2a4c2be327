"""One model looked at beside the start model: held-out reward accuracy, lengths, likelihoods and drift."""

from collections.abc import Sequence

import numpy as np

from prefloop.evaluate.reward_accuracy import accuracy, mean_interval
from prefloop.models import ModelRef
from prefloop.records import Group, Pair, Record
from prefloop.run import Stage
from prefloop.train.config import Compute


class Checkup(Record):
    """What is known of one model. Log-probabilities in nats; "change" is this model minus the start model.

    accuracy, margin: of the implicit reward on held-out pairs, as the loss has it: beta (log pi - log pi_start), beta
    log pi for a loss without a reference, means over tokens for one of these; [value, low, high] at 95 %.
    chosen_change, rejected_change: mean change of the summed log-probability of held-out responses.
    chosen_nll_per_token: of the held-out chosen responses under this model.
    length_chars, length_tokens, finished: of own answers to held-out prompts.
    reward: of these answers, where someone scores them, [value, low, high]; as given, not standardised.
    kl_per_token: estimate of KL(pi || pi_start) per token from own answers, [value, low, high].
    """

    model: str
    pairs: int
    accuracy: tuple[float, float, float] | None = None
    margin: tuple[float, float, float] | None = None
    chosen_change: float | None = None
    rejected_change: float | None = None
    chosen_nll_per_token: float | None = None
    answers: int
    length_chars: tuple[float, float, float] | None = None
    length_tokens: float | None = None
    finished: float | None = None
    reward: tuple[float, float, float] | None = None
    kl_per_token: tuple[float, float, float] | None = None


def checkup(
    model: ModelRef,
    start: ModelRef,
    held_out: Sequence[Pair],
    answers: Sequence[Group],
    *,
    beta: float,
    per_token: bool = False,
    referenced: bool = True,
    compute: Compute,
    stage: Stage | None = None,
) -> Checkup:
    """Look at `model` on held-out pairs, whose `reference_logps` are the start model's, and on its own answers.

    `beta`, `per_token`, `referenced`: what the margin is made of (`margins_of`).
    """
    from prefloop.train.reference import logps_under

    stage = stage or Stage.detached()
    pair_items = [(pair.prompt, (pair.chosen, pair.rejected)) for pair in held_out]
    answer_items = [(group.prompt, group.responses) for group in answers]
    before = [list(pair.reference_logps or ()) for pair in held_out]
    if model.fingerprint == start.fingerprint:
        base = own = logps_under(model, answer_items, compute=compute, part="own", stage=stage)
        now = before
    else:
        both = logps_under(model, [*pair_items, *answer_items], compute=compute, part="own", stage=stage)
        now, own = both[: len(held_out)], both[len(held_out) :]
        base = logps_under(start, answer_items, compute=compute, part="start", stage=stage)
    figures: dict[str, object] = {"model": model.name, "pairs": len(held_out), "answers": len(answers)}
    if held_out:
        change = np.array(now) - np.array(before)
        margins = margins_of(held_out, now, before, beta=beta, per_token=per_token, referenced=referenced)
        tokens = sum(pair.chosen.length_tokens for pair in held_out)
        figures |= {
            "accuracy": accuracy(margins),
            "margin": mean_interval(margins),
            "chosen_change": float(change[:, 0].mean()),
            "rejected_change": float(change[:, 1].mean()),
            "chosen_nll_per_token": -sum(row[0] for row in now) / tokens,
        }
    responses = [response for group in answers for response in group.responses]
    if responses:
        mine = [value for row in own for value in row]
        theirs = [value for row in base for value in row]
        drift = [(a - b) / response.length_tokens for a, b, response in zip(mine, theirs, responses, strict=True)]
        figures |= {
            "length_chars": mean_interval([response.length_chars for response in responses]),
            "length_tokens": float(np.mean([response.length_tokens for response in responses])),
            "finished": float(np.mean([response.finish_reason == "stop" for response in responses])),
            "kl_per_token": mean_interval(drift),
        }
    rewards = [response.score for response in responses if response.score is not None]
    if rewards:
        figures["reward"] = mean_interval(rewards)
    return Checkup.model_validate(figures)


def margins_of(
    pairs: Sequence[Pair],
    now: Sequence[Sequence[float]],
    before: Sequence[Sequence[float]],
    *,
    beta: float,
    per_token: bool,
    referenced: bool,
) -> list[float]:
    """The margin of every pair in the units in which training logs it (`pair_metrics`).

    `now` and `before`: summed log-probabilities of (chosen, rejected) under the model and the start model.
    """
    import torch

    from prefloop.train.losses import PairLogps, pair_metrics

    own, start = (torch.tensor(rows, dtype=torch.float64) for rows in (now, before))
    logps = PairLogps(
        own[:, 0],
        own[:, 1],
        start[:, 0] if referenced else None,
        start[:, 1] if referenced else None,
        torch.tensor([pair.chosen.length_tokens for pair in pairs]),
        torch.tensor([pair.rejected.length_tokens for pair in pairs]),
    )
    return pair_metrics(logps, beta=beta, per_token=per_token)["margin"].tolist()
