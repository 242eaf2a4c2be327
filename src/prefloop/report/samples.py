"""What the sample browser of a page browses: answers before and after, and the pairs that were trained on.

Plain data that becomes JSON, as rows of positions (`ANSWER`, `PAIR`) to keep a page of 20,000 samples small.
"""

import json
from collections.abc import Sequence
from typing import Any

from prefloop.records import Group, Prompt, Response, content_id
from prefloop.report.story import Story, prompt_text, training_pairs

BUDGET = 13_500_000
"""Bytes of JSON that samples may take. What is beyond is left out evenly, and the page says so."""

ANSWER = ("run", "prompt", "answers")
"""Of a row of `answers`; answers: for every model of the run, in order, [text, cut, p] or null.

cut: 1 for an answer that hit the limit of new tokens. p: P(preferred over the answer of the start, or of the other
side of an evaluation), null where unknown.
"""
PAIR = ("run", "round", "prompt", "chosen", "rejected", "chosen_score", "rejected_score", "p", "source")
"""Of a row of `pairs`; source: 0 offline, 1 generated. Scores are null where none was computed."""


def samples(stories: Sequence[Story], *, budget: int = BUDGET) -> dict[str, Any]:
    """All samples of some runs that fit into `budget` bytes; `prompts` are [text, category], named by position."""
    answers = [row for i, story in enumerate(stories) for row in _answers(story, i)]
    pairs, files = [], {}
    for i, story in enumerate(stories):
        for round in story.rounds:
            name, found = training_pairs(story, round)
            if found:
                files[f"{i} {round.label}"] = name
            for pair in found:
                scores = [pair.chosen_score, pair.rejected_score]
                if None in scores:  # a file of offline pairs may bring scores of its own with the responses
                    scores = [pair.chosen.score, pair.rejected.score]
                pairs.append(
                    [i, round.label, pair.prompt, _strip(pair.chosen), _strip(pair.rejected), *map(_digits, scores),
                     pair.p, int(pair.source == "generated")]
                )  # fmt: skip
    kept_answers = _fitting(answers, budget if not pairs else budget // 2)
    kept_pairs = _fitting(pairs, budget - sum(map(_size, kept_answers)))
    prompts: dict[tuple[str, str], int] = {}
    for row in (*kept_answers, *kept_pairs):
        place = 1 if len(row) == len(ANSWER) else 2
        row[place] = prompts.setdefault(_prompt(row[place]), len(prompts))
    return {
        "runs": [story.name for story in stories],
        "models": [_models(story) for story in stories],
        "judged": [_judged(story) for story in stories],
        "prompts": [list(prompt) for prompt in prompts],
        "answers": kept_answers,
        "pairs": kept_pairs,
        "files": files,
        "of": [len(answers), len(pairs)],
    }


def embedded(data: Any) -> str:
    """JSON that can stand in a `script` element: no `<`, `>` or `&` in it, so no text can close the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # all of them only ever occur inside strings
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _models(story: Story) -> list[str]:
    """The models that answered: those of the checkups, then the evaluations of an online method by step."""
    return [r.label for r in story.rounds if r.answers] + [
        f"{r.label}, step {step}" for r in story.rounds for step, _ in r.evaluations
    ]


def _judged(story: Story) -> str:
    """Who said the p of this run's answers."""
    return str(story.config.get("evaluator") or story.config.get("annotator") or "")


def _answers(story: Story, run: int) -> list[list[Any]]:
    """A row a prompt, with every model's answer to it."""
    columns = [
        list(zip(r.answers, r.preferred or [None] * len(r.answers), strict=True)) for r in story.rounds if r.answers
    ]
    for r in story.rounds:
        for _, found in r.evaluations:
            groups = [Group.model_validate(group) for group in found["answers"]]
            columns.append(list(zip(groups, found.get("preferred") or [None] * len(groups), strict=True)))
    rows: dict[str, list[Any]] = {}
    for i, column in enumerate(columns):
        for group, p in column:
            row = rows.setdefault(content_id(group.prompt.messages), [run, group.prompt, [None] * len(columns)])
            response = group.responses[0]
            row[2][i] = [_strip(response), int(response.finish_reason == "length"), _digits(p)]
    return list(rows.values())


def _strip(response: Response) -> str:
    return response.text.strip()


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _prompt(prompt: Prompt) -> tuple[str, str]:
    return prompt_text(prompt), prompt.category or ""


def _size(row: Sequence[Any]) -> int:
    """Bytes that a row takes in the page, with its prompt, the prompt's position and the commas."""
    text = embedded([_prompt(part) if isinstance(part, Prompt) else part for part in row])
    return len(text.encode(errors="replace")) + 8


def _fitting(rows: list[list[Any]], room: int) -> list[list[Any]]:
    """All rows, or so many, evenly spread, that they fit into `room` bytes."""
    sizes = [_size(row) for row in rows]
    kept = range(len(rows))
    share = min(1.0, room / (sum(sizes) or 1))
    while sum(sizes[i] for i in kept) > room:
        n = int(share * len(rows))
        kept = [i * len(rows) // n for i in range(n)]
        share *= 0.98  # the rows drawn may be longer than most
    return [rows[i] for i in kept]
