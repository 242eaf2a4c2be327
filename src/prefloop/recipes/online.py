"""What online recipes share: who judges, what becomes of a question, looks at the model between steps, and the loop
around a recipe's own steps with its records, checkpoints and budgets.

A recipe's configuration is any with the options of `prefloop oaif` that are read here.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from prefloop.atomic import write_atomically
from prefloop.errors import FeedbackError, InputError, PrefloopError
from prefloop.models import ModelRef, resolve
from prefloop.recipes.steps import check_room, conclude, look_at, prompts_and_held_out
from prefloop.seeds import derive_seed

if TYPE_CHECKING:
    from prefloop.feedback.annotator import Annotator, Comparison, Judgement
    from prefloop.progress import Advance
    from prefloop.records import Group, Pair, Prompt
    from prefloop.run import Run, Stage
    from prefloop.train.online import OnlineLearner

Unfinished = Literal["keep", "drop", "penalise"]
OUTCOMES = {
    "pairs": "pair",
    "identical": "identical",
    "tie": "tie",
    "abstained": "abstained",
    "unfinished": "unfinished",
}
"""What is counted at every step -> what became of a question."""
UNDECIDED = ("tie", "abstained")
"""Outcomes that an annotator was asked for."""
STEPS_WITHOUT_PAIRS = 3
"""The first ones that asked, after which the run stops."""
SLOTS = ("consistent", "first_slot", "second_slot")
"""What the answers of an annotator with slots follow (`Judgement.slot`); counted at every step."""
SAMPLED = 200
"""Prompts that an estimate is made from."""


def run_online(
    cfg: Any,
    run: "Run",
    align: Callable[..., Path],
    prompts: "Sequence[Prompt]",
    held_out: "Sequence[Prompt]",
    *,
    beta: float,
) -> ModelRef:
    """A recipe whose steps are `align`: the start model is looked at, trained, and looked at again; RUN/model.

    `align(start, prompts, before, judges, cfg, stage=...)`, where `before` are the start model's answers to the
    held-out prompts, returns the folder of the trained model.
    """
    start = resolve(cfg.policy)
    check_room([*prompts, *held_out], start, cfg.sampling.max_new_tokens)
    judges = load_judges(cfg, run)
    warn_of_shared(judges, run)
    look = partial(look_at, run, start, [], cfg, beta=beta, prompts=held_out)

    before = look("start", start)
    warn_of_no_win_rates(before, run)
    folder = run.round(1).stage("model", align, start, prompts, before, judges, cfg)
    aligned = ModelRef.of(folder.path, name="round-1")
    look("round-1", aligned)
    return conclude(run, aligned)


def warn_of_no_win_rates(before: "Sequence[Group]", run: "Run") -> None:
    """Says so where the start model has answered nothing that a later model's answers could be compared with."""
    if not before:
        run.note("warning: no held-out prompts, so no win rates; see --held-out and --look-at.answers")


@dataclass(frozen=True)
class Judges:
    """Who trains, and who judges the win rates."""

    annotator: "Annotator"
    evaluator: "Annotator"

    @property
    def identity(self) -> str:
        """Of a stage that they judge in."""
        return json.dumps([self.annotator.identity, self.evaluator.identity])

    @property
    def shared(self) -> str:
        """The annotators that do both, alone or in a vote, by name."""
        from prefloop.feedback.annotator import members

        trains, evaluates = ({m.identity: m.name for m in members(one)} for one in (self.annotator, self.evaluator))
        return ", ".join(name for identity, name in trains.items() if identity in evaluates)


