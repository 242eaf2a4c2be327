"""ExPO: model extrapolation (Zheng et al. 2024, arXiv 2404.16792).

1. Take theta_0, the model before alignment, and theta_1, the model after it. theta_0 must be the very model that
   theta_1 was trained from: same architecture, vocabulary, weight names and shapes.
2. theta(alpha) = theta_1 + alpha (theta_1 - theta_0), every weight, no training.
3. Choose alpha: every theta(alpha) answers the same prompts with the same seeds, an annotator compares its answers with
   those of theta_1 (or a scorer takes their mean), and the best alpha wins. alpha = 0.1 ... 0.5 is tried first; while
   the best is the largest tried, twice that; then the gaps around the best are halved.
4. A guard refuses an alpha whose answers grow, do not end, repeat themselves or would surprise theta_1.

alpha = 0 is theta_1, and is what comes out when nothing beats it; alpha = -1 is theta_0, tried too, to show what the
alignment itself was worth to the annotator.

Departures from the paper: arithmetic in float32 whatever the weights are stored in; the guard; an annotator's
preference over theta_1 where no scorer is given; --pairs makes theta_1 by a DPO round first; the chosen model is judged
again on held-out prompts, because a figure that was chosen by flatters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, field_validator, model_validator

from prefloop.config import Config
from prefloop.errors import CheckFailed, InputError, OutOfRange
from prefloop.evaluate.candidate import Candidate, Guard, candidate, refusal
from prefloop.feedback.options import AnnotatorName, Feedback
from prefloop.models import ModelRef, adapter_base, resolve
from prefloop.recipes.dpo import dpo_round
from prefloop.recipes.steps import (
    LookAt,
    apart_from,
    check_room,
    conclude,
    load,
    load_own_prompts,
    look_at,
    prompts_and_held_out,
    some,
    tokenise,
)
from prefloop.records import Group, Prompt
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.sample.stage import sample
from prefloop.seeds import derive_seed
from prefloop.train.config import Compute, Train

if TYPE_CHECKING:
    from prefloop.feedback.annotator import Annotator, Judgement
    from prefloop.feedback.scorer import Scores
    from prefloop.run import Run, Stage

FINEST = 0.25
"""Gaps around the best alpha are halved until they are this share of it."""


class Search(Config):
    """How `--alpha auto` looks for alpha."""

    grid: tuple[float, ...] = Field(
        default=(0.1, 0.2, 0.3, 0.4, 0.5),
        description="alphas that are tried first, ascending (public models: 0.1 to 0.5)",
    )
    largest: float = Field(
        default=32.0, gt=0, description="where doubling ends (paper, DPO stopped at 5 % of its steps: 25)"
    )
    limit: int | None = Field(default=None, ge=1, description="only so many prompts, drawn by the seed")
    keep_models: bool = Field(default=False, description="keep the model of every alpha, under RUN/search")

    @field_validator("grid")
    @classmethod
    def _ascending_and_positive(cls, grid: tuple[float, ...]) -> tuple[float, ...]:
        if not grid or grid[0] <= 0 or any(b <= a for a, b in pairwise(grid)):
            raise ValueError(f"search.grid = {grid}: expected numbers above 0, ascending, at least one")
        return grid


class ExpoConfig(Config):
    """Options of `prefloop expo BASE ALIGNED`."""

    base: str = Field(default="", description="theta_0, the very model that the aligned one was trained from")
    aligned: str = Field(default="", description="theta_1: a model, or a LoRA adapter folder on the base")
    alpha: float | Literal["auto"] = Field(
        default=0.3, description="how far beyond, or auto: search (the authors: 0.3 or 0.5 is usually good)"
    )
    pairs: str = Field(default="", description="without an aligned model: pairs for a DPO round that makes it")
    prompts: str = Field(
        default="", description="prompts that alpha is chosen by: a file, a data set folder or hub name, or seed:train"
    )
    held_out: str = Field(default="", description="prompts to look at models with; a tenth of them when left out")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    annotator: AnnotatorName = ""
    scorer: str = Field(
        default="", description="in place of an annotator, a function of your own as module:function; its mean counts"
    )
    feedback: Feedback = Field(default_factory=Feedback)
    search: Search = Field(default_factory=Search)
    guard: Guard = Field(default_factory=Guard)
    beta: float = Field(default=0.1, gt=0, description="of the DPO round of --pairs")
    train: Train = Field(default_factory=Train, description="the DPO round of --pairs")
    seed: int = Field(default=0, ge=0, description="of every random choice; answers have the same seeds at every alpha")
    sampling: Sampling = Field(
        default_factory=lambda: Sampling(temperature=0.7, top_k=50, top_p=0.9, max_new_tokens=2048),
        description="of answers (the authors': temperature 0.7, top_k 50, top_p 0.9, 2048 tokens)",
    )
    look_at: LookAt = Field(default_factory=LookAt)
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.alpha != "auto" and not abs(self.alpha) < float("inf"):
            raise ValueError(f"alpha = {self.alpha}: expected auto, or a finite number")
        if self.aligned and self.pairs:
            raise ValueError(f"aligned = {self.aligned} and pairs = {self.pairs}: the pairs are for making the aligned "
                             "model; give one of them")  # fmt: skip
        if self.annotator and self.scorer:
            raise ValueError(f"annotator = {self.annotator} and scorer = {self.scorer}: give one of them")
        return self


def demo() -> ExpoConfig:
    """The packaged small model, aligned by a short DPO on the packaged pairs; a rule chooses alpha."""
    return ExpoConfig(
        base="smollm2-135m",
        alpha="auto",
        pairs="seed:train",
        prompts="seed:train",
        held_out="seed:held_out",
        annotator="rule:helpful-short",
        search=Search(grid=(0.5, 1.0, 2.0), largest=16.0, limit=16),
        sampling=Sampling(temperature=0.7, top_p=0.9, max_new_tokens=48),
        look_at=LookAt(answers=16, shown=4),
        train=Train(steps=12, batch_size=4, learning_rate=2e-5, warmup_steps=2, validation_pairs=0, checkpoint_every=6),
    )


def expo(cfg: ExpoConfig, run: "Run") -> ModelRef:
    """Extrapolate `cfg.aligned` away from `cfg.base`; returns the final model, RUN/model."""
    from prefloop.merge.extrapolate import check_ancestor, distance, extrapolated

    if not cfg.base or not (cfg.aligned or cfg.pairs):
        raise InputError("expected two models, prefloop expo BASE ALIGNED; or --base and --pairs for a DPO round that "
                         "makes the aligned one")  # fmt: skip
    base = resolve(cfg.base)
    prompts, held_out = prompts_to_search_and_look(cfg, run)
    judge = load_judge(cfg, run)
    check_room([*prompts, *held_out], base, cfg.sampling.max_new_tokens)
    aligned = aligned_model(cfg, run, base, held_out)
    check_ancestor(base, aligned)
    check_room([*prompts, *held_out], aligned, cfg.sampling.max_new_tokens)
    run.stage("distance", distance, base, aligned)

    look = partial(look_at, run, aligned, [], cfg, beta=cfg.beta, prompts=held_out)
    own = look("aligned", aligned) if held_out else []
    tried = search(cfg, run, base, aligned, prompts, judge) if cfg.alpha == "auto" else []
    alpha = run.stage("choice", choose, tried, cfg.alpha)["alpha"]
    folder = run.stage("expo/model", extrapolated, base, aligned, alpha)
    model = ModelRef.of(folder.path, name=f"expo, alpha = {alpha:g}")
    if is_adapter(cfg.aligned):
        scale_adapter_too(run, Path(cfg.aligned), alpha)
    if held_out:
        answers = look("expo", model)
        if own and judge.named:
            before = weigh(run, "aligned", 0.0, own, own, None, aligned, judge, cfg)
            weigh(run, "expo", alpha, answers, own, before, aligned, judge, cfg)
    return conclude(run, model)


def prompts_to_search_and_look(cfg: ExpoConfig, run: "Run") -> tuple[list[Prompt], list[Prompt]]:
    """Those that alpha is chosen by and those that the outcome is looked at with; a given alpha needs none."""
    if cfg.alpha != "auto":
        return [], load_own_prompts(cfg.held_out or cfg.prompts, cfg.on_bad_row, run)
    prompts, held_out = prompts_and_held_out(cfg, run)
    return some(prompts, cfg.search.limit, derive_seed(cfg.seed, "search")), held_out


def aligned_model(cfg: ExpoConfig, run: "Run", base: ModelRef, held_out: Sequence[Prompt]) -> ModelRef:
    """theta_1: the one that was given, an adapter merged in float32; or a DPO round of the base on --pairs, those on
    held-out prompts left out. Alpha may be searched on prompts of these pairs: what is held out judges the outcome.
    """
    if cfg.pairs:
        given = load(cfg.pairs, "pairs", cfg.on_bad_row, run)
        pairs = run.stage("data/pairs", tokenise, apart_from(given, held_out, run, why="held-out prompts"), base)
        return dpo_round(run.part("aligned"), base, base, pairs, beta=cfg.beta, train=cfg.train, compute=cfg.compute,
                         seed=derive_seed(cfg.seed, "dpo"))  # fmt: skip
    if is_adapter(cfg.aligned):
        under = adapter_base(Path(cfg.aligned))
        if under.weights != base.weights:
            raise InputError(f"adapter {cfg.aligned} is on {under.name}, not on base {cfg.base}; give that as the base")
    return resolve(cfg.aligned)


def is_adapter(name: str) -> bool:
    return bool(name) and (Path(name) / "adapter_config.json").is_file()


def scale_adapter_too(run: "Run", adapter: Path, alpha: float) -> None:
    """RUN/adapter: the adapter that makes the model on the same base, where a plain LoRA came in."""
    from prefloop.merge.extrapolate import adapter_obstacle, scaled_adapter

    obstacle = adapter_obstacle(adapter)
    if obstacle:
        run.note(f"no scaled adapter is written, only the merged model: {obstacle}")
    else:
        run.stage("adapter", scaled_adapter, adapter, alpha)


@dataclass(frozen=True)
class Judge:
    """Who alpha is chosen by: an annotator, or a scorer of the user's; neither where alpha is given."""

    annotator: "Annotator | None"
    scorer: "Scores | None"

    @property
    def named(self) -> bool:
        return self.annotator is not None or self.scorer is not None


