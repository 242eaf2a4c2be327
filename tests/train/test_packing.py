"""Rows under a token budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.train.packing import TokenGroup, pack


def test_a_group_counts_its_prompt_once_and_no_last_tokens() -> None:
    assert TokenGroup((1, 2, 3), ((4, 5), (6,), (7, 8, 9))).tokens == 3 + 1 + 0 + 2


def test_longest_first_into_the_fullest_row_that_fits() -> None:
    # 7 opens a row (3 left), 6 another (4 left), 4 goes where 4 are left, 3 where 3 are left.
    assert pack([4, 7, 3, 6], 10) == [[1, 2], [0, 3]]


def test_an_item_over_the_budget_gets_a_row_of_its_own() -> None:
    assert pack([50, 3, 3], 10) == [[0], [1, 2]]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 64))
def test_every_item_once_and_no_row_over_the_budget(sizes: list[int], budget: int) -> None:
    packed = pack(sizes, budget)
    assert sorted(index for row in packed for index in row) == list(range(len(sizes)))
    assert all(len(row) == 1 or sum(sizes[i] for i in row) <= budget for row in packed)


@pytest.mark.parametrize(("prompt", "responses"), [((1,), ()), ((1,), ((),))])
def test_what_has_no_log_probability_is_refused(
    prompt: tuple[int, ...], responses: tuple[tuple[int, ...], ...]
) -> None:
    with pytest.raises(ValueError, match="at least one"):
        TokenGroup(prompt, responses)
