"""The charts of a page: of one run a series a round, of several runs a series a run."""

from collections.abc import Callable, Sequence
from typing import Any

from prefloop.evaluate.candidate import Candidate
from prefloop.report.charts import Chart, Point, Series, number, thinned
from prefloop.report.story import Interval, Round, Story


def charts(stories: Sequence[Story]) -> list[tuple[str, list[Chart]]]:
    """All charts there is something to draw for, by group."""
    groups = [
        ("Models", [*_by_model(stories), *_frontier(stories), *_asked(stories)]),
        ("Win rates", _win_rates(stories)),
        ("Search over alpha", _alphas(stories)),
        ("Training", [*_training(stories), *_phases(stories)]),
        ("Length of winners and losers", _length(stories)),
    ]
    return [(name, found) for name, found in groups if found]


def _value(interval: Interval) -> str:
    return f"{number(interval[0])} [{number(interval[1])}, {number(interval[2])}]"


def _several(stories: Sequence[Story]) -> bool:
    return len(stories) > 1


def _labels(stories: Sequence[Story]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(round.label for story in stories for round in story.rounds if round.checkup))


def _by_model(stories: Sequence[Story]) -> list[Chart]:
    """Figures of the models with their intervals, a place on the x axis for every model."""
    figures: list[tuple[str, str, str, float | None, Callable[[Round], Interval | None]]] = [
        (
            "Held-out accuracy",
            "share ranked as labelled",
            "Should rise above one half (the line), which is a coin. Whiskers are 95 % intervals.",
            0.5,
            lambda r: r.checkup and r.checkup.accuracy,
        ),
        (
            "Held-out margin",
            "beta h, reward units",
            "How far the implicit reward keeps chosen and rejected apart, in the units of the loss. It grows with "
            "training, also beyond use.",
            0.0,
            lambda r: r.checkup and r.checkup.margin,
        ),
        (
            "Win rate against the start",
            "share of held-out prompts",
            "By the evaluator. Above one half (the line) beyond the whiskers is better than the start.",
            0.5,
            lambda r: r.win_rate,
        ),
        (
            "Answer length",
            "characters",
            "Should stay where it began: what grows beyond the whiskers is length, whatever the reward says.",
            None,
            lambda r: r.checkup and r.checkup.length_chars,
        ),
        (
            "Reward of own answers",
            "as the evaluator gives it",
            "Should rise. Whiskers are 95 % intervals over held-out prompts. What gives the reward is not the truth: "
            "read some answers.",
            None,
            lambda r: r.checkup and r.checkup.reward,
        ),
        (
            "Drift from the start",
            "KL, nats a token",
            "How far own answers are from what the start model would write. Zero is no change.",
            0.0,
            lambda r: r.checkup and r.checkup.kl_per_token,
        ),
    ]
    labels, found = _labels(stories), []
    for title, unit, caption, level, read in figures:
        series = []
        for i, story in enumerate(stories):
            known = [(labels.index(r.label), read(r)) for r in story.rounds if r.checkup]
            values = [(float(x), value) for x, value in known if value]
            if values:
                series.append(
                    Series(
                        story.name if _several(stories) else "",
                        [(x, value[0]) for x, value in values],
                        [value[1:] for _, value in values],
                        [f"{labels[int(x)]} {_value(value)}" for x, value in values],
                        colour=i,
                        dots=True,
                    )
                )
        if series:
            found.append(Chart(title, "model", unit, caption, series, ticks=labels, level=level))
    return found


def _frontier(stories: Sequence[Story]) -> list[Chart]:
    """Held-out reward against KL, model by model."""
    series = []
    for i, story in enumerate(stories):
        looked = [(r.label, r.checkup) for r in story.rounds if r.checkup]
        known = [(label, c.kl_per_token[0], c.margin) for label, c in looked if c.kl_per_token and c.margin]
        if len(known) > 1:
            series.append(
                Series(
                    story.name if _several(stories) else "",
                    [(kl, margin[0]) for _, kl, margin in known],
                    [margin[1:] for _, _, margin in known],
                    [f"{label}: margin {_value(margin)} at {number(kl)} nats" for label, kl, margin in known],
                    colour=i,
                    dots=True,
                )
            )
    caption = (
        "Up and to the left is better: reward gained for little drift. A line that turns flat pays drift for nothing."
    )
    title = "Reward against drift"
    return [Chart(title, "KL, nats a token", "held-out margin", caption, series)] if series else []


