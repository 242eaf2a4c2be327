"""A reward model from preference pairs (Ouyang et al. 2022, arXiv 2203.02155, section 3.5, Eq. 1).

1. Take a language model, put a head with one output in place of its vocabulary: r(x, y) is its value at the last token
   of the conversation that ends with y. A new head is zero: all rewards are 0, and the loss is ln 2.
2. For every pair (x, y_w, y_l), one epoch, minimise

       -log sigmoid(r(x, y_w) - r(x, y_l) - m) + eta (r(x, y_w) + r(x, y_l))^2

   m: a margin, where the pairs have scores (Llama 2); eta: pulls the rewards, whose zero preferences leave open, to
   where their sum is 0 (Eisenstein et al. 2023).
3. Look at held-out pairs: are they ranked right, and is sigmoid(r_w - r_l) as sure as it is right?
4. Cross-fitting (--folds k): a model's scores of pairs that it was trained on are too sure. So the prompts are dealt
   into k folds, every fold is scored by a model that was trained on the others, and the scores are put together.

For RLAIF (Lee et al. 2024, arXiv 2309.00267) the preferences are an annotator's: --annotator labels the pairs anew, or
with --prompts two answers of the language model to each prompt.

What comes out is an ordinary transformers sequence classifier, and an annotator: `reward-model:RUN/model`.

Departures from the paper: two answers to a prompt at a time, not all pairs of K at once; no end token is appended to an
answer that was cut, beyond what the chat template writes; the learning rate falls to 0, not to a tenth of its peak.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from prefloop.config import Config
from prefloop.data.groups import groups_of_pairs
from prefloop.errors import CheckFailed, InputError
from prefloop.feedback.options import Feedback
from prefloop.metrics import MetricsName
from prefloop.models import ModelRef, resolve
from prefloop.pairs.replay import hold_out
from prefloop.recipes.steps import (
    apart_from,
    check_room,
    conclude,
    held_back,
    load,
    load_own_prompts,
    prompts_of,
    tell_epochs,
)
from prefloop.sample.options import EngineName, Server
from prefloop.sample.sampling import Sampling
from prefloop.seeds import derive_seed, generator
from prefloop.train.config import Compute, EpochTrain

if TYPE_CHECKING:
    from prefloop.records import Pair
    from prefloop.run import Round, Run, Stage


class RewardModelConfig(Config):
    """Options of `prefloop reward-model`."""

    policy: str = Field(default="", description="the language model to make it from: hub id, folder, .gguf file")
    pairs: str = Field(default="", description="preference pairs: a file, a data set folder or hub name, or seed:train")
    prompts: str = Field(
        default="", description="in place of pairs: prompts that the model answers twice, for the annotator to judge"
    )
    annotator: str = Field(default="", description="who labels the two answers, in place of the pairs' own labels")
    feedback: Feedback = Field(default_factory=Feedback)
    sampling: Sampling = Field(default_factory=Sampling, description="of the two answers to --prompts")
    held_out: str = Field(
        default="", description="pairs to look at it with; when left out the folds do, and without folds a tenth"
    )
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="bad rows: stop, or skip and count")
    centre: float = Field(default=0.01, ge=0, description="eta, of (r_w + r_l)^2 (Eisenstein et al.: 0.01)")
    margin: float = Field(
        default=0.0, ge=0, description="m of a pair, for every point that its scores differ by; 0: none"
    )
    head_std: float = Field(default=0.0, ge=0, description="standard deviation of the new head; 0: a head of zeros")
    folds: int = Field(default=0, ge=0, description="of cross-fitting, at least 2; 0: none")
    seed: int = Field(default=0, ge=0, description="of every random choice")
    train: EpochTrain = Field(
        default_factory=lambda: EpochTrain(batch_size=64, learning_rate=9e-6, warmup_steps=0, schedule="cosine"),
        description="InstructGPT: one epoch in batches of 64, from 9e-6 down along a cosine",
    )
    metrics: MetricsName = ""
    engine: EngineName = "auto"
    server: Server = Field(default_factory=Server)
    compute: Compute = Field(default_factory=Compute)

    @field_validator("folds")
    @classmethod
    def _two_at_least(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError(
                "folds = 1: a model that has not seen a fold needs another to be trained on; give 2 or more"
            )
        return folds


def demo() -> RewardModelConfig:
    """The packaged small model on the packaged pairs: some minutes on two CPU cores."""
    return RewardModelConfig(
        policy="smollm2-135m",
        pairs="seed:train",
        held_out="seed:held_out",
        folds=2,
        train=EpochTrain(
            steps=16, batch_size=4, learning_rate=2e-5, warmup_steps=2, validation_pairs=4, validate_every=8,
            checkpoint_every=8,
        ),
    )  # fmt: skip


def reward_model(cfg: RewardModelConfig, run: "Run") -> ModelRef:
    """Train a reward model on `cfg.pairs`; returns it, RUN/model."""
    from prefloop.evaluate.reward_pairs import reward_pairs, score_pairs
    from prefloop.train.scalar import check_has_classifier

    start = resolve(cfg.policy)
    check_has_classifier(start)
    pairs, held_out = load_both(cfg, run, start)

    folds = deal(pairs, cfg.folds, seed=derive_seed(cfg.seed, "folds"))
    scored = []
    for i, fold in enumerate(folds):
        part = run.part(f"fold-{i + 1}")
        others = [pair for other in folds if other is not fold for pair in other]
        model = train_on(part, start, others, cfg, seed=derive_seed(cfg.seed, "fold", i))
        scored.append(part.stage("scored", score_pairs, fold, model, compute=cfg.compute))
        part.stage("ranking", reward_pairs, scored[-1])
    if folds:
        together = run.stage("cross-fit/pairs", in_order, pairs, *scored)
        run.stage("cross-fit/groups", groups_of_pairs, together)
        run.stage("cross-fit/ranking", reward_pairs, together)

    round = run.round(1)
    model = train_on(round, start, pairs, cfg, seed=derive_seed(cfg.seed, "reward model"))
    if held_out:
        round.stage("ranking", reward_pairs, round.stage("scored", score_pairs, held_out, model, compute=cfg.compute))
    elif not folds:
        run.note("warning: no held-out pairs, so nothing says how good this reward model is; see --held-out")
    return conclude(run, model)


def train_on(
    round: "Round", start: ModelRef, pairs: "Sequence[Pair]", cfg: RewardModelConfig, *, seed: int
) -> ModelRef:
    """Steps 1 and 2; the reward model is ROUND/model. At most a quarter of the pairs is held out to watch."""
    from prefloop.train.learner import fit
    from prefloop.train.reward import RewardObjective

    training, watched = held_back(round, pairs, cfg.train, seed=seed, kind="pairs")
    train = cfg.train.over(len(training))
    tell_epochs(round, train, len(training), kind="pairs")
    objective = RewardObjective(centre=cfg.centre, margin=cfg.margin, head_std=cfg.head_std, seed=seed)
    folder = round.stage("model", fit, start, training, watched, objective=objective, config=train,
                         compute=cfg.compute, seed=seed)  # fmt: skip
    return ModelRef.of(folder.path, name=round.label)


def load_both(cfg: RewardModelConfig, run: "Run", model: ModelRef) -> "tuple[list[Pair], list[Pair]]":
    """The pairs to train on and those to look with, all of which fit into the model; no prompt is on both sides.

    Where none are given to look with, a tenth of the pairs (256 at most) is set aside; none with folds, which say of
    every pair how a model ranks it that has not seen it.
    """
    apart = load(cfg.held_out, "held-out", cfg.on_bad_row, run) if cfg.held_out else []
    given = apart_from(preferences(cfg, run, model), prompts_of(apart), run, why="held-out prompts")
    pairs = run.stage("data/pairs", whole_pairs, given, model)
    if not pairs:
        raise CheckFailed("there are no pairs to train on; the counts of earlier stages say where they were dropped")
    if apart:
        return pairs, run.stage("data/held_out", whole_pairs, apart, model)
    if cfg.folds:
        return pairs, []
    return hold_out(pairs, min(256, len(pairs) // 10), seed=derive_seed(cfg.seed, "held out"))


def preferences(cfg: RewardModelConfig, run: "Run", model: ModelRef) -> "list[Pair]":
    """The pairs as they are labelled, or as the annotator labels them or two own answers to each prompt."""
    from prefloop.feedback.registry import load_annotator, load_meter
    from prefloop.feedback.stage import annotate
    from prefloop.records import Group
    from prefloop.run import Stage
    from prefloop.sample.stage import sample
    from prefloop.train.reward import margin_of

    if cfg.prompts and (cfg.pairs or not cfg.annotator):
        raise InputError("--prompts needs an --annotator that judges the answers to them, and no --pairs")
    if cfg.margin and cfg.annotator:
        raise InputError(f"margin = {cfg.margin:g}: an --annotator's labels come without the scores it is made of; "
                         "leave one of the two out")  # fmt: skip
    pairs = [] if cfg.prompts else load(cfg.pairs, "pairs", cfg.on_bad_row, run)
    for pair in pairs:
        margin_of(pair, cfg.margin)
    if not cfg.annotator:
        return pairs
    if pairs:  # checked here too, before labels are paid for that could not be used
        check_folds(cfg.folds, len({pair.prompt.id for pair in pairs}))
    annotator = load_annotator(cfg.annotator, cfg.feedback, compute=cfg.compute, stage=Stage(name="feedback", run=run),
                               meter=load_meter(cfg.feedback, run=run))  # fmt: skip
    if cfg.prompts:
        prompts = load_own_prompts(cfg.prompts, cfg.on_bad_row, run)
        check_folds(cfg.folds, len({prompt.id for prompt in prompts}))
        check_room(prompts, model, cfg.sampling.max_new_tokens)
        questions = run.stage("data/answers", sample, model, prompts, k=2, sampling=cfg.sampling,
                              seed=derive_seed(cfg.seed, "answers"), compute=cfg.compute, engine=cfg.engine,
                              server=cfg.server)  # fmt: skip
    else:
        questions = [Group(prompt=pair.prompt, responses=pair.responses) for pair in pairs]
    return run.stage("data/labelled", annotate, questions, annotator, labels=cfg.feedback.labels)


def whole_pairs(pairs: "Sequence[Pair]", model: ModelRef, *, stage: "Stage") -> "list[Pair]":
    """Stage: pairs whose two conversations differ and fit into the model's context; the others are counted."""
    from prefloop.data.chat import ChatFormat
    from prefloop.models import context_of, load_tokenizer
    from prefloop.train.reward import conversation_group

    chat, context = ChatFormat(load_tokenizer(model)), context_of(model)
    stage.note(f"tokens: {chat.description}")
    kept = []
    for pair in pairs:
        chat.prompt_ids(pair.prompt)  # says what is wrong with a prompt that the template does not take
        group = conversation_group(chat, pair)
        if group.responses[0] == group.responses[1]:
            stage.count("pairs dropped: the same conversation twice")
        elif context and len(group.prompt_ids) + max(map(len, group.responses)) - 1 > context:  # without the probe
            stage.count(f"pairs dropped: longer than the context of {context} tokens")
        else:
            kept.append(pair)
    stage.count("pairs kept", len(kept))
    return kept


