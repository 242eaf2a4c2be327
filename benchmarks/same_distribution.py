"""Do the engines sample from the same distribution? 2,000 answers each, against transformers in float32.

    python benchmarks/same_distribution.py --engines transformers,openvino --out runs/same-distribution

Per engine and setting of `SETTINGS`, the answers of the real small model to ten prompts are compared with the
reference's: their length, whether they ended, the trainer's log-probability of the answer and by token, and the first
tokens' frequencies, by permutation tests within prompts (`prefloop.sample.distribution`). `p` is the smallest p-value
after Holm's correction; an engine that agrees is told apart with probability ALPHA = 0.001 at most, per engine and
setting. That this holds is looked at by simulation: of many comparisons of two samples drawn anew from the reference's
answers (which agree, then), the share of alarms at the level 0.05 is counted.

`FAULTS` are made on purpose, in the transformers engine at temperature 1, and must be caught: a wrong temperature, a
top-k that leaks in, and an end token that is not heeded.

Every engine has a seed of its own: with the reference's, the transformers engine would give the reference's answers.
All answers are kept in the run folder `--out`: the same command continues, and other `--engines` are added. What an
engine's code does is not part of their key, so after a change to an engine give a new `--out`.
Prints, last, one line of JSON. It exits with status 1 when an engine disagrees or a fault is not caught.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from prefloop.config import Config
from prefloop.data.chat import ChatFormat
from prefloop.models import ModelRef, choose_sampling_dtype, load_model, load_tokenizer, resolve
from prefloop.records import Group, Prompt
from prefloop.run import Run, Stage
from prefloop.sample.distribution import ALPHA, Comparison, same_distribution
from prefloop.sample.engines import ENGINES, EngineSetting, load_engine
from prefloop.sample.options import Server
from prefloop.sample.sampling import Sampling
from prefloop.sample.transformers import TransformersEngine
from prefloop.seeds import derive_seed, generator
from prefloop.train.config import Compute
from prefloop.train.reference import logps_under
from sampling import engine_names, vllm_server

PROMPTS = [
    Prompt.of(text)
    for text in (
        "Name a colour. Answer with one word.",
        "Pick a number between 1 and 10.",
        "Say hello.",
        "Is a tomato a fruit? Yes or no?",
        "What is the capital of France?",
        "Name an animal.",
        "Give me a first name for a girl.",
        "What is 2 + 2?",
        "Which day comes after Monday?",
        "Translate 'thank you' into French.",
    )
]
MAX_NEW_TOKENS = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature_1": {},
    "temperature_0.7_top_p_0.9": {"temperature": 0.7, "top_p": 0.9},
    "top_k_40_min_p_0.05": {"top_k": 40, "min_p": 0.05},
}
PLAIN = "temperature_1"
FAULTS: dict[str, dict[str, Any]] = {"temperature_1.1": {"temperature": 1.1}, "leaked_top_k_50": {"top_k": 50}}
DEAF = "missed_end_token"
BATCH_SIZE = 100
LEVEL, COMPARISONS = 0.05, 200
"""Of the false alarms that are counted, and in how many comparisons."""


class DistributionConfig(Config):
    """What the answers in a run folder depend on, the engine apart."""

    policy: str = "smollm2-135m"
    answers: int = 2000
    dtype: str = "bfloat16"
    seed: int = 0


def sampled(
    policy: ModelRef,
    prompts: Sequence[Prompt],
    *,
    engine: str,
    dtype: str,
    k: int,
    sampling: Sampling,
    seed: int,
    server: Server,
    stage: Stage,
) -> list[Group]:
    """Stage: k answers of an engine to every prompt."""
    log = stage.scratch / "server.log" if stage.scratch else None
    loaded = load_engine(engine, policy, EngineSetting(dtype, "cpu", BATCH_SIZE, server, log))
    try:
        with stage.progress(k * len(prompts), unit="answers") as advance:
            return loaded.sample(prompts, k=k, sampling=sampling, seed=seed, advance=advance)
    finally:
        loaded.close()


def sampled_deaf(
    policy: ModelRef, prompts: Sequence[Prompt], *, dtype: str, k: int, sampling: Sampling, seed: int
) -> list[Group]:
    """Stage: answers of an engine that knows no end token, and samples on past it."""
    chat = ChatFormat(load_tokenizer(policy))
    chat.stop_token_ids = frozenset()
    engine = TransformersEngine(load_model(policy, dtype=dtype), chat, batch_size=BATCH_SIZE)
    return engine.sample(prompts, k=k, sampling=sampling, seed=seed)


def scored(groups: Sequence[Group], policy: ModelRef, *, compute: Compute, stage: Stage) -> list[Group]:
    """Stage: the groups with the trainer's log-probabilities."""
    items = [(group.prompt, group.responses) for group in groups]
    return [
        group.model_copy(
            update={
                "responses": tuple(
                    response.model_copy(update={"policy_logp": logp})
                    for response, logp in zip(group.responses, row, strict=True)
                )
            }
        )
        for group, row in zip(groups, logps_under(policy, items, compute=compute, stage=stage), strict=True)
    ]


