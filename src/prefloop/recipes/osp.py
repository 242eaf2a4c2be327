"""OSP: online self-preferring language models (Zhai et al. 2024, arXiv 2405.14103).

Start: a model pi(0) that can answer and, asked which of two answers is better, can judge; prompts. With --pairs, a
model learns to judge first, from labelled pairs, by the token of the right option: that is pi(0). Round t = 1..T:
1. Sample n answers to every prompt from pi(t-1).
2. Compare each with one baseline answer: one of the n (n - 1 comparisons), or an answer of pi(0) (n). The judge is
   pi(t-1) itself, by the probability of the option that it would name next, in both orders, averaged:

       s_i = P(y_i > y_base) = 1/2 [q(y_i, y_base) + 1 - q(y_base, y_i)],      q = sigmoid((l_1 - l_2) / temperature)

3. Rank by u_i = logit s_i and pair from the ranking, with the strength that Bradley-Terry gives two answers which were
   never compared: p_ij = sigmoid(u_i - u_j).
4. Soft-preference cross-entropy (SPCE) from pi(t-1) against pi(0), for a fixed number of steps: pi(t).

       loss = -p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h)
       h = log pi/pi(0) (y_i|x) - log pi/pi(0) (y_j|x)

p is a number by the time of training: no gradient goes through the judge, though it is the same network.

The paper's n, pairing, baseline and beta were not seen; they are options (docs/methods/osp.md says which defaults, and
why). Departures: AdamW; identical answers and pairs with p = 1/2 are left out.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prefloop.config import Config
from prefloop.feedback.options import AnnotatorName, Feedback
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, resolve
from prefloop.pairs.ranked import Pairing, ranked_pairs, strength, tempered
from prefloop.recipes.dpo import dpo_round
from prefloop.recipes.steps import (
    LookAt,
    apart_from,
    check_room,
    conclude,
    held_back,
    load,
    look_at,
    prompts_and_held_out,
    some,
)
from prefloop.records import Group, Pair, Prompt, Response
from prefloop.run import Round, Run, Stage
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.sample.stage import sample
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Train

if TYPE_CHECKING:
    from prefloop.evaluate.win_rate import WinRate
    from prefloop.feedback.annotator import Annotator, Comparison, Judgement

Baseline = Literal["own", "start"]


class OspConfig(Config):
    """Options of `prefloop osp`."""

    policy: str = Field(default="", description="pi(0), the model that answers and judges")
    prompts: str = Field(default="", description="prompts: a file, a data set folder or hub name, or seed:train")
    held_out: str = Field(default="", description="prompts to look at models with; a tenth of them when left out")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    pairs: str = Field(default="", description="labelled pairs to learn to judge from; none: it judges as it is")
    annotator: AnnotatorName = Field(
        default="", description="who judges in place of the round's own policy (paper: itself), as in `prefloop oaif`"
    )
    feedback: Feedback = Field(
        default_factory=lambda: Feedback(labels="soft"),
        description="of the judge; labels hard makes p = 1, which is DPO on the same pairs",
    )
    evaluator: str = Field(default="", description="annotator for win rates against pi(0); none: no win rates")
    evaluation: Feedback = Field(
        default_factory=lambda: Feedback(instruction="helpfulness-scoring"), description="the evaluator's own options"
    )
    rounds: int = Field(default=3, ge=1, description="T (paper: unseen)")
    n: int = Field(default=4, ge=2, description="answers a prompt (paper: unseen)")
    prompts_per_round: int | None = Field(default=None, ge=1, description="draw so many; all when left out")
    baseline: Baseline = Field(
        default="own",
        description="compared with: own, the first of the n answers (n-1 comparisons), or start, one of pi(0) (n)",
    )
    pairing: Pairing = Field(
        default="all", description="of a ranking: all pairs, best_vs_rest, or mirrored (i-th best with i-th worst)"
    )
    temperature: float = Field(
        default=1.0, gt=0, description="the judge's logits are divided by it: above 1 is less sure"
    )
    beta: float = Field(default=0.1, gt=0, description="of the loss (as in DPO; paper: unseen)")
    seed: int = Field(default=0, ge=0, description="of every random choice")
    sampling: Sampling = Field(default_factory=Sampling)
    look_at: LookAt = Field(default_factory=LookAt)
    train: Train = Field(default_factory=lambda: Train(validation_pairs=0), description="every round (paper: LoRA)")
    judge_train: Train = Field(
        default_factory=lambda: Train(validation_pairs=0),
        description="learning to judge; both orders of a pair are two",
    )
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)


def demo() -> OspConfig:
    """The packaged small model, judging itself, and a rule that says what came of it."""
    return OspConfig(
        policy="smollm2-135m",
        prompts="seed:train",
        held_out="seed:held_out",
        evaluator="rule:helpful-short",
        rounds=2,
        prompts_per_round=8,
        sampling=Sampling(max_new_tokens=64),
        look_at=LookAt(answers=12, shown=4),
        train=Train(steps=4, batch_size=8, learning_rate=1e-5, warmup_steps=1, validation_pairs=0, checkpoint_every=2),
    )


def osp(cfg: OspConfig, run: Run) -> ModelRef:
    """Run OSP; returns the final model, RUN/model."""
    given = resolve(cfg.policy)
    prompts, held_out = prompts_and_held_out(cfg, run)
    check_room([*prompts, *held_out], given, cfg.sampling.max_new_tokens)
    load_judge(cfg, run, given)  # what cannot be used is refused before anything is computed
    evaluator = load_evaluator(cfg, run)
    before: list[Group] = []

    def look(label: str, model: ModelRef) -> list[Group]:
        answers = look_at(run, given, [], cfg, label, model, beta=cfg.beta, prompts=held_out)
        if evaluator and before:
            run.stage(f"{label}/win_rate", against_start, answers, before, evaluator)
        return answers

    before = look("start", given)
    start = learned_judge(cfg, run, given, held_out) if cfg.pairs else given
    if cfg.pairs:
        look("round-0", start)
    policy = start
    for t in range(1, cfg.rounds + 1):
        drawn = some(prompts, cfg.prompts_per_round, derive_seed(cfg.seed, "prompts", t))
        pairs = self_preferences(cfg, run.round(t), policy, start, drawn, seed=derive_seed(cfg.seed, "sample", t))
        policy = dpo_round(run.round(t), policy, start, pairs, beta=cfg.beta, train=cfg.train, compute=cfg.compute,
                           seed=derive_seed(cfg.seed, "dpo", t))  # fmt: skip
        look(f"round-{t}", policy)
    return conclude(run, policy)


def learned_judge(cfg: OspConfig, run: Run, model: ModelRef, held_out: list[Prompt]) -> ModelRef:
    """The model after it has learned to judge from `cfg.pairs`, those on held-out prompts left out."""
    from prefloop.feedback.instructions import load_instruction
    from prefloop.feedback.judge_tuning import OptionObjective, judgements_to_learn
    from prefloop.train.learner import fit

    round, seed = run.round(0), derive_seed(cfg.seed, "judge")
    pairs = apart_from(load(cfg.pairs, "pairs", cfg.on_bad_row, run), held_out, run, why="held-out prompts")
    items = round.stage("judgements", judgements_to_learn, pairs, model, instruction=cfg.feedback.instruction,
                        version=load_instruction(cfg.feedback.instruction).hash)  # fmt: skip
    training, validation = held_back(round, items, cfg.judge_train, seed=seed, kind="judgements")
    folder = round.stage("model", fit, model, training, validation, objective=OptionObjective(), seed=seed,
                         config=cfg.judge_train, compute=cfg.compute)  # fmt: skip
    return ModelRef.of(folder.path, name=round.label)


def self_preferences(
    cfg: OspConfig, round: Round, policy: ModelRef, start: ModelRef, prompts: list[Prompt], *, seed: int
) -> list[Pair]:
    """Steps 1 to 3: soft preferences among the model's own answers, with their log-probabilities under pi(0)."""
    draw = partial(sample, sampling=cfg.sampling, compute=cfg.compute, engine=cfg.engine, server=cfg.server)
    groups = round.stage("groups", draw, policy, prompts, k=cfg.n, seed=seed)
    baselines: list[Group] = []
    if cfg.baseline == "start":
        baselines = round.stage("baselines", draw, start, prompts, k=1, seed=derive_seed(cfg.seed, "baseline"))
    judge = load_judge(cfg, round.run, policy)
    ranked = round.stage("strengths", strengths, groups, baselines, judge, temperature=cfg.temperature)
    # Once for an answer, which may be in n - 1 pairs.
    known = round.stage("reference", with_logps, ranked, start, compute=cfg.compute)
    return round.stage("pairs", ranked_pairs, known, pairing=cfg.pairing, labels=cfg.feedback.labels,
                       reference=start.fingerprint)  # fmt: skip


