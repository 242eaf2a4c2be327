"""The length coefficient: D3-D9 and D18, and the search against three slower ones that are written differently.

The references here work in exact fractions on whole numbers, one prompt after another, so that nothing of the
vectorised envelopes is shared with them.
"""

from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.errors import InputError
from prefloop.pairs.length import LengthCoefficient, fixed_coefficient, length_coefficient
from prefloop.pairs.select import best_vs_worst, debias_length
from prefloop.records import Group, Prompt, Response
from tests.pairs.builders import group, groups_of, length_biased, with_scores

MOST = 12  # the largest length in the exact tests: distinct breakpoints are at least 1 / MOST**2 apart

Rows = list[tuple[list[int | None], list[int]]]


@st.composite
def rows_of_scores_and_lengths(draw) -> Rows:
    """Prompts with whole scores and lengths, many ties, different sizes, and missing scores."""
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        k = draw(st.integers(2, 6))
        scores: list[int | None] = draw(st.lists(st.integers(-20, 20), min_size=k, max_size=k))
        for missing in draw(st.sets(st.integers(0, k - 1), max_size=k - 2)):
            scores[missing] = None
        rows.append((scores, draw(st.lists(st.integers(0, MOST), min_size=k, max_size=k))))
    return rows


def exact_gap(rows: Rows, alpha: Fraction) -> Fraction:
    """f(alpha), the first of equal scores winning and losing."""
    total = 0
    for scores, lengths in rows:
        lines = [(s - alpha * n, n) for s, n in zip(scores, lengths, strict=True) if s is not None]
        total += max(lines, key=lambda line: line[0])[1] - min(lines, key=lambda line: line[0])[1]
    return Fraction(total, len(rows))


def all_crossings(rows: Rows) -> list[Fraction]:
    """Every alpha > 0 at which any two responses to one prompt cross, on an envelope or not."""
    crossings = set()
    for scores, lengths in rows:
        lines = [(s, n) for s, n in zip(scores, lengths, strict=True) if s is not None]
        crossings |= {Fraction(s - t, n - m) for (s, n), (t, m) in combinations(lines, 2) if n != m}
    return sorted(alpha for alpha in crossings if alpha > 0)


def steps_by_brute_force(rows: Rows) -> list[tuple[Fraction, Fraction]]:
    """(start, f) of every step of f for alpha > 0, neighbours with equal f merged."""
    starts = [Fraction(0), *all_crossings(rows)]
    middles = [(a + b) / 2 for a, b in pairwise(starts)] + [starts[-1] + 1]
    steps: list[tuple[Fraction, Fraction]] = []
    for start, middle in zip(starts, middles, strict=True):
        gap = exact_gap(rows, middle)
        if not steps or steps[-1][1] != gap:
            steps.append((start, gap))
    return steps


@settings(max_examples=150, deadline=None)
@given(rows_of_scores_and_lengths())
def test_the_search_finds_the_smallest_best_alpha_of_a_brute_force_over_all_crossings(rows: Rows) -> None:
    found = length_coefficient(groups_of(rows))
    best = min([exact_gap(rows, Fraction(0)), *(gap for _, gap in steps_by_brute_force(rows))], key=abs)
    assert found.gap == float(best)
    assert exact_gap(rows, Fraction(found.alpha)) == best
    assert (found.alpha == 0.0) == (exact_gap(rows, Fraction(0)) == best)


@settings(max_examples=60, deadline=None)
@given(rows_of_scores_and_lengths())
def test_the_search_agrees_with_a_bisection_on_the_sign_of_the_gap(rows: Rows) -> None:
    found = length_coefficient(groups_of(rows))
    # 40 is the largest crossing; the odd fraction keeps every point of the bisection off the crossings.
    low, high = Fraction(0), 41 + Fraction(1, 104729)
    if exact_gap(rows, low) <= 0:
        assert found.alpha == 0.0
        return
    while high - low > Fraction(1, MOST**2 * 4):
        middle = (low + high) / 2
        low, high = (middle, high) if exact_gap(rows, middle) > 0 else (low, middle)
    assert abs(found.gap) == float(min(exact_gap(rows, low), abs(exact_gap(rows, high))))


