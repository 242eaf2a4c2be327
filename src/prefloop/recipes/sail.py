"""SAIL: self-improving online alignment with the score-function gradient (Ding et al. 2024, arXiv 2406.15567).

Start: an instruction-tuned model pi(0), which stays the reference; preference pairs; for `pr` an annotator.
Step s = 0..T-1:
1. Draw a batch of the pairs. Each goes the variant's route with probability r, and is plain DPO otherwise.

       dp   the pair's answers, labelled by the policy
       pp   two answers of the policy to the pair's prompt, labelled by the policy
       pr   two answers of the policy to the pair's prompt, labelled by the annotator

2. For pp and pr: every G steps, sample two answers to each prompt that will take the route until the next time, from
   the current weights. Two identical answers, a tie, an abstention, or (`--on-unfinished drop`) a cut answer: the pair
   itself is taken, as plain DPO.
3. A policy's label: y_1 is preferred with probability sigmoid(beta h), drawn at the step itself.
4. One optimiser step on the mean of the surrogate, F = log sigmoid(beta h), h against pi(0):

       -F - c/2 F^2 [dp, pp] - c sg[F - b] (log pi(y_w) + log pi(y_l)) [pp, pr]

   b is the running mean of F over such answers of earlier steps (`--response-term theory-baseline`); 0 with `theory`;
   `released` is the published code's term, which has the other sign (docs/methods/sail.md).

T = ceil(--train.steps / (1 - r)), so that as many plain pairs are trained on as by DPO in --train.steps steps.

Departures: answers belong to their own prompts, always (the released code can exchange them); policy labels are drawn
with the weights of the step and not when the answers are sampled; AdamW in place of RMSprop.
"""

from collections.abc import Sequence
from functools import partial
from math import ceil, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from prefloop.config import Config, free
from prefloop.errors import InputError
from prefloop.feedback.options import AnnotatorName, Feedback
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, resolve
from prefloop.recipes.online import (
    OUTCOMES,
    Judges,
    Labelled,
    OnlineLoop,
    Unfinished,
    check_nothing_to_watch,
    counts_of,
    distinct,
    estimate_online,
    evaluate,
    lengths,
    lengths_of_pairs,
    load_judges,
    preferences,
    settled,
    totals,
    warn_of_no_win_rates,
    warn_of_shared,
)
from prefloop.recipes.steps import LookAt, check_room, conclude, load, look_at, offline_and_held_out, prompts_of
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed, generator
from prefloop.train.config import Compute, Train

if TYPE_CHECKING:
    from prefloop.feedback.annotator import Annotator
    from prefloop.records import Group, Pair, Prompt
    from prefloop.run import Run, Stage
    from prefloop.train.online import OnlineLearner

MEMORY = 0.9
"""Of the running mean b, a step with own answers: about the last ten count."""


class Variant(NamedTuple):
    """Share of examples that take the route, and coefficient c of its term: the published configurations."""

    mixture: float
    coefficient: float


VARIANTS = {"dp": Variant(0.4, 0.2), "pp": Variant(0.3, 0.2), "pr": Variant(0.3, 0.3)}


class SailConfig(Config):
    """Options of `prefloop sail`. The defaults are those of the paper's configurations."""

    policy: str = Field(default="", description="pi(0), the instruction-tuned model to start from, and the reference")
    pairs: str = Field(default="", description="preference pairs: a file, a data set folder or hub name, or seed:train")
    held_out: str = Field(default="", description="pairs to look at models with; a tenth of the pairs when left out")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    variant: Literal["dp", "pp", "pr"] = Field(
        default="pp", description="where answers and labels come from: data or policy, policy or reward (annotator)"
    )
    mixture: float | None = Field(
        default=None, ge=0, lt=1, description="r, the share of examples on the route; none: dp 0.4, pp 0.3, pr 0.3"
    )
    coefficient: float | None = Field(
        default=None, ge=0, description="c of the route's term, 1 is the exact gradient; none: dp 0.2, pp 0.2, pr 0.3"
    )
    response_term: Literal["theory", "theory-baseline", "released"] = Field(
        default="theory-baseline", description="of pp and pr: exact, exact with less noise, or as the published code"
    )
    sample_every: int = Field(default=1, ge=1, description="G, steps whose answers are sampled together")
    annotator: AnnotatorName = ""
    evaluator: str = Field(
        default="", description="who judges the win rates; another than --annotator, which is used when left out"
    )
    feedback: Feedback = Field(default_factory=Feedback)
    evaluation: Feedback = Field(
        default_factory=lambda: Feedback(instruction="helpfulness-scoring"),
        description="the evaluator's own options, with a budget of its own",
    )
    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (configurations: 0.1)")
    on_unfinished: Unfinished = Field(
        default="keep",
        description="a sampled answer cut at the limit: keep it, drop its pair, or (pr) penalise it: it loses to a "
        "finished one",
    )
    evaluate_every: int = Field(default=100, ge=1, description="steps between win rates")
    dry_run: bool = free(
        default=False, description="say what the annotators would take in calls, tokens and money, and do nothing"
    )
    seed: int = Field(default=0, ge=0, description="of every random choice")
    sampling: Sampling = Field(default_factory=lambda: Sampling(temperature=0.9))
    look_at: LookAt = Field(default_factory=LookAt)
    train: Train = Field(
        default_factory=lambda: Train(batch_size=16, learning_rate=1e-5, warmup_steps=150, validation_pairs=0),
        description="steps are DPO's: see T above",
    )
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)

    @property
    def share(self) -> float:
        """r."""
        return VARIANTS[self.variant].mixture if self.mixture is None else self.mixture

    @property
    def c(self) -> float:
        """c."""
        return VARIANTS[self.variant].coefficient if self.coefficient is None else self.coefficient


