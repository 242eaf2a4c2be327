"""`prefloop eval`: a model, or a file of answers, against another one; its implicit reward; how far it has moved.

    --prompts, --against, --annotator    win rate, at equal length too
    --pairs                              implicit reward of (policy, reference) on pairs whose preference is known
    --prompts                            drift of the policy from the reference, on its own answers

Everything is a stage of the run folder --out: the same command continues, and nothing is sampled or asked twice.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.console import Console

from prefloop.atomic import write_atomically
from prefloop.commands import needed
from prefloop.config import Config, free, read_yaml
from prefloop.data.answers import Answered, Question, files_of, mt_bench_questions, read_answers
from prefloop.data.chat import same_tokenizer
from prefloop.errors import InputError
from prefloop.evaluate.drift import drift
from prefloop.evaluate.figures import COMPARED, FIGURES, Report, figures_of, table_of
from prefloop.evaluate.implicit_pairs import implicit_pairs
from prefloop.evaluate.win_rate import head_to_head
from prefloop.feedback.annotator import Annotator, Comparison, Judgement
from prefloop.feedback.options import AnnotatorName, Feedback
from prefloop.feedback.registry import load_annotator, load_meter
from prefloop.feedback.stage import ask
from prefloop.models import ModelRef, load_tokenizer, resolve
from prefloop.recipes.steps import load, load_own_prompts, some, tokenise
from prefloop.records import Group
from prefloop.report.page import REPORT, write_page
from prefloop.report.story import read_story
from prefloop.run import Run, Stage, recipe_of
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.sample.stage import sample
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute

START = "start"


class EvalOptions(Config):
    """Win rate, implicit reward and drift of a model or a file of answers, with intervals: eval.json, report.html."""

    policy: str = Field(default="", description="what is evaluated: a model, a run folder, or a file of answers")
    against: str = Field(default="", description="the other side: the same, or `start`, what the run began with")
    prompts: str = Field(
        default="", description="prompts that both sides answer, or MT-Bench questions; else those of a file of answers"
    )
    limit: int | None = Field(default=None, ge=1, description="only so many prompts, drawn by the seed")
    annotator: AnnotatorName = ""
    pairs: str = Field(default="", description="held-out pairs, or RewardBench's (prompt, chosen, rejected, subset)")
    reference: str = Field(
        default="", description="of the implicit reward and the drift; by default the run's start, or --against"
    )
    beta: float = Field(default=0.1, gt=0, description="of the implicit reward of --pairs")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    seed: int = Field(default=0, ge=0, description="of every draw, the same for both sides, and of the intervals")
    sampling: Sampling = Field(default_factory=Sampling)
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    feedback: Feedback = Field(default_factory=lambda: Feedback(labels="soft"))
    compute: Compute = Field(default_factory=Compute)
    out: str = free(default="runs/eval", description="the folder to work in; the same command continues it")


@dataclass(frozen=True)
class Side:
    """One side: a model, or a file of answers; `start` is the model that a run folder began with."""

    name: str
    model: ModelRef | None = None
    file: str | None = None
    start: str | None = None

    @classmethod
    def of(cls, name: str) -> "Side":
        """Raises InputError for a folder that is neither a finished run nor a model, and for what `resolve` refuses."""
        path = Path(name)
        if is_file(name):
            return cls(name, file=name)
        if not path.is_dir():
            return cls(name, model=resolve(name))
        if recipe_of(path / "config.yaml") is None:
            if any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
                return cls(name, model=resolve(name))
            raise InputError(
                f"{name}: neither a run folder (no config.yaml of prefloop in it) nor a model (no config.json); "
                "give one of them, or a file of answers"
            )
        if recipe_of(path / "config.yaml") == "eval":
            raise InputError(f"{name} is an evaluation; give what was evaluated, or {name}/ours/model_outputs.json")
        if not (path / "model" / "config.json").is_file():
            raise InputError(f"{name}: this run has no final model yet; finish it, or give one of its round-*/model")
        return cls(name, model=ModelRef.of(path / "model", name), start=read_yaml(path / "config.yaml").get("policy"))


def is_file(name: str) -> bool:
    """Whether a side is a file of answers."""
    return Path(name).is_file() and Path(name).suffix != ".gguf"


def run_eval(options: EvalOptions) -> None:
    """`prefloop eval`: run, write OUT/eval.json, and show it."""
    needed(options, "policy")
    model = bool(options.prompts) and not is_file(options.policy)
    if not model and not options.against and not options.pairs:
        raise InputError("nothing to measure: give --prompts and --against with an --annotator, or --pairs")
    if bool(options.against) != bool(options.annotator):
        raise InputError("--against and --annotator go together: one says against whom, the other who judges")
    out = Path(options.out)
    with Run.open(out, recipe="eval", config=options, console=Console(stderr=True)) as run:
        report = evaluate(options, run)
        write_atomically(out / FIGURES, json.dumps(json.loads(report.to_json()), indent=1) + "\n")
    page = write_page([read_story(out)], out / REPORT)
    console = Console()
    for figures in figures_of(report):
        console.print(table_of(figures))
    print(f"figures {out / FIGURES}\nreport  {page}")


def evaluate(options: EvalOptions, run: Run) -> Report:
    """The parts that the options ask for, in the order of their cost."""
    ours = Side.of(options.policy)
    theirs = other_side(options.against, ours) if options.against else None
    reference = reference_of(options, ours, theirs)
    questions = questions_of(options, ours, theirs, run)
    meter = load_meter(options.feedback, run=run)
    judge = (
        load_annotator(options.annotator, options.feedback, compute=options.compute, meter=meter) if theirs else None
    )
    parts: dict[str, object] = {"policy": ours.name}
    if options.pairs:
        if ours.model is None or reference is None:
            raise InputError("--pairs needs a model as --policy and a --reference that it was trained from")
        pairs = load(options.pairs, "pairs", options.on_bad_row, run)
        difference = same_tokenizer(load_tokenizer(ours.model), load_tokenizer(reference))
        if difference:
            raise InputError(
                f"--pairs: {ours.name} and its reference {reference.name} have different tokenizers ({difference}); "
                "the implicit reward needs both to score the same token ids: give another --reference"
            )
        pairs = run.stage("pairs", tokenise, pairs, ours.model)
        if not pairs:
            raise InputError(f"--pairs {options.pairs}: no pair fits into the model's context; give shorter ones")
        parts["implicit_reward"] = run.stage(
            "implicit_reward", implicit_pairs, pairs, ours.model, reference, beta=options.beta, compute=options.compute
        )
    if questions:
        own, drawn = answers_of(run, "ours", ours, questions, options)
        parts["prompts"] = len(questions)
        if ours.model:
            if reference and same_tokenizer(load_tokenizer(ours.model), load_tokenizer(reference)):
                run.note(f"no KL: {reference.name} has another tokenizer")
                reference = None
            parts["drift"] = run.stage("drift", drift, drawn, ours.model, reference, compute=options.compute)
        if theirs and judge:
            others, _ = answers_of(run, "theirs", theirs, questions, options)
            judgements = run.stage("judgements", judgements_of, own, others, judge)
            if options.feedback.labels == "hard":
                judgements = [one if one.p is None else one.model_copy(update={"p": hard(one.p)}) for one in judgements]
            compared = comparisons(own, others)
            groups = [Group(prompt=c.prompt, responses=(c.a, c.b)) for c in compared]
            write_atomically(run.path / COMPARED, "".join(group.to_json() + "\n" for group in groups))
            parts["win_rate"] = head_to_head(compared, judgements, seed=options.seed)
            parts |= {"against": theirs.name, "annotator": judge.name}
    return Report.model_validate(parts)


def other_side(against: str, ours: Side) -> Side:
    """Raises InputError for `start` where the policy is no run folder."""
    if against != START:
        return Side.of(against)
    if not ours.start:
        raise InputError(f"--against start: {ours.name} is not a run folder; give the run folder as --policy")
    return Side.of(ours.start)


def reference_of(options: EvalOptions, ours: Side, theirs: Side | None) -> ModelRef | None:
    """The model that drift and implicit reward are measured from."""
    if options.reference or ours.start:
        return resolve(options.reference or ours.start or "")
    return theirs.model if theirs else None


def questions_of(options: EvalOptions, ours: Side, theirs: Side | None, run: Run) -> list[Question]:
    """Those of --prompts, else those of a file of answers. Raises InputError where none are, or two files differ."""
    if options.prompts:
        questions = mt_bench_questions(options.prompts)
        if questions is None:
            prompts = load_own_prompts(options.prompts, options.on_bad_row, run)
            questions = [Question(prompt) for prompt in prompts]
    elif theirs is None and ours.file is None:
        return []
    else:
        files = [side.file for side in (ours, theirs) if side and side.file]
        if not files:
            raise InputError("--prompts is missing: neither side is a file of answers that has prompts of its own")
        held = [[Question(a.prompt, a.second) for a in read_answers(file)] for file in files]
        questions = held[0]
        for file, others in zip(files, reversed(held), strict=True):
            read_answers(file, others)
    kept = {prompt.id for prompt in some([q.prompt for q in questions], options.limit, options.seed)}
    return [question for question in questions if question.prompt.id in kept]


def answers_of(
    run: Run, label: str, side: Side, questions: Sequence[Question], options: EvalOptions
) -> tuple[list[Answered], list[Group]]:
    """A side's answers, also as files that other tools read, and what was sampled for them turn by turn."""
    drawn: list[Group] = []
    if side.model is None:
        assert side.file
        answered = read_answers(side.file, questions)
    else:
        turns = {q.prompt.id: q for q in questions}
        first = _sampled(run, f"{label}/first", side.model, [q.prompt for q in questions], options)
        follow = [(turns[g.prompt.id].after(g.responses[0])) for g in first if turns[g.prompt.id].second]
        second = _sampled(run, f"{label}/second", side.model, follow, options) if follow else []
        last = {group.prompt.id: group.responses[0] for group in second}
        drawn = [*first, *second]
        answered = [
            Answered(prompt=g.prompt, second=q.second, answers=(g.responses[0], last[q.after(g.responses[0]).id]))
            if (q := turns[g.prompt.id]).second
            else Answered(prompt=g.prompt, answers=g.responses)
            for g in first
        ]
    for name, content in files_of(answered, side.name).items():
        write_atomically(run.path / label / name, content)
    return answered, drawn


