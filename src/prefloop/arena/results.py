"""What the votes say: win rates of every two models, scores of all, agreement of the raters.

A match is one question, however many raters it had: its p is the mean of those who preferred an answer or saw a tie,
as in a judgement file. "Both bad" and skipped votes say nothing about which is better, and are counted apart.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from pydantic import Field

from prefloop.arena.matches import Match
from prefloop.arena.votes import About, Vote
from prefloop.evaluate.agreement import krippendorff
from prefloop.evaluate.bradley_terry import scores
from prefloop.evaluate.figures import Figures, interval, percent
from prefloop.evaluate.reward_accuracy import wilson_interval
from prefloop.evaluate.win_rate import WinRate, win_rate
from prefloop.feedback.annotator import Judgement, abstention, around_half
from prefloop.records import Record

Interval = tuple[float, float, float]


class Counts(Record):
    """Votes by kind. side_1: of those that prefer an answer, the share for the one shown as Answer 1 (Wilson interval);
    1/2 is expected, because the sides are tossed.
    """

    votes: int
    preferred: int
    ties: int
    both_bad: int
    skipped: int
    side_1: Interval | None = None


class PairOfModels(Record):
    """One model against another. rate: of the first, over matches with a preference or a tie; `abstained` are matches
    that were only found both bad or skipped.
    """

    first: str
    second: str
    counts: Counts
    rate: WinRate


class Agreement(Record):
    """Of raters on the same matches, skipped ones left out. Labels: the first model's answer, the second's, tie, both
    bad. Which model is the first is arbitrary and hidden from raters, so every match counts in both orders: alpha is 0
    for raters who toss coins, however often one model wins.

    share: observed agreement; alpha: Krippendorff's (evaluate/agreement.py).
    """

    matches: int
    share: float | None = None
    alpha: float | None = None


class ArenaResults(Record):
    """All figures. Intervals are [value, low, high] at 95 %.

    scores: Bradley-Terry scores in logits, which sum to 0; None where judgements do not connect all models.
    raters_agreement: "NAME and NAME" -> of these two.
    """

    about: About
    matches: int
    counts: Counts
    pairs: list[PairOfModels]
    scores: dict[str, Interval] | None = None
    agreement: Agreement
    raters: dict[str, Counts]
    raters_agreement: dict[str, Agreement] = Field(default_factory=dict)


def results_of(about: About, matches: dict[int, Match], votes: Sequence[Vote]) -> ArenaResults:
    """The figures of these votes; intervals resample with the arena's seed."""
    raters = sorted({vote.rater for vote in votes})
    by_rater = {rater: [vote for vote in votes if vote.rater == rater] for rater in raters}
    return ArenaResults(
        about=about,
        matches=len(matches),
        counts=counts_of(votes),
        pairs=pairs_of(about, matches, votes),
        scores=scores_of(about, matches, votes),
        agreement=agreement_of(votes),
        raters={rater: counts_of(own) for rater, own in by_rater.items()},
        raters_agreement={
            f"{a} and {b}": agreement_of([*by_rater[a], *by_rater[b]]) for a, b in combinations(raters, 2)
        },
    )


def counts_of(votes: Sequence[Vote]) -> Counts:
    n = Counter(vote.choice for vote in votes)
    preferred = n["1"] + n["2"]
    return Counts(
        votes=len(votes),
        preferred=preferred,
        ties=n["tie"],
        both_bad=n["both bad"],
        skipped=n["skip"],
        side_1=(n["1"] / preferred, *wilson_interval(n["1"], preferred)) if preferred else None,
    )


def judgements_of(votes: Sequence[Vote]) -> dict[int, Judgement]:
    """Match -> what its raters say together, for every match with a vote."""
    by_match: dict[int, list[Vote]] = {}
    for vote in votes:
        by_match.setdefault(vote.match, []).append(vote)
    return {match: _together(own) for match, own in by_match.items()}


def _together(votes: Sequence[Vote]) -> Judgement:
    halves = [vote.p - 0.5 for vote in votes if vote.p is not None]
    if not halves:
        return abstention("both bad" if any(vote.choice == "both bad" for vote in votes) else "skipped")
    return Judgement(p=around_half(math.fsum(halves) / len(halves)))


def pairs_of(about: About, matches: dict[int, Match], votes: Sequence[Vote]) -> list[PairOfModels]:
    judgements = judgements_of(votes)
    found = []
    for first, second in combinations(about.models, 2):
        own = {id for id, match in matches.items() if (match.model_1, match.model_2) == (first, second)}
        found.append(
            PairOfModels(
                first=first,
                second=second,
                counts=counts_of([vote for vote in votes if vote.match in own]),
                rate=win_rate([judgements[id] for id in sorted(own & judgements.keys())], seed=about.seed),
            )
        )
    return found


