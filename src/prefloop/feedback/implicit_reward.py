"""The implicit reward of a DPO-trained model and its reference (DICE §2; Rafailov et al. 2023, Eq. 5).

    score(x, y) = log pi(y|x) - log pi_ref(y|x)        summed over response tokens, end token included

The score is the raw log-ratio, without beta, as in the released DICE code: beta changes no ranking within a prompt, and
a length coefficient found on this score says so (`beta_inside=False`). Multiply by beta for the reward of the paper.

As an annotator (`ImplicitReward`) it does, by the Bradley-Terry model that DPO fits:

    p(a > b) = sigmoid(beta (score(x, a) - score(x, b)))
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from prefloop.data.chat import ChatFormat
from prefloop.errors import InputError
from prefloop.feedback.annotator import Comparison, Judgement, abstention, ask_different, sigmoid
from prefloop.models import ModelRef, check_different, choose_device, context_length, load_model, load_tokenizer
from prefloop.progress import Advance, ignore
from prefloop.records import Group, Prompt, Response
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

    judges: Literal["response", "pair"] = "response"

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
            rewards = self._rewards({q.group: q.prompt_id for q in questions if isinstance(q, _Question)})
            advance(len(different))
            return [
                abstention(question) if isinstance(question, str) else question.judged(*rewards[question.group])
                for question in questions
            ]

        return ask_different(ask, comparisons, advance)

    def score(self, answers: Sequence[tuple[Prompt, Response]]) -> list[float | str]:
        """beta (log pi - log pi_ref) of every answer, or why there is none."""
        groups = [self._tokens(prompt, [response]) for prompt, response in answers]
        ids = [prompt.id for prompt, _ in answers]
        rewards = self._rewards({g: id for g, id in zip(groups, ids, strict=True) if not isinstance(g, str)})
        return [group if isinstance(group, str) else rewards[group][0] for group in groups]

    def _rewards(self, asked_of: "dict[TokenGroup, str]") -> dict["TokenGroup", list[float]]:
        """beta times the implicit rewards of the responses of every group; `asked_of`: group -> the prompt's id."""
        from prefloop.train.checks import check_finite
        from prefloop.train.reference import model_pass

        if not asked_of:
            return {}
        # Each once and sorted: a reward depends neither on the order of the questions nor on the slot of an answer.
        groups = sorted(asked_of, key=lambda group: (group.prompt_ids, group.responses))
        sums = []
        for model, ref in zip(self.models, self.refs, strict=True):
            found = model_pass(groups, model, ref.name, compute=self.compute, part="logps", stage=Stage.detached())
            check_finite(found.sums, [asked_of[group] for group in groups], ref.name)
            sums.append(found.sums)
        return {
            group: [self.beta * (a - b) for a, b in zip(ours, theirs, strict=True)]
            for group, ours, theirs in zip(groups, *sums, strict=True)
        }

    def _question(self, comparison: Comparison) -> "_Question | str":
        """The token ids of a comparison, its answers in an order of their own, or why it cannot be asked."""
        from prefloop.train.packing import TokenGroup

        group = self._tokens(comparison.prompt, [comparison.a, comparison.b])
        if isinstance(group, str):
            return group
        a, b = group.responses
        return _Question(TokenGroup(group.prompt_ids, (min(a, b), max(a, b))), b < a, comparison.prompt.id)

    def _tokens(self, prompt: Prompt, responses: Sequence[Response]) -> "TokenGroup | str":
        """The token ids of a prompt and its answers, or why they cannot be scored."""
        from prefloop.train.packing import TokenGroup

        try:
            prompt_ids = tuple(self.chat.prompt_ids(prompt))
        except InputError:
            return "the models' chat template does not take the conversation"
        ids = tuple(self.chat.own_ids(response).token_ids or () for response in responses)
        if not all(ids):
            return "an answer without tokens"
        if self.context is not None and len(prompt_ids) + max(map(len, ids)) > self.context:
            return f"longer than the models' context of {self.context} tokens"
        return TokenGroup(prompt_ids, ids)


class _Question(NamedTuple):
    """The ids of a comparison with its two answers in an order of their own; `flipped`: the first is b."""

    group: "TokenGroup"
    flipped: bool
    prompt_id: str

    def judged(self, first: float, second: float) -> Judgement:
        return Judgement(p=sigmoid(second - first if self.flipped else first - second))
