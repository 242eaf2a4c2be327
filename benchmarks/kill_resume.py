"""Kill the DICE demo at random moments, rerun it until it is done, and compare every byte with an uninterrupted run.

    python benchmarks/kill_resume.py --kills 8

The demo runs at a small size on the real small model (or on --policy). Each kill is SIGKILL, at a random moment inside
a stage: sampling, scoring, pairs, training and saving are all among them. Compared are the final weights and every
artifact in the manifest, and the report without its table of times. Prints, last, one line of JSON.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from prefloop.models import cache_folder

SMALL = """
--k 4 --prompts-per-round 12 --filters.min-valid 2 --sampling.max-new-tokens 64 --look-at.answers 4 --look-at.shown 2
--start.steps 4 --start.batch-size 2 --start.checkpoint-every 1 --start.validation-pairs 2
--train.steps 4 --train.batch-size 2 --train.checkpoint-every 1 --train.validation-pairs 2
--compute.sequences-per-batch 8
""".split()  # fmt: skip

# Where the kills fall, in the order of the run; each at a random moment of the stage. `saving` waits for the event that
# training is over and the model is being written.
TARGETS = [
    ("round-0/model", "stage"),
    ("round-1/groups", "stage"),
    ("round-1/feedback", "stage"),
    ("round-1/pairs", "stage"),
    ("round-1/model", "stage"),
    ("round-1/model", "saving"),
    ("round-2/groups", "stage"),
    ("round-2/feedback", "stage"),
    ("round-2/training_pairs", "stage"),
    ("round-2/model", "stage"),
    ("round-2/model", "saving"),
    ("model", "stage"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/kill_resume"))
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    whole, killed = args.out / "whole", args.out / "killed"

    start(args.policy, whole).wait()
    seconds = {name: entry["seconds"] for name, entry in manifest(whole).items()}
    print(f"uninterrupted: {sum(seconds.values()):.0f} s in stages", flush=True)

    draw = random.Random(args.seed)
    # Sampling, scoring, pairs, training and saving once each; the other kills where chance puts them.
    each = [target for target in TARGETS if target[0].startswith("round-1/")]
    others = draw.sample([target for target in TARGETS if target not in each], max(0, args.kills - len(each)))
    targets = [target for target in TARGETS if target in each + others]
    kills = 0
    while kills < args.kills:
        if not targets:
            raise SystemExit(f"the run ended before kill {kills + 1} of {args.kills}")
        name, moment = targets.pop(0)
        if kill_once(args.policy, killed, name, moment, delay=draw.random() * 0.9 * seconds[name]):
            kills += 1
    process = start(args.policy, killed)
    if process.wait() != 0:
        raise SystemExit("the killed run did not finish")

    differences = compare(whole, killed)
    for difference in differences:
        print("differs:", difference)
    print(json.dumps({"kills": kills, "identical": not differences}))
    sys.exit(bool(differences))


def start(policy: str, out: Path) -> subprocess.Popen[bytes]:
    """The same command each time."""
    command = [sys.executable, "-m", "prefloop.cli", "dice", "--preset", "demo", "--policy", policy, "--out", str(out)]
    # A cache of each run's own: one that the other filled would answer instead of the code under test.
    cache = out.parent / f"{out.name}.cache"
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "models").is_symlink():
        (cache / "models").symlink_to(cache_folder() / "models")
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, *SMALL], stdout=log, stderr=log, env={**os.environ, "PREFLOOP_CACHE": str(cache)}
        )


def manifest(out: Path) -> dict[str, dict]:
    return json.loads((out / "manifest.json").read_text())["stages"]


def events(out: Path) -> list[dict]:
    file = out / "events.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def kill_once(policy: str, out: Path, name: str, moment: str, *, delay: float) -> bool:
    """Run until that moment of the stage, wait `delay` (a saving lasts about a second), kill. False if it was over."""
    delay = min(delay, 1.0) if moment == "saving" else delay
    before = len(events(out))
    process = start(policy, out)
    wanted = "saving" if moment == "saving" else "started"
    while process.poll() is None:
        if any(event["stage"] == name and event["event"] == wanted for event in events(out)[before:]):
            break
        time.sleep(0.005)
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    print(f"{'killed' if killed else 'missed'} in {name} ({moment}) after {delay:.2f} s of it", flush=True)
    return killed


def compare(whole: Path, killed: Path) -> list[str]:
    """Names of artifacts, and of files in artifact folders, whose bytes differ."""
    a, b = manifest(whole), manifest(killed)
    differences = [] if list(a) == list(b) else ["list of stages"]
    for name, entry in a.items():
        path = entry["artifact"]["path"]
        files = sorted(p.relative_to(whole) for p in (whole / path).rglob("*")) if (whole / path).is_dir() else [path]
        for file in files:
            if (whole / file).is_file() and (
                not (killed / file).is_file() or (whole / file).read_bytes() != (killed / file).read_bytes()
            ):
                differences.append(f"{name}: {file}")
    reports = [(folder / "report.md").read_text().split("## Time")[0].split("\n", 1)[1] for folder in (whole, killed)]
    plots = [[(folder / plot).read_bytes() for plot in ("alpha.png", "training.png")] for folder in (whole, killed)]
    return differences + ["report.md"] * (reports[0] != reports[1]) + ["plots"] * (plots[0] != plots[1])


if __name__ == "__main__":
    main()
