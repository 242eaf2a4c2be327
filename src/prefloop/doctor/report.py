"""What `prefloop doctor` found, as one record, and what follows from it: problems, which stop a run, and notes."""

from rich.filesize import decimal

from prefloop.doctor.data import DataFacts
from prefloop.doctor.estimate import Mode, ScoreEstimate, StepEstimate
from prefloop.doctor.machine import Machine
from prefloop.doctor.model import ModelFacts
from prefloop.doctor.parity import GRADIENT_TOLERANCE, VALUE_TOLERANCE
from prefloop.records import Record
from prefloop.train.logprobs import Path


class PathFacts(Record):
    """The path that will be taken, and its float32 numbers beside the plain transformers forward (relative).

    gradient_difference is None where memory is too small for two sets of gradients.
    """

    path: Path
    why: str
    responses: int
    value_difference: float
    gradient_difference: float | None = None


class Report(Record):
    """All figures. Ready when there are no problems; notes stop nothing.

    mode: what was asked for, and what the memory is judged by. lora_rank: of the adapters that were estimated.
    steps: "full" first, "lora" where peft is installed.
    measured_tokens: of the row that was timed. path and scoring are None when the weights alone do not fit.
    """

    machine: Machine
    model: ModelFacts
    data: DataFacts
    mode: Mode
    lora_rank: int
    batch_size: int
    tokens_per_forward: int
    measured_tokens: int | None = None
    path: PathFacts | None = None
    steps: tuple[StepEstimate, ...]
    scoring: ScoreEstimate | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def problems(report: Report) -> tuple[str, ...]:
    """What would stop a run or make its numbers wrong: what was seen, what was expected, what to change."""
    available = report.machine.memory_available or 0
    found = [*_data_problems(report), *_parity_problems(report)]
    step = next(step for step in report.steps if step.mode == report.mode)
    if step.fits is False:
        found.append(
            f"a training step ({step.mode}) needs {needed(step)} and {decimal(available)} are available: does not fit; "
            f"{_remedy(step, available, report.tokens_per_forward)}"
        )
    if report.scoring and report.scoring.fits is False:
        found.append(
            f"scoring needs {decimal(report.scoring.total)} and {decimal(available)} are available: does not fit; "
            f"lower compute.tokens_per_forward (now {report.tokens_per_forward})"
        )
    return tuple(found)


def _remedy(step: StepEstimate, available: int, tokens_per_forward: int) -> str:
    """What can make a step fit: what takes from the activations helps only where everything else has room."""
    ways = ["use LoRA (lora.rank 16)"] if step.mode == "full" else []
    if step.weights + step.gradients + step.optimizer <= available:
        ways = [
            f"lower compute.tokens_per_forward (now {tokens_per_forward})",
            *ways,
            "turn gradient checkpointing on (train.gradient_checkpointing)",
        ]
    if step.weights > available or not ways:
        ways = ["use a smaller model or more memory"]
    return ", or ".join(ways)


def needed(step: StepEstimate) -> str:
    """`2.2 GB`, or `at least 2.2 GB` where activations could not be measured."""
    if step.total is None:
        return f"at least {decimal(step.weights + step.gradients + step.optimizer)}"
    return decimal(step.total)


def _data_problems(report: Report) -> list[str]:
    data = report.data
    if not data.without_room:
        return []
    return [
        f"{data.without_room} of {data.measured} prompts leave no room for an answer in the model's context of "
        f"{report.model.context} tokens; shorten them or leave them out"
    ]


def _parity_problems(report: Report) -> list[str]:
    if report.path is None:
        return []
    checked = [
        ("log-probability", report.path.value_difference, VALUE_TOLERANCE),
        ("gradient of a weight", report.path.gradient_difference, GRADIENT_TOLERANCE),
    ]
    return [
        f"the {name} on the {report.path.path} path differs from the plain transformers forward by {difference:.1e} "
        f"(relative; at most {tolerance:.0e} expected): scores and training would be wrong; use another model, and "
        f"report this architecture ({report.model.architecture})"
        for name, difference, tolerance in checked
        if difference is not None and not difference <= tolerance
    ]


def notes(report: Report) -> tuple[str, ...]:
    """What is worth knowing and stops nothing."""
    data, machine = report.data, report.machine
    said = {
        f"{data.over_context - data.without_room} of {data.measured} rows are longer than the model's context of "
        f"{report.model.context} tokens; training drops them": data.over_context > data.without_room,
        f"{data.skipped} rows of the data do not fit and were skipped": data.skipped > 0,
        "prompts have no answers yet: those of the packaged pairs stood in for them, so times and memory are those of "
        "short answers": data.kind == "prompts",
        "the padded path computes a prompt once for each of its answers, so it is slower": (
            report.path is not None and report.path.path == "padded"
        ),
        "bfloat16 is emulated on this processor; compute.dtype float32 is faster": (
            machine.dtype == "bfloat16" and not machine.bfloat16_is_native
        ),
        "LoRA was not looked at: pip install 'prefloop[lora]'": all(step.mode != "lora" for step in report.steps),
        "the system does not say how much memory is available, so nothing was compared with it": (
            machine.memory_available is None
        ),
    }
    return tuple(text for text, holds in said.items() if holds)