def _asked(stories: Sequence[Story]) -> list[Chart]:
    """Of conditional models: the reward of the answers against the reward that was asked for."""
    series = []
    for i, story in enumerate(stories):
        known = [(row.target, row.reward) for r in story.rounds for row in r.asked if row.reward]
        if known:
            series.append(
                Series(
                    story.name if _several(stories) else "",
                    [(target, reward[0]) for target, reward in known],
                    [reward[1:] for _, reward in known],
                    [f"asked for {number(target)}: {_value(reward)}" for target, reward in known],
                    colour=i,
                    dots=True,
                )
            )
    caption = (
        "In standard deviations above the mean reward of the training data. Should rise: a flat line says that the "
        "model does not listen to what it is asked for."
    )
    title = "Reward asked for and got"
    return [Chart(title, "asked for", "got", caption, series, level=0.0)] if series else []


def _win_rates(stories: Sequence[Story]) -> list[Chart]:
    """Win rates against the start by step and by drift, under the evaluator, at equal length too, and under the
    annotator that trains.
    """
    by_step, by_drift = [], []
    for i, story in enumerate(stories):
        rows = [row for r in story.rounds for row in r.evaluations]
        judges: list[tuple[str, Callable[[dict[str, Any]], Interval | None], str]] = [
            ("evaluator", lambda row: row["against_start"]["rate"], "solid"),
            ("evaluator, at equal length", lambda row: row.get("at_equal_length"), "dotted"),
        ]
        if story.config.get("evaluator") not in (None, "", story.config.get("annotator")):
            judges.append(("annotator", lambda row: row["against_start_by_the_annotator"]["rate"], "dashed"))
        for judge, rate_in, line in judges:
            known = [(step, row["log_ratio_per_token"][0], rate_in(row)) for step, row in rows]
            known = [(step, drift, rate) for step, drift, rate in known if rate]
            if not known:
                continue
            said = story.name if _several(stories) else f"{judge} {story.config.get(judge) or ''}".strip()
            colour = i if _several(stories) else len(by_step)
            shared: dict[str, Any] = {
                "legend": not _several(stories) or judge == "evaluator",
                "intervals": [tuple(rate[1:]) for _, _, rate in known],
                "notes": [f"step {step}, {_value(rate)} by the {judge}" for step, _, rate in known],
                "colour": colour,
                "line": line,
                "dots": True,
            }
            by_step.append(Series(said, [(step, rate[0]) for step, _, rate in known], **shared))
            by_drift.append(Series(said, [(drift, rate[0]) for _, drift, rate in known], **shared))
    if not by_step:
        return []
    return [
        Chart(
            "Win rate against the start",
            "step",
            "share of held-out prompts",
            "Solid: by the evaluator, dotted: the same at equal length, dashed: by the annotator that trains. Where "
            "the last rises and the first falls, the model learns the annotator's taste; where the dotted one stays "
            "behind, it learns length.",
            by_step,
            level=0.5,
        ),
        Chart(
            "Win rate against drift",
            "log pi / pi(0), nats a token",
            "share of held-out prompts",
            "Up and to the left is better. A rate that falls while drift grows is over-optimisation.",
            by_drift,
            level=0.5,
        ),
    ]


def _alphas(stories: Sequence[Story]) -> list[Chart]:
    """What ExPO tried, a place on the x axis for every alpha."""
    tried = sorted({one.alpha for story in stories for one in story.tried if one.answers})
    annotated = all(story.config.get("annotator") for story in stories if story.tried)
    figures: list[tuple[str, str, str, float | None, Callable[[Candidate], Interval | None]]] = [
        (
            "Judged",
            "win rate over alpha = 0" if annotated else "mean score",
            "Rises, and falls where the model breaks; alpha = 0 is the aligned model, -1 its base. Hovering says "
            "what the guard refused.",
            0.5 if annotated else None,
            lambda one: one.rate,
        ),
        (
            "Length of answers by alpha",
            "tokens",
            "What rises with the judgement may be a taste for length.",
            None,
            lambda one: one.length_tokens,
        ),
        (
            "Perplexity by alpha",
            "under the aligned model",
            "How strange the answers are to the aligned model: falls where they become set phrases, rises where they "
            "break.",
            None,
            lambda one: one.perplexity,
        ),
        (
            "Repetition by alpha",
            "share of runs of 4 words",
            "Rises where answers fall into loops.",
            None,
            lambda one: one.repetition,
        ),
    ]
    labels, found = tuple(f"{alpha:g}" for alpha in tried), []
    for title, unit, caption, level, read in figures:
        series = []
        for i, story in enumerate(stories):
            values = [(tried.index(one.alpha), read(one), one.refused) for one in story.tried if one.answers]
            known = [(float(x), value, refused) for x, value, refused in values if value]
            if known:
                series.append(
                    Series(
                        story.name if _several(stories) else "",
                        [(x, value[0]) for x, value, _ in known],
                        [value[1:] for _, value, _ in known],
                        [
                            f"alpha = {labels[int(x)]}: {_value(value)}" + (f"; refused: {refused}" if refused else "")
                            for x, value, refused in known
                        ],
                        colour=i,
                        dots=True,
                    )
                )
        if series:
            found.append(Chart(title, "alpha", unit, caption, series, ticks=labels, level=level))
    return found