@settings(max_examples=60, deadline=None)
@given(rows_of_scores_and_lengths())
def test_the_curve_is_every_step_of_the_gap(rows: Rows) -> None:
    expected = steps_by_brute_force(rows)
    curve = length_coefficient(groups_of(rows)).curve
    assert [gap for _, gap in curve] == [float(gap) for _, gap in expected]
    assert [alpha for alpha, _ in curve] == [float(start) for start, _ in expected]


@settings(max_examples=60, deadline=None)
@given(rows_of_scores_and_lengths())
def test_d5_the_gap_never_rises_with_alpha(rows: Rows) -> None:
    groups = groups_of(rows)
    alphas = [i / 8 for i in range(0, 40, 3)]  # exact as floats, so that ties at crossings are ties here too
    gaps = [fixed_coefficient(groups, alpha).gap for alpha in alphas]
    assert gaps == [float(exact_gap(rows, Fraction(alpha))) for alpha in alphas]
    assert all(later <= earlier for earlier, later in pairwise(gaps))


@settings(max_examples=60, deadline=None)
@given(rows_of_scores_and_lengths())
def test_the_reported_gap_is_that_of_the_pairs_really_made(rows: Rows) -> None:
    groups = groups_of(rows)
    found = length_coefficient(groups)
    pairs = best_vs_worst(debias_length(groups, found))
    gaps = [pair.chosen.length_chars - pair.rejected.length_chars for pair in pairs]
    # A prompt whose best and worst are the same answer makes no pair, and its gap is 0.
    assert found.gap == sum(gaps) / len(groups)
    assert found.mean_abs_gap == sum(map(abs, gaps)) / len(groups)


@settings(max_examples=60, deadline=None)
@given(rows_of_scores_and_lengths(), st.lists(st.integers(-1000, 1000), min_size=5, max_size=5))
def test_d3_a_constant_of_the_prompt_changes_nothing(rows: Rows, constants: list[int]) -> None:
    groups = groups_of(rows)
    shifted = with_scores(groups, lambda i, score: None if score is None else score + constants[i])
    before, after = length_coefficient(groups), length_coefficient(shifted)
    assert (after.alpha, after.gap, after.curve) == (before.alpha, before.gap, before.curve)
    texts = [
        [(pair.chosen.text, pair.rejected.text) for pair in best_vs_worst(debias_length(some, before))]
        for some in (groups, shifted)
    ]
    assert texts[0] == texts[1]


def test_d4_scores_scaled_by_beta_take_the_coefficient_with_beta_and_give_the_same_pairs() -> None:
    groups, beta = length_biased(200, 8, seed=1), 0.1
    scaled = with_scores(groups, lambda _, score: beta * score)
    raw = length_coefficient(groups)
    inside = raw.with_beta(beta)
    assert inside.alpha == pytest.approx(length_coefficient(scaled).alpha, rel=1e-9)
    assert inside.alpha == pytest.approx(0.1 * raw.alpha, rel=1e-15)
    assert (inside.beta_inside, raw.beta_inside) == (True, False)
    assert inside.curve[5] == (beta * raw.curve[5][0], raw.curve[5][1])
    assert inside.gap == raw.gap

    def answers(some: list[Group], coefficient: LengthCoefficient) -> list[tuple[str, str]]:
        return [(pair.chosen.text, pair.rejected.text) for pair in best_vs_worst(debias_length(some, coefficient))]

    assert answers(scaled, inside) == answers(groups, raw)
    assert answers(scaled, raw) != answers(groups, raw)


def test_with_beta_is_refused_twice_and_for_a_beta_that_is_not_positive() -> None:
    found = length_coefficient([group([0.0, 1.0], [3, 9])])
    with pytest.raises(InputError, match="already has beta inside"):
        found.with_beta(0.1).with_beta(0.1)
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"beta = .*: should be positive"):
            found.with_beta(beta)


def test_d6_at_a_very_large_alpha_every_winner_is_the_shortest_and_every_loser_the_longest() -> None:
    groups = length_biased(50, 6, seed=2)
    lengths = np.array([[response.length_chars for response in g.responses] for g in groups])
    expected = float((lengths.min(axis=1) - lengths.max(axis=1)).mean())
    assert expected < 0
    assert fixed_coefficient(groups, 1e9).gap == expected
    assert length_coefficient(groups).curve[-1][1] == expected


