"""The implicit reward of a DPO-trained model and its reference (DICE §2; Rafailov et al. 2023, Eq. 5).

    score(x, y) = log pi(y|x) - log pi_ref(y|x)        summed over response tokens, end token included

The score is the raw log-ratio, without beta, as in the released DICE code: beta changes no ranking within a prompt, and
a length coefficient found on this score says so (`beta_inside=False`). Multiply by beta for the reward of the paper.

As an annotator (`ImplicitReward`) it does, by the Bradley-Terry model that DPO fits:

    p(a > b) = sigmoid(beta (score(x, a) - score(x, b)))
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from prefloop.data.chat import ChatFormat
from prefloop.errors import InputError
from prefloop.feedback.annotator import Comparison, Judgement, abstention, ask_different, sigmoid
from prefloop.models import ModelRef, check_different, choose_device, context_length, load_model, load_tokenizer
from prefloop.progress import Advance, ignore
from prefloop.records import Group
from prefloop.run import Stage
from prefloop.train.config import Compute

if TYPE_CHECKING:
    from prefloop.train.packing import TokenGroup


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


class ImplicitReward:
    """Judges by the implicit rewards of two answers. Both models stay in memory: an online method asks at every step.

    A question that is too long for a model, or an answer without a token, is an abstention. Raises InputError when both
    models have the same weights.
    """

    def __init__(self, policy: ModelRef, reference: ModelRef, *, beta: float, compute: Compute) -> None:
        from prefloop.train.reference import choose_dtype

        check_different(policy, reference)
        self.beta, self.compute = beta, compute
        self.refs = (policy, reference)
        device = choose_device(compute.device)
        self.models = tuple(load_model(ref, device=device).requires_grad_(False) for ref in self.refs)
        self.chat = ChatFormat(load_tokenizer(policy))
        self.context = min((limit for model in self.models if (limit := context_length(model))), default=None)
        self.name = f"implicit-reward:{policy.name},{reference.name}"
        dtype = choose_dtype(compute, device)
        self.identity = f"implicit-reward:{policy.fingerprint},{reference.fingerprint} beta={beta} {dtype}"

    def judge(self, comparisons: Sequence[Comparison], *, advance: Advance = ignore) -> list[Judgement]:
        def ask(different: Sequence[Comparison]) -> list[Judgement]:
            questions = [self._question(comparison) for comparison in different]
            rewards = self._rewards([question for question in questions if isinstance(question, _Question)])
            advance(len(different))
            return [
                abstention(question) if isinstance(question, str) else question.judged(*rewards[question.group])
                for question in questions
            ]

        return ask_different(ask, comparisons, advance)

    def _rewards(self, questions: Sequence["_Question"]) -> dict["TokenGroup", tuple[float, float]]:
        """beta times the implicit reward of both answers of every question's group."""
        from prefloop.train.checks import check_finite
        from prefloop.train.reference import model_pass

        if not questions:
            return {}
        # Each once and sorted: a reward depends neither on the order of the questions nor on the slot of an answer.
        asked_of = {question.group: question.prompt_id for question in questions}
        groups = sorted(asked_of, key=lambda group: (group.prompt_ids, group.responses))
        sums = []
        for model, ref in zip(self.models, self.refs, strict=True):
            found = model_pass(groups, model, ref.name, compute=self.compute, part="logps", stage=Stage.detached())
            check_finite(found.sums, [asked_of[group] for group in groups], ref.name)
            sums.append(found.sums)
        return {
            group: (self.beta * (ours[0] - theirs[0]), self.beta * (ours[1] - theirs[1]))
            for group, ours, theirs in zip(groups, *sums, strict=True)
        }

    def _question(self, comparison: Comparison) -> "_Question | str":
        """The token ids of a comparison, or why it cannot be asked."""
        from prefloop.train.packing import TokenGroup

        try:
            prompt_ids = tuple(self.chat.prompt_ids(comparison.prompt))
        except InputError:
            return "the models' chat template does not take the conversation"
        a, b = (self.chat.with_token_ids(response).token_ids or () for response in (comparison.a, comparison.b))
        if not a or not b:
            return "an answer without tokens"
        if self.context is not None and len(prompt_ids) + max(len(a), len(b)) > self.context:
            return f"longer than the models' context of {self.context} tokens"
        return _Question(TokenGroup(prompt_ids, (min(a, b), max(a, b))), b < a, comparison.prompt.id)


class _Question(NamedTuple):
    """The ids of a comparison with its two answers in an order of their own; `flipped`: the first is b."""

    group: "TokenGroup"
    flipped: bool
    prompt_id: str

    def judged(self, first: float, second: float) -> Judgement:
        return Judgement(p=sigmoid(second - first if self.flipped else first - second))
