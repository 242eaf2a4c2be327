"""One row of the comparison: a method run on the data of a seed, and the figures of the model that comes out."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

import prefloop
from bake import world
from bake.figures import PLAIN
from bake.methods import (
    CASES,
    COMPUTE,
    METHODS,
    RATES,
    REWARD_MODELS,
    REWARD_RATE,
    SAMPLING,
    Setting,
    reward_model,
)
from bake.tally import counted
from prefloop.atomic import write_atomically
from prefloop.cli import COMMANDS
from prefloop.config import Config
from prefloop.feedback.rule import load_rule
from prefloop.feedback.stage import annotate
from prefloop.fingerprints import sha256
from prefloop.models import ModelRef
from prefloop.records import Group, Pair, Prompt, Record, Response
from prefloop.run import Run
from prefloop.sample.stage import sample

PAIRS = 1920
"""Offline pairs of a seed; a row takes the first n."""
HELD_OUT, PER_PROMPT = 512, 2
"""Questions that every model is looked at with, and its answers to each."""
HERE = Path(__file__).parent
CODE = [*Path(prefloop.__file__).parent.rglob("*.py"), *HERE.glob("*.py"), HERE.with_name("small_world.py")]
SHOWN = ("claims.py", "figures.py", "page.py")
"""They say what came of rows; no row depends on them."""
MADE_BY = sha256("".join(file.read_text() for file in sorted(CODE) if file.name not in SHOWN))
"""What rows are made by: those of another state of the code are made anew."""
WATCHED = 8
"""Questions that recipes want to look at models with; nothing depends on them."""


@dataclass(frozen=True)
class Job:
    """A row: `method` at strength `strength` (0, 1, 2) with `n` labels, in a case of `CASES`."""

    method: str
    seed: int
    strength: int
    n: int
    case: str = PLAIN

    @property
    def name(self) -> str:
        return f"{self.method}-n{self.n}-seed{self.seed}-{self.strength}-{self.case}"


def prepare(out: Path, seed: int, case: str = PLAIN) -> Path:
    """The folder of a seed and a case: start model, questions, pairs and answers of the start model. What is there of
    this world is taken, what is there of another one is made anew. Questions and held-out questions are those of the
    seed in every case.
    """
    data = out / "data" / f"seed-{seed}-{case}"
    if (data / "inputs.json").is_file() and json.loads((data / "inputs.json").read_text())["made_by"] == MADE_BY:
        return data
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    if case == PLAIN:
        world.start_model(data / "start", seed=seed)
    else:  # a case is of questions and a judge; the model is that of the seed
        shutil.copytree(prepare(out, seed) / "start", data / "start")
    start = ModelRef.of(data / "start", name="start")
    asked = [Prompt.of(text) for text in world.questions(PAIRS * 11 // 10 + HELD_OUT + WATCHED, "seed", seed)]
    held_out, watched, training = asked[:HELD_OUT], asked[HELD_OUT : HELD_OUT + WATCHED], asked[HELD_OUT + WATCHED :]

    annotator = load_rule(CASES[case].annotator.removeprefix("rule:"))
    training = training[: CASES[case].questions]
    each = ceil(PAIRS * 11 // 10 / len(training))
    drawn = sample(start, training, k=2 * each, sampling=SAMPLING, seed=seed, compute=COMPUTE, engine="transformers")
    twos = [
        group.model_copy(update={"responses": group.responses[2 * i : 2 * i + 2]})
        for i in range(each)
        for group in drawn
    ]
    # An empty answer is no row of a file: its question is left out.
    groups = [group for group in twos if all(response.text for response in group.responses)]
    pairs: list[Pair] = annotate(groups, annotator)[:PAIRS]
    of_texts = {(group.prompt.id, frozenset(one.text for one in group.responses)): group for group in groups}
    groups = [of_texts[pair.prompt.id, frozenset(one.text for one in pair.responses)] for pair in pairs]
    _write(data / "pairs.jsonl", [_texts(pair) for pair in pairs])
    _write(data / "answers.jsonl", groups)
    _write(data / "prompts.jsonl", list({pair.prompt.id: pair.prompt for pair in pairs}.values()))
    _write(data / "watched.jsonl", watched)
    best = [(prompt.messages[-1].content, world.best_answer(prompt.messages[-1].content)) for prompt in watched]
    rows = [{"prompt": asked, "chosen": said, "rejected": "well"} for asked, said in best]
    _write(data / "watched_pairs.jsonl", rows)
    _write(data / "held_out.jsonl", held_out)
    _write(data / "start_answers.jsonl", answers_of(start, held_out, seed))
    tokens = [sum(response.length_tokens for response in group.responses) for group in groups]
    write_atomically(data / "inputs.json", json.dumps({"made_by": MADE_BY, "tokens_sampled": tokens}))
    return data


def _texts(pair: Pair) -> dict[str, str]:
    return {"prompt": pair.prompt.messages[-1].content, "chosen": pair.chosen.text, "rejected": pair.rejected.text}


def _write(file: Path, rows: Sequence[Record | dict[str, str]]) -> None:
    lines = (row.to_json() if isinstance(row, Record) else json.dumps(row) for row in rows)
    write_atomically(file, "".join(line + "\n" for line in lines))


def reward_model_config(data: Path, needs: str, seed: int, n: int, case: str) -> Config:
    return reward_model(Setting(data=data, seed=seed, n=n, rate=REWARD_RATE, strength=0, case=CASES[case]), needs)


def key_of(out: Path, *configs: Config) -> str:
    """Of what a row's figures depend on; where it lies is none of it."""
    return sha256(json.dumps([MADE_BY, *(cfg.to_yaml().replace(str(out), "") for cfg in configs)]))


