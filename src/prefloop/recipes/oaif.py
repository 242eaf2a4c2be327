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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prefloop.config import Config, free
from prefloop.errors import FeedbackError, InputError
from prefloop.feedback.options import AnnotatorName, Feedback
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, resolve
from prefloop.recipes.steps import LookAt, check_room, conclude, load_own_prompts, look_at, split_off
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Train

if TYPE_CHECKING:
    from prefloop.feedback.annotator import Annotator
    from prefloop.records import Group, Pair, Prompt
    from prefloop.run import Run, Stage
    from prefloop.train.online import OnlineLearner

Unfinished = Literal["keep", "drop", "penalise"]
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
        train=Train(steps=24, batch_size=8, learning_rate=5e-6, warmup_steps=2, validation_pairs=0, checkpoint_every=8),
    )


def oaif(cfg: OaifConfig, run: "Run") -> ModelRef:
    """Run OAIF; returns the final model, RUN/model."""
    start = resolve(cfg.policy)
    prompts, held_out = load_both(cfg, run)
    check_room([*prompts, *held_out], start, cfg.sampling.max_new_tokens)
    if cfg.evaluator in ("", cfg.annotator):
        run.note("warning: the win rates are judged by the annotator that trains the model, which flatters it; name "
                 "another --evaluator")  # fmt: skip
    look = partial(look_at, run, start, [], cfg, beta=beta_of(cfg), prompts=held_out)

    before = look("start", start)
    folder = run.round(1).stage("model", align, start, prompts, before, cfg)
    aligned = ModelRef.of(folder.path, name="round-1")
    look("round-1", aligned)
    return conclude(run, aligned)


