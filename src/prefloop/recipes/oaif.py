"""OAIF: direct alignment from online AI feedback (Guo et al. 2024, arXiv 2402.04792, Algorithm 1).

Start: an instruction-tuned model pi(0), prompts, an annotator. Step t = 1..T:
1. Draw a batch of prompts; sample two answers to each from the current model, independently, at temperature 0.9.
2. Ask the annotator which is better. One that shows an answer first is asked in both orders and averaged.
3. Take the better one as y+, the other as y-; one optimiser step on the mean of the loss of

       h = log pi/pi(0) (y+|x) - log pi/pi(0) (y-|x)

   DPO  -log sigmoid(beta h)          beta 0.1
   IPO  (h - 1 / (2 beta))^2          beta 1.0
   SLiC max(0, 1 - beta h)            beta 0.002

   all on log-probabilities summed over tokens. pi(0) stays the reference to the end.

Every N steps the model is looked at: win rate against pi(0) and against itself N steps before, on held-out prompts, by
an annotator that does not train it.

Every step samples inside this process, from the weights in training; --engine and --server are those of the answers
that are looked at before and after.

Departures from the paper (docs/methods/oaif.md says more): AdamW by default (--train.optimizer adafactor is the
paper's); identical answers, ties and abstentions make no pair; an answer that was cut at the limit of new tokens has no
end token, and --on-unfinished says what becomes of it. `--offline` is the paper's baseline: the same labels, on
answers of pi(0).
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from prefloop.atomic import write_atomically
from prefloop.config import Config, free
from prefloop.errors import FeedbackError, InputError, PrefloopError
from prefloop.feedback.options import AnnotatorName, Feedback
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, resolve
from prefloop.recipes.steps import LookAt, check_room, conclude, load_own_prompts, look_at, split_off
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Train

if TYPE_CHECKING:
    from prefloop.feedback.annotator import Annotator, Comparison, Judgement
    from prefloop.feedback.meter import Meter
    from prefloop.records import Group, Pair, Prompt
    from prefloop.run import Run, Stage
    from prefloop.train.online import OnlineLearner

Unfinished = Literal["keep", "drop", "penalise"]
OUTCOMES = {
    "pairs": "pair",
    "identical": "identical",
    "tie": "tie",
    "abstained": "abstained",
    "unfinished": "unfinished",
}
"""What is counted at every step -> what became of a question."""
STEPS_WITHOUT_PAIRS = 3
"""From the start, after which the run stops."""
SLOTS = ("consistent", "first_slot", "second_slot")
"""What the answers of an annotator with slots follow (`Judgement.slot`); counted at every step."""
SAMPLED = 200
"""Prompts that an estimate is made from."""


class OaifConfig(Config):
    """Options of `prefloop oaif`. The defaults are the paper's."""

    policy: str = Field(default="", description="pi(0), the instruction-tuned model to start from")
    prompts: str = Field(default="", description="prompts: a file, a data set folder or hub name, or seed:train")
    held_out: str = Field(default="", description="prompts to look at models with; a tenth of them when left out")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    annotator: AnnotatorName = ""
    evaluator: str = Field(
        default="", description="who judges the win rates; another than --annotator, which is used when left out"
    )
    feedback: Feedback = Field(default_factory=Feedback)
    evaluation: Feedback = Field(
        default_factory=lambda: Feedback(instruction="helpfulness-scoring"),
        description="the evaluator's own options, with a budget of its own",
    )
    loss: Literal["dpo", "ipo", "slic"] = Field(
        default="dpo", description="on summed log-probabilities (paper: all three)"
    )
    beta: float | None = Field(
        default=None, gt=0, description="of the loss; none: 0.1 for dpo, 1.0 for ipo, 0.002 for slic (paper)"
    )
    on_unfinished: Unfinished = Field(
        default="keep",
        description="an answer cut at the limit: keep it, drop its pair, or penalise it (it loses to a finished one)",
    )
    offline: bool = Field(
        default=False, description="the baseline: answers of the start model instead of the current one"
    )
    evaluate_every: int = Field(default=100, ge=1, description="steps between win rates")
    dry_run: bool = free(
        default=False, description="say what the annotators would take in calls, tokens and money, and do nothing"
    )
    seed: int = Field(default=0, ge=0, description="of every random choice")
    sampling: Sampling = Field(default_factory=lambda: Sampling(temperature=0.9))
    look_at: LookAt = Field(default_factory=LookAt)
    train: Train = Field(
        default_factory=lambda: Train(steps=4000, batch_size=128, warmup_steps=150, validation_pairs=0),
        description="every step is one batch of prompts",
    )
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)