def prepare_reward_model(out: Path, needs: str, seed: int, n: int, case: str = PLAIN) -> None:
    """The reward model of n pairs, and what it took. `needs`: which of `REWARD_MODELS`."""
    data = prepare(out, seed, case)
    folder, cfg = data / f"{needs}-{n}", reward_model_config(data, needs, seed, n, case)
    file, key = folder / "counts.json", key_of(out, cfg)
    if file.is_file() and json.loads(file.read_text())["key"] == key:
        return
    counts = run_recipe("reward-model", cfg, folder)[1]
    write_atomically(file, json.dumps({"key": key, "counts": counts}))


def run_row(out: Path, job: Job) -> dict[str, Any]:
    """The row's figures; of a row that has them already, those. One that was stopped midway begins again."""
    data = prepare(out, job.seed, job.case)
    method = METHODS[job.method]
    rate = RATES[job.strength] * method.pace
    setting = Setting(data=data, seed=job.seed, n=job.n, rate=rate, strength=job.strength, case=CASES[job.case])
    cfg = method.config(setting)
    judged = method.needs in REWARD_MODELS
    judges = [reward_model_config(data, method.needs, job.seed, job.n, job.case)] if judged else []
    key = key_of(out, cfg, *judges)
    file = out / "rows" / f"{job.name}.json"
    if file.is_file():
        known = json.loads(file.read_text())
        if known["key"] == key:
            return known
    if judged:
        prepare_reward_model(out, method.needs, job.seed, job.n, job.case)
    folder = out / "runs" / job.name
    model, counts, seconds = run_recipe(method.recipe, cfg, folder)
    for name, n in inputs(data, job.n, cfg, method.needs).items():
        counts[name] = counts.get(name, 0) + n
    found = {"key": key, **asdict(job), **look(data, model, job.seed), **counts, "seconds": seconds}
    write_atomically(file, json.dumps(found) + "\n")
    shutil.rmtree(folder)
    return found