def _training(stories: Sequence[Story]) -> list[Chart]:
    curves = _curves(stories)

    def series(name: str, said: str = "", line: str = "solid") -> list[Series]:
        found = []
        for label, colour, offset, rounds in curves:
            points = [(x, row[name]) for x, row in _rows(offset, rounds) if name in row]
            if points:
                name_of = f"{label} {said}".strip()
                found.append(Series(name_of, thinned(points), colour=colour, line=line, legend=not said))
        return found

    def watched(name: str) -> list[Series]:
        found = []
        for label, colour, offset, rounds in curves:
            looks = [(x, row.get("validation", {})) for x, row in _rows(offset, rounds)]
            rows = [(x, look[name]) for x, look in looks if name in look]
            if rows:
                found.append(Series(f"{label} validation", rows, colour=colour, line="none", dots=True, legend=False))
        return found

    figures = [
        (
            "Loss",
            "mean of a batch",
            _of_the_loss([row for _, _, offset, rounds in curves for _, row in _rows(offset, rounds) if "loss" in row]),
            [*series("loss"), *watched("loss")],
            None,
        ),
        (
            "Preference loss",
            "nats",
            "-log sigmoid(beta h) of the pairs of a step, whatever else is in the loss. Begins at ln 2 = 0.693 and "
            "should fall.",
            series("preference_loss"),
            None,
        ),
        (
            "Margin",
            "reward units",
            "Of the implicit reward, beta h, or of a reward model. Grows from zero. Under DPO a pair beyond 3 has next "
            "to no gradient left: further steps repeat what is learned.",
            [*series("margin"), *watched("margin")],
            0.0,
        ),
        (
            "Log-probability change in the round",
            "nats a response",
            "Solid: chosen, dashed: rejected, which should fall faster. That both fall is common; a steep fall of "
            "chosen is not.",
            [*series("chosen_change"), *series("rejected_change", "rejected", "dashed")],
            0.0,
        ),
        (
            "Pairs ranked right",
            "share of a batch",
            "Rises from chance. At 1.0 from early on, the pairs are too easy, or learned by heart.",
            series("correct"),
            0.5,
        ),
        (
            "Rewards",
            "reward units",
            "Of a reward model. Solid: chosen, dashed: rejected. They part around zero, where centring keeps them.",
            [*series("chosen_reward"), *series("rejected_reward", "rejected", "dashed")],
            0.0,
        ),
        (
            "Reward of sampled answers",
            "mean of a step",
            "As the annotator gives it, before the price of drift and before penalties. Should rise.",
            series("reward"),
            None,
        ),
        (
            "Drift of sampled answers",
            "KL, nats an answer",
            "sum over an answer of log pi - log pi_ref. What the reward costs: growth without more reward is "
            "over-optimisation. Below zero is noise of the estimate, or a temperature other than 1.",
            [*series("kl"), *series("kl_start", "from the start", "dashed")],
            0.0,
        ),
        (
            "Entropy",
            "nats a token",
            "Of the policy on its own answers. A steep fall says that it has settled on few answers: raise --beta.",
            series("entropy"),
            None,
        ),
        (
            "Clipped tokens",
            "share of a step",
            "Tokens whose probability has moved by more than --ppo.clip within a step. Much over 0.2: a lower learning "
            "rate, or fewer epochs.",
            series("clip_fraction"),
            0.0,
        ),
        (
            "Value loss",
            "mean of a step",
            "How far the value model is from the returns, squared, by two. Falls, with steps where rewards change.",
            series("value_loss"),
            0.0,
        ),
        (
            "Explained variance",
            "share",
            "Of the returns, by the values before the step. 1 is perfect, 0 no better than a constant; below 0, the "
            "values mislead.",
            series("explained_variance"),
            0.0,
        ),
        (
            "Length of sampled answers",
            "characters",
            "Of the answers of each step, from the model in training. Should not drift upwards with the reward.",
            series("length_chars"),
            None,
        ),
        (
            "Finished answers",
            "share of a step",
            "Answers that ended before the limit of new tokens. A fall says that answers grow into the limit.",
            series("finished"),
            None,
        ),
    ]
    return [
        Chart(title, "step", unit, caption, found, level=level)
        for title, unit, caption, found, level in figures
        if found
    ]


