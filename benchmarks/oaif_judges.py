"""The OAIF demo on the real small model with three annotators: a rule, a local LLM judge, and one behind a server.

    python benchmarks/oaif_judges.py --annotators rule,judge,api --vllm-python vllm-env/bin/python

The judge is the packaged small model itself: it shows that the machinery works, not that 135M parameters can judge.
For `api`, vLLM serves it on 127.0.0.1, with a key, as any OpenAI-compatible server would; it is ended in the end. Each
run starts with an empty cache of judgements. Then two steps of it are taken again in a new run folder: the program
stops if that asks a question again, or if the key is in any file. Prints, last, one line of JSON with seconds, calls,
pairs made, and win rates against the start by the evaluator.
"""

import argparse
import http.client
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from prefloop.feedback.meter import usage_of
from prefloop.models import cache_folder, resolve
from prefloop.sample.options import Server
from prefloop.sample.process import SupervisedProcess
from prefloop.sample.vllm import serve_command, served_name, vllm_python

KEY = "OAIF_JUDGES_KEY"
MODEL = "smollm2-135m"
LABELS_ONLY = json.dumps({"structured_outputs": {"choice": ["1", "2"]}})
"""vLLM's own field. Left alone, the small model answers with anything but a label, and the run stops for want of pairs.
"""
SERVER_ARGS = "--enforce-eager --kv-cache-memory-bytes 536870912"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotators", default="rule,judge,api", help="of rule, judge and api, with commas")
    parser.add_argument("--vllm-python", default="", help="interpreter of an environment with vLLM, for api")
    parser.add_argument("--out", type=Path, default=Path("runs/oaif_judges"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ[KEY] = secrets.token_hex(16)
    found: dict[str, Any] = {}
    for name in args.annotators.split(","):
        if name == "rule":
            found[name] = run(args.out, name, "rule:helpful-short")
        elif name == "judge":
            found[name] = run(args.out, name, f"judge:{MODEL}")
        else:
            with vllm_server(args.vllm_python, args.out / "vllm.log") as (url, model):
                found[name] = run(args.out, name, f"api:{model}", "--feedback.base-url", url,
                                  "--feedback.api-key-env", KEY, "--feedback.request", LABELS_ONLY)  # fmt: skip
            leaks = [str(file) for file in args.out.rglob("*") if file.is_file() and holds_key(file)]
            if leaks:
                raise SystemExit(f"the key is in {leaks}")
    print(json.dumps(found))


def run(folder: Path, name: str, annotator: str, *options: str) -> dict[str, Any]:
    """The demo with this annotator, and two steps of it again; what it took."""
    out, cache = folder / name, folder / f"cache-{name}"
    cache.mkdir(exist_ok=True)
    models = cache / "models"
    if not models.exists():
        resolve(MODEL)  # its conversion is not part of the demo's time
        models.symlink_to((cache_folder() / "models").resolve())
    command = [sys.executable, "-m", "prefloop.cli", "oaif", "--preset", "demo", "--annotator", annotator, *options]
    environment = os.environ | {"PREFLOOP_CACHE": str(cache.resolve())}
    start = time.monotonic()
    subprocess.run([*command, "--out", str(out)], env=environment, check=True)
    seconds = time.monotonic() - start
    again = folder / f"{name}-again"
    short = ["--train.steps", "2", "--look-at.answers", "0", "--out", str(again)]
    subprocess.run([*command, *short], env=environment, check=True, capture_output=True)
    asked = {judge: tally["calls"] for judge, tally in feedback(again).items()}
    if any(asked.values()):
        raise SystemExit(f"{name}: questions were asked again: {asked}")
    entry = json.loads((out / "manifest.json").read_text())["stages"]["round-1/model"]
    log = [json.loads(line) for line in (out / "round-1/model/training_log.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["evaluation"]["against_start"]["rate"] for row in log if "evaluation" in row}
    return {
        "seconds": round(seconds, 1),
        "stages": {
            stage: round(value["seconds"], 1)
            for stage, value in json.loads((out / "manifest.json").read_text())["stages"].items()
        },
        "counts": entry["counts"],
        "feedback": feedback(out),
        "win_rate_by_evaluator": rates,
    }


def feedback(run: Path) -> dict[str, Any]:
    """What every LLM judge of a run has used in all."""
    return {name: tally.to_json() for name, tally in usage_of(run).items()}


@contextmanager
def vllm_server(python: str, log: Path) -> Iterator[tuple[str, str]]:
    """A server of the small model on 127.0.0.1: its URL and the name of the model."""
    ref = resolve(MODEL)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = os.environ | {"VLLM_API_KEY": os.environ[KEY], "VLLM_NO_USAGE_STATS": "1"}
    command = serve_command(
        vllm_python(os.path.abspath(python)), ref, Server(args=SERVER_ARGS), dtype="bfloat16", context=2048, port=port
    )
    process = SupervisedProcess(command, log=log, environment=environment)
    try:
        while not healthy(port):
            if process.wait(0.5) is not None:
                raise SystemExit(f"vLLM ended before it was ready; see {log}")
        yield f"http://127.0.0.1:{port}/v1", served_name(ref)
    finally:
        process.close()


def healthy(port: int) -> bool:
    with suppress(OSError, http.client.HTTPException), closing(http.client.HTTPConnection("127.0.0.1", port)) as there:
        there.request("GET", "/health")
        return there.getresponse().status == 200
    return False


def holds_key(file: Path) -> bool:
    return os.environ[KEY].encode() in file.read_bytes()


if __name__ == "__main__":
    main()