def load_judges(cfg: Any, run: "Run") -> Judges:
    """Both annotators. Raises InputError for what cannot be used, before anything is computed."""
    from prefloop.feedback.registry import load_annotator, load_meter
    from prefloop.run import Stage

    load = partial(load_annotator, compute=cfg.compute, stage=Stage(name="feedback", run=run))
    annotator = load(cfg.annotator, cfg.feedback, meter=load_meter(cfg.feedback, run=run))
    evaluation = load_meter(cfg.evaluation, run=run, role="evaluation")
    # Left out, the evaluator is the annotator: the same one, so that nothing is loaded or paid twice.
    evaluator = load(cfg.evaluator, cfg.evaluation, meter=evaluation) if cfg.evaluator else annotator
    return Judges(annotator, evaluator)


def warn_of_shared(judges: Judges, run: "Run") -> None:
    """Says so where the annotator that trains judges the win rates too."""
    if judges.shared:
        run.note(f"warning: the win rates are judged by the annotator that trains the model ({judges.shared}), which "
                 "flatters it; name another --evaluator")  # fmt: skip


def load_both(cfg: Any, run: "Run") -> "tuple[list[Prompt], list[Prompt]]":
    """The prompts to train on and those to look at models with."""
    check_online(cfg)
    return prompts_and_held_out(cfg, run)


def check_online(cfg: Any) -> None:
    """Raises InputError, before anything is read, where nobody is named to judge, or by `check_nothing_to_watch`."""
    if not cfg.annotator:
        raise InputError("--annotator is missing: name who judges, such as rule:helpful-short or judge:MODEL")
    check_nothing_to_watch(cfg)


def check_nothing_to_watch(cfg: Any) -> None:
    """Raises InputError for data held out to watch the loss: what an online step learns from is made in that step."""
    if cfg.train.validation_pairs:
        often = ", every --evaluate-every steps" if hasattr(cfg, "evaluate_every") else ""
        raise InputError(
            f"train.validation_pairs = {cfg.train.validation_pairs}: an online recipe holds none of its pairs out; "
            "set it to 0 (Train's own default is for DICE), and look at answers to held-out prompts (--held-out with "
            f"--look-at.answers{often})"
        )


