"""What people are asked: every two models on every prompt, balanced at every moment, sides tossed; clear refusals."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from prefloop.arena.matches import Match, matches_of, read_sides, side_1
from prefloop.data.answers import Answered
from prefloop.errors import InputError
from prefloop.records import Group, Prompt, Response
from tests.arena.arenas import answers, files


def sides(models: int, prompts: int) -> dict[str, list[Answered]]:
    return {
        f"m{m}": [Answered(prompt=Prompt.of(f"Q{i}"), answers=(Response(text=f"m{m} {i}"),)) for i in range(prompts)]
        for m in range(models)
    }


def pair(match: Match) -> tuple[str, str]:
    return match.model_1, match.model_2


@pytest.mark.parametrize(("models", "prompts"), [(2, 5), (3, 7), (4, 6), (5, 4)])
def test_every_two_models_meet_on_every_prompt_and_are_balanced_wherever_one_stops(models: int, prompts: int) -> None:
    found, identical = matches_of(sides(models, prompts), seed=3)
    assert identical == 0
    n = models * (models - 1) // 2
    assert Counter((pair(m), m.prompt.id) for m in found) == Counter(
        {(two, Prompt.of(f"Q{i}").id): 1 for two in combinations([f"m{m}" for m in range(models)], 2)
         for i in range(prompts)}
    )  # fmt: skip
    seen: Counter[tuple[str, str]] = Counter()
    for i, match in enumerate(found):
        seen[pair(match)] += 1
        assert max(seen.values()) - min(seen.values() if len(seen) == n else [0]) <= 1
        if prompts >= n and i % n == n - 1:  # a round: every two models, each two on a prompt of their own
            assert len({m.prompt.id for m in found[i + 1 - n : i + 1]}) == n
    assert [m.response_1 for m in found] == [f"{m.model_1} {m.prompt.messages[0].content[1:]}" for m in found]


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    first, again, other = (matches_of(sides(3, 8), seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other and sorted(m.to_json() for m in first) == sorted(m.to_json() for m in other)


def test_identical_answers_are_not_asked_about() -> None:
    given = sides(2, 4)
    given["m1"][2] = Answered(prompt=given["m0"][2].prompt, answers=(Response(text=" m0 2\n"),))
    found, identical = matches_of(given, seed=0)
    assert (len(found), identical) == (3, 1) and "m0 2" not in {m.response_1 for m in found}


def test_sides_are_tossed_for_every_match_and_rater() -> None:
    tossed = [side_1(0, match, rater) for match in range(1000) for rater in ("Ann", "Bo")]
    assert abs(tossed.count(1) - 1000) < 4 * (2000 / 4) ** 0.5
    agree = sum(a == b for a, b in zip(tossed[::2], tossed[1::2], strict=True))
    assert abs(agree - 500) < 4 * (1000 / 4) ** 0.5  # one rater's sides say nothing about another's
    assert tossed != [side_1(1, match, rater) for match in range(1000) for rater in ("Ann", "Bo")]


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    assert list(read_sides(files(tmp_path, "mine", "theirs"))[1]) == ["mine", "theirs"]
    for side in ("ours", "theirs"):
        (tmp_path / side).mkdir()
    same = [answers(tmp_path / side / "model_outputs.json", {"Q": side}) for side in ("ours", "theirs")]
    assert list(read_sides(same)[1]) == ["ours/model_outputs", "theirs/model_outputs"]
    assert list(read_sides(same, names=["a", "b"])[1]) == ["a", "b"]


def test_one_file_with_several_answers_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "groups.jsonl"
    groups = [
        Group(prompt=Prompt.of(f"Q{i}"), responses=tuple(Response(text=f"{i}{k}") for k in range(3 + i)))
        for i in range(2)
    ]
    file.write_text("".join(group.to_json() + "\n" for group in groups))
    _, found = read_sides([str(file)])
    assert {name: [a.whole.text for a in own] for name, own in found.items()} == {
        "answer 1": ["00", "10"],
        "answer 2": ["01", "11"],
        "answer 3": ["02", "12"],
    }


def test_what_does_not_match_is_refused(tmp_path: Path) -> None:
    mine, theirs = files(tmp_path, "mine", "theirs")
    fewer = answers(tmp_path / "fewer.json", {"Question 0?": "yes"})
    with pytest.raises(InputError, match=r"fewer\.json: 5 of 6 prompts have no answer there, the first 'Question 1"):
        read_sides([mine, theirs, fewer])
    with pytest.raises(InputError, match=r"fewer\.json: 5 of 6 prompts have no answer there"):
        read_sides([fewer, mine])
    for one in (mine, str(tmp_path / "one.jsonl")):
        (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "Q", "response": "yes"}))
        with pytest.raises(InputError, match=r"(mine|one)\.json.*: a prompt has one answer only"):
            read_sides([one])
    with pytest.raises(InputError, match="--names: 1 names for 2 models"):
        read_sides([mine, theirs], names=["a"])
    with pytest.raises(InputError, match="'a' names two models"):
        read_sides([mine, theirs], names=["a", "a"])
    with pytest.raises(InputError, match="names two models; tell them apart by --names"):
        read_sides([mine, mine])