def deal(pairs: "Sequence[Pair]", folds: int, *, seed: int) -> "list[list[Pair]]":
    """The pairs in `folds` parts, all pairs of a prompt in the same one, in their order; [] for no folds.

    Raises InputError when there are fewer prompts than folds.
    """
    if not folds:
        return []
    ids = list(dict.fromkeys(pair.prompt.id for pair in pairs))
    check_folds(folds, len(ids))
    fold_of = {ids[i]: place % folds for place, i in enumerate(generator(seed, "folds").permutation(len(ids)))}
    return [[pair for pair in pairs if fold_of[pair.prompt.id] == fold] for fold in range(folds)]


def check_folds(folds: int, prompts: int) -> None:
    if folds > prompts:
        raise InputError(f"folds = {folds}: there are {prompts} prompts; give fewer folds, or more pairs")


def in_order(pairs: "Sequence[Pair]", *scored: "Sequence[Pair]") -> "list[Pair]":
    """Stage: what the folds' models scored, in the order of `pairs`."""
    key = {(pair.prompt.id, pair.chosen.text, pair.rejected.text): i for i, pair in enumerate(pairs)}
    together = [pair for part in scored for pair in part]
    return sorted(together, key=lambda pair: key[pair.prompt.id, pair.chosen.text, pair.rejected.text])