def load_judge(cfg: OspConfig, run: Run, policy: ModelRef) -> "Annotator":
    """The policy as its own judge, or the annotator that was named. Raises InputError for what cannot be used."""
    from prefloop.feedback.registry import load_annotator, load_meter

    meter = load_meter(cfg.feedback, run=run)
    stage = Stage(name="feedback", run=run)
    if cfg.annotator:
        return load_annotator(cfg.annotator, cfg.feedback, compute=cfg.compute, meter=meter, stage=stage)
    from prefloop.feedback.cache import JudgementCache
    from prefloop.feedback.instructions import load_instruction
    from prefloop.feedback.judge import LocalJudge

    instruction = load_instruction(cfg.feedback.instruction)
    return LocalJudge(policy, instruction, compute=cfg.compute, cache=JudgementCache(), meter=meter, stage=stage)


def load_evaluator(cfg: OspConfig, run: Run) -> "Annotator | None":
    from prefloop.feedback.registry import load_annotator, load_meter

    if not cfg.evaluator:
        return None
    return load_annotator(cfg.evaluator, cfg.evaluation, compute=cfg.compute, stage=Stage(name="evaluation", run=run),
                          meter=load_meter(cfg.evaluation, run=run, role="evaluation"))  # fmt: skip


def strengths(
    groups: Sequence[Group],
    baselines: Sequence[Group],
    judge: "Annotator",
    *,
    temperature: float,
    stage: Stage | None = None,
) -> list[Group]:
    """The groups with u_i as `score`: logit P(y_i > baseline), 0 for the baseline itself, the first answer of a group
    where there are no `baselines`. An abstention leaves no score and its reason.

    Comparisons are counted by what became of them, questions (both orders of an annotator with slots) too.
    """
    from prefloop.feedback.annotator import Comparison
    from prefloop.feedback.stage import ask

    stage = stage or Stage.detached()
    outside = {group.prompt.id: group.responses[0] for group in baselines}
    comparisons = [
        Comparison(group.prompt, response, outside.get(group.prompt.id, group.responses[0]))
        for group in groups
        for response in group.responses[0 if outside else 1 :]
    ]
    judgements = ask(comparisons, judge, stage=stage)
    count(comparisons, judgements, stage)
    answers = iter(judgements)
    return [
        group.model_copy(
            update={
                "responses": tuple(
                    response.model_copy(update={"score": 0.0})
                    if i == 0 and not outside
                    else with_strength(response, next(answers), temperature)
                    for i, response in enumerate(group.responses)
                )
            }
        )
        for group in groups
    ]


