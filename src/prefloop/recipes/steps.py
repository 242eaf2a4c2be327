"""Steps that several recipes share, each implemented once."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field
from rich.console import Console

from prefloop.atomic import write_atomically
from prefloop.config import Config
from prefloop.data.chat import ChatFormat, check_prompt_length, same_tokenizer
from prefloop.data.mapping import Loaded, OnBadRow, are_answers, load_answers, load_pairs, load_prompts, load_rows
from prefloop.errors import CheckFailed, InputError
from prefloop.evaluate.checkup import checkup
from prefloop.feedback.meter import described
from prefloop.feedback.scorer import score_by
from prefloop.models import ModelRef, check_different, context_of, copy_model, load_tokenizer, resolve
from prefloop.pairs.answers import good_and_bad
from prefloop.pairs.replay import hold_out
from prefloop.records import Answer, Group, Item, Judged, Pair, Prompt, Response
from prefloop.report.card import model_card
from prefloop.report.markdown import write_report
from prefloop.report.page import REPORT, write_page
from prefloop.report.story import read_story
from prefloop.report.table import terminal_tables
from prefloop.run import Round, Run, Stage
from prefloop.sample.stage import sample
from prefloop.seeds import derive_seed, generator
from prefloop.train.config import Train

if TYPE_CHECKING:
    from prefloop.feedback.annotator import Annotator

I = TypeVar("I", bound=Item)  # noqa: E741


class LookAt(Config):
    """What every round's model is looked at with. Nothing of it is trained on, nothing is chosen by it."""

    answers: int = Field(default=16, ge=0, description="held-out prompts that every model answers once")
    shown: int = Field(default=4, ge=0, description="how many of these answers the report shows, before and after")


def two_models(policy: str, reference: str) -> tuple[ModelRef, ModelRef]:
    """A DPO-trained policy and the reference it was trained against: two models over one tokenizer.

    Raises InputError when their weights are the same or their tokenizers differ.
    """
    first, second = resolve(policy), resolve(reference)
    check_different(first, second)
    check_same_tokenizer(first, second)
    return first, second


def check_same_tokenizer(policy: ModelRef, reference: ModelRef) -> None:
    """Raises InputError where two models would not read the same text as the same token ids."""
    difference = same_tokenizer(load_tokenizer(policy), load_tokenizer(reference))
    if difference:
        raise InputError(
            f"policy {policy.name} and reference {reference.name} have different tokenizers ({difference}); "
            "the implicit reward needs both models to score the same token ids"
        )


def tokenise(items: Sequence[Judged], model: ModelRef, *, stage: Stage | None = None) -> list[Judged]:
    """The pairs or answers with the model's token ids: prompt and response tokenised apart, one end token.

    One that does not fit the model's context is dropped and counted; a prompt that leaves no room is an InputError.
    Raises CheckFailed where special tokens are not where they belong (`check_pairs`, `check_tokens`).
    """
    from prefloop.train.checks import check_pairs, check_tokens
    from prefloop.train.packing import TokenGroup

    stage = stage or Stage.detached()
    chat = ChatFormat(load_tokenizer(model))
    stage.note(f"tokens: {chat.description}")
    context = context_of(model)
    kept: list[Judged] = []
    groups: list[TokenGroup] = []
    kind = "answers" if items and isinstance(items[0], Answer) else "pairs"
    for item in items:
        prompt_ids = chat.prompt_ids(item.prompt)
        check_prompt_length(prompt_ids, 1, context, item.prompt)
        responses = [chat.own_ids(response) for response in item.responses]
        if context and len(prompt_ids) + max(response.length_tokens for response in responses) > context:
            stage.count(f"{kind} dropped: longer than the context of {context} tokens")
            continue
        kept.append(item.with_responses(*responses))
        groups.append(TokenGroup(tuple(prompt_ids), tuple(response.token_ids or () for response in responses)))
    # Training checks its items too, but in DICE that is hours later.
    if kind == "pairs":
        check_pairs([item for item in kept if isinstance(item, Pair)], groups, chat)
    else:
        check_tokens(kept, groups, chat, names=("response",))
    stage.count(f"{kind} kept", len(kept))
    return kept