def load_judge(cfg: ExpoConfig, run: "Run") -> Judge:
    """Raises InputError for what cannot be used, before anything is computed."""
    from prefloop.feedback.registry import load_annotator, load_meter
    from prefloop.feedback.scorer import load_function
    from prefloop.run import Stage

    if cfg.alpha == "auto" and not (cfg.annotator or cfg.scorer):
        raise InputError("--alpha auto needs --annotator, such as rule:helpful or judge:MODEL, or a --scorer")
    if cfg.scorer:
        return Judge(None, load_function(cfg.scorer, others=""))
    if not cfg.annotator:
        return Judge(None, None)
    meter, stage = load_meter(cfg.feedback, run=run), Stage(name="search", run=run)
    return Judge(load_annotator(cfg.annotator, cfg.feedback, compute=cfg.compute, meter=meter, stage=stage), None)


def search(
    cfg: ExpoConfig, run: "Run", base: ModelRef, aligned: ModelRef, prompts: Sequence[Prompt], judge: Judge
) -> list[Candidate]:
    """Steps 3 and 4: all that was tried."""
    from prefloop.merge.extrapolate import extrapolated

    own: list[Group] = []
    found: list[Candidate] = []
    while alphas := next_alphas(found, grid=cfg.search.grid, largest=cfg.search.largest):
        for alpha in alphas:
            label = f"search/alpha-{alpha:.12g}".replace("+", "")  # 1e+30 is no name of a stage
            answers = run.stage(f"{label}/answers", answers_at, base, aligned, alpha, prompts, cfg)
            heard = not isinstance(answers, Candidate)
            own = own or (answers if heard else [])
            found.append(weigh(run, label, alpha, answers, own, found[0] if found else None, aligned, judge, cfg))
            if cfg.search.keep_models and heard:
                run.stage(f"{label}/model", extrapolated, base, aligned, alpha)
    return found