def _of_the_loss(rows: Sequence[dict[str, Any]]) -> str:
    """What to expect of it: a loss in the ordinary sense, or a surrogate with a preference loss beside it."""
    surrogate = ["preference_loss" in row for row in rows]
    of_loss = (
        "Falls slowly and stays above zero. Dots are data of the round that is not trained on: where they turn up "
        "while the line falls, stop earlier."
    )
    of_surrogate = (
        "Of SAIL a surrogate, whose gradient counts and not its value: that may be large or negative. Look at the "
        "preference loss."
    )
    return " ".join([*([of_surrogate] if any(surrogate) else []), *([] if all(surrogate) else [of_loss])])


def _phases(stories: Sequence[Story]) -> list[Chart]:
    """BPO's two divergences at each evaluation: from the model that samples, and from the start."""
    found = []
    for i, story in enumerate(stories):
        rows = [row for r in story.rounds for row in r.evaluations]
        name = "log_ratio_to_behaviour_per_token"
        lines = [("from the start", "log_ratio_per_token", "dashed"), ("from the behaviour model", name, "solid")]
        for j, (said, figure, line) in enumerate(lines if any(name in row for _, row in rows) else []):
            label = f"{story.name} {said}" if _several(stories) else said
            colour = i if _several(stories) else j
            intervals = [tuple(row[figure][1:]) for _, row in rows]
            points = [(float(step), row[figure][0]) for step, row in rows]
            found.append(Series(label, points, intervals, colour=colour, line=line, dots=True))
    caption = (
        "Of own answers. A phase begins at zero from the model that samples for it, which the loss holds the model to; "
        "nothing holds it to the start, so that line may rise without end."
    )
    return [Chart("Drift in a phase", "step", "KL, nats a token", caption, found, level=0.0)] if found else []


Curve = tuple[str, int, int, list[Round]]
"""A name, a colour, the steps before it, and the rounds that follow one another in it."""


def _curves(stories: Sequence[Story]) -> list[Curve]:
    if _several(stories):
        return [(story.name, i, 0, [r for r in story.rounds if r.steps]) for i, story in enumerate(stories)]
    curves: list[Curve] = []
    offset = 0
    for round in stories[0].rounds:
        if round.steps:
            curves.append((round.label, len(curves), offset, [round]))
            offset += round.steps[-1]["step"]
    return curves


def _rows(offset: int, rounds: Sequence[Round]) -> list[tuple[float, dict[str, Any]]]:
    """The rows of training logs with the step they are at, rounds one after another."""
    rows = []
    for round in rounds:
        rows += [(float(offset + row["step"]), row) for row in round.training]
        offset += round.steps[-1]["step"]
    return rows


def _length(stories: Sequence[Story]) -> list[Chart]:
    """DICE's length gap against alpha, and at 0 beside at the alpha used."""
    known = [
        (f"{story.name} {r.label}" if _several(stories) else r.label, r.length)
        for story in stories
        for r in story.rounds
        if r.length
    ]
    if not known:
        return []
    largest = max(length.alpha for _, length in known)
    unit = known[0][1].unit
    swept: list[Series] = []
    for i, (label, length) in enumerate(known):
        used = (length.alpha, length.gap)
        curve: list[Point] = [point for point in length.curve if largest == 0 or point[0] <= 3 * largest]
        if curve:
            swept.append(Series(label, curve, colour=i, line="steps"))
        note = f"alpha {number(length.alpha)}: gap {number(length.gap)}"
        swept.append(Series(label, [used], notes=[note], colour=i, line="none", dots=True, legend=not curve))
    labels = tuple(label for label, _ in known)
    before = [(float(i), length.gap_at_zero) for i, (_, length) in enumerate(known)]
    after = [(float(i), length.gap) for i, (_, length) in enumerate(known)]
    return [
        Chart(
            "Length gap against alpha",
            f"length coefficient alpha, nats per {unit[:-1]}",
            f"winner - loser, mean {unit}",
            "A larger coefficient makes winners shorter. The dot, the one used, should lie near zero.",
            swept,
            level=0.0,
            x_to=3 * largest if largest > 0 else None,
        ),
        Chart(
            "Length gap before and after",
            "round",
            f"winner - loser, mean {unit}",
            "Without the penalty, winners are often longer than losers; with it, the two should be as long.",
            [
                Series("alpha = 0", before, colour=1, line="none", dots=True),
                Series("alpha used", after, colour=0, line="none", dots=True),
            ],
            ticks=labels,
            level=0.0,
        ),
    ]
