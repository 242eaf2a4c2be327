"""Questions and answers of evaluations, in prefloop's own files and in those of AlpacaEval and MT-Bench.

    questions    prompts in any form that `load_prompts` reads; MT-Bench: question_id, category, turns (one or two)
    answers      groups, or rows with a prompt and a response; AlpacaEval: a list of instruction, output, generator;
                 MT-Bench: question_id, choices [{turns}]

A question of two turns is sampled turn by turn, and judged once, as the whole conversation.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prefloop.data.files import Rows, read_rows
from prefloop.data.groups import read_groups
from prefloop.data.mapping import load_prompts
from prefloop.errors import InputError
from prefloop.records import Group, Message, Prompt, Record, Response, content_id


class Question(NamedTuple):
    """A prompt, and what the user says next where there is a second turn."""

    prompt: Prompt
    second: str | None = None

    def after(self, first: Response) -> Prompt:
        """The prompt of the second turn, after this answer to the first."""
        turns = (Message(role="assistant", content=first.text), Message(role="user", content=self.second or ""))
        return Prompt(
            id=f"{self.prompt.id}-turn-2", messages=self.prompt.messages + turns, category=self.prompt.category
        )


class Answered(Record):
    """A question with one side's answers: to the prompt, and to `second` where there is a second turn."""

    prompt: Prompt
    second: str | None = None
    answers: tuple[Response, ...]

    @property
    def whole(self) -> Response:
        """What is judged: the answer, or both answers with the user's second turn between them."""
        if self.second is None:
            return self.answers[0]
        first, last = (answer.text.strip() for answer in self.answers)
        return Response(text=f"{first}\n\n[User:]\n{self.second}\n\n[Assistant:]\n{last}")


def read_questions(source: str) -> list[Question]:
    """Raises InputError, in one line, for what cannot be read as prompts or as MT-Bench questions."""
    return mt_bench_questions(source) or [Question(prompt) for prompt in load_prompts(source).records]


def mt_bench_questions(source: str) -> list[Question] | None:
    """The questions of an MT-Bench file; None where the source is something else. Raises InputError for a bad row."""
    if source.partition(":")[0] == "seed":
        return None
    rows = read_rows(source)
    if "turns" not in rows.columns:
        return None
    questions: dict[str, Question] = {}
    for row in rows:
        given = row.data.get("turns")
        turns = given if isinstance(given, list) else []
        texts = [turn for turn in turns if isinstance(turn, str) and turn.strip()]
        if len(texts) != len(turns) or len(turns) not in (1, 2) or row.data.get("question_id") is None:
            raise InputError(f"{row.where}: expected 'question_id' and one or two texts in 'turns'")
        id = str(row.data["question_id"])
        prompt = Prompt.of(turns[0], id=id, category=_category(row.data.get("category")))
        if id in questions:
            raise InputError(f"{row.where}: question_id {id} is there twice; give every question its own")
        questions[id] = Question(prompt, turns[1] if len(turns) == 2 else None)
    return list(questions.values())


def read_answers(source: str, questions: Sequence[Question] | None = None) -> list[Answered]:
    """The answers of a file to these questions, in their order; without questions, to those that the file has.

    The first answer counts where there are several. Raises InputError when a question has no answer there, or when
    MT-Bench answers come without the questions that their ids stand for.
    """
    rows = read_rows(source)
    if "choices" in rows.columns:
        return _mt_bench_answers(rows, questions)
    groups = _alpaca_eval(rows) if {"instruction", "output"} <= set(rows.columns) else _own_ids(read_groups(source))
    if questions is None:
        return [Answered(prompt=group.prompt, answers=group.responses[:1]) for group in groups]
    if any(question.second for question in questions):
        raise InputError(f"{source}: the questions have two turns; expected MT-Bench answers (question_id, choices)")
    found = {content_id(group.prompt.messages): group.responses[:1] for group in groups}
    keys = [content_id(question.prompt.messages) for question in questions]
    _check_complete(source, questions, [key in found for key in keys])
    return [Answered(prompt=q.prompt, answers=found[key]) for q, key in zip(questions, keys, strict=True)]