def _sampled(run: Run, stage: str, model: ModelRef, prompts: Sequence[object], options: EvalOptions) -> list[Group]:
    return run.stage(stage, sample, model, prompts, k=1, sampling=options.sampling,
                     seed=derive_seed(options.seed, "eval"), compute=options.compute, engine=options.engine,
                     server=options.server)  # fmt: skip


def comparisons(ours: Sequence[Answered], theirs: Sequence[Answered]) -> list[Comparison]:
    return [Comparison(a.prompt, a.whole, b.whole) for a, b in zip(ours, theirs, strict=True)]


def hard(p: float) -> float:
    """A preference as a choice: 0, 1, or a tie."""
    return 0.5 * ((p > 0.5) + (p >= 0.5))


def judgements_of(
    ours: Sequence[Answered], theirs: Sequence[Answered], annotator: Annotator, *, stage: Stage
) -> list[Judgement]:
    """Stage: one judgement a question. Raises InputError where more than half are abstentions."""
    judgements = ask(comparisons(ours, theirs), annotator, stage=stage)
    reasons = [judgement.reason for judgement in judgements if judgement.reason]
    if 2 * len(reasons) > len(judgements):
        often = max(set(reasons), key=reasons.count)
        raise InputError(
            f"{annotator.name} abstained on {len(reasons)} of {len(judgements)} comparisons, mostly: {often}; "
            "a win rate of the rest would mislead; use another --annotator, or other prompts"
        )
    return judgements
