"""Everything that can be known before a run, in about a minute: machine, model, data, path, parity, memory and time.

Nothing is trained and nothing is written. Memory is looked at first: what would not fit is not tried.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from prefloop.data.chat import ChatFormat
from prefloop.data.mapping import OnBadRow
from prefloop.doctor.data import MOST_ROWS, evenly, longest, look_at_data, read_data, token_groups
from prefloop.doctor.estimate import (
    Line,
    ScoreEstimate,
    StepEstimate,
    Workload,
    fits,
    head_bytes,
    scoring_pass,
    training_pass,
    typical,
)
from prefloop.doctor.machine import look_at_machine
from prefloop.doctor.model import look_at_model, outline
from prefloop.doctor.parity import gradient_difference, value_difference
from prefloop.doctor.report import PathFacts, Report, notes, problems
from prefloop.errors import InputError
from prefloop.models import ModelRef, load_model, load_tokenizer, resolve
from prefloop.train.config import Compute, Lora
from prefloop.train.learner import add_lora
from prefloop.train.logprobs import choose_path
from prefloop.train.packing import TokenGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASS_TOKENS = 512
"""Tokens of the longer pass that is timed: a few seconds for a small model on a CPU."""

PARITY_ROWS = 4
"""The shortest rows of the data: on them the path is compared with the plain forward."""

ESTIMATED_RANK = 16
"""Of the adapters that are estimated when none were asked for."""

Say = Callable[[str], object]


def examine(
    model: str,
    data: str,
    *,
    split: str | None,
    on_bad_row: OnBadRow,
    compute: Compute,
    batch_size: int,
    lora: Lora,
    say: Say,
) -> Report:
    """Look at everything; `say` is told what is being done.

    Memory is judged for the training that was asked for: adapters where `lora.rank` is not 0, else all weights.
    Raises InputError for a model, data or a device that cannot be used.
    """
    say(f"looking for {model}")
    ref = resolve(model)
    bare = outline(ref)
    chat = ChatFormat(load_tokenizer(ref))
    facts = look_at_model(ref, bare, chat)
    steps = [StepEstimate.of_weights("full", bare)]
    adapters = lora if lora.rank else lora.replace(rank=ESTIMATED_RANK)
    if lora.rank or find_spec("peft"):
        steps.append(StepEstimate.of_weights("lora", add_lora(bare, adapters, seed=0)))

    say(f"reading {data}")
    loaded = read_data(data, split=split, on_bad_row=on_bad_row)
    groups = token_groups(evenly(loaded.records, MOST_ROWS), chat)
    usable = _within(groups, facts.context, data)
    report = Report(
        machine=look_at_machine(compute, say),
        model=facts,
        data=look_at_data(loaded, groups, facts.context),
        mode="lora" if lora.rank else "full",
        lora_rank=adapters.rank,
        batch_size=batch_size,
        tokens_per_forward=compute.tokens_per_forward,
        steps=tuple(steps),
    )
    if fits(steps[0].weights, report.machine.memory_available) is not False:
        report = measure(report, ref, usable, adapters, say)
    return report.model_copy(update={"problems": problems(report), "notes": notes(report)})


def _within(groups: Sequence[TokenGroup], context: int | None, source: str) -> list[TokenGroup]:
    """The groups that training would not drop. Raises InputError when there are none."""
    kept = [group for group in groups if context is None or longest(group) <= context]
    if not kept:
        raise InputError(
            f"{source}: all {len(groups)} rows looked at are longer than the model's context of {context} tokens; "
            "shorten them, or use a model with a longer context"
        )
    return kept


def measure(report: Report, ref: ModelRef, groups: Sequence[TokenGroup], adapters: Lora, say: Say) -> Report:
    """The report with what only the loaded model can tell: path, parity, and a pass of every kind that fits."""
    dtype, available = report.machine.dtype, report.machine.memory_available
    say(f"loading {ref.name}")
    model = load_model(ref, device=report.machine.device)
    say("comparing with the plain forward")
    full = report.steps[0]
    room = fits(full.weights + 2 * full.gradients, available) is not False
    found = look_at_path(model, groups, gradients=room)

    work = Workload.of(groups, report.batch_size, report.tokens_per_forward, found.path)
    row = typical(groups, PASS_TOKENS)
    parts = (row[: len(row) // 2], row)  # the first, shorter pass also warms up
    say("timing a scoring pass")
    scored = scoring_pass(model, row, found.path, dtype)
    lines: list[Line] = []
    steps: list[StepEstimate] = []
    for step in report.steps:
        if fits(step.weights + step.gradients, available) is not False:
            say(f"timing a training pass ({step.mode})")
            trainee = add_lora(model, adapters, seed=0) if step.mode == "lora" else model
            short, long = (training_pass(trainee, part, found.path, dtype) for part in parts)
            lines.append(Line.through(short, long))
            head = head_bytes(model, work.training_row)
            step = step.measured(work, lines[-1], long, head=head, available=available)
        steps.append(step)
    scoring = ScoreEstimate.of(
        full.weights,
        work,
        lines[0].per_token / report.model.layers if lines else None,
        scored,
        head=head_bytes(model, work.scoring_row),
        available=available,
    )
    update = {"path": found, "steps": tuple(steps), "scoring": scoring, "measured_tokens": scored.tokens}
    return report.model_copy(update=update)


def look_at_path(model: "PreTrainedModel", groups: Sequence[TokenGroup], *, gradients: bool) -> PathFacts:
    """The path that training takes on `groups`, and its parity on the shortest of them; `gradients` on one of these."""
    path, why = choose_path(model, groups)
    shortest = sorted(groups, key=lambda group: group.tokens)[:PARITY_ROWS]
    return PathFacts(
        path=path,
        why=why,
        responses=sum(len(group.responses) for group in shortest),
        value_difference=value_difference(model, shortest, path),
        gradient_difference=gradient_difference(model, shortest[:1], path) if gradients else None,
    )