def run_recipe(recipe: str, cfg: Config, folder: Path) -> tuple[ModelRef, dict[str, int], float]:
    """What `prefloop RECIPE` does, in a new folder, with a cache of its own: the model, what it consumed, seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    module, _, function = COMMANDS[recipe].run.partition(":")
    method: Callable[[Any, Run], ModelRef] = getattr(import_module(module), function)
    started = time.perf_counter()
    with own_cache(folder.with_name(folder.name + ".cache")), counted() as tally:
        with Run.open(folder, recipe=recipe, config=cfg) as run:
            model = method(cfg, run)
    return model, dict(tally), round(time.perf_counter() - started, 2)


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Log-probabilities that another row has computed are computed again: each row pays for its own."""
    before = os.environ.get("PREFLOOP_CACHE")
    os.environ["PREFLOOP_CACHE"] = str(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("PREFLOOP_CACHE")
        if before is not None:
            os.environ["PREFLOOP_CACHE"] = before


def inputs(data: Path, n: int, cfg: Any, needs: str) -> dict[str, int]:
    """What making the data of a run has taken: a token of the start model's answers, a call for every label."""
    if not needs:
        return {}
    tokens = json.loads((data / "inputs.json").read_text())["tokens_sampled"]
    file = cfg.data if needs == "answers" else getattr(cfg, "pairs", "") or data / f"pairs-{n}.jsonl"
    used = len(Path(file).read_text().splitlines())
    taken = {"tokens_sampled": sum(tokens[:used]), "label_calls": 0 if needs == "answers" else used}
    if needs in REWARD_MODELS:
        for name, more in json.loads((data / f"{needs}-{n}" / "counts.json").read_text())["counts"].items():
            taken[name] = taken.get(name, 0) + more
    return taken


def answers_of(model: ModelRef, held_out: Sequence[Prompt], seed: int) -> list[Group]:
    return sample(model, held_out, k=PER_PROMPT, sampling=SAMPLING, seed=seed, compute=COMPUTE, engine="transformers")


def look(data: Path, model: ModelRef, seed: int) -> dict[str, float]:
    """The model on held-out questions: true reward, KL divergence from the start model in nats an answer, win rate
    against the start model's answers by the truth, words.
    """
    from prefloop.train.reference import logps_under

    held_out = [Prompt.from_json(line) for line in (data / "held_out.jsonl").read_text().splitlines()]
    before = [Group.from_json(line) for line in (data / "start_answers.jsonl").read_text().splitlines()]
    # Another seed than that of the start model's answers: with the same numbers the two are not independent.
    after = answers_of(model, held_out, seed + 500_000)
    items = [(group.prompt, group.responses) for group in after]
    start = ModelRef.of(data / "start", name="start")
    ours, theirs = (logps_under(ref, items, compute=COMPUTE) for ref in (model, start))
    rewards = [world.truth(group.prompt, response) for group in after for response in group.responses]
    old = [world.truth(group.prompt, response) for group in before for response in group.responses]
    return {
        "reward": fmean(rewards),
        "kl": fmean(a - b for own, start in zip(ours, theirs, strict=True) for a, b in zip(own, start, strict=True)),
        "win_rate": fmean((a > b) + (a == b) / 2 for a, b in zip(rewards, old, strict=True)),
        "words": fmean(len(response.text.split()) for group in after for response in group.responses),
    }


OF = 64
"""Answers of which the best is taken."""


def sanity(data: Path, seed: int) -> dict[str, Any]:
    """What can be had: the start model, the best of its 64 answers by the truth, by the annotator and by what the
    annotator likes without its noise, and the best answer there is; true rewards, and words.
    """
    file = data / "sanity.json"
    if file.is_file():
        return json.loads(file.read_text())
    start = ModelRef.of(data / "start", name="start")
    held_out = [Prompt.from_json(line) for line in (data / "held_out.jsonl").read_text().splitlines()][:64]
    groups = sample(start, held_out, k=OF, sampling=SAMPLING, seed=seed + 900_000, compute=COMPUTE,
                    engine="transformers")  # fmt: skip

    def best(by: Callable[[Prompt, Response], float]) -> dict[str, float]:
        chosen = [(g.prompt, max(g.responses, key=lambda response: by(g.prompt, response))) for g in groups]
        return {"reward": fmean(world.truth(*one) for one in chosen),
                "words": fmean(len(response.text.split()) for _, response in chosen)}  # fmt: skip

    kinds = {"truth": world.truth, "annotator": world.score, "annotator_without_noise": world.expected_score}
    found: dict[str, Any] = {f"best_of_{OF}_by_{name}_{figure}": value for name, by in kinds.items()
                             for figure, value in best(by).items()}  # fmt: skip
    pairs = [(g.prompt, *g.responses[:2]) for g in groups]
    judges = {"": world.score, "_of_the_fair": world.fair_score, "_of_the_weak": world.weak_score}
    for name, judge in judges.items():
        found[f"agreement{name}"] = fmean((world.truth(p, a) > world.truth(p, b)) == (judge(p, a) > judge(p, b))
                                          for p, a, b in pairs if world.truth(p, a) != world.truth(p, b))  # fmt: skip
    oracle = [(p, Response(text=world.best_answer(p.messages[-1].content))) for p in held_out]
    found |= {"oracle_reward": fmean(world.truth(*one) for one in oracle),
              "oracle_words": fmean(len(response.text.split()) for _, response in oracle),
              "start": look(data, start, seed)}  # fmt: skip
    write_atomically(file, json.dumps(found))
    return found


def measure(data: Path) -> dict[str, float]:
    """Seconds of a token, relative to one that is trained on: what `bake.figures.COSTS` was set by: steps of DPO
    on fresh answers, as an online method takes them.
    """
    from prefloop.train.learner import Learner
    from prefloop.train.losses import parse_loss
    from prefloop.train.objective import PairObjective
    from prefloop.train.online import OnlineLearner

    start = ModelRef.of(data / "start", name="start")
    setting = Setting(data=data, seed=0, n=480, rate=RATES[0], strength=0, case=CASES[PLAIN])
    learner = Learner(start, [], objective=PairObjective(parse_loss("dpo")), config=setting.train(30), compute=COMPUTE,
                      seed=0)  # fmt: skip
    online = OnlineLearner(learner)
    prompts = [Prompt.from_json(line) for line in (data / "prompts.jsonl").read_text().splitlines()]
    spent = {"tokens_sampled": 0.0, "tokens_scored": 0.0, "tokens_trained": 0.0}
    tokens = dict.fromkeys(spent, 0)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        with counted() as tally:
            started = time.perf_counter()
            found = work()
            spent[name] += time.perf_counter() - started
        tokens[name] += tally[name]
        return found

    for step in range(30):
        batch = prompts[16 * step : 16 * (step + 1)]
        groups = timed("tokens_sampled", lambda: online.sample(batch, k=2, sampling=SAMPLING, seed=step))  # noqa: B023
        pairs = annotate(groups, load_rule("bake.world:score"))
        pairs = timed("tokens_scored", lambda: online.with_reference_logps(pairs))  # noqa: B023
        timed("tokens_trained", lambda: learner.step(pairs, step))  # noqa: B023
    each = {name: spent[name] / tokens[name] for name in spent}
    return {name: round(value / each["tokens_trained"], 2) for name, value in each.items()}