def test_d7_d8_grid_early_stop_bisection_and_exact_search_agree_on_biased_data() -> None:
    groups = length_biased(2000, 8, seed=3)
    scores = np.array([[response.score for response in g.responses] for g in groups])
    lengths = np.array([[response.length_chars for response in g.responses] for g in groups])

    def f(alpha: float) -> float:
        penalised = scores - alpha * lengths
        ends = [np.take_along_axis(lengths, at(penalised, axis=1)[:, None], 1) for at in (np.argmax, np.argmin)]
        return float((ends[0] - ends[1]).mean())

    grid = [i / 1000 for i in range(100)]
    full = min(grid, key=lambda alpha: abs(f(alpha)))
    early = next(a for a, b in pairwise(grid) if abs(f(b)) > abs(f(a)))
    low, high = 0.0, 1.0
    for _ in range(40):
        low, high = ((low + high) / 2, high) if f((low + high) / 2) > 0 else (low, (low + high) / 2)

    found = length_coefficient(groups)
    assert early == full == 0.02
    assert found.alpha == pytest.approx(low, abs=1e-5)
    assert abs(found.gap) == min(abs(f(low)), abs(f(high)))
    assert abs(found.gap) <= abs(f(full))
    largest_range = float((lengths.max(axis=1) - lengths.min(axis=1)).max())
    assert abs(found.gap) <= 2 * largest_range / len(groups)


def test_d9_responses_of_equal_length_leave_alpha_at_zero_and_the_gap_zero_everywhere() -> None:
    groups = groups_of([([1.0, 5.0, 3.0], [7, 7, 7]), ([0.5, 0.25], [9, 9])])
    found = length_coefficient(groups)
    assert (found.alpha, found.gap_at_zero, found.gap, found.mean_abs_gap) == (0.0, 0.0, 0.0, 0.0)
    assert found.curve == ((0.0, 0.0),)
    assert (found.score_length_correlation_at_zero, found.score_length_correlation) == (None, None)
    assert fixed_coefficient(groups, 3.0).gap == 0.0


def test_winners_that_are_shorter_already_take_no_penalty() -> None:
    found = length_coefficient(groups_of([([1.0, 0.0], [5, 9]), ([1.0, 0.0], [6, 7])]))
    assert (found.alpha, found.gap_at_zero, found.gap) == (0.0, -2.5, -2.5)


def test_one_prompt_flips_at_its_crossing_and_the_smaller_alpha_wins_the_tie() -> None:
    # The lines 4 - 30 alpha and 2 - 10 alpha cross at 0.1; f is +20 before and -20 behind.
    found = length_coefficient([group([4.0, 2.0], [30, 10])])
    assert found.curve == ((0.0, 20.0), (0.1, -20.0))
    assert (found.alpha, found.gap) == (0.0, 20.0)


def test_two_prompts_balance_between_their_crossings_and_alpha_is_the_middle() -> None:
    # Crossings at 0.1 and 0.3, with jumps of 40 and 40 from +20.
    found = length_coefficient(groups_of([([4.0, 2.0], [30, 10]), ([8.0, 2.0], [30, 10])]))
    assert found.alpha == pytest.approx(0.2, rel=1e-15)
    assert (found.gap_at_zero, found.gap, found.mean_abs_gap, found.n_prompts) == (20.0, 0.0, 20.0, 2)


def test_equal_scores_count_the_first_response_at_zero_and_the_shortest_just_above() -> None:
    found = length_coefficient([group([1.0, 1.0, 0.0], [10, 5, 5])])
    assert found.gap_at_zero == 5.0
    assert found.curve == ((0.0, 0.0), (0.2, -5.0))
    assert (found.alpha, found.gap) == (0.1, 0.0)


