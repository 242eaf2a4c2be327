"""What people are asked: every two models on every prompt, in an order that is balanced wherever one stops."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

from prefloop.data.answers import Answered, Question, read_answers, read_questions
from prefloop.data.files import read_rows
from prefloop.data.groups import read_groups
from prefloop.errors import InputError
from prefloop.records import Prompt, Record, Response
from prefloop.seeds import derive_seed, generator

Side = Literal[1, 2]


class Match(Record):
    """Two models' answers to one prompt."""

    prompt: Prompt
    model_1: str
    model_2: str
    response_1: str
    response_2: str


def read_sides(
    files: Sequence[str], *, names: Sequence[str] = (), prompts: str = ""
) -> tuple[list[Question], dict[str, list[Answered]]]:
    """(questions, model -> its answers to them, in their order) of one file a model.

    A single file with several answers a prompt stands for as many models as every prompt has answers. `prompts` says
    which questions count; without it the files must have the same. Raises InputError for prompts that do not match, for
    names that do not, and where there is nothing to compare.
    """
    if len(files) == 1:
        questions, answered = _several_answers(files[0], prompts)
        names = names or [f"answer {i + 1}" for i in range(len(answered))]
    else:
        if prompts:
            questions = read_questions(prompts)
        else:
            held = [[Question(a.prompt, a.second) for a in read_answers(file)] for file in files]
            questions = held[0]
            for others in held[1:]:
                read_answers(files[0], others)
        answered = [read_answers(file, questions) for file in files]
        names = names or _short(files)
    if len(names) != len(answered):
        raise InputError(f"--names: {len(names)} names for {len(answered)} models; give one a model, in their order")
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise InputError(f"{twice[0]!r} names two models; tell them apart by --names")
    return questions, dict(zip(names, answered, strict=True))


def _several_answers(file: str, prompts: str) -> tuple[list[Question], list[list[Answered]]]:
    one_answer = {"instruction", "choices"} & set(read_rows(file).columns)  # AlpacaEval's, MT-Bench's
    groups = [] if one_answer else read_groups(file)
    fewest = min((len(group.responses) for group in groups), default=1)
    if fewest < 2:
        raise InputError(
            f"{file}: a prompt has one answer only, so there is nothing to compare; give a file for each model, or "
            "several answers to every prompt"
        )
    if prompts:
        raise InputError(f"--prompts: {file} has prompts of its own; leave the option out")
    questions = [Question(group.prompt) for group in groups]
    return questions, [[Answered(prompt=g.prompt, answers=(g.responses[i],)) for g in groups] for i in range(fewest)]


def _short(files: Sequence[str]) -> list[str]:
    """The files' names without ending; with as much of the path as tells them apart.

    >>> _short(["out/ours/model_outputs.json", "out/theirs/model_outputs.json"])
    ['ours/model_outputs', 'theirs/model_outputs']
    """
    parts = [Path(file).with_suffix("").parts for file in files]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(file) for file in files]


def matches_of(sides: Mapping[str, Sequence[Answered]], *, seed: int) -> tuple[list[Match], int]:
    """(matches in the order in which they are asked, how many more are of identical answers and are not asked).

    In rounds: each asks about every two models once, in random order, each two on another prompt where there are as
    many. So after any number of matches, no two models have been compared more than once more than two others.
    """
    pairs = list(combinations(sides, 2))
    prompts = len(next(iter(sides.values())))
    rng = generator(seed, "arena")
    order = rng.permutation(prompts).tolist()
    found: list[Match] = []
    for round in range(prompts):
        for i in rng.permutation(len(pairs)).tolist():
            first, second = pairs[i]
            place = order[(round + i * max(1, prompts // len(pairs))) % prompts]
            one, other = sides[first][place], sides[second][place]
            if not one.whole.same_as(other.whole):
                found.append(
                    Match(
                        prompt=one.prompt,
                        model_1=first,
                        model_2=second,
                        response_1=one.whole.text,
                        response_2=other.whole.text,
                    )
                )
    return found, prompts * len(pairs) - len(found)


def side_1(seed: int, match: int, rater: str) -> Side:
    """Which response of a match a rater sees as Answer 1: by the toss of a coin for every match and rater."""
    return 1 if derive_seed(seed, "side", match, rater) % 2 else 2


def responses(match: Match) -> tuple[Response, Response]:
    return Response(text=match.response_1), Response(text=match.response_2)