class OnlineLoop:
    """What goes on around the steps of an online method: looks at the model when they are due, questions and answers on
    record, checkpoints, and a start from the last one.

        with OnlineLoop(...) as loop:
            for step in loop.steps():
                ...
                pairs, labelled = loop.pairs(step, groups)
                loop.done({"step": step + 1, ...})
        return loop.conclude()

    `ask` and `look` are `preferences` (or a function like it) and `evaluate`. One that learns from scores has neither:
    it calls `scores`, and `before` is empty. `kept`: what a recipe carries from step to step beyond the log (plain data
    and tensors); it is in the checkpoints.
    """

    def __init__(
        self,
        online: "OnlineLearner",
        before: "Sequence[Group]",
        judges: Judges,
        cfg: Any,
        *,
        ask: "Callable[[Sequence[Group], Annotator, Any], tuple[list[Pair], list[Labelled]]] | None" = None,
        look: Callable[..., dict[str, Any]] | None = None,
        description: str,
        stage: "Stage",
    ) -> None:
        from prefloop.train.checkpoint import load_checkpoint, load_more

        assert stage.scratch is not None and stage.output is not None
        self.online, self.before, self.judges, self.cfg, self.stage = online, before, judges, cfg, stage
        self.ask, self.look, self.description = ask, look, description
        self.scratch, self.output = stage.scratch, stage.output
        self.records = FeedbackRecords(self.scratch / "feedback")
        self.kept: dict[str, Any] = {}
        learner = online.learner
        self.first, self.log = load_checkpoint(self.scratch, model=learner.model, optimizer=learner.optimizer)
        self.sampler_checked = False
        more = load_more(self.scratch, device=learner.model.device)
        if more:
            self.kept = more["kept"]
            online.restore(more["online"])
        self._open = ExitStack()
        self._advance: Advance | None = None

    def __enter__(self) -> Self:
        from prefloop.train.memory import reused_memory

        self._open.enter_context(reused_memory())
        progress = self.stage.progress(self.cfg.train.steps, unit="steps", description=self.description)
        self._advance = self._open.enter_context(progress)
        self._advance(self.first)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    def steps(self) -> Iterator[int]:
        """The steps that are left, from 0. `done` is called in each; what is due before it, or after the last, is done
        here.
        """
        for step in range(self.first, self.cfg.train.steps + 1):
            if self.before and evaluation_is_due(self.cfg, self.log, step):
                assert self.look is not None
                with self._judging(step):
                    found = self.look(self.online, self.before, self.log, self.judges, self.cfg)
                self.log.append({"step": step, "evaluation": found})
                self.stage.event("evaluation", **self.log[-1])
            if step < self.cfg.train.steps:
                yield step

    def pairs(self, step: int, groups: "Sequence[Group]") -> "tuple[list[Pair], list[Labelled]]":
        """What `ask` makes of the two answers of each group; every question goes on record."""
        assert self.ask is not None
        with self._judging(step):
            pairs, labelled = self.ask(groups, self.judges.annotator, self.cfg)
            check_there_are_pairs(pairs, labelled, self.log, step)
        self.records.write(step, map(row_of, labelled))
        return pairs, labelled

    def scores(self, step: int, groups: "Sequence[Group]") -> list[float | str]:
        """The annotator's score of the one answer of each group, or why there is none; every answer goes on record."""
        annotator: Any = self.judges.annotator
        with self._judging(step):
            found: list[float | str] = annotator.score([(group.prompt, group.responses[0]) for group in groups])
            check_there_are_scores(found, self.log)
        self.records.write(step, map(scored_row, groups, found))
        return found

    def sampler_gap(self, step: int, groups: "Sequence[Group]") -> dict[str, float]:
        """The first answers that this process samples are checked against the trainer's own log-probabilities; the
        figure of the run's very first answers is kept.
        """
        if self.sampler_checked:
            return {}
        self.sampler_checked = True
        gap = self.online.check_sampler(self.online.sampler_gap(groups))
        self.stage.event("sampler_gap", step=step + 1, mean=gap)
        return {} if any("sampler_gap" in row for row in self.log) else {"sampler_gap": gap}

    def done(self, row: dict[str, Any]) -> None:
        """A step is complete: `row` goes into the log, and a checkpoint is written where one is due."""
        step = row["step"]
        self.log.append(row)
        self.stage.event("step", **row)
        if step < self.cfg.train.steps and step % self.cfg.train.checkpoint_every == 0:
            self._save(step)
        assert self._advance is not None
        self._advance(1)

    def conclude(self, counted: "Callable[[Sequence[dict[str, Any]]], dict[str, int]] | None" = None) -> Path:
        """Counts, the model, its log and every question; returns the folder. `counted`: what of the log is counted,
        `totals` where it is left out.
        """
        from prefloop.train.learner import TRAINING_LOG, write_training_log

        stage, log = self.stage, self.log
        gap = next((row["sampler_gap"] for row in log if "sampler_gap" in row), None)
        if gap is not None:
            stage.figure("sampler gap at the start, mean nats a token", gap)
        for agreement in getattr(self.judges.annotator, "agreements", ()):
            stage.event("agreement", said=agreement.describe(), share=agreement.share, kappa=agreement.kappa)
        for name, n in (counted or totals)(log).items():
            stage.count(name, n)
        stage.event("saving")
        self.online.write(self.output)
        write_training_log(self.output / TRAINING_LOG, log)
        self.records.collect(self.output / "feedback.jsonl")
        return self.output

    @contextmanager
    def _judging(self, step: int) -> Iterator[None]:
        """While annotators are asked, the model stands still: whatever ends the run here, `step` steps are kept."""
        try:
            yield
        except (PrefloopError, KeyboardInterrupt):
            if step > self.first:
                self._save(step)
            raise

    def _save(self, step: int) -> None:
        from prefloop.train.checkpoint import save_checkpoint

        learner, carried = self.online.learner, {"online": self.online.state(), "kept": self.kept}
        save_checkpoint(self.scratch, step=step, model=learner.model, optimizer=learner.optimizer, log=self.log,
                        more=carried if any(carried.values()) else None)  # fmt: skip


