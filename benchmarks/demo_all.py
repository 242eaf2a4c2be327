"""The demo of every recipe, one after another, and one table of what came out.

    python benchmarks/demo_all.py [--out runs/demos] [RECIPE ...]

Each is `prefloop RECIPE --preset demo --out OUT/RECIPE`, a process of its own, whose output goes to OUT/RECIPE.log. One
that fails is told in the table, and the others go on. The same command continues, or only prints the table again where
all is done. Exit status: 0, or 1 where one has failed.

The figures are of a small model after a few steps on a few prompts: they show that the machinery runs, and no more.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prefloop.cli import having
from prefloop.errors import InputError
from prefloop.report.story import Story, read_story

Start = Callable[[str, Path], int]
"""(recipe, run folder) -> exit status."""


def main(argv: Sequence[str] | None = None, *, start: Start | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="only these")
    parser.add_argument("--out", type=Path, default=Path("runs/demos"))
    args = parser.parse_args(argv)
    recipes = having("demo")
    unknown = set(args.recipes) - set(recipes)
    if unknown:
        parser.error(f"no recipe with a demo: {', '.join(sorted(unknown))}; there are {', '.join(recipes)}")
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table("recipe", "minutes", "held out", "folder", title="demos")
    failed = 0
    try:
        for name in args.recipes or recipes:
            print(f"{name}: started, see {args.out / name}.log", flush=True)
            began = time.monotonic()
            status = (start or run_demo)(name, args.out / name)
            print(f"{name}: {'done' if status == 0 else 'FAILED'} after {time.monotonic() - began:.0f} s", flush=True)
            failed += status != 0
            table.add_row(*row(name, args.out / name, status))
    finally:  # what is done is told where the rest is interrupted
        Console(width=None if sys.stdout.isatty() else 140).print(table)
    return int(failed > 0)


def run_demo(name: str, folder: Path) -> int:
    """The demo of a recipe as its user would start it."""
    command = [sys.executable, "-m", "prefloop.cli", name, "--preset", "demo", "--out", str(folder)]
    with log_of(folder).open("w") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def row(name: str, folder: Path, status: int) -> tuple[str, str, str, str]:
    """A line of the table. Minutes are those of the run's stages, also of earlier processes."""
    try:
        story = read_story(folder)
    except InputError:
        story = None
    minutes = f"{story.seconds / 60:.1f}" if story else "-"
    if status:
        said = log_of(folder).read_text().split("\n") if log_of(folder).is_file() else []
        last = next((line for line in reversed(said) if line.strip()), "no output")
        return name, minutes, f"FAILED (exit status {status}): {last[:120]}", str(folder)
    return name, minutes, figure(story) if story else "-", str(folder)


def figure(story: Story) -> str:
    """The held-out figure that says most of a run: the first there is, with its 95 % interval."""
    rounds = story.rounds[::-1]
    checkups = [r.checkup for r in rounds if r.checkup]
    looks: list[tuple[str, list[Any]]] = [
        ("pairs ranked right", [r.ranking.overall.accuracy for r in rounds if r.ranking]),
        ("win rate", [found["against_start"]["rate"] for r in rounds for _, found in r.evaluations[::-1]]),
        ("win rate", [r.win_rate for r in rounds]),
        ("judged", [r.candidate.rate for r in rounds if r.candidate]),
        ("reward", [c.reward for c in checkups]),
        ("pairs ranked as labelled", [c.accuracy for c in checkups]),
    ]
    for what, found in looks:
        known = [interval for interval in found if interval]
        if known:
            value, low, high = known[0]
            before = f"{known[-1][0]:.2f} to " if what == "reward" and len(known) > 1 else ""
            return f"{what} {before}{value:.2f} [{low:.2f}, {high:.2f}]"
    return "no figure"


if __name__ == "__main__":
    sys.exit(main())