def test_a_step_that_only_rounding_makes_is_not_used() -> None:
    # Both prompts cross at 0.3; as floats 0.1 + 0.2 is one ulp above, and f would be 0 in that ulp.
    found = length_coefficient(groups_of([([0.1 + 0.2, 0.0], [1, 0]), ([0.3, 0.0], [1, 0])]))
    assert (found.alpha, found.gap) == (0.0, 1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_responses_and_of_prompts_is_irrelevant_without_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = length_biased(20, 5, seed=seed)
    mixed = [
        g.model_copy(update={"responses": tuple(g.responses[i] for i in rng.permutation(5))})
        for g in (groups[i] for i in rng.permutation(20))
    ]
    before, after = length_coefficient(groups), length_coefficient(mixed)
    assert (after.alpha, after.gap, after.curve) == (before.alpha, before.gap, before.curve)


def test_the_length_bias_grows_with_k_and_vanishes_at_alpha_and_flips_at_twice_alpha() -> None:
    groups = length_biased(1000, 16, seed=4)
    found = {
        k: length_coefficient([g.model_copy(update={"responses": g.responses[:k]}) for g in groups])
        for k in (2, 4, 8, 16)
    }
    at_zero = [found[k].gap_at_zero for k in (2, 4, 8, 16)]
    assert at_zero[0] > 200
    assert all(more > 1.1 * less for less, more in pairwise(at_zero))
    for k, coefficient in found.items():
        assert abs(coefficient.gap) <= 2 * 1450 / 1000
        assert coefficient.alpha == pytest.approx(0.02, rel=0.1), k
    over = fixed_coefficient(groups, 2 * found[16].alpha)
    assert over.gap == pytest.approx(-found[16].gap_at_zero, rel=0.1)


def test_the_correlation_is_within_prompts_before_and_after() -> None:
    # Per prompt, scores rise with length at slope 2; between prompts they fall steeply, which decides nothing.
    groups = groups_of([([100.0, 104.0, 106.0], [1, 3, 4]), ([0.0, 6.0, 4.0], [50, 53, 52])])
    found = fixed_coefficient(groups, 3.0)
    assert found.score_length_correlation_at_zero == pytest.approx(1.0, abs=1e-12)
    assert found.score_length_correlation == pytest.approx(-1.0, abs=1e-12)
    uneven = fixed_coefficient([group([0.0, 1.0, 1.0], [1, 2, 3])], 0.0)
    assert uneven.score_length_correlation == pytest.approx(3**0.5 / 2, abs=1e-12)


def test_a_long_curve_is_thinned_to_200_points_that_keep_both_ends_and_the_step_of_alpha() -> None:
    found = length_coefficient(length_biased(500, 8, seed=5))
    alphas, gaps = zip(*found.curve, strict=True)
    assert 190 < len(found.curve) <= 200
    assert alphas[0] == 0.0 and gaps[0] == found.gap_at_zero
    assert list(gaps) == sorted(gaps, reverse=True) and list(alphas) == sorted(alphas)
    assert gaps[np.searchsorted(alphas, found.alpha) - 1] == found.gap


def test_d18_length_is_code_points_of_the_stripped_text_and_tokens_are_another_unit() -> None:
    # 10 code points, of which one combines and one joins: 7 visible characters, 24 bytes in UTF-8.
    long = Response(text=" \t日本e\u0301 \U0001f469\u200d\U0001f467né\n", token_ids=(1, 2), score=1.0)
    short = Response(text="four", token_ids=(1, 2, 3, 4, 5), score=0.0)
    groups = [Group(prompt=Prompt.of("?"), responses=(long, short))]
    assert fixed_coefficient(groups, 0.0).gap == 6.0
    assert fixed_coefficient(groups, 0.0, unit="tokens").gap == -3.0
    assert [r.score for r in debias_length(groups, fixed_coefficient(groups, 0.5))[0].responses] == [-4.0, -2.0]
    in_tokens = fixed_coefficient(groups, 0.5, unit="tokens")
    assert [r.score for r in debias_length(groups, in_tokens)[0].responses] == [0.0, -2.5]


def test_the_record_survives_its_json_line() -> None:
    found = length_coefficient(length_biased(30, 4, seed=6), unit="tokens")
    assert found.unit == "tokens"
    assert LengthCoefficient.from_json(found.to_json()) == found


def test_bad_input_is_refused_in_one_line_that_names_it() -> None:
    with pytest.raises(InputError, match=r"prompt 'one': scored responses 1, but a comparison takes 2; [^\n]*$"):
        length_coefficient([group([1.0, 2.0], [3, 4]), group([1.0], [3], id="one")])
    with pytest.raises(InputError, match="prompt 'p': scored responses 1"):
        length_coefficient([group([1.0, None], [3, 4])])
    with pytest.raises(InputError, match="no groups"):
        length_coefficient([])
    with pytest.raises(InputError, match=r"length unit 'char': expected 'chars' or 'tokens'\. Did you mean 'chars'\?"):
        length_coefficient([group([1.0, 2.0], [3, 4])], unit="char")
    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"alpha = .*: should be a number of at least 0"):
            fixed_coefficient([group([1.0, 2.0], [3, 4])], alpha)