def scores_of(about: About, matches: dict[int, Match], votes: Sequence[Vote]) -> dict[str, Interval] | None:
    """Bradley-Terry scores; a match counts once, prompts are resampled."""
    pairs = list(combinations(range(len(about.models)), 2))
    column = {(about.models[i], about.models[j]): place for place, (i, j) in enumerate(pairs)}
    row: dict[str, int] = {}
    cells = [
        (row.setdefault(matches[id].prompt.to_json(), len(row)), column[matches[id].model_1, matches[id].model_2], j.p)
        for id, j in sorted(judgements_of(votes).items())
        if j.p is not None
    ]
    if not cells:
        return None
    wins, judged = np.zeros((2, len(row), len(pairs)))
    for prompt, pair, p in cells:
        wins[prompt, pair] += p
        judged[prompt, pair] += 1
    found = scores(pairs, wins, judged, len(about.models), seed=about.seed)
    return None if found is None else dict(zip(about.models, found, strict=True))


def agreement_of(votes: Sequence[Vote]) -> Agreement:
    """Of all raters of these votes together."""
    labels: dict[int, list[str]] = {}
    for vote in votes:
        if vote.choice != "skip":
            labels.setdefault(vote.match, []).append(
                vote.choice if vote.p in (None, 0.5) else f"model {2 - vote.p:.0f}"
            )
    units = [unit for unit in labels.values() if len(unit) > 1]
    other = {"model 1": "model 2", "model 2": "model 1"}
    share, alpha = krippendorff([*units, *([other.get(label, label) for label in unit] for unit in units)])
    return Agreement(matches=len(units), share=share, alpha=alpha)


def judgement_rows(matches: dict[int, Match], votes: Sequence[Vote]) -> list[str]:
    """JSON lines that `feedback/judgement_file.py` reads: a vote each, without those that were skipped or both bad, and
    without matches one of whose answers is empty, which no judgement file may hold.
    """
    rows = []
    for vote in votes:
        match = matches[vote.match]
        if vote.p is None or not (match.response_1.strip() and match.response_2.strip()):
            continue
        rows.append(
            {
                "prompt": [message.model_dump() for message in match.prompt.messages],
                "response_1": match.response_1.strip(),
                "response_2": match.response_2.strip(),
                "preference": "tie" if vote.p == 0.5 else 1 if vote.p else 2,
                "rater": vote.rater,
                "model_1": match.model_1,
                "model_2": match.model_2,
            }
        )
    return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]


def figures_of(results: ArenaResults) -> list[Figures]:
    """The tables of what people preferred."""
    n = results.counts
    rows = [
        (
            f"{pair.first} against {pair.second}",
            percent(pair.rate.rate),
            f"{pair.rate.wins}-{pair.rate.losses}-{pair.rate.ties}",
            "-" if pair.rate.sign_test is None else f"{pair.rate.sign_test:.2g}",
            str(pair.counts.both_bad),
            str(pair.counts.skipped),
            str(pair.counts.votes),
        )
        for pair in results.pairs
    ]
    title = f"{results.matches} matches of {len(results.about.models)} models on {results.about.prompts} prompts"
    head = ("win rate of the first, %", "", "won-lost-tied", "sign test", "both bad", "skipped", "votes")
    found = [Figures(title, head, rows)]
    if results.scores and len(results.about.models) > 2:
        best_first = sorted(results.scores.items(), key=lambda item: -item[1][0])
        rows = [(model, interval(score, "{:+.2f}")) for model, score in best_first]
        found.append(Figures("Bradley-Terry scores, logits", ("", "score"), rows))
    rows = [
        (rater, str(own.preferred), str(own.ties), str(own.both_bad), str(own.skipped), percent(own.side_1))
        for rater, own in [*results.raters.items(), *([("all", n)] if len(results.raters) > 1 else [])]
    ]
    found.append(Figures("raters", ("", "preferred", "ties", "both bad", "skipped", "for Answer 1, %"), rows))
    if results.agreement.matches:
        rows = [
            (
                name,
                str(own.matches),
                f"{100 * (own.share or 0):.1f}",
                "-" if own.alpha is None else f"{own.alpha:.2f}",
            )
            for name, own in [("all", results.agreement), *results.raters_agreement.items()]
            if own.matches and (name == "all" or len(results.raters_agreement) > 1)
        ]
        found.append(Figures("agreement of raters on the same matches", ("", "matches", "same, %", "alpha"), rows))
    return found