def check_there_are_pairs(
    pairs: "Sequence[Pair]", labelled: "Sequence[Labelled]", log: Sequence[dict[str, Any]], step: int
) -> None:
    """Raises FeedbackError when none of the first steps that asked has given a pair: that is paid for and teaches
    nothing.
    """
    asked = 1 + sum("pairs" in row for row in log)
    if pairs or any(row.get("pairs") for row in log) or asked < STEPS_WITHOUT_PAIRS:
        return
    why = Counter(one.outcome if one.outcome != "abstained" else one.judgement.reason for one in labelled)
    said = ", ".join(f"{n} {reason}" for reason, n in why.most_common())
    undecided = [one.outcome for one in labelled if one.outcome in UNDECIDED]
    if undecided or any(row.get(outcome) for row in log for outcome in UNDECIDED):
        remedy = "Try the annotator by `prefloop judge check`, or change --annotator or --sampling"
    else:
        remedy = "Nobody was asked about them: change --sampling (temperature, max-new-tokens) or --on-unfinished"
    raise FeedbackError(
        f"the first {step + 1} steps have given no pair; the questions of the last one: {said}. {remedy}"
    )


def check_there_are_scores(found: Sequence[float | str], log: Sequence[dict[str, Any]]) -> None:
    """Raises FeedbackError when the very first answers have no score."""
    if not log and all(isinstance(score, str) for score in found):
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(map(str, found)).most_common())
        raise FeedbackError(f"the first step has no answer with a score ({why}); try another --annotator")


def estimate_online(
    cfg: Any,
    recipe: str,
    *,
    read: "Callable[[Any, Run], tuple[list[Prompt], list[Prompt]]]" = load_both,
    asked: int | None = None,
) -> list[str]:
    """What --dry-run prints: a line for every LLM judge, with what a whole run would take if no two answers were the
    same and every first answer of the judge were clear. Nothing is asked.

    `asked`: questions of the training; one for every prompt of every step when left out.
    """
    from prefloop.feedback.annotator import Comparison
    from prefloop.feedback.estimate import estimate
    from prefloop.feedback.registry import load_meter
    from prefloop.records import Response
    from prefloop.run import Run

    with tempfile.TemporaryDirectory() as folder, Run.open(Path(folder) / "run", recipe=recipe, config=cfg) as run:
        prompts, held_out = read(cfg, run)
        judges = load_judges(cfg, run)
    in_training: int = cfg.train.steps * cfg.train.batch_size if asked is None else asked
    # Answers as long as they may be, of about a token a word; two different ones.
    first, second = (
        Response(text=" ".join([word] * cfg.sampling.max_new_tokens), finish_reason="length") for word in ("one", "two")
    )
    looks = sum(evaluation_is_due(cfg, [], step) for step in range(cfg.train.steps + 1))
    looked_at = looks * min(cfg.look_at.answers, len(held_out))
    lines = []
    for role, judge, prices, of, n in (
        ("training", judges.annotator, cfg.feedback, prompts, in_training),
        ("win rates", judges.annotator, cfg.feedback, held_out, looked_at),
        ("win rates", judges.evaluator, cfg.evaluation if cfg.evaluator else cfg.feedback, held_out, 2 * looked_at),
    ):
        questions = [Comparison(prompt, first, second) for prompt in of[: min(n, SAMPLED)]]
        found = estimate(judge, questions, load_meter(prices).prices) if questions else []
        lines += [f"{role}: {one.times(n / len(questions)).render()}" for one in found]
        lines += [] if found else [f"{role}: {judge.name}: no calls"]
    return lines