def demo() -> SailConfig:
    """The packaged small model on the packaged pairs, and a rule that likes answers of 25 words."""
    return SailConfig(
        policy="smollm2-135m",
        pairs="seed:train",
        held_out="seed:held_out",
        variant="pr",
        annotator="rule:helpful-short",
        evaluator="rule:varied",
        evaluate_every=8,
        sampling=Sampling(temperature=0.9, max_new_tokens=48),
        look_at=LookAt(answers=12, shown=4),
        train=Train(steps=11, batch_size=4, learning_rate=5e-6, warmup_steps=2, validation_pairs=0, checkpoint_every=4),
    )


def sail(cfg: SailConfig, run: "Run") -> ModelRef:
    """Run SAIL; returns the final model, RUN/model."""
    from prefloop.train.reference import with_reference_logps

    check_options(cfg)
    start = resolve(cfg.policy)
    judges = load_judges(judged(cfg), run)
    if cfg.variant == "pr":
        warn_of_shared(judges, run)
    pairs, held_out = offline_and_held_out(cfg, run, start)
    check_room(prompts_of([*pairs, *held_out]), start, cfg.sampling.max_new_tokens)
    cfg = corrected(cfg)
    drawn = sorted({i for step in range(cfg.train.steps) for i in Drawn.at(cfg, step, len(pairs)).indices})
    known = run.stage("start/pairs", with_reference_logps, [pairs[i] for i in drawn], start, compute=cfg.compute)
    pairs = [*pairs]
    for i, pair in zip(drawn, known, strict=True):
        pairs[i] = pair
    run.note(f"{cfg.train.steps} steps: a share of {cfg.share:g} of the examples goes the route {cfg.variant}")
    look = partial(look_at, run, start, held_out, cfg, beta=cfg.beta)

    before = look("start", start)
    warn_of_no_win_rates(before, run)
    folder = run.round(1).stage("model", align, start, pairs, before, judges, cfg)
    aligned = ModelRef.of(folder.path, name="round-1")
    look("round-1", aligned)
    return conclude(run, aligned)


def check_options(cfg: SailConfig) -> None:
    """Raises InputError where nobody is named to label (pr) or to judge the win rates, and for options that do not go
    together.
    """
    if cfg.variant == "pr" and not cfg.annotator:
        raise InputError("--annotator is missing: --variant pr asks one, such as rule:helpful-short or judge:MODEL")
    if cfg.variant != "pr" and not cfg.evaluator:
        raise InputError(
            f"--evaluator is missing: --variant {cfg.variant} labels by the policy itself, but win rates need a judge, "
            "such as rule:helpful-short or judge:MODEL"
        )
    if cfg.variant == "pp" and cfg.on_unfinished == "penalise":
        raise InputError(
            "on_unfinished = 'penalise' labels a pair, and --variant pp labels by the policy: keep or drop"
        )
    check_nothing_to_watch(cfg)


def judged(cfg: SailConfig) -> SailConfig:
    """Where no annotator trains, the evaluator stands in its place: one judge for all win rates."""
    return cfg if cfg.annotator else cfg.replace(annotator=cfg.evaluator, evaluator="",
                                                 feedback=cfg.evaluation.model_dump())  # fmt: skip


def corrected(cfg: SailConfig) -> SailConfig:
    """T = ceil(steps / (1 - r))."""
    return cfg.replace(train__steps=ceil(round(cfg.train.steps / (1 - cfg.share), 6)))


