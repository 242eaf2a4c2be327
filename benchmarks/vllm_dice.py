"""Two rounds of DICE through vLLM, killed in the middle of the second round's sampling and continued.

    python benchmarks/vllm_dice.py --python vllm-env/bin/python

The demo runs at a small size on the real small model. When the second round has its first finished groups, the run is
ended by SIGKILL: its vLLM has to be gone then, and the same command has to go on with those groups. The second round
must have sampled from the weights that the first one made: vLLM's log-probabilities of its own answers are held against
the trainer's under the new weights and under the old ones. Sampling is in float32, where two models that differ by a
few training steps are told apart. Run again, it goes on where it was. Linux only. Prints, last, one line of JSON.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from prefloop.models import ModelRef
from prefloop.records import Group
from prefloop.sample.handover import Gap, measure
from prefloop.sample.process import SupervisedProcess

STAGE = "round-2/groups"
SMALL = """
--k 4 --prompts-per-round 12 --filters.min-valid 2 --sampling.max-new-tokens 32 --look-at.answers 0
--start.steps 4 --start.batch-size 2 --start.checkpoint-every 2 --start.validation-pairs 2
--train.steps 4 --train.batch-size 2 --train.checkpoint-every 2 --train.validation-pairs 2 --train.learning-rate 2e-5
--compute.sequences-per-batch 4 --compute.sampling-dtype float32
""".split()  # fmt: skip

# Small and quick to start on a CPU, also beside other work.
SERVER_ARGS = "--enforce-eager --max-model-len 1024 --kv-cache-memory-bytes 536870912"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="", help="interpreter of an environment with vLLM")
    parser.add_argument("--server-args", default=SERVER_ARGS, help="further arguments of vLLM")
    parser.add_argument("--policy", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/vllm_dice"))
    args = parser.parse_args()
    if not args.python:
        print("skipped: name the interpreter of an environment with vLLM by --python")
        print(json.dumps({"skipped": "no --python"}))
        return
    out, python = args.out.resolve(), os.path.abspath(args.python)  # a link in a virtual environment stays a link
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)  # by which all processes of the run are found, those of vLLM among them
    run = out / "run"
    command = [sys.executable, "-m", "prefloop.cli", "dice", "--preset", "demo", "--policy", args.policy]
    command += ["--out", str(run), "--engine", "vllm", "--server.python", python]
    command += [f"--server.args={args.server_args}", *SMALL]

    killed = out / "killed.json"
    if not killed.is_file():
        killed.write_text(json.dumps(kill_in_the_middle(command, run, out)))
    killing = json.loads(killed.read_text())
    print(f"killed with {len(killing['groups'])} groups sampled; vLLM was gone {killing['gone_after_s']:.1f} s later")
    if with_log(command, out).wait(3600) != 0:
        raise SystemExit(f"the killed run did not finish; see {out / 'log'}")

    groups = [Group.from_json(line) for line in (run / f"{STAGE}.jsonl").read_text().split("\n")[:-1]]
    kept = set(killing["groups"]) <= {group.to_json() for group in groups}
    print(f"{len(groups)} groups in the end; those sampled before the kill are {'' if kept else 'NOT '}among them")
    new, old = (gap(run / f"round-{t}" / "model", groups) for t in (1, 0))
    print(f"under the weights of round 1, which round 2 samples from: {new}")
    print(f"under the weights of round 0: {old}")
    figures = {
        "rounds": 2,
        "groups": len(groups),
        "groups_before_kill": len(killing["groups"]),
        "kept": kept,
        "gone_after_s": killing["gone_after_s"],
        "gap_new_weights": new.mean,
        "gap_old_weights": old.mean,
        "processes_left": len(processes(out)),
    }
    good = kept and new.mean < old.mean and not figures["processes_left"]
    print(json.dumps({**figures, "good": good}))
    sys.exit(not good)


def with_log(command: list[str], out: Path) -> SupervisedProcess:
    return SupervisedProcess(command, log=out / "log")


def kill_in_the_middle(command: list[str], run: Path, out: Path) -> dict:
    """Run until some but not all groups of the stage are on disk, kill, and wait until nothing of the run is left."""
    process = with_log(command, out)
    scratch = run / f"{STAGE}.partial"
    # The run and its watchdog are two; those of vLLM are on top.
    while not (any(scratch.glob("groups-*.jsonl")) and len(processes(out)) > 2):
        if process.wait(0.05) is not None:
            raise SystemExit(f"the run ended by itself before it could be killed; see {out / 'log'}")
    shards = [file.read_text() for file in scratch.glob("groups-*.jsonl")]
    opened = [event for event in events(run) if event["event"] == "opened"]
    os.kill(opened[-1]["pid"], signal.SIGKILL)
    started = time.monotonic()
    while processes(out):
        if time.monotonic() - started > 60:
            raise SystemExit(f"processes are left a minute after the kill: {processes(out)}")
        time.sleep(0.05)
    seconds = round(time.monotonic() - started, 2)
    return {"gone_after_s": seconds, "groups": [line for shard in shards for line in shard.split("\n")[1:-1]]}


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if line.endswith("}")]


def processes(folder: Path) -> list[int]:
    """Processes that work in `folder`, but for this one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid() and (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
        except OSError:  # gone by now, or another user's
            continue
    return found


def gap(model: Path, groups: list[Group]) -> Gap:
    """How far vLLM's log-probabilities of the answers are from the trainer's under the weights in a folder."""
    found = measure(ModelRef.of(model), [groups], budget=2048, device="cpu", answers=10**6, seed=0)
    assert found is not None, "vLLM gave no log-probabilities"
    return found


if __name__ == "__main__":
    main()
