"""The report of `prefloop doctor` as a person reads it; the verdict comes last."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from prefloop.doctor.data import DataFacts, Percentiles
from prefloop.doctor.machine import Machine
from prefloop.doctor.model import ModelFacts
from prefloop.doctor.report import PathFacts, Report, needed

Rows = Iterable[tuple[str, str]]
ROWS = (
    "weights",
    "gradients",
    "optimiser state",
    "activations",
    "temporary",
    "head tiles",
    "memory",
    "fits",
    "seconds",
)
"""Of the estimates, downwards."""


def render(report: Report, console: Console) -> None:
    """Print the report, section by section, and the verdict."""
    sections: list[tuple[str, Rows]] = [
        ("machine", _machine(report.machine)),
        ("model", _model(report)),
        ("data", _data(report.data, report.model)),
    ]
    if report.path:
        sections.append(("path", _path(report.path, report.machine)))
    for title, rows in sections:
        console.print(Text(title, style="bold"))
        console.print(_table(rows))
        console.print()
    console.print(Text(_basis(report), style="bold"))
    console.print(_estimates(report))
    console.print()
    for note in report.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    for problem in report.problems:
        console.print(Text(f"problem: {problem}", style="red"), soft_wrap=True)
    verdict = f"not ready: {len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}"
    console.print(Text(verdict, style="bold red") if report.problems else Text("ready", style="bold green"))


def _table(rows: Rows) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(Text(f"  {name}"), Text(value))
    return table


def _machine(machine: Machine) -> Rows:
    yield "system", f"{machine.system}, {machine.cores} cores, {machine.threads} threads"
    yield "device", f"{machine.device} ({machine.device_why}): {machine.device_name}"
    known = [(machine.memory_available, "available"), (machine.memory_total, "in all")]
    yield "memory", ", ".join(f"{decimal(size)} {what}" for size, what in known if size is not None) or "not known"
    yield "bfloat16", "native" if machine.bfloat16_is_native else "not native"
    yield "products", ", ".join(f"{dtype} {rate:,.0f} GFLOP/s" for dtype, rate in machine.gflops.items())
    yield "used", f"{machine.dtype} for scoring and training, {machine.sampling_dtype} for sampling"
    yield "versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())


def _model(report: Report) -> Rows:
    model: ModelFacts = report.model
    yield "name", f"{model.name} ({model.architecture}, {model.dtype_on_disk} on disk)"
    modes = {"full": "full", "lora": f"lora of rank {report.lora_rank}"}
    trained = ", ".join(f"{step.trained:,} trained ({modes[step.mode]})" for step in report.steps)
    yield "parameters", f"{model.parameters:,}; {trained}"
    yield "shape", f"{model.layers} layers, vocabulary of {model.vocabulary:,}, context {model.context or 'not known'}"
    yield "tokens", model.tokens


def _data(data: DataFacts, model: ModelFacts) -> Rows:
    part = f", {data.measured} of them looked at" if data.measured < data.rows else ""
    yield "source", f"{data.source}: {data.rows:,} {data.kind}{part}"
    yield "columns", data.mapping
    yield "prompt tokens", _percentiles(data.prompt_tokens)
    if data.row_tokens:
        yield "row tokens", f"{_percentiles(data.row_tokens)} (prompt and longer response)"
    if model.context:
        yield "over context", f"{data.over_context} of {data.measured} rows"


def _percentiles(tokens: Percentiles) -> str:
    return f"{tokens.median} median, {tokens.p90} 90th percentile, {tokens.p99} 99th, {tokens.max} max"


def _path(path: PathFacts, machine: Machine) -> Rows:
    yield "taken", f"{path.why} (in {machine.dtype})"
    gradient = "not compared" if path.gradient_difference is None else f"{path.gradient_difference:.1e} in a gradient"
    yield (
        "parity",
        f"{path.value_difference:.1e} in the log-probabilities of {path.responses} responses, {gradient} "
        "(largest relative difference from the plain transformers forward, float32)",
    )


def _basis(report: Report) -> str:
    if report.measured_tokens is None:
        return "estimate, from the sizes of the weights alone"
    return (
        f"estimate, from passes over {report.measured_tokens} tokens: a training step of {report.batch_size} pairs "
        "(the optimiser's own update not timed), scoring 100 responses"
    )


def _estimates(report: Report) -> Table:
    """A column per kind of training and one for scoring, a row per share of the memory."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    rows: dict[str, list[str]] = {name: [] for name in ROWS}

    def column(title: str, cells: Sequence[str]) -> None:
        table.add_column(title, justify="right")
        for row, cell in zip(rows.values(), cells, strict=True):
            row.append(cell)

    for step in report.steps:
        sizes = (step.weights, step.gradients, step.optimizer, step.activations, step.temporary, step.head)
        column(f"train ({step.mode})", [*map(_size, sizes), needed(step), _verdict(step.fits), _seconds(step.seconds)])
    if report.scoring:
        score = report.scoring
        sizes = (score.weights, 0, 0, score.activations, 0, score.head)
        column("score", [*map(_size, sizes), decimal(score.total), _verdict(score.fits), _seconds(score.seconds)])
    for name, cells in rows.items():
        table.add_row(f"  {name}", *cells)
    return table


def _size(size: int | None) -> str:
    return "-" if not size else decimal(size)


def _verdict(fits: bool | None) -> str:
    return {True: "fits", False: "does not fit", None: "not known"}[fits]


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g} s"