def paper() -> OaifConfig:
    """The paper's setting: needs GPUs. Give --policy, --prompts and --annotator."""
    return OaifConfig(train=OaifConfig().train.replace(optimizer="adafactor"))


def demo() -> OaifConfig:
    """The packaged small model, and a rule that likes answers of 25 words which keep to the prompt."""
    return OaifConfig(
        policy="smollm2-135m",
        prompts="seed:train",
        held_out="seed:held_out",
        annotator="rule:helpful-short",
        evaluator="rule:varied",
        evaluate_every=8,
        sampling=Sampling(temperature=0.9, max_new_tokens=64),
        look_at=LookAt(answers=12, shown=4),
        train=Train(steps=16, batch_size=8, learning_rate=1e-5, warmup_steps=2, validation_pairs=0, checkpoint_every=8),
    )


def oaif(cfg: OaifConfig, run: "Run") -> ModelRef:
    """Run OAIF; returns the final model, RUN/model."""
    start = resolve(cfg.policy)
    prompts, held_out = load_both(cfg, run)
    check_room([*prompts, *held_out], start, cfg.sampling.max_new_tokens)
    judges = load_judges(cfg, run)
    if judges.shared:
        run.note(f"warning: the win rates are judged by the annotator that trains the model ({judges.shared}), which "
                 "flatters it; name another --evaluator")  # fmt: skip
    look = partial(look_at, run, start, [], cfg, beta=beta_of(cfg), prompts=held_out)

    before = look("start", start)
    if not before:
        run.note("warning: no held-out prompts, so no win rates; see --held-out and --look-at.answers")
    folder = run.round(1).stage("model", align, start, prompts, before, judges, cfg)
    aligned = ModelRef.of(folder.path, name="round-1")
    look("round-1", aligned)
    return conclude(run, aligned)


@dataclass(frozen=True)
class Judges:
    """Who trains, who judges the win rates, and what counts the calls of each."""

    annotator: "Annotator"
    evaluator: "Annotator"
    meters: "tuple[Meter, Meter]"

    @property
    def identity(self) -> str:
        """Of a stage that they judge in."""
        return json.dumps([self.annotator.identity, self.evaluator.identity])

    @property
    def shared(self) -> str:
        """The annotators that do both, alone or in a vote, by name."""
        from prefloop.feedback.annotator import members

        trains, evaluates = ({m.identity: m.name for m in members(one)} for one in (self.annotator, self.evaluator))
        return ", ".join(name for identity, name in trains.items() if identity in evaluates)


def load_judges(cfg: OaifConfig, run: "Run") -> Judges:
    """Both annotators. Raises InputError for what cannot be used, before anything is computed."""
    from prefloop.feedback.registry import load_annotator, load_meter
    from prefloop.run import Stage

    meters = load_meter(cfg.feedback), load_meter(cfg.evaluation)
    load = partial(load_annotator, compute=cfg.compute, stage=Stage(name="feedback", run=run))
    annotator = load(cfg.annotator, cfg.feedback, meter=meters[0])
    # Left out, the evaluator is the annotator: the same one, so that nothing is loaded or paid twice.
    evaluator = load(cfg.evaluator, cfg.evaluation, meter=meters[1]) if cfg.evaluator else annotator
    return Judges(annotator, evaluator, meters)


