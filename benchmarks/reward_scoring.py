"""A reward model as annotator: answers to one prompt that share it, against every conversation by itself.

    python benchmarks/reward_scoring.py [--answers 4] [--prompts 12] [--dtype bfloat16] [--rounds 3]

Three ways to the same rewards take turns, round by round, over one model in memory: `shared`, what the annotator does;
`padded`, its fallback, the classifier's own forward with one row a conversation; and that with keys and values kept, as
transformers does by default. Not counted: loading, the proof of the path, and the first round, which is warm-up. The
head is random: what it prefers does not matter for the time. Prints, last, one line of JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from prefloop.data.chat import ChatFormat
from prefloop.feedback.reward_model import RewardModel
from prefloop.models import ModelRef, load_tokenizer, resolve, write_model
from prefloop.train.config import Compute
from prefloop.train.scalar import load_scalar_model
from workloads import WORKLOADS, make_items

WAYS = {"shared": (True, False), "padded": (False, False), "padded, cache kept": (False, True)}
"""What is timed -> whether prompts are shared, and whether keys and values are kept."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--workload", default="multi_turn")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--answers", type=int, default=4, help="to each prompt")
    parser.add_argument("--rounds", type=int, default=4, help="the first is warm-up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: expected 2 or more, the first is warm-up")
    ref = resolve(args.model)
    tokenizer = load_tokenizer(ref)
    items = make_items(WORKLOADS[args.workload], ChatFormat(tokenizer), args.prompts, responses=args.answers, seed=0)
    asked = [(prompt, response) for prompt, responses in items for response in responses]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), load_scalar_model(ref, head_std=0.02), tokenizer)
        compute = Compute(device=args.device, dtype=args.dtype)
        annotator = RewardModel(ModelRef.of(Path(folder)), compute=compute)
    trunk: Any = annotator.model.base_model
    seen: list[int] = []
    trunk.register_forward_pre_hook(
        lambda _, given, named: seen.append((given[0] if given else named["input_ids"]).numel()), with_kwargs=True
    )
    annotator.score(asked)  # the proof
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens: dict[str, int] = {}
    rewards: dict[str, list[Any]] = {}
    for _ in range(args.rounds):
        for way, (annotator.reads_last_token, trunk.config.use_cache) in WAYS.items():
            seen.clear()
            start = time.perf_counter()
            rewards[way] = annotator.score(asked)
            seconds[way].append(time.perf_counter() - start)
            tokens[way] = sum(seen)
    furthest = max(abs(a - b) for a, b in zip(rewards["shared"], rewards["padded"], strict=True))
    rows = {way: {"tokens": tokens[way], "seconds": round(median(seconds[way][1:]), 2)} for way in WAYS}
    print(json.dumps({**rows, "furthest": furthest}))


if __name__ == "__main__":
    main()