def evaluation_is_due(cfg: Any, log: Sequence[dict[str, Any]], step: int) -> bool:
    """After `step` steps: every so many, and at the end, once."""
    due = step > 0 and (step == cfg.train.steps or step % cfg.evaluate_every == 0)
    return due and not any(row["step"] == step and "evaluation" in row for row in log)


def distinct(prompts: "Sequence[Prompt]") -> "list[Prompt]":
    """Each prompt once: where an epoch ends inside a batch, a prompt may be in it twice."""
    return list({prompt.id: prompt for prompt in prompts}.values())


class Labelled(NamedTuple):
    """A question and what became of it: one of `OUTCOMES`, or "unlabelled" for a pair that nobody was asked about."""

    question: "Comparison"
    judgement: "Judgement"
    outcome: str


def settled(question: "Comparison", on_unfinished: Unfinished) -> Labelled | None:
    """What becomes of a question that needs no annotator; None for one that does."""
    from prefloop.feedback.annotator import Judgement, abstention

    cut = [response.finish_reason == "length" for response in (question.a, question.b)]
    if question.identical:
        return Labelled(question, Judgement(p=0.5), "identical")
    if any(cut) and on_unfinished == "drop":
        return Labelled(question, abstention("an answer is unfinished"), "unfinished")
    if cut[0] != cut[1] and on_unfinished == "penalise":
        return Labelled(question, Judgement(p=float(cut[1])), "pair")
    return None


def preferences(groups: "Sequence[Group]", annotator: "Annotator", cfg: Any) -> "tuple[list[Pair], list[Labelled]]":
    """Steps 2 and 3: pairs, and what became of every question."""
    from prefloop.feedback.stage import comparison_of, label
    from prefloop.run import Stage

    questions = [comparison_of(group) for group in groups]
    known = [settled(question, cfg.on_unfinished) for question in questions]
    asked = [question for question, one in zip(questions, known, strict=True) if one is None]
    judged = zip(asked, annotator.judge(asked), strict=True)
    answers = iter([Labelled(question, one, outcome_of(one)) for question, one in judged])
    labelled = [one or next(answers) for one in known]
    kept = [one for one in labelled if one.outcome == "pair"]
    pairs = label([one.question for one in kept], [one.judgement for one in kept], labels=cfg.feedback.labels,
                  stage=Stage.detached())  # fmt: skip
    return pairs, labelled


def outcome_of(judgement: "Judgement") -> str:
    if judgement.p is None:
        return "abstained"
    return "tie" if judgement.p == 0.5 else "pair"


def counts_of(labelled: Sequence[Labelled]) -> dict[str, Any]:
    """How many questions of a step ended how, why there was no answer, and what an annotator with slots followed."""
    found = Counter("pair" if one.outcome == "unlabelled" else one.outcome for one in labelled)
    reasons = Counter(one.judgement.reason for one in labelled if one.outcome == "abstained")
    slots = Counter(one.judgement.slot for one in labelled)
    return {
        **{name: found[outcome] for name, outcome in OUTCOMES.items()},
        **({"abstentions": dict(sorted(reasons.items()))} if reasons else {}),
        **({name: slots[name] for name in SLOTS} if any(one.judgement.q_ab is not None for one in labelled) else {}),
    }


def lengths_of_pairs(pairs: "Sequence[Pair]") -> dict[str, float]:
    """Mean characters of chosen and of rejected answers."""
    if not pairs:
        return {}
    chosen, rejected = (sum(getattr(pair, side).length_chars for pair in pairs) for side in ("chosen", "rejected"))
    return {"chosen_chars": chosen / len(pairs), "rejected_chars": rejected / len(pairs)}