class Experiment:
    """Samples by name, each made once and kept in the run folder."""

    def __init__(self, run: Run, config: DistributionConfig, server: Server) -> None:
        self.run, self.config, self.server = run, config, server
        self.policy = resolve(config.policy)
        self.k = -(-config.answers // len(PROMPTS))
        # Any function of an answer may be compared, so the trainer scores in the precision that is fastest here.
        self.compute = Compute(device="cpu").replace(dtype=choose_sampling_dtype("cpu"))

    def sample(self, name: str, sampling: Sampling, *, engine: str = "transformers", dtype: str = "") -> list[Group]:
        """An engine's answers with their log-probabilities; `name` is of the files and the seed."""
        groups = self.run.stage(
            f"{name}/groups", sampled, self.policy, PROMPTS, engine=engine, dtype=dtype or self.config.dtype,
            k=self.k, sampling=sampling, seed=self.seed(name), server=self.server if engine == "vllm" else Server(),
        )  # fmt: skip
        return self.scored(name, groups)

    def deaf(self) -> list[Group]:
        """As `sample`, of the engine that knows no end token."""
        name, sampling = f"faults/{DEAF}", Sampling(max_new_tokens=MAX_NEW_TOKENS)
        groups = self.run.stage(
            f"{name}/groups", sampled_deaf, self.policy, PROMPTS, dtype=self.config.dtype, k=self.k,
            sampling=sampling, seed=self.seed(name),
        )  # fmt: skip
        return self.scored(name, groups)

    def scored(self, name: str, groups: list[Group]) -> list[Group]:
        return self.run.stage(f"{name}/scored", scored, groups, self.policy, compute=self.compute)

    def seed(self, name: str) -> int:
        return derive_seed(self.config.seed, "sample", name)


def show(name: str, found: Comparison) -> None:
    tests = ", ".join(f"{test} {p:.4f}" for test, p in found.tests.items())
    print(f"{name}: p = {found.p:.5f}, {'the same' if found.agrees else 'NOT the same'} ({tests})", flush=True)


def compare_engines(experiment: Experiment, engines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{engine: {setting: {p, agrees}}}; where an engine refuses a setting, both are None and `refused` says why."""
    result: dict[str, dict[str, Any]] = {name: {} for name in engines}
    for setting, options in SETTINGS.items():
        sampling = Sampling(**options, max_new_tokens=MAX_NEW_TOKENS)
        reference = experiment.sample(f"reference/{setting}", sampling, dtype="float32")
        for engine in engines:
            obstacle = ENGINES[engine].obstacle(
                experiment.policy, sampling, EngineSetting(experiment.config.dtype, server=experiment.server)
            )
            if obstacle:
                result[engine][setting] = {"p": None, "agrees": None, "refused": obstacle}
                continue
            found = same_distribution(reference, experiment.sample(f"{engine}/{setting}", sampling, engine=engine))
            show(f"{engine}, {setting}", found)
            result[engine][setting] = {"p": found.p, "agrees": found.agrees}
    return result


def compare_faults(experiment: Experiment, reference: list[Group]) -> dict[str, dict[str, Any]]:
    """{fault: {p, caught}} at temperature 1."""
    faulty = {
        name: experiment.sample(f"faults/{name}", Sampling(**options, max_new_tokens=MAX_NEW_TOKENS))
        for name, options in FAULTS.items()
    }
    result = {}
    for name, groups in {**faulty, DEAF: experiment.deaf()}.items():
        found = same_distribution(reference, groups)
        show(f"fault {name}", found)
        result[name] = {"p": found.p, "caught": not found.agrees}
    return result


def false_alarms(groups: Sequence[Group]) -> float:
    """Share of comparisons that alarm at LEVEL, both samples being drawn (with replacement) from the same answers."""
    rng = generator(0, "false alarms")

    def drawn() -> list[Group]:
        return [
            group.model_copy(update={"responses": tuple(group.responses[i] for i in rng.integers(0, n, n))})
            for group in groups
            for n in [len(group.responses)]
        ]

    alarms = [
        not same_distribution(drawn(), drawn(), alpha=LEVEL, deals=499, seed=i).agrees for i in range(COMPARISONS)
    ]
    return sum(alarms) / COMPARISONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=engine_names, default="transformers,openvino", help="with commas")
    parser.add_argument("--out", type=Path, default=Path("runs/same-distribution"))
    parser.add_argument("--vllm-python", default="", help="interpreter of an environment with vLLM")
    for name, field in DistributionConfig.model_fields.items():
        parser.add_argument("--" + name, type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    out, engines, server = args.pop("out"), args.pop("engines"), vllm_server(args.pop("vllm_python"), "cpu")
    config = DistributionConfig(**args)
    with Run.open(out, recipe="same-distribution", config=config, console=Console(stderr=True)) as run:
        experiment = Experiment(run, config, server)
        result = compare_engines(experiment, engines)
        sampling = Sampling(**SETTINGS[PLAIN], max_new_tokens=MAX_NEW_TOKENS)
        reference = experiment.sample(f"reference/{PLAIN}", sampling, dtype="float32")
        faults = compare_faults(experiment, reference)
        rate = false_alarms(reference)
    print(f"false alarms: {rate:.3f} of {COMPARISONS} comparisons at the level {LEVEL}")
    right = all(row["agrees"] is not False for rows in result.values() for row in rows.values())
    alarms = {"alpha": ALPHA, "level": LEVEL, "rate": rate, "comparisons": COMPARISONS}
    print(json.dumps({**result, "faults": faults, "false_alarms": alarms}))
    sys.exit(not (right and all(fault["caught"] for fault in faults.values())))


if __name__ == "__main__":
    main()