def next_alphas(found: Sequence[Candidate], *, grid: Sequence[float], largest: float) -> list[float]:
    """What to try after `found`; nothing when the search is over.

    First 0 (theta_1), -1 (theta_0) and the grid. While the best is the largest tried, twice that, up to `largest`.
    Then, where the search left the grid, the middles of the gaps around the best that are wider than a quarter of it.
    """
    if not found:
        return [0.0, -1.0, *grid]
    top, tried = best(found).alpha, sorted(one.alpha for one in found)
    if top == tried[-1] and 2 * top <= largest:
        return [2 * top]
    if tried[-1] == grid[-1]:
        return []
    place = tried.index(top)
    around = tried[max(place - 1, 0) : place + 2]
    return [(low + high) / 2 for low, high in pairwise(around) if low >= 0 and high - low > FINEST * top > 0]


def best(found: Sequence[Candidate]) -> Candidate:
    """The best that the guard lets pass, the smaller alpha of equals; alpha = 0 where there is none."""
    passed = [one for one in found if one.alpha >= 0 and one.refused is None and one.rate]
    return max(passed, key=lambda one: (one.rate[0] if one.rate else 0.0, -one.alpha), default=found[0])


def choose(tried: Sequence[Candidate], alpha: float | str, *, stage: "Stage") -> dict[str, float]:
    """Stage: the alpha that is given, or the best of those tried."""
    chosen = best(tried).alpha if tried else float(alpha)
    if tried:
        said = "" if chosen else ": nothing beats the aligned model"
        stage.note(f"alpha = {chosen:g}, of {len(tried)} tried{said}")
    return {"alpha": chosen, "tried": len(tried)}