def encode(groups: Sequence[Group], model: ModelRef) -> list[Group]:
    """The groups with the model's token ids, for scoring under any model; a given text counts as finished.

    What the sampler knew of its own log-probabilities is left out: another model may have sampled.
    """
    chat = ChatFormat(load_tokenizer(model))
    check_room([group.prompt for group in groups], model, 1)

    def own(response: Response) -> Response:
        return chat.own_ids(response).model_copy(update={"sampling_logps": None})

    return [
        group.model_copy(update={"responses": tuple(own(response) for response in group.responses)}) for group in groups
    ]


def fitting(groups: Sequence[Group], model: ModelRef, *, stage: Stage | None = None) -> list[Group]:
    """The groups with the model's token ids, without the answers that do not fit its context, which are counted.

    Raises InputError for a prompt that leaves no room for an answer.
    """
    stage = stage or Stage.detached()
    chat, context = ChatFormat(load_tokenizer(model)), context_of(model)
    stage.note(f"tokens: {chat.description}")
    kept: list[Group] = []
    for group in encode(groups, model):
        room = context - len(chat.prompt_ids(group.prompt)) if context else math.inf
        responses = tuple(response for response in group.responses if response.length_tokens <= room)
        if len(responses) < len(group.responses):
            dropped = len(group.responses) - len(responses)
            stage.count(f"answers dropped: longer than the context of {context} tokens", dropped)
        if responses:
            kept.append(group.model_copy(update={"responses": responses}))
    stage.count("answers", sum(len(group.responses) for group in kept))
    stage.count("prompts", len({group.prompt.id for group in kept}))
    return kept


def check_room(prompts: Sequence[Prompt], model: ModelRef, max_new_tokens: int) -> None:
    """Raises InputError, before anything is computed, for a prompt that leaves no room for its answer."""
    chat, context = ChatFormat(load_tokenizer(model)), context_of(model)
    for prompt in prompts:
        check_prompt_length(chat.prompt_ids(prompt), max_new_tokens, context, prompt)


def prompts_of(items: Sequence[Item]) -> list[Prompt]:
    """The prompts of pairs or groups, each once, in order."""
    return list({item.prompt.id: item.prompt for item in items}.values())


