"""The single steps as commands, file in, file out: `prefloop sample | score | pairs | inspect | judge check | report |
doctor`.

A step works in a folder OUT.work beside its output, which keeps finished parts when it is interrupted and is removed
when the output is complete. An output that exists already is never overwritten.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.console import Console
from rich.markup import escape

from prefloop.atomic import write_atomically
from prefloop.config import Config
from prefloop.data.groups import read_groups
from prefloop.data.mapping import load_prompts
from prefloop.errors import InputError
from prefloop.feedback.implicit_reward import implicit_reward
from prefloop.feedback.options import AnnotatorName, Feedback
from prefloop.models import load_tokenizer, resolve
from prefloop.pairs.filters import keep_finished, keep_scored
from prefloop.pairs.replay import mix
from prefloop.pairs.select import best_vs_worst, debias_length
from prefloop.recipes.dice import Filters, find_coefficient
from prefloop.recipes.steps import encode, load, two_models
from prefloop.records import Record
from prefloop.report.page import REPORT, write_page
from prefloop.report.story import read_story
from prefloop.run import Run
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.sample.stage import sample as sample_stage
from prefloop.train.config import Compute, Lora


class SampleOptions(Config):
    """K answers of a model to every prompt of a file, as groups: one JSON line a prompt."""

    policy: str = Field(default="", description="hub id, folder, .gguf file or smollm2-135m")
    prompts: str = Field(default="", description="prompts: a file, a data set folder or hub name, or seed:train")
    out: str = Field(default="groups.jsonl", description="the file to write")
    k: int = Field(default=1, ge=1, description="answers a prompt")
    reward: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="of a model that prefloop ca made: the reward to ask for, where it is not the model's own target",
    )
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    seed: int = Field(default=0, ge=0, description="of every draw")
    sampling: Sampling = Field(default_factory=Sampling)
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)


class ScoreOptions(Config):
    """log pi(y|x) - log pi_ref(y|x) of every response of a file, under any two models over one tokenizer."""

    file: str = Field(default="", description="groups, pairs, or rows with a prompt and one or several responses")
    policy: str = Field(default="", description="the DPO-trained model")
    reference: str = Field(default="", description="the model that it was trained from")
    out: str = Field(default="scored.jsonl", description="the file to write")
    compute: Compute = Field(default_factory=Compute)


class PairsOptions(Config):
    """Best against worst of scored groups, length debiased, mixed with offline pairs; alpha goes to OUT.length.json."""

    file: str = Field(default="", description="scored groups, as `prefloop score` writes them")
    out: str = Field(default="pairs.jsonl", description="the file to write")
    alpha: float | Literal["auto"] = Field(default="auto", description="length coefficient; auto finds alpha*")
    length_unit: Literal["chars", "tokens"] = Field(default="chars", description="unit of |y|")
    filters: Filters = Field(default_factory=lambda: Filters(min_valid=2))
    offline: str = Field(default="", description="offline pairs to mix in")
    replay_fraction: float = Field(default=0.0, ge=0, le=1, description="share of offline pairs")
    seed: int = Field(default=0, ge=0, description="of the mixture")


class InspectOptions(Config):
    """Rows of a prompts or pairs file as a model will see them: prompt, response and end tokens apart."""

    file: str = Field(default="", description="prompts or pairs: a file, a data set folder or hub name, or seed:train")
    model: str = Field(default="smollm2-135m", description="whose tokenizer and chat template to use")
    rows: int = Field(default=3, ge=1, description="how many rows to show")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")


class JudgeCheckOptions(Config):
    """How far a judge can be trusted, on pairs whose answer is known, before it labels anything: agreement, how often
    it follows the slot or the length, abstentions, and what it costs.
    """

    annotator: AnnotatorName = ""
    gold: str = Field(default="", description="pairs with known preference: a file, a data set, or seed:train")
    limit: int | None = Field(default=None, ge=1, description="only the first so many")
    dry_run: bool = Field(default=False, description="say what it would take in calls, tokens and money; ask nothing")
    feedback: Feedback = Field(default_factory=Feedback)
    compute: Compute = Field(default_factory=Compute)
    out: str = Field(default="", description="a JSON file to write all figures to")


class DoctorOptions(Config):
    """What this machine makes of a model: hardware, path, parity on a few rows, memory and time a step.

    Nothing is trained. Exit status 0 when all is ready, 1 when there is a problem.
    """

    model: str = Field(default="", description="hub id, folder, .gguf file or smollm2-135m")
    data: str = Field(default="seed", description="pairs or prompts: a file, a data set folder or hub name, seed:train")
    split: str = Field(default="", description="of the data; all of it when empty")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    batch_size: int = Field(default=32, ge=1, description="pairs a training step")
    lora: Lora = Field(default_factory=Lora)
    compute: Compute = Field(default_factory=Compute)
    out: str = Field(default="", description="a JSON file to write all figures to")


class ReportOptions(Config):
    """A self-contained page of finished runs, several side by side: figures, charts, what they mean, samples."""

    runs: tuple[str, ...] = Field(default=(), description="run folders, as the recipes make them")
    out: str = Field(default="", description="the page to write; RUN/report.html, or report.html here for several runs")


def sample(options: SampleOptions) -> None:
    """`prefloop sample`."""
    needed(options, "policy", "prompts")

    def work(run: Run) -> Sequence[Record]:
        loaded = load_prompts(options.prompts, on_bad_row=options.on_bad_row)
        run.note(f"{options.prompts}: {loaded.mapping.describe()}")
        policy = resolve(options.policy)
        policy = policy if options.reward is None else policy.asking_for(options.reward)
        return run.stage("groups", sample_stage, policy, loaded.records, k=options.k,
                         sampling=options.sampling, seed=options.seed, compute=options.compute,
                         engine=options.engine, server=options.server)  # fmt: skip

    to_file("sample", options, work)


def score(options: ScoreOptions) -> None:
    """`prefloop score`."""
    needed(options, "file", "policy", "reference")

    def work(run: Run) -> Sequence[Record]:
        groups = read_groups(options.file)
        policy, reference = two_models(options.policy, options.reference)
        encoded = run.stage("groups", encode, groups, policy)
        return run.stage("scored", implicit_reward, encoded, policy, reference, compute=options.compute)

    to_file("score", options, work)


def pairs(options: PairsOptions) -> None:
    """`prefloop pairs`."""
    needed(options, "file")
    if bool(options.offline) != (options.replay_fraction > 0):
        raise InputError("--offline and --replay-fraction go together: one says which pairs, the other what share")

    def work(run: Run) -> Sequence[Record]:
        groups = read_groups(options.file)
        valid = run.stage("valid", keep_finished, groups, **options.filters.model_dump())
        scored = run.stage("scored", keep_scored, valid, min_valid=options.filters.min_valid)
        coefficient = run.stage("length", find_coefficient, scored, alpha=options.alpha, unit=options.length_unit)
        run.note(
            f"alpha {coefficient.alpha:.4g} nats per {coefficient.unit[:-1]}: mean length gap "
            f"{coefficient.gap_at_zero:+.1f} to {coefficient.gap:+.1f} {coefficient.unit}"
        )
        write_atomically(Path(options.out + ".length.json"), coefficient.to_json() + "\n")
        made = run.stage("pairs", best_vs_worst, debias_length(scored, coefficient))
        if not options.offline:
            return made
        offline = load(options.offline, "offline", "error", run)
        return run.stage("mixed", mix, made, offline, fraction=options.replay_fraction, seed=options.seed)

    to_file("pairs", options, work)


def inspect(options: InspectOptions) -> None:
    """`prefloop inspect`."""
    from prefloop.data.chat import ChatFormat
    from prefloop.data.inspect import inspect_rows

    needed(options, "file")
    chat = ChatFormat(load_tokenizer(resolve(options.model)))
    inspect_rows(options.file, chat, Console(), n=options.rows, on_bad_row=options.on_bad_row)


def judge_check(options: JudgeCheckOptions) -> None:
    """`prefloop judge check`."""
    from prefloop.feedback.gold import check_judge, estimate_check
    from prefloop.feedback.registry import load_annotator, load_meter

    needed(options, "annotator", "gold")
    out = new_file(options.out) if options.out else None
    meter = load_meter(options.feedback)
    annotator = load_annotator(options.annotator, options.feedback, compute=options.compute, meter=meter)
    estimates = estimate_check(options.gold, annotator, meter=meter, limit=options.limit)
    for estimate in estimates:
        print(estimate.render())
    if options.dry_run:
        if not estimates:
            print(f"{annotator.name}: no calls")
        return
    report = check_judge(options.gold, annotator, meter=meter, limit=options.limit)
    Console().print(report.render())
    if out:
        write_atomically(out, report.to_json() + "\n")


def doctor(options: DoctorOptions) -> None:
    """`prefloop doctor`. Raises SystemExit with status 1 when there is a problem."""
    from prefloop.doctor.examine import examine
    from prefloop.doctor.render import render

    needed(options, "model")
    out = new_file(options.out) if options.out else None
    with Console(stderr=True).status("") as status:
        report = examine(
            options.model,
            options.data,
            split=options.split or None,
            on_bad_row=options.on_bad_row,
            compute=options.compute,
            batch_size=options.batch_size,
            lora=options.lora,
            say=lambda text: status.update(escape(text)),
        )
    render(report, Console())
    if out:
        write_atomically(out, report.to_json() + "\n")
    if report.problems:
        sys.exit(1)


def report(options: ReportOptions) -> None:
    """`prefloop report`. RUN/report.html, which the run itself has written, is written anew."""
    needed(options, "runs")
    stories = [read_story(Path(run)) for run in options.runs]
    if options.out or len(stories) > 1:
        out = new_file(options.out or REPORT)
    else:
        out = stories[0].path / REPORT
    print(write_page(stories, out))


def needed(options: Config, *names: str) -> None:
    """Raises InputError for the first of these options that was not given."""
    for name in names:
        if not getattr(options, name):
            description = type(options).model_fields[name].description
            raise InputError(f"--{name} is missing: {description}")


def new_file(out: str) -> Path:
    """The path of an output. Raises InputError when there is something at it."""
    path = Path(out)
    if path.exists():
        raise InputError(f"{path} exists already; give another --out, or delete it")
    return path


def to_file(
    name: str, options: SampleOptions | ScoreOptions | PairsOptions, work: Callable[[Run], Sequence[Record]]
) -> None:
    """Run `work` in OUT.work and write its records to OUT, whole or not at all."""
    out = new_file(options.out)
    folder = out.with_name(out.name + ".work")
    with Run.open(folder, recipe=name, config=options, console=Console(stderr=True)) as run:
        records = work(run)
        write_atomically(out, "".join(record.to_json() + "\n" for record in records))
    shutil.rmtree(folder)
    print(f"{out}: {len(records)} rows")