def answers_at(
    base: ModelRef, aligned: ModelRef, alpha: float, prompts: Sequence[Prompt], cfg: ExpoConfig, *, stage: "Stage"
) -> list[Group] | Candidate:
    """Stage: the answers of theta(alpha), whose weights are on the disk only meanwhile.

    A candidate that is refused unheard where a weight leaves the range of its dtype, or of the sampler's, or where the
    sampler's own check fails, as it may where weights have left what a model is.
    """
    from prefloop.atomic import write_folder_atomically
    from prefloop.merge.extrapolate import extrapolate

    def refused(why: str) -> Candidate:
        stage.note(f"alpha = {alpha:g} is passed over: {why}")
        return Candidate(alpha=alpha, answers=0, refused=why)

    model = aligned
    try:
        if alpha:
            assert stage.scratch is not None
            folder = stage.scratch / "model"
            if not folder.is_dir():
                write_folder_atomically(folder, lambda path: extrapolate(base, aligned, alpha, path))
            model = ModelRef.of(folder, name=f"alpha = {alpha:g}")
        return sample(model, prompts, k=1, sampling=cfg.sampling, seed=derive_seed(cfg.seed, "answers"),
                      compute=cfg.compute, engine=cfg.engine, server=cfg.server, stage=stage)  # fmt: skip
    except OutOfRange as error:
        if not alpha:
            raise
        return refused(str(error))
    except CheckFailed as error:
        if alpha <= 0:
            raise
        return refused(f"its answers were not sampled from it (a check of the sampler: {error})")


def weigh(
    run: "Run",
    label: str,
    alpha: float,
    answers: Sequence[Group] | Candidate,
    own: Sequence[Group],
    beside: Candidate | None,
    aligned: ModelRef,
    judge: Judge,
    cfg: ExpoConfig,
) -> Candidate:
    """The verdict on one alpha. `own`: the answers of theta_1 to the same prompts; `beside`: its figures, None for its
    own.
    """
    from prefloop.evaluate.win_rate import comparisons_of
    from prefloop.feedback.scorer import score_with
    from prefloop.feedback.stage import ask

    if isinstance(answers, Candidate):
        return run.stage(f"{label}/figures", unheard, answers)
    if judge.scorer:
        verdicts = run.stage(f"{label}/scores", score_with, answers, judge.scorer)
    else:
        verdicts = run.stage(f"{label}/judgements", ask, comparisons_of(answers, own), judge.annotator)
    return run.stage(f"{label}/figures", figures, alpha, answers, verdicts, beside, aligned, cfg.guard,
                     compute=cfg.compute)  # fmt: skip


def unheard(one: Candidate) -> Candidate:
    """Stage: what there is to say of a candidate that did not answer."""
    return one


def figures(
    alpha: float,
    answers: Sequence[Group],
    verdicts: "Sequence[Judgement] | Sequence[Group]",
    beside: Candidate | None,
    aligned: ModelRef,
    guard: Guard,
    *,
    compute: Compute,
    stage: "Stage",
) -> Candidate:
    """Stage: the figures of one alpha, and whether the guard refuses it."""
    from prefloop.train.reference import logps_under

    items = [(group.prompt, group.responses) for group in answers]
    logps = logps_under(aligned, items, compute=compute, part="aligned", stage=stage)
    found = candidate(alpha, answers, logps, verdicts)
    return found.model_copy(update={"refused": refusal(found, beside or found, guard)})