def align(
    start: ModelRef,
    pairs: "Sequence[Pair]",
    before: "Sequence[Group]",
    judges: Judges,
    cfg: SailConfig,
    *,
    stage: "Stage",
) -> Path:
    """The T steps on pairs, of which those that are drawn have the start model's log-probabilities. `before`: its
    answers to the held-out prompts.
    """
    from prefloop.train.learner import Learner
    from prefloop.train.online import OnlineLearner
    from prefloop.train.sail import OWN_ANSWERS, RoutedPair, SailObjective

    objective = SailObjective(cfg.beta, cfg.c, cfg.response_term, cfg.train.batch_size)
    learner = Learner(start, [RoutedPair.of(pair, "plain", u=0.0, baseline=0.0) for pair in pairs], objective=objective,
                      config=cfg.train, compute=cfg.compute, seed=cfg.seed, stage=stage)  # fmt: skip
    online = OnlineLearner(learner)
    ask = unlabelled if cfg.variant == "pp" else preferences
    with OnlineLoop(online, before, judges, cfg, ask=ask, look=evaluate,
                    description=f"sail {cfg.variant}", stage=stage) as loop:  # fmt: skip
        for step in loop.steps():
            row: dict[str, Any] = {"step": step + 1}
            if cfg.variant in OWN_ANSWERS and step % cfg.sample_every == 0:
                prompts = prompts_ahead(pairs, cfg, step)
                pool, found = fresh_pairs(online, loop, prompts, cfg, step)
                row |= found
                loop.kept["pool"] = [pair.to_json() for pair in pool]
            drawn = Drawn.at(cfg, step, len(pairs))
            batch, missing = routed(pairs, drawn, loop.kept.get("pool", []), cfg, baseline=baseline_of(loop.log))
            row |= {"routed": sum(item.route != "plain" for item in batch), "fell_back": missing}
            loop.done(row | per_kind(learner.step(batch, step)))
    tell_fallen_back(loop.log, cfg, stage)
    tell_sign_changes(loop.log, cfg, stage)
    return loop.conclude(counted)


class Drawn(NamedTuple):
    """What is drawn for a step: indices of pairs, whether each goes the route, and its uniform number for a label."""

    indices: list[int]
    on_route: list[bool]
    u: list[float]

    @classmethod
    def at(cls, cfg: SailConfig, step: int, n: int) -> "Drawn":
        from prefloop.train.learner import batch_of_step

        indices = batch_of_step(n, cfg.train.batch_size, step, cfg.seed)
        routes, u = generator(cfg.seed, "routes", step).random((2, len(indices)))
        return cls(indices, [bool(x < cfg.share) for x in routes], [float(x) for x in u])


def prompts_ahead(pairs: "Sequence[Pair]", cfg: SailConfig, step: int) -> "list[Prompt]":
    """The prompts that go the route until answers are sampled again, each once."""
    steps = range(step, min(step + cfg.sample_every, cfg.train.steps))
    drawn = [Drawn.at(cfg, later, len(pairs)) for later in steps]
    return distinct([pairs[i].prompt for one in drawn for i, on in zip(one.indices, one.on_route, strict=True) if on])


def fresh_pairs(
    online: "OnlineLearner", loop: OnlineLoop, prompts: "Sequence[Prompt]", cfg: SailConfig, step: int
) -> "tuple[list[Pair], dict[str, Any]]":
    """Step 2: pairs of fresh answers with the start model's log-probabilities, and what is logged about them."""
    if not prompts:
        return [], {}
    groups = online.sample(prompts, k=2, sampling=cfg.sampling, seed=derive_seed(cfg.seed, "step", step))
    gap = loop.sampler_gap(step, groups)
    pairs, labelled = loop.pairs(step, groups)
    of_pairs = lengths_of_pairs(pairs) if cfg.variant == "pr" else {}  # of pp, the chosen one is drawn at the step
    row = {**lengths(groups), **gap, **counts_of(labelled), **of_pairs}
    return online.with_reference_logps(pairs) if pairs else [], row


def unlabelled(
    groups: "Sequence[Group]", annotator: "Annotator", cfg: SailConfig
) -> "tuple[list[Pair], list[Labelled]]":
    """`preferences` of pp: pairs in the order in which they were sampled, and nobody is asked."""
    from prefloop.feedback.annotator import abstention
    from prefloop.feedback.stage import comparison_of
    from prefloop.records import Pair

    nobody = abstention("the policy labels it at the step")
    labelled = [
        settled(question, cfg.on_unfinished) or Labelled(question, nobody, "unlabelled")
        for question in map(comparison_of, groups)
    ]
    pairs = [
        Pair(prompt=question.prompt, chosen=question.a, rejected=question.b, source="generated")
        for question, _, outcome in labelled
        if outcome == "unlabelled"
    ]
    return pairs, labelled