def load_both(cfg: Any, run: "Run") -> "tuple[list[Prompt], list[Prompt]]":
    """The prompts to train on and those to look at models with."""
    if not cfg.annotator:
        raise InputError("--annotator is missing: name who judges, such as rule:helpful-short or judge:MODEL")
    prompts = load_own_prompts(cfg.prompts, cfg.on_bad_row, run)
    if not prompts:
        raise InputError("--prompts is missing: name a file, a data set folder or hub name, or seed:train")
    held_out = load_own_prompts(cfg.held_out, cfg.on_bad_row, run)
    if held_out:
        apart = {prompt.messages for prompt in held_out}
        own = [prompt for prompt in prompts if prompt.messages not in apart]
        if len(own) < len(prompts):
            run.note(f"{len(prompts) - len(own)} prompts left out of training: they are held out")
        return own, held_out
    return split_off(prompts, min(256, len(prompts) // 10), derive_seed(cfg.seed, "held out"))


def align(
    start: ModelRef,
    prompts: "Sequence[Prompt]",
    before: "Sequence[Group]",
    judges: Judges,
    cfg: OaifConfig,
    *,
    stage: "Stage",
) -> Path:
    """The T steps. `before`: answers of the start model to the held-out prompts."""
    from prefloop.train.checkpoint import load_checkpoint, save_checkpoint
    from prefloop.train.learner import TRAINING_LOG, Learner, batch_of_step, write_training_log
    from prefloop.train.losses import LOSSES
    from prefloop.train.memory import reused_memory
    from prefloop.train.objective import PairObjective
    from prefloop.train.online import OnlineLearner

    scratch, output = stage.scratch, stage.output
    assert scratch is not None and output is not None
    loss, beta = LOSSES[cfg.loss].function, beta_of(cfg)
    learner = Learner(start, [], objective=PairObjective(partial(loss, beta=beta), beta), config=cfg.train,
                      compute=cfg.compute, seed=cfg.seed, stage=stage)  # fmt: skip
    online = OnlineLearner(learner, behaviour="start" if cfg.offline else "current")
    records = FeedbackRecords(scratch / "feedback", judges.meters)
    first, log = load_checkpoint(scratch, model=learner.model, optimizer=learner.optimizer)

    def save(step: int) -> None:
        save_checkpoint(scratch, step=step, model=learner.model, optimizer=learner.optimizer, log=log)

    @contextmanager
    def judging(step: int) -> Iterator[None]:
        """While annotators are asked, the model stands still: whatever ends the run here, `step` steps are kept."""
        try:
            yield
        except (PrefloopError, KeyboardInterrupt):
            if step > first:
                save(step)
            stage.event("feedback", **records.summary())
            raise
        finally:
            records.keep_counts()

    with reused_memory(), stage.progress(cfg.train.steps, unit="steps", description=f"{cfg.loss} online") as advance:
        advance(first)
        for step in range(first, cfg.train.steps + 1):
            if before and evaluation_is_due(cfg, log, step):
                with judging(step):
                    found = evaluate(online, before, log, judges, cfg)
                log.append({"step": step, "evaluation": found})
                stage.event("evaluation", **log[-1])
            if step == cfg.train.steps:
                break
            batch = [prompts[i] for i in batch_of_step(len(prompts), cfg.train.batch_size, step, cfg.seed)]
            groups = online.sample(distinct(batch), k=2, sampling=cfg.sampling, seed=seed_of_step(cfg, step))
            row: dict[str, Any] = {"step": step + 1, **lengths(groups)}
            if step == first and not cfg.offline:
                gap = online.check_sampler(online.drift(groups)[1])
                row |= {"sampler_gap": gap} if step == 0 else {}
            with judging(step):
                pairs, labelled = preferences(groups, judges.annotator, cfg)
                check_there_are_pairs(pairs, labelled, log, step)
            records.write(step, labelled)
            row |= counts_of(labelled) | lengths_of_pairs(pairs)
            if pairs:
                row |= online.step(pairs, step)
            log.append(row)
            stage.event("step", **row)
            if step + 1 < cfg.train.steps and (step + 1) % cfg.train.checkpoint_every == 0:
                save(step + 1)
            advance(1)
    if "sampler_gap" in log[0]:
        stage.figure("sampler gap at the start, mean nats a token", log[0]["sampler_gap"])
    for meter in judges.meters:
        if meter.tallies:
            stage.note(f"feedback: {meter.describe()}")
    stage.event("feedback", **records.summary())
    for agreement in getattr(judges.annotator, "agreements", ()):
        stage.event("agreement", said=agreement.describe(), share=agreement.share, kappa=agreement.kappa)
    for name, n in totals(log).items():
        stage.count(name, n)
    stage.event("saving")
    learner.write(output)
    write_training_log(output / TRAINING_LOG, log)
    records.collect(output / "feedback.jsonl")
    return output


def seed_of_step(cfg: OaifConfig, step: int) -> int:
    """Of the answers of a step. Offline a prompt has one pair of answers, however often it comes round."""
    return derive_seed(cfg.seed, "offline") if cfg.offline else derive_seed(cfg.seed, "step", step)


def check_there_are_pairs(
    pairs: "Sequence[Pair]", labelled: "Sequence[Labelled]", log: Sequence[dict[str, Any]], step: int
) -> None:
    """Raises FeedbackError when none of the first steps has given a pair: that is paid for and teaches nothing."""
    if pairs or any(row.get("pairs") for row in log) or step + 1 < STEPS_WITHOUT_PAIRS:
        return
    why = Counter(one.outcome if one.outcome != "abstained" else one.judgement.reason for one in labelled)
    said = ", ".join(f"{n} {reason}" for reason, n in why.most_common())
    raise FeedbackError(
        f"the first {step + 1} steps have given no pair; the questions of the last one: {said}. Try the annotator by "
        "`prefloop judge check`, or change --annotator or --sampling"
    )


def estimate_feedback(cfg: OaifConfig) -> list[str]:
    """What --dry-run prints: a line for every LLM judge, with what a whole run would take if no two answers were the
    same and every first answer of the judge were clear. Nothing is asked.
    """
    from prefloop.feedback.annotator import Comparison
    from prefloop.feedback.estimate import estimate
    from prefloop.feedback.registry import load_meter
    from prefloop.records import Response
    from prefloop.run import Run

    with tempfile.TemporaryDirectory() as folder, Run.open(Path(folder) / "run", recipe="oaif", config=cfg) as run:
        prompts, held_out = load_both(cfg, run)
        judges = load_judges(cfg, run)
    # Answers as long as they may be, of about a token a word; two different ones.
    first, second = (
        Response(text=" ".join([word] * cfg.sampling.max_new_tokens), finish_reason="length") for word in ("one", "two")
    )
    looks = sum(evaluation_is_due(cfg, [], step) for step in range(cfg.train.steps + 1))
    looked_at = looks * min(cfg.look_at.answers, len(held_out))
    lines = []
    for role, judge, prices, of, n in (
        ("training", judges.annotator, cfg.feedback, prompts, cfg.train.steps * cfg.train.batch_size),
        ("win rates", judges.annotator, cfg.feedback, held_out, looked_at),
        ("win rates", judges.evaluator, cfg.evaluation if cfg.evaluator else cfg.feedback, held_out, 2 * looked_at),
    ):
        questions = [Comparison(prompt, first, second) for prompt in of[: min(n, SAMPLED)]]
        found = estimate(judge, questions, load_meter(prices).prices) if questions else []
        lines += [f"{role}: {one.times(n / len(questions)).render()}" for one in found]
        lines += [] if found else [f"{role}: {judge.name}: no calls"]
    return lines


def beta_of(cfg: OaifConfig) -> float:
    """The beta given, or that of the loss."""
    from prefloop.train.losses import LOSSES

    return LOSSES[cfg.loss].beta if cfg.beta is None else cfg.beta


def evaluation_is_due(cfg: OaifConfig, log: Sequence[dict[str, Any]], step: int) -> bool:
    """After `step` steps: every so many, and at the end, once."""
    due = step > 0 and (step == cfg.train.steps or step % cfg.evaluate_every == 0)
    return due and not any(row["step"] == step and "evaluation" in row for row in log)


def distinct(prompts: "Sequence[Prompt]") -> "list[Prompt]":
    """Each prompt once: where an epoch ends inside a batch, a prompt may be in it twice."""
    return list({prompt.id: prompt for prompt in prompts}.values())


class Labelled(NamedTuple):
    """A question and what became of it: "pair", "identical", "tie", "abstained" or "unfinished"."""

    question: "Comparison"
    judgement: "Judgement"
    outcome: str


def preferences(
    groups: "Sequence[Group]", annotator: "Annotator", cfg: OaifConfig
) -> "tuple[list[Pair], list[Labelled]]":
    """Steps 2 and 3: pairs, and what became of every question."""
    from prefloop.feedback.annotator import Judgement, abstention
    from prefloop.feedback.stage import comparison_of, label
    from prefloop.run import Stage

    questions = [comparison_of(group) for group in groups]
    known = {}  # judgements that need no annotator
    for i, question in enumerate(questions):
        cut = [response.finish_reason == "length" for response in (question.a, question.b)]
        if question.identical:
            known[i] = Labelled(question, Judgement(p=0.5), "identical")
        elif any(cut) and cfg.on_unfinished == "drop":
            known[i] = Labelled(question, abstention("an answer is unfinished"), "unfinished")
        elif cut[0] != cut[1] and cfg.on_unfinished == "penalise":
            known[i] = Labelled(question, Judgement(p=float(cut[1])), "pair")
    asked = [i for i in range(len(questions)) if i not in known]
    answers = annotator.judge([questions[i] for i in asked])
    found = {i: Labelled(questions[i], one, outcome_of(one)) for i, one in zip(asked, answers, strict=True)} | known
    labelled = [found[i] for i in range(len(questions))]
    kept = [one for one in labelled if one.outcome == "pair"]
    pairs = label([one.question for one in kept], [one.judgement for one in kept], labels=cfg.feedback.labels,
                  stage=Stage.detached())  # fmt: skip
    return pairs, labelled


def outcome_of(judgement: "Judgement") -> str:
    if judgement.p is None:
        return "abstained"
    return "tie" if judgement.p == 0.5 else "pair"


def counts_of(labelled: Sequence[Labelled]) -> dict[str, Any]:
    """How many questions of a step ended how, why there was no answer, and what an annotator with slots followed."""
    found = Counter(one.outcome for one in labelled)
    reasons = Counter(one.judgement.reason for one in labelled if one.outcome == "abstained")
    slots = Counter(one.judgement.slot for one in labelled)
    return {
        **{name: found[outcome] for name, outcome in OUTCOMES.items()},
        **({"abstentions": dict(sorted(reasons.items()))} if reasons else {}),
        **({name: slots[name] for name in SLOTS} if any(one.judgement.q_ab is not None for one in labelled) else {}),
    }


def lengths_of_pairs(pairs: "Sequence[Pair]") -> dict[str, float]:
    """Mean characters of chosen and of rejected answers."""
    if not pairs:
        return {}
    chosen, rejected = (sum(getattr(pair, side).length_chars for pair in pairs) for side in ("chosen", "rejected"))
    return {"chosen_chars": chosen / len(pairs), "rejected_chars": rejected / len(pairs)}


def totals(log: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Questions of all steps by what became of them, and abstentions by reason."""
    found = Counter({name: sum(row.get(name, 0) for row in log) for name in OUTCOMES})
    found.update({name: sum(row.get(name, 0) for row in log) for name in SLOTS if any(name in row for row in log)})
    for row in log:
        found.update({f"abstained: {reason}": n for reason, n in row.get("abstentions", {}).items()})
    return dict(found)


class FeedbackRecords:
    """Every question with its answers and judgement, and what was counted, in files that a stopped run finds again.

    One file a step, under its own name: a step that is done again after a stop writes the same one.
    """

    def __init__(self, folder: Path, meters: "Sequence[Meter]") -> None:
        self.folder, self.meters = folder, meters
        folder.mkdir(exist_ok=True)
        self.counts = folder / "counts.json"
        if self.counts.is_file():
            for meter, counted in zip(meters, json.loads(self.counts.read_text()), strict=True):
                meter.resume(counted)

    def keep_counts(self) -> None:
        write_atomically(self.counts, json.dumps([meter.to_json() for meter in self.meters]))

    def summary(self) -> dict[str, Any]:
        return {name: tally for meter in self.meters for name, tally in meter.summary().items()}

    def write(self, step: int, labelled: Sequence[Labelled]) -> None:
        rows = [
            {
                "step": step + 1,
                "prompt": question.prompt.id,
                "a": question.a.text,
                "b": question.b.text,
                **judgement.model_dump(exclude_none=True),
                "outcome": outcome,
            }
            for question, judgement, outcome in labelled
        ]
        write_atomically(self.folder / f"{step:06d}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def collect(self, file: Path) -> None:
        """All steps, in order, as one file."""
        write_atomically(file, "".join(part.read_text() for part in sorted(self.folder.glob("*.jsonl"))))


def lengths(groups: "Sequence[Group]") -> dict[str, float]:
    """Mean length and share of finished answers of what was sampled."""
    responses = [response for group in groups for response in group.responses]
    return {
        "length_chars": sum(response.length_chars for response in responses) / len(responses),
        "finished": sum(response.finish_reason == "stop" for response in responses) / len(responses),
    }


def evaluate(
    online: "OnlineLearner",
    before: "Sequence[Group]",
    log: Sequence[dict[str, Any]],
    judges: Judges,
    cfg: OaifConfig,
) -> dict[str, Any]:
    """Own answers to the held-out prompts against those of the start model and of the evaluation before."""
    from prefloop.evaluate.reward_accuracy import mean_interval
    from prefloop.evaluate.win_rate import comparisons_of, win_rate
    from prefloop.records import Group

    prompts = [group.prompt for group in before]
    now = online.sample(prompts, k=1, sampling=cfg.sampling, seed=derive_seed(cfg.seed, "evaluation"), current=True)
    earlier = [row["evaluation"]["answers"] for row in log if "evaluation" in row]
    previous = [Group.from_json(json.dumps(group)) for group in earlier[-1]] if earlier else before
    questions = comparisons_of(now, before)
    judged, trained = judges.evaluator.judge(questions), judges.annotator.judge(questions)
    both = [(a.p, b.p) for a, b in zip(judged, trained, strict=True) if a.p is not None and b.p is not None]
    decided = [(a > 0.5, b > 0.5) for a, b in both if 0.5 not in (a, b)]
    drift, gap = online.drift(now)
    responses = [group.responses[0] for group in now]
    return {
        "against_start": win_rate(judged).model_dump(),
        "against_start_by_the_annotator": win_rate(trained).model_dump(),
        "against_previous": win_rate(judges.evaluator.judge(comparisons_of(now, previous))).model_dump(),
        "agreement": sum(a == b for a, b in decided) / len(decided) if decided else None,
        "length_chars": mean_interval([response.length_chars for response in responses]),
        "log_ratio_per_token": mean_interval(drift),
        "sampler_gap": online.check_sampler(gap),
        "answers": [json.loads(group.to_json()) for group in now],
        "preferred": [judgement.p for judgement in judged],
    }
