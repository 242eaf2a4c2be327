"""Rows under a token budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.train.packing import TokenGroup, pack, split


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


def test_a_group_over_the_budget_is_cut_between_responses() -> None:
    large = TokenGroup((1, 2, 3), ((4, 5), (6,), (7, 8, 9), (5, 5, 5, 5, 5, 5, 5)))
    small = TokenGroup((1,), ((2,), (3,)))
    assert split([large, small], 6, shared=True) == [
        (0, TokenGroup((1, 2, 3), ((4, 5), (6,), (7, 8, 9)))),
        (0, TokenGroup((1, 2, 3), ((5, 5, 5, 5, 5, 5, 5),))),
        (1, small),
    ]
    assert [len(piece.responses) for _, piece in split([large, small], 6, shared=False)] == [1] * 6


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 64))
def test_pieces_hold_every_response_in_order_under_the_budget(lengths: list[int], budget: int) -> None:
    group = TokenGroup((1, 2), tuple(tuple(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)))
    pieces = [piece for _, piece in split([group], budget, shared=True)]
    assert tuple(response for piece in pieces for response in piece.responses) == group.responses
    assert all(len(piece.responses) == 1 or piece.tokens <= budget for piece in pieces)
