"""`report.md`: what was run, what came out, before and after, where the drops and the time went."""

from pathlib import Path
from typing import Any

from prefloop.atomic import write_atomically
from prefloop.records import Prompt
from prefloop.report.plots import plot_alpha, plot_training
from prefloop.report.story import Round, Story
from prefloop.report.table import markdown_table


def write_report(story: Story) -> Path:
    """Write report.md and its plots into the run folder; returns the report's path."""
    plots = []
    if plot_alpha(story, story.path / "alpha.png"):
        plots.append("![length gap against alpha](alpha.png)")
    if plot_training(story, story.path / "training.png"):
        plots.append("![training](training.png)")
    shown = int(story.config.get("look_at", {}).get("shown", 0))
    parts = [
        f"# {story.recipe}: {story.path.name}",
        _what(story),
        "## Figures by round\n\n" + markdown_table(story),
        *(["## Curves\n\n" + "\n\n".join(plots)] if plots else []),
        _win_rates(story),
        _readings(story),
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
        ("reference", config.get("reference")),
        ("pairs", config.get("pairs")),
        ("held out", config.get("held_out")),
        ("seed", config.get("seed")),
        ("model", "model/"),
        ("all options", "config.yaml"),
        ("stages, hashes, versions", "manifest.json"),
    ]
    return "\n".join(f"- {name}: `{value}`" for name, value in rows if value not in (None, ""))


def _win_rates(story: Story) -> str:
    """The evaluations of an online method: by whom, against whom, and what drifted meanwhile."""
    rows = [(row["step"], row["evaluation"]) for r in story.rounds for row in r.training if "evaluation" in row]
    if not rows:
        return ""
    judges = {
        "evaluator": story.config.get("evaluator") or story.config.get("annotator"),
        "annotator": story.config.get("annotator"),
    }
    lines = [
        f"| {step} | {_rate(found['against_start'])} | {_rate(found['against_start_by_the_annotator'])} "
        f"| {_rate(found['against_previous'])} | {found['length_chars'][0]:.0f} "
        f"| {found['log_ratio_per_token'][0]:.4f} |"
        for step, found in rows
    ]
    return "\n".join([
        "## Win rates",
        "",
        f"On held-out prompts, with 95 % intervals. The evaluator is `{judges['evaluator']}`, the annotator that "
        f"trains `{judges['annotator']}`.",
        "",
        "| step | against the start, evaluator | against the start, annotator "
        "| against the evaluation before, evaluator | characters | log pi/pi(0) a token |",
        "|---:|---|---|---|---:|---:|",
        *lines,
    ])  # fmt: skip


def _rate(found: dict[str, Any]) -> str:
    if found["rate"] is None:
        return f"none ({found['abstained']} abstained)"
    value, low, high = found["rate"]
    abstained = f", {found['abstained']} abstained" if found["abstained"] else ""
    return f"{value:.2f} [{low:.2f}, {high:.2f}]{abstained}"


def _readings(story: Story) -> str:
    """Plain words where a known pattern shows, with the models that show it."""
    looked = [(round.label, round.checkup) for round in story.rounds if round.checkup]
    patterns = [
        (
            [label for label, c in looked if (c.rejected_change or 0) < (c.chosen_change or 0) < 0],
            "chosen and rejected both became less likely, rejected more so. DPO trains the difference, so this is "
            "expected; where the fall of chosen is large, train for fewer steps or raise beta.",
        ),
        (
            [label for label, c in looked if label != "start" and c.accuracy and c.accuracy[1] <= 0.5 <= c.accuracy[2]],
            "the interval of the held-out accuracy contains 1/2, so with these held-out pairs the implicit reward "
            "cannot be told from a coin; more held-out pairs or more training would say more.",
        ),
        (
            [label for label, c in looked if c.finished is not None and c.finished < 0.7],
            "over 30 % of the answers hit the limit of new tokens; DICE makes no pairs of those, OAIF trains on them "
            "without an end (--on-unfinished says otherwise): raise sampling.max_new_tokens.",
        ),
    ]
    lines = [f"- {', '.join(labels)}: {text}" for labels, text in patterns if labels]
    return "\n".join(["## What it means", "", *lines]) if lines else ""


def _text(prompt: Prompt) -> str:
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)


def _quoted(text: str) -> str:
    """A model's text as an indented block: no mark-up in it takes effect."""
    return "\n".join("    " + line for line in text.splitlines() or ["(empty)"])


def _before_and_after(rounds: list[Round], shown: int) -> str:
    answered = [round for round in rounds if round.answers]
    if len(answered) < 2 or not shown:
        return ""
    parts = ["## Before and after", "Held-out prompts, the same seed for every model."]
    for position, group in enumerate(answered[0].answers[:shown]):
        parts.append(f"### {position + 1}\n\n{_quoted(_text(group.prompt))}")
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
    total = sum(entry["seconds"] for _, entry in entries)
    lines = [f"| {name} | {entry['seconds']:.1f} |" for name, entry in entries if entry["seconds"] >= 0.1]
    table = ["## Time", "", "| stage | seconds |", "|---|---:|", *lines, f"| **all stages** | **{total:.1f}** |"]
    return "\n".join(table)