def _alpaca_eval(rows: Rows) -> list[Group]:
    groups: dict[str, Group] = {}
    for row in rows:
        instruction, output, more = (row.data.get(name) for name in ("instruction", "output", "input"))
        if not isinstance(instruction, str) or not instruction.strip() or not isinstance(output, str):
            raise InputError(f"{row.where}: expected texts in 'instruction' and 'output'")
        text = f"{instruction}\n\n{more}" if isinstance(more, str) and more.strip() else instruction
        prompt = Prompt.of(text, category=_category(row.data.get("category") or row.data.get("dataset")))
        groups.setdefault(prompt.id, Group(prompt=prompt, responses=(Response(text=output),)))
    return list(groups.values())


def _own_ids(groups: Sequence[Group]) -> list[Group]:
    """Prompts that differ under one id get ids of their content."""
    texts: dict[str, set[str]] = {}
    for group in groups:
        texts.setdefault(group.prompt.id, set()).add(content_id(group.prompt.messages))
    return [
        group
        if len(texts[group.prompt.id]) == 1
        else group.model_copy(
            update={"prompt": group.prompt.model_copy(update={"id": content_id(group.prompt.messages)})}
        )
        for group in groups
    ]


def _category(value: Any) -> str | None:
    return None if value is None else str(value)


def _mt_bench_answers(rows: Rows, questions: Sequence[Question] | None) -> list[Answered]:
    if questions is None:
        raise InputError(
            f"{rows.source}: MT-Bench answers name their questions by id only; give --prompts question.jsonl"
        )
    found: dict[str, tuple[Response, ...]] = {}
    for row in rows:
        try:
            turns = row.data["choices"][0]["turns"]
            if not isinstance(turns, list):
                raise TypeError
            found[str(row.data["question_id"])] = tuple(Response(text=text) for text in turns)
        except (KeyError, IndexError, TypeError, ValueError):
            raise InputError(f"{row.where}: expected 'question_id' and 'choices' with a list of 'turns'") from None
    enough = [len(found.get(q.prompt.id, ())) >= 1 + (q.second is not None) for q in questions]
    _check_complete(rows.source, questions, enough)
    return [
        Answered(prompt=q.prompt, second=q.second, answers=found[q.prompt.id][: 1 + (q.second is not None)])
        for q in questions
    ]


def _check_complete(source: str, questions: Sequence[Question], answered: Sequence[bool]) -> None:
    missing = [question.prompt for question, there in zip(questions, answered, strict=True) if not there]
    if missing:
        first = " ".join(missing[0].messages[-1].content.split())
        raise InputError(
            f"{source}: {len(missing)} of {len(questions)} prompts have no answer there, the first {first[:60]!r}; "
            "both sides must answer the same prompts"
        )


def files_of(side: Sequence[Answered], generator: str) -> Mapping[str, str]:
    """Name -> content of the files that other tools read: `model_outputs.json` (AlpacaEval) where every prompt is one
    user turn, and `question.jsonl` with `model_answer.jsonl` (MT-Bench).
    """
    single = [len(a.prompt.messages) == 1 for a in side]
    if not all(single):
        return {}
    if not any(answered.second for answered in side):
        outputs = [
            {
                "instruction": a.prompt.messages[0].content,
                "output": a.answers[0].text,
                "generator": generator,
                **({"dataset": a.prompt.category} if a.prompt.category else {}),
            }
            for a in side
        ]
        return {"model_outputs.json": json.dumps(outputs, ensure_ascii=False, indent=1) + "\n"}
    questions, answers = [], []
    for a in side:
        # MT-Bench's ids are numbers; what a number would not give back stays a text.
        id = int(a.prompt.id) if re.fullmatch(r"0|[1-9][0-9]*", a.prompt.id) else a.prompt.id
        turns = [a.prompt.messages[0].content, *([a.second] if a.second else [])]
        questions.append({"question_id": id, "category": a.prompt.category, "turns": turns})
        choice = {"index": 0, "turns": [answer.text for answer in a.answers]}
        answers.append(
            {"question_id": id, "answer_id": f"{generator}-{id}", "model_id": generator, "choices": [choice]}
        )
    return {"question.jsonl": _lines(questions), "model_answer.jsonl": _lines(answers)}


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