def with_strength(response: Response, judgement: "Judgement", temperature: float) -> Response:
    s = tempered(judgement, temperature)
    found = {"failure": judgement.reason} if s is None else {"score": strength(s)}
    return response.model_copy(update=found)


def count(comparisons: "Sequence[Comparison]", judgements: "Sequence[Judgement]", stage: Stage) -> None:
    """Comparisons with a baseline by what became of them; questions; what an annotator with slots followed."""
    asked = [j for c, j in zip(comparisons, judgements, strict=True) if not c.identical]
    orders = 2 if any(judgement.q_ab is not None for judgement in asked) else 1
    reasons = Counter(judgement.reason for judgement in asked if judgement.reason)
    slots = Counter(judgement.slot for judgement in asked if judgement.slot)
    found = {
        "comparisons": len(comparisons),
        "identical": len(comparisons) - len(asked),
        "decided": sum(judgement.p not in (None, 0.5) for judgement in asked),
        "tie": sum(judgement.p == 0.5 for judgement in asked),
        "abstained": sum(reasons.values()),
        **{f"abstained: {reason}": n for reason, n in sorted(reasons.items())},
        **{slot: slots[slot] for slot in ("consistent", "first_slot", "second_slot") if slots},
        "questions": orders * len(asked),
    }
    for name, n in found.items():
        stage.count(name, n)


def with_logps(groups: Sequence[Group], reference: ModelRef, *, compute: Compute, stage: Stage) -> list[Group]:
    """The groups with `reference_logp` on every response."""
    from prefloop.train.reference import logps_under

    logps = logps_under(reference, [(group.prompt, group.responses) for group in groups], compute=compute, stage=stage)
    return [
        group.model_copy(
            update={
                "responses": tuple(
                    response.model_copy(update={"reference_logp": logp})
                    for response, logp in zip(group.responses, row, strict=True)
                )
            }
        )
        for group, row in zip(groups, logps, strict=True)
    ]


def against_start(now: Sequence[Group], before: Sequence[Group], evaluator: "Annotator") -> "WinRate":
    """Own answers to held-out prompts against those of pi(0)."""
    from prefloop.evaluate.win_rate import comparisons_of, win_rate

    return win_rate(evaluator.judge(comparisons_of(now, before)))