def routed(
    pairs: "Sequence[Pair]", drawn: Drawn, pool: Sequence[str], cfg: SailConfig, *, baseline: float
) -> "tuple[list[Any], int]":
    """The batch of a step as routed pairs, and how many fell back to plain because the pool has none of their prompt.

    A prompt's own answers are found by the prompt itself, wherever in the pool they are.
    """
    from prefloop.records import Pair
    from prefloop.train.sail import OWN_ANSWERS, RoutedPair

    own = {pair.prompt.messages: pair for pair in map(Pair.from_json, pool)}
    batch, missing = [], 0
    for index, on_route, u in zip(drawn.indices, drawn.on_route, drawn.u, strict=True):
        pair = pairs[index]
        route = cfg.variant if on_route else "plain"
        if route in OWN_ANSWERS:
            found = own.get(pair.prompt.messages)
            pair, route = (found, route) if found else (pair, "plain")
            missing += found is None
        batch.append(RoutedPair.of(pair, route, u=u, baseline=baseline))
    return batch, missing


def baseline_of(log: Sequence[dict[str, Any]]) -> float:
    """b: the running mean of F over own answers of earlier steps, from -ln 2, which is F at h = 0."""
    b = LN_HALF
    for row in log:
        if row.get("own_answers"):
            b = MEMORY * b + (1 - MEMORY) * row["log_sigmoid"]
    return b


LN_HALF = -log(2.0)


def per_kind(figures: dict[str, float]) -> dict[str, float]:
    """Means over a batch as means over the pairs that each is about; what is about none is left out."""
    of = {"labelled": ("correct", "margin", "chosen_change", "rejected_change"), "own_answers": ("log_sigmoid",)}
    found = dict(figures)
    for share, names in of.items():
        for name in names:
            value = found.pop(name)
            if figures[share]:
                found[name] = value / figures[share]
    return found


def counted(log: Sequence[dict[str, Any]]) -> dict[str, int]:
    """`totals`, how many examples went the route, and how many fell back to the data's own pair."""
    names = {"routed": "examples on the route", "fell_back": "examples that fell back"}
    return totals(log) | {said: sum(row.get(name, 0) for row in log) for name, said in names.items()}


def tell_fallen_back(log: Sequence[dict[str, Any]], cfg: SailConfig, stage: "Stage") -> None:
    """A warning where most examples that should have gone the route were plain DPO."""
    found = counted(log)
    went, fell = found["examples on the route"], found["examples that fell back"]
    if fell > went:
        why = ", ".join(f"{found[name]} {name}" for name in OUTCOMES if name != "pairs" and found[name])
        remedies = ["--sampling", "--on-unfinished", *(["--annotator"] if cfg.variant == "pr" else [])]
        stage.note(
            f"warning: {fell} examples fell back to plain DPO and only {went} went the route {cfg.variant} (questions: "
            f"{why}); remedies: another {', '.join(remedies)}"
        )


def tell_sign_changes(log: Sequence[dict[str, Any]], cfg: SailConfig, stage: "Stage") -> None:
    """A warning where labels that the policy drew were so unlikely that their gradient turned round."""
    from prefloop.train.sail import sign_change

    turned = sum(row.get("sign_changed", 0.0) > 0 for row in log)
    if turned:
        h = sign_change(cfg.c, beta=cfg.beta)
        stage.note(
            f"warning: in {turned} steps the policy drew a label with h < {h:.1f} nats, where the term of coefficient "
            f"{cfg.c:g} outweighs the loss and pushes h further down; remedies: a smaller --coefficient or --mixture"
        )


def estimate_feedback(cfg: SailConfig) -> list[str]:
    """What --dry-run prints (`estimate_online`): only pr asks an annotator while it trains."""
    check_options(cfg)
    cfg = corrected(cfg)
    asked = round(cfg.share * cfg.train.steps * cfg.train.batch_size) if cfg.variant == "pr" else 0
    return estimate_online(judged(cfg), "sail", read=prompts_of_pairs, asked=asked)


def prompts_of_pairs(cfg: SailConfig, run: "Run") -> "tuple[list[Prompt], list[Prompt]]":
    """The prompts of the pairs and of the held-out pairs; without the latter, about a tenth of the first."""
    prompts = prompts_of(load(cfg.pairs, "pairs", cfg.on_bad_row, run))
    if cfg.held_out:
        return prompts, prompts_of(load(cfg.held_out, "held-out", cfg.on_bad_row, run))
    return prompts, prompts[: min(256, len(prompts) // 10)]