def split_off(prompts: Sequence[Prompt], n: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The other prompts, and `n` drawn from all of them; both in their order."""
    drawn = {prompt.id for prompt in some(prompts, n, seed)}
    return [p for p in prompts if p.id not in drawn], [p for p in prompts if p.id in drawn]


def some(prompts: Sequence[Prompt], n: int | None, seed: int) -> list[Prompt]:
    """`n` prompts drawn without replacement, in their order; all of them when n is None or not smaller."""
    if n is None or n >= len(prompts):
        return list(prompts)
    chosen = generator(seed, "prompts").permutation(len(prompts))[:n]
    return [prompts[i] for i in sorted(chosen)]


def load(source: str, option: str, on_bad_row: OnBadRow, run: Run) -> list[Pair]:
    """Preference pairs of a user's source, the mapping found said aloud. Raises InputError when none was named."""
    if not source:
        raise InputError(f"--{option} is missing: name a file, a data set folder or hub name, or seed:train")
    return said(load_pairs(source, on_bad_row=on_bad_row), run)


def offline_and_held_out(
    cfg: Any, run: Run, model: ModelRef, *, check: Callable[[Sequence[Pair]], None] | None = None
) -> tuple[list[Pair], list[Pair]]:
    """The offline pairs and the held-out pairs with the model's token ids, the latter with its log-probabilities too.

    Without `cfg.held_out` a tenth of the pairs (256 at most) is held out by prompt and never trained on. `check` sees
    the offline pairs before anything is computed.
    """
    from prefloop.train.reference import with_reference_logps

    pairs = load(cfg.pairs, "pairs", cfg.on_bad_row, run)
    if check:
        check(pairs)
    apart = load(cfg.held_out, "held-out", cfg.on_bad_row, run) if cfg.held_out else []
    pairs = apart_from(pairs, prompts_of(apart), run, why="held-out prompts")
    offline = run.stage("data/pairs", tokenise, pairs, model)
    if apart:
        held_out = run.stage("data/held_out", tokenise, apart, model)
    else:
        offline, held_out = hold_out(offline, min(256, len(offline) // 10), seed=derive_seed(cfg.seed, "held out"))
    return offline, run.stage("start/held_out", with_reference_logps, held_out, model, compute=cfg.compute)


def has_answers(source: str) -> bool:
    """Whether the rows of a user's source are single answers with labels."""
    return bool(source) and are_answers(load_rows(source, None, seed_file="pairs"))


def answers_and_held_out(cfg: Any, run: Run, model: ModelRef) -> tuple[list[Answer], list[Pair], list[Prompt]]:
    """The answers of `cfg.pairs` with the model's token ids; held-out pairs, with its log-probabilities too; and the
    prompts to look at models with.

    Without `cfg.held_out` a tenth of the answers (256 at most) is held out by prompt and never trained on; a pair is
    the first good and the first bad answer to a prompt that has both.
    """
    from prefloop.train.reference import with_reference_logps

    answers = said(load_answers(cfg.pairs, on_bad_row=cfg.on_bad_row), run)
    apart = load(cfg.held_out, "held-out", cfg.on_bad_row, run) if cfg.held_out else []
    answers = apart_from(answers, prompts_of(apart), run, why="held-out prompts")
    own = run.stage("data/answers", tokenise, answers, model)
    if apart:
        held_out = run.stage("data/held_out", tokenise, apart, model)
        prompts = prompts_of(held_out)
    else:
        own, others = hold_out(own, min(256, len(own) // 10), seed=derive_seed(cfg.seed, "held out"))
        held_out, prompts = good_and_bad(others), prompts_of(others)
    return own, run.stage("start/held_out", with_reference_logps, held_out, model, compute=cfg.compute), prompts


def held_back(round: Round, items: Sequence[I], train: Train, *, seed: int, kind: str) -> tuple[list[I], list[I]]:
    """(training, validation): `train.validation_pairs` items, a quarter of them at most, are held out to watch."""
    if not items:
        raise CheckFailed(f"there are no {kind} to train on; the counts of earlier stages say where they were dropped")
    watched = min(train.validation_pairs, len(items) // 4)
    if watched < train.validation_pairs:
        round.run.note(f"{round.label}: {watched} validation {kind}, a quarter of {len(items)}, not the "
                       f"{train.validation_pairs} asked for")  # fmt: skip
    return hold_out(items, watched, seed=seed)


def tell_epochs(round: Round, train: Train, n: int, *, kind: str) -> None:
    """Note how many times over its data a training goes."""
    epochs = train.steps * train.batch_size / n
    round.run.note(f"{round.label}: {train.steps} steps of {train.batch_size} are {epochs:.2g} times over {n} {kind}")


def load_own_prompts(source: str, on_bad_row: OnBadRow, run: Run) -> list[Prompt]:
    """The prompts of a user's source; none when none was named."""
    return said(load_prompts(source, on_bad_row=on_bad_row), run) if source else []


def prompts_and_held_out(cfg: Any, run: Run) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts of `cfg.prompts`, and those of `cfg.held_out` to look at models with; none is in both.

    Without `cfg.held_out` a tenth of the prompts (256 at most) is held out. Raises InputError when there are none.
    """
    prompts = load_own_prompts(cfg.prompts, cfg.on_bad_row, run)
    if not prompts:
        raise InputError("--prompts is missing: name a file, a data set folder or hub name, or seed:train")
    held_out = load_own_prompts(cfg.held_out, cfg.on_bad_row, run)
    if not held_out:
        return split_off(prompts, min(256, len(prompts) // 10), derive_seed(cfg.seed, "held out"))
    apart = {prompt.messages for prompt in held_out}
    own = [prompt for prompt in prompts if prompt.messages not in apart]
    if not own:
        raise InputError(f"every prompt of --prompts {cfg.prompts} is in --held-out {cfg.held_out} too; give others")
    if len(own) < len(prompts):
        run.note(f"{len(prompts) - len(own)} prompts left out of training: they are held out")
    return own, held_out


def apart_from(items: Sequence[I], prompts: Sequence[Prompt], run: Run, *, why: str) -> list[I]:
    """The items whose prompts are not among `prompts`, and how many were left out for it.

    Raises InputError when none is left.
    """
    known = {prompt.messages for prompt in prompts}
    kept = [item for item in items if item.prompt.messages not in known]
    if items and not kept:
        raise InputError(f"all {len(items)} rows to train on have prompts that are held out too; give others")
    if len(kept) < len(items):
        run.note(f"{len(items) - len(kept)} rows left out of training: {why}")
    return kept


def said(loaded: Loaded, run: Run) -> list[Any]:
    """What was loaded; the mapping found and the rows skipped are told."""
    run.note(f"{loaded.source}: {len(loaded.records)} rows; {loaded.mapping.describe()}")
    if loaded.bad_rows:
        run.note(f"{loaded.source}: {len(loaded.bad_rows)} rows skipped; all are in events.jsonl, the first ones:")
        for row in loaded.bad_rows:
            run.event("row skipped", source=loaded.source, row=row.number, reason=row.reason)
        for row in loaded.bad_rows[:10]:
            run.say(f"  row {row.number}: {row.reason}")
    return loaded.records


def look_at(
    run: Run,
    start: ModelRef,
    held_out: Sequence[Pair],
    cfg: Any,
    label: str,
    model: ModelRef,
    *,
    beta: float = 1.0,
    per_token: bool = False,
    referenced: bool = True,
    prompts: Sequence[Prompt] = (),
    evaluator: "Annotator | None" = None,
) -> list[Group]:
    """Answers of `model` to held-out prompts and its figures beside the start model; the same seeds for every model.

    The prompts are those of the held-out pairs unless given. An `evaluator` scores the answers. `beta`, `per_token` and
    `referenced` are of the margin on held-out pairs (`checkup`). Returns the answers.
    """
    prompts = some(prompts or prompts_of(held_out), cfg.look_at.answers, derive_seed(cfg.seed, "look at"))
    seed = derive_seed(cfg.seed, "answers")
    answers = run.stage(
        f"{label}/answers", sample, model, prompts, k=1, sampling=cfg.sampling, seed=seed, compute=cfg.compute,
        engine=cfg.engine, server=cfg.server,
    )  # fmt: skip
    if evaluator:
        answers = run.stage(f"{label}/rewards", score_by, answers, evaluator)
    run.stage(f"{label}/checkup", checkup, model, start, held_out, answers, beta=beta, per_token=per_token,
              referenced=referenced, compute=cfg.compute)  # fmt: skip
    return answers


def conclude(run: Run, model: ModelRef) -> ModelRef:
    """The final model with its card as RUN/model, and the reports: report.md and report.html; what annotators have used
    is said.
    """
    folder = run.stage("model", export, model, model_card(read_story(run.path)))
    story = read_story(run.path)
    if story.usage:
        run.note(f"feedback: {described(story.usage)}")
    write_report(story)
    write_page([story], run.path / REPORT)
    return ModelRef.of(folder.path)


def export(model: ModelRef, card: str, *, stage: Stage) -> Path:
    """The final model as an ordinary transformers folder with its card."""
    assert stage.output is not None
    copy_model(model, stage.output)
    write_atomically(stage.output / "README.md", card)
    return stage.output


def run_in_folder(recipe: str, method: Callable[[Any, Run], ModelRef], cfg: Config, out: Path) -> None:
    """Run a recipe in its run folder, then print the table and where everything is."""
    console = Console(stderr=True)
    with Run.open(out, recipe=recipe, config=cfg, console=console) as run:
        model = method(cfg, run)
    story = read_story(out)
    seconds = sum(entry["seconds"] for entry in story.stages.values())
    for table in terminal_tables(story):
        Console().print(table)
    print(f"report  {out / REPORT}\nmodel   {model.path}\nstages  {seconds:.0f} s in all")
