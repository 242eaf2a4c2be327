"""`report.md`: what was run, what came out, before and after, where the drops and the time went."""

from pathlib import Path
from typing import Any

from prefloop.atomic import write_atomically
from prefloop.report import readings
from prefloop.report.costs import costs
from prefloop.report.plots import plot_alpha, plot_training
from prefloop.report.story import Round, Story, prompt_text
from prefloop.report.table import ALPHAS, WIN_RATES, alphas, alphas_meaning, markdown_table, win_rates


def write_report(story: Story) -> Path:
    """Write report.md and its plots into the run folder; returns the report's path."""
    plots = []
    if plot_alpha(story, story.path / "alpha.png"):
        plots.append("![length gap against alpha](alpha.png)")
    if plot_training(story, story.path / "training.png"):
        plots.append("![training](training.png)")
    shown = int(story.config.get("look_at", {}).get("shown", 0))
    parts = [
        f"# {story.recipe}: {story.name}",
        _what(story),
        "## Figures by round\n\n" + markdown_table(story),
        _costs(story),
        *(["## Curves\n\n" + "\n\n".join(plots)] if plots else []),
        _win_rates(story),
        _alphas(story),
        readings.markdown(readings.read(story)),
        _before_and_after(story.rounds, shown),
        _counts(story),
        _time(story),
        _figures(story),
    ]
    path = story.path / "report.md"
    write_atomically(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _what(story: Story) -> str:
    config = story.config
    rows = [
        ("policy", config.get("policy")),
        ("base", config.get("base")),
        ("aligned", config.get("aligned")),
        ("alpha", story.alpha),
        ("reference", config.get("reference")),
        ("pairs", config.get("pairs") if "data" not in config else None),
        ("data", config.get("data")),
        ("reward", config.get("reward")),
        ("prompts", config.get("prompts")),
        ("value", config.get("value")),
        ("annotator", config.get("annotator")),
        ("evaluator", config.get("evaluator")),
        ("held out", config.get("held_out")),
        ("seed", config.get("seed")),
        ("model", "model/"),
        ("all options", "config.yaml"),
        ("stages, hashes, versions", "manifest.json"),
    ]
    return "\n".join(f"- {name}: `{value}`" for name, value in rows if value not in (None, ""))


def _costs(story: Story) -> str:
    labels, rows = costs(story)
    if not rows:
        return ""
    lines = ["| | " + " | ".join(labels) + " |", "|---|" + "---:|" * len(labels)]
    return "\n".join(["## What a round took", "", *lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _win_rates(story: Story) -> str:
    """The evaluations of an online method: by whom, against whom, and what drifted meanwhile."""
    rows = win_rates(story)
    if not rows:
        return ""
    annotator = story.config.get("annotator")
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([
        "## Win rates",
        "",
        f"On held-out prompts, with 95 % intervals. The evaluator is `{story.config.get('evaluator') or annotator}`, "
        f"the annotator that trains `{annotator}`.",
        "",
        "| " + " | ".join(WIN_RATES) + " |",
        "|---:|---|---|---|---|---:|---:|",
        *lines,
    ])  # fmt: skip


def _alphas(story: Story) -> str:
    """What ExPO tried."""
    if not story.tried:
        return ""
    lines = ["| " + " | ".join(row) + " |" for row in alphas(story)]
    head = ["| " + " | ".join(ALPHAS) + " |", "|---|" + "---:|" * (len(ALPHAS) - 2) + "---|"]
    return "\n".join(["## Search over alpha", "", alphas_meaning(story), "", *head, *lines])


def _quoted(text: str) -> str:
    """A model's text as an indented block: no mark-up in it takes effect."""
    return "\n".join("    " + line for line in text.splitlines() or ["(empty)"])


def _before_and_after(rounds: list[Round], shown: int) -> str:
    answered = [round for round in rounds if round.answers]
    if len(answered) < 2 or not shown:
        return ""
    parts = ["## Before and after", "Held-out prompts, the same seed for every model."]
    for position, group in enumerate(answered[0].answers[:shown]):
        parts.append(f"### {position + 1}\n\n{_quoted(prompt_text(group.prompt))}")
        for round in (answered[0], answered[-1]):
            response = round.answers[position].responses[0]
            cut = "" if response.finish_reason == "stop" else ", cut at the limit"
            parts.append(f"**{round.label}** ({response.length_chars} characters{cut})\n\n{_quoted(response.text)}")
    return "\n\n".join(parts)


def _counts(story: Story) -> str:
    lines = [
        f"| {name} | {reason} | {n} |"
        for name, entry in story.stages.items()
        for reason, n in (entry.get("counts") or {}).items()
    ]
    return "\n".join(["## Kept and dropped", "", "| stage | what | count |", "|---|---|---:|", *lines]) if lines else ""


def _figures(story: Story) -> str:
    lines = [
        f"| {name} | {what} | {value:.4g} |"
        for name, entry in story.stages.items()
        for what, value in (entry.get("figures") or {}).items()
    ]
    return (
        "\n".join(["## Measured on the way", "", "| stage | what | value |", "|---|---|---:|", *lines]) if lines else ""
    )


def _time(story: Story) -> str:
    entries: list[tuple[str, dict[str, Any]]] = list(story.stages.items())
    lines = [f"| {name} | {entry['seconds']:.1f} |" for name, entry in entries if entry["seconds"] >= 0.1]
    table = [
        "## Time",
        "",
        "| stage | seconds |",
        "|---|---:|",
        *lines,
        f"| **all stages** | **{story.seconds:.1f}** |",
    ]
    return "\n".join(table)