def totals(log: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Questions of all steps by what became of them, and abstentions by reason."""
    found = Counter({name: sum(row.get(name, 0) for row in log) for name in OUTCOMES})
    found.update({name: sum(row.get(name, 0) for row in log) for name in SLOTS if any(name in row for row in log)})
    for row in log:
        found.update({f"abstained: {reason}": n for reason, n in row.get("abstentions", {}).items()})
    return dict(found)


class FeedbackRecords:
    """Every question with its answers and judgement, in files that a stopped run finds again.

    One file a step, under its own name: a step that is done again after a stop writes the same one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def write(self, step: int, rows: "Iterable[dict[str, Any]]") -> None:
        lines = [json.dumps({"step": step + 1, **row}) + "\n" for row in rows]
        write_atomically(self.folder / f"{step:06d}.jsonl", "".join(lines))

    def collect(self, file: Path) -> None:
        """All steps, in order, as one file."""
        write_atomically(file, "".join(part.read_text() for part in sorted(self.folder.glob("*.jsonl"))))


def row_of(one: Labelled) -> dict[str, Any]:
    """A question on record."""
    question, judgement, outcome = one
    return {
        "prompt": question.prompt.model_dump(exclude_none=True),
        "a": question.a.text,
        "b": question.b.text,
        **judgement.model_dump(exclude_none=True),
        "outcome": outcome,
    }


def scored_row(group: "Group", score: float | str) -> dict[str, Any]:
    """An answer and its score on record."""
    [answer] = group.responses
    said = {"reason": score, "outcome": "unscored"} if isinstance(score, str) else {"score": score, "outcome": "scored"}
    prompt = group.prompt.model_dump(exclude_none=True)
    return {"prompt": prompt, "answer": answer.text, "finish_reason": answer.finish_reason, **said}


def lengths(groups: "Sequence[Group]") -> dict[str, float]:
    """Mean length and share of finished answers of what was sampled."""
    responses = [response for group in groups for response in group.responses]
    return {
        "length_chars": sum(response.length_chars for response in responses) / len(responses),
        "finished": sum(response.finish_reason == "stop" for response in responses) / len(responses),
    }


def evaluate(
    online: "OnlineLearner",
    before: "Sequence[Group]",
    log: Sequence[dict[str, Any]],
    judges: Judges,
    cfg: Any,
) -> dict[str, Any]:
    """Own answers to the held-out prompts against those of the start model and of the evaluation before."""
    from prefloop.evaluate.reward_accuracy import mean_interval
    from prefloop.evaluate.win_rate import comparisons_of, head_to_head, win_rate
    from prefloop.records import Group

    prompts = [group.prompt for group in before]
    now = online.sample(prompts, k=1, sampling=cfg.sampling, seed=derive_seed(cfg.seed, "evaluation"), current=True)
    earlier = [row["evaluation"]["answers"] for row in log if "evaluation" in row]
    previous = [Group.from_json(json.dumps(group)) for group in earlier[-1]] if earlier else before
    questions = comparisons_of(now, before)
    judged, trained = judges.evaluator.judge(questions), judges.annotator.judge(questions)
    both = [(a.p, b.p) for a, b in zip(judged, trained, strict=True) if a.p is not None and b.p is not None]
    decided = [(a > 0.5, b > 0.5) for a, b in both if 0.5 not in (a, b)]
    drift, gap = online.drift(now)
    responses = [group.responses[0] for group in now]
    found = head_to_head(questions, judged, seed=0)
    return {
        "against_start": found.overall.model_dump(),
        "at_equal_length": found.length_controlled,
        "against_start_by_the_annotator": win_rate(trained).model_dump(),
        "against_previous": win_rate(judges.evaluator.judge(comparisons_of(now, previous))).model_dump(),
        "agreement": sum(a == b for a, b in decided) / len(decided) if decided else None,
        "length_chars": mean_interval([response.length_chars for response in responses]),
        "log_ratio_per_token": mean_interval(drift),
        **{name: mean_interval(values) for name, values in online.further_drift(now).items()},
        "sampler_gap": online.check_sampler(gap),
        "answers": [json.loads(group.to_json()) for group in now],
        "preferred": [judgement.p for judgement in judged],
    }