def load_both(cfg: OaifConfig, run: "Run") -> "tuple[list[Prompt], list[Prompt]]":
    """The prompts to train on and those to look at models with."""
    if not cfg.annotator:
        raise InputError("--annotator is missing: name who judges, such as rule:helpful-short or judge:MODEL")
    prompts = load_own_prompts(cfg.prompts, cfg.on_bad_row, run)
    if not prompts:
        raise InputError("--prompts is missing: name a file, a data set folder or hub name, or seed:train")
    held_out = load_own_prompts(cfg.held_out, cfg.on_bad_row, run)
    if held_out:
        return prompts, held_out
    return split_off(prompts, min(256, len(prompts) // 10), derive_seed(cfg.seed, "held out"))


def align(
    start: ModelRef, prompts: "Sequence[Prompt]", before: "Sequence[Group]", cfg: OaifConfig, *, stage: "Stage"
) -> Path:
    """The T steps. `before`: answers of the start model to the held-out prompts."""
    from prefloop.feedback.registry import load_annotator, load_meter
    from prefloop.train.checkpoint import load_checkpoint, save_checkpoint
    from prefloop.train.learner import TRAINING_LOG, Learner, batch_of_step, write_training_log
    from prefloop.train.losses import LOSSES
    from prefloop.train.memory import reused_memory
    from prefloop.train.online import OnlineLearner

    loss, beta = LOSSES[cfg.loss].function, beta_of(cfg)
    meter = load_meter(cfg.feedback)
    annotator = load_annotator(cfg.annotator, cfg.feedback, compute=cfg.compute, meter=meter, stage=stage)
    evaluator = load_annotator(
        cfg.evaluator or cfg.annotator, cfg.feedback, compute=cfg.compute, meter=meter, stage=stage
    )
    learner = Learner(start, [], loss=partial(loss, beta=beta), beta=beta, config=cfg.train, compute=cfg.compute,
                      seed=cfg.seed, stage=stage)  # fmt: skip
    online = OnlineLearner(learner, behaviour="start" if cfg.offline else "current")
    first, log = load_checkpoint(stage.scratch, model=learner.model, optimizer=learner.optimizer)

    def save(step: int) -> None:
        if stage.scratch and step > first:
            save_checkpoint(stage.scratch, step=step, model=learner.model, optimizer=learner.optimizer, log=log)

    @contextmanager
    def kept(step: int) -> Iterator[None]:
        """A budget or a server that ends the run, not the method: nothing of it is lost."""
        try:
            yield
        except FeedbackError:
            save(step)
            stage.event("feedback", **meter.summary())
            raise

    with reused_memory(), stage.progress(cfg.train.steps, unit="steps", description=f"{cfg.loss} online") as advance:
        advance(first)
        for step in range(first, cfg.train.steps + 1):
            if evaluation_is_due(cfg, log, step):
                with kept(step):
                    found = evaluate(online, before, log, annotator, evaluator, cfg)
                log.append({"step": step, "evaluation": found})
                stage.event("evaluation", **log[-1])
            if step == cfg.train.steps:
                break
            batch = [prompts[i] for i in batch_of_step(len(prompts), cfg.train.batch_size, step, cfg.seed)]
            groups = online.sample(
                distinct(batch), k=2, sampling=cfg.sampling, seed=derive_seed(cfg.seed, "step", step)
            )
            row: dict[str, Any] = {"step": step + 1, **lengths(groups)}
            if step == first and not cfg.offline:
                gap = online.check_sampler(online.drift(groups)[1])
                row |= {"sampler_gap": gap} if step == 0 else {}
            with kept(step):
                row |= learn(online, groups, annotator, cfg, step)
            log.append(row)
            stage.event("step", **row)
            if step + 1 < cfg.train.steps and (step + 1) % cfg.train.checkpoint_every == 0:
                save(step + 1)
            advance(1)
    if "sampler_gap" in log[0]:
        stage.figure("sampler gap at the start, mean nats a token", log[0]["sampler_gap"])
    stage.note(f"feedback: {meter.describe()}")
    stage.event("feedback", **meter.summary())
    for name in ("pairs", "identical", "tie", "abstained", "unfinished", *SLOTS):
        if any(name in row for row in log):
            stage.count(name, sum(row.get(name, 0) for row in log))
    assert stage.output is not None
    stage.event("saving")
    learner.write(stage.output)
    write_training_log(stage.output / TRAINING_LOG, log)
    return stage.output


def estimate_feedback(cfg: OaifConfig) -> list[str]:
    """What --dry-run prints: a line for every LLM judge, with what it would take at most. Nothing is asked."""
    from prefloop.feedback.annotator import Comparison
    from prefloop.feedback.estimate import CHARS_PER_TOKEN, estimate
    from prefloop.feedback.registry import load_annotator, load_meter
    from prefloop.records import Response
    from prefloop.run import Run

    with tempfile.TemporaryDirectory() as folder, Run.open(Path(folder) / "run", recipe="oaif", config=cfg) as run:
        prompts, held_out = load_both(cfg, run)
    # Answers as long as they may be. Each is another one, so that none is taken for a question asked before.
    length = cfg.sampling.max_new_tokens * CHARS_PER_TOKEN
    first, second = (Response(text=f"{n} ".ljust(length, "."), finish_reason="length") for n in (1, 2))

    meter, asked = load_meter(cfg.feedback), cfg.train.steps * cfg.train.batch_size
    looks = sum(evaluation_is_due(cfg, [], step) for step in range(cfg.train.steps + 1))
    looked_at = looks * min(cfg.look_at.answers, len(held_out))
    lines = []
    for role, name, of, n in (
        ("training", cfg.annotator, prompts, asked),
        ("win rates", cfg.annotator, held_out, looked_at),
        ("win rates", cfg.evaluator or cfg.annotator, held_out, 2 * looked_at),
    ):
        annotator = load_annotator(name, cfg.feedback, compute=cfg.compute, meter=meter)
        questions = [Comparison(prompt, first, second) for prompt in of[: min(n, SAMPLED)]]
        found = estimate(annotator, questions, meter.prices) if questions else []
        lines += [f"{role}: {one.times(n / len(questions)).render()}" for one in found]
        lines += [] if found else [f"{role}: {annotator.name}: no calls"]
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


def learn(
    online: "OnlineLearner", groups: "Sequence[Group]", annotator: "Annotator", cfg: OaifConfig, step: int
) -> dict[str, Any]:
    """Steps 2 and 3 on the answers of one step: its counts, and the learner's figures where there was a pair."""
    pairs, counts = preferences(groups, annotator, cfg)
    return {**counts, **(online.learner.step(online.with_reference_logps(pairs), step) if pairs else {})}


def preferences(
    groups: "Sequence[Group]", annotator: "Annotator", cfg: OaifConfig
) -> "tuple[list[Pair], dict[str, int]]":
    """Steps 2 and 3: pairs, how many questions made none and why, and what an annotator with slots followed."""
    from prefloop.feedback.annotator import Judgement
    from prefloop.feedback.stage import comparison_of, label
    from prefloop.run import Stage

    questions = [comparison_of(group) for group in groups]
    asked, judged = [], []
    counts = {"identical": 0, "unfinished": 0}
    for question in questions:
        cut = [response.finish_reason == "length" for response in (question.a, question.b)]
        if question.identical:
            counts["identical"] += 1
        elif any(cut) and cfg.on_unfinished == "drop":
            counts["unfinished"] += 1
        elif cut[0] != cut[1] and cfg.on_unfinished == "penalise":
            counts["unfinished"] += 1
            judged.append((question, Judgement(p=float(cut[1]))))
        else:
            asked.append(question)
    answers = annotator.judge(asked)
    if any(answer.q_ab is not None for answer in answers):
        counts |= {name: sum(answer.slot == name for answer in answers) for name in SLOTS}
    judged += zip(asked, answers, strict=True)
    pairs = label([q for q, _ in judged], [j for _, j in judged], labels=cfg.feedback.labels, stage=Stage.detached())
    counts["tie"] = sum(judgement.p == 0.5 for _, judgement in judged)
    counts["abstained"] = sum(judgement.p is None for _, judgement in judged)
    return pairs, {**counts, "pairs": len(pairs)}


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
    annotator: "Annotator",
    evaluator: "Annotator",
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
    judged, trained = evaluator.judge(questions), annotator.judge(questions)
    both = [(a.p, b.p) for a, b in zip(judged, trained, strict=True) if a.p is not None and b.p is not None]
    decided = [(a > 0.5, b > 0.5) for a, b in both if 0.5 not in (a, b)]
    drift, gap = online.drift(now)
    responses = [group.responses[0] for group in now]
    return {
        "against_start": win_rate(judged).model_dump(),
        "against_start_by_the_annotator": win_rate(trained).model_dump(),
        "against_previous": win_rate(evaluator.judge(comparisons_of(now, previous))).model_dump(),
        "agreement": sum(a == b for a, b in decided) / len(decided) if decided else None,
        "length_chars": mean_interval([response.length_chars for response in responses]),
        "log_ratio_per_token": mean_interval(drift),
        "sampler_gap": online.check_sampler(gap),
        "answers": [json.loads(group.to_json()) for group in now],
        "preferred": [judgement.p for judgement in judged],
    }
