"""D12 and the rest of the replay mixture, and the validation slice."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.errors import InputError
from prefloop.pairs.replay import hold_out, mix
from prefloop.records import Pair
from prefloop.run import Stage
from tests.pairs.builders import pair, pairs_of


def sources(pairs: list[Pair]) -> tuple[int, int]:
    """(generated, offline)"""
    counts = Counter(pair.source for pair in pairs)
    return counts["generated"], counts["offline"]


def ids(pairs: list[Pair]) -> list[str]:
    return [pair.prompt.id for pair in pairs]


@pytest.fixture(scope="module")
def ten_thousand() -> tuple[list[Pair], list[Pair]]:
    """(generated, offline) on the same prompts, as in DICE."""
    return pairs_of(range(10_000), source="generated"), pairs_of(range(10_000))


@pytest.mark.parametrize(
    ("fraction", "counts"),
    [(0.25, (7500, 2500)), (0.5, (5000, 5000)), (0.75, (2500, 7500)), (0.9, (1000, 9000)), (0.1, (9000, 1000))],
)
def test_d12_counts_are_exact_and_prompts_unique(ten_thousand, fraction: float, counts: tuple[int, int]) -> None:
    stage = Stage.detached()
    mixed = mix(*ten_thousand, fraction=fraction, seed=0, stage=stage)
    assert sources(mixed) == counts
    assert len(set(ids(mixed))) == 10_000
    assert (stage.counts["generated pairs mixed"], stage.counts["offline pairs mixed"]) == counts
    assert stage.counts["generated pairs not drawn"] == 10_000 - counts[0]
    assert stage.counts["offline pairs dropped: a generated pair of the prompt is drawn"] == counts[0]
    assert "pairs missing to the mixture's size" not in stage.counts


def test_a_fraction_of_zero_is_all_generated_and_of_one_all_offline() -> None:
    generated, offline = pairs_of(range(30), source="generated"), pairs_of(range(20))
    only_new = mix(generated, offline, fraction=0, seed=1)
    assert sources(only_new) == (30, 0) and sorted(ids(only_new)) == sorted(ids(generated))
    only_old = mix(generated, offline, fraction=1.0, seed=1)
    assert sources(only_old) == (0, 20) and sorted(ids(only_old)) == sorted(ids(offline))
    assert sources(mix([], offline, fraction=1, seed=1)) == (0, 20)
    assert sources(mix(generated, [], fraction=0.0, seed=1)) == (30, 0)


@pytest.mark.parametrize(("fraction", "counts"), [(0, (10, 0)), (0.5, (5, 5)), (0.9, (1, 9)), (1, (0, 10))])
def test_size_takes_the_place_of_the_number_of_offline_pairs(fraction: float, counts: tuple[int, int]) -> None:
    mixed = mix(pairs_of(range(30), source="generated"), pairs_of(range(30)), fraction=fraction, size=10, seed=2)
    assert sources(mixed) == counts


def test_few_generated_pairs_take_their_share_of_offline_ones_and_the_rest_is_counted_as_missing() -> None:
    stage = Stage.detached()
    mixed = mix(pairs_of(range(6), source="generated"), pairs_of(range(100)), fraction=0.75, seed=3, stage=stage)
    assert sources(mixed) == (6, 18)
    assert len(set(ids(mixed))) == 24
    assert stage.counts == {
        "generated pairs mixed": 6,
        "offline pairs mixed": 18,
        "offline pairs dropped: a generated pair of the prompt is drawn": 6,
        "offline pairs not drawn": 76,
        "pairs missing to the mixture's size": 76,
    }


def test_few_offline_pairs_keep_the_fraction_by_leaving_generated_ones_out() -> None:
    stage = Stage.detached()
    generated = pairs_of(range(100), source="generated")
    mixed = mix(generated, pairs_of(range(100, 110)), fraction=0.5, size=100, seed=4, stage=stage)
    assert sources(mixed) == (10, 10)
    assert stage.counts["generated pairs dropped: too few offline pairs for the fraction"] == 40
    assert stage.counts["generated pairs not drawn"] == 50
    assert stage.counts["pairs missing to the mixture's size"] == 80


def test_offline_pairs_of_drawn_prompts_are_not_available() -> None:
    # 10 prompts on both sides: with n generated drawn, 10 - n offline pairs are left for a half.
    both = pairs_of(range(10), source="generated"), pairs_of(range(10))
    assert sources(mix(*both, fraction=0.5, size=20, seed=5)) == (5, 5)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 30), max_size=40),
    st.lists(st.integers(0, 30), max_size=40),
    st.sampled_from([0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 1]),
    st.integers(1, 50) | st.none(),
    st.integers(0, 5),
)
def test_a_mixture_repeats_no_prompt_and_accounts_for_every_pair(new, old, fraction, size, seed) -> None:
    generated = [pair(str(i), str(n), source="generated") for n, i in enumerate(new)]
    offline = [pair(str(i), str(n)) for n, i in enumerate(old)]
    stage = Stage.detached()
    try:
        mixed = mix(generated, offline, fraction=fraction, size=size, seed=seed, stage=stage)
    except InputError:
        return
    given_pairs = {p.to_json() for p in [*generated, *offline]}
    assert all(p.to_json() in given_pairs for p in mixed)
    assert len(set(ids(mixed))) == len(mixed)
    assert len(mixed) <= (size or max(len(generated), len(offline)))
    n_gen, n_off = sources(mixed)
    if fraction < 1:
        # The offline share is rounded down to whole pairs and otherwise kept.
        share = fraction * n_gen / (1 - fraction)
        assert share - 1 - 1e-9 < n_off <= share + 1e-9
    missing = stage.counts.pop("pairs missing to the mixture's size", 0)
    assert missing >= 0
    assert sum(stage.counts.values()) == len(generated) + len(offline)
    assert min(stage.counts.values()) > 0


def test_of_several_pairs_of_a_prompt_one_is_drawn_and_each_can_be() -> None:
    offline = [pair(str(prompt), name) for prompt in range(5) for name in "xyz"]
    stage = Stage.detached()
    seen = set()
    for seed in range(20):
        mixed = mix([], offline, fraction=1, seed=seed, stage=stage)
        assert sorted(ids(mixed)) == ["0", "1", "2", "3", "4"]
        seen |= {p.chosen.text for p in mixed}
    assert len(seen) == 15
    assert stage.counts["offline pairs dropped: another pair of the prompt is drawn"] == 20 * 10


def test_a_prompt_with_many_pairs_is_drawn_no_more_often_than_one_with_a_single_pair() -> None:
    offline = [pair("many", str(n)) for n in range(20)] + pairs_of(range(9))
    drawn = Counter(ids([p for seed in range(600) for p in mix([], offline, fraction=1, size=1, seed=seed)]))
    # 600 draws of 10 prompts: 60 +- 7.3 (one standard deviation).
    assert 35 < drawn["many"] < 85


def test_the_seed_alone_decides_the_draw_and_the_order(ten_thousand) -> None:
    generated, offline = ten_thousand[0][:200], ten_thousand[1][:200]

    def lines(seed: int) -> list[str]:
        return [p.to_json() for p in mix(generated, offline, fraction=0.5, seed=seed)]

    assert lines(7) == lines(7)
    assert lines(7) != lines(8)
    assert sorted(lines(7)) != sorted(lines(8))
    mixed_sources = [p.source for p in mix(generated, offline, fraction=0.5, seed=7)]
    assert 20 < mixed_sources[:100].count("generated") < 80


def test_the_draws_of_generated_and_offline_pairs_are_not_the_same_positions() -> None:
    generated, offline = pairs_of(range(100), source="generated"), pairs_of(range(100, 200))
    mixed = mix(generated, offline, fraction=0.5, seed=9)
    new = {int(p.prompt.id) for p in mixed if p.source == "generated"}
    old = {int(p.prompt.id) - 100 for p in mixed if p.source == "offline"}
    assert len(new) == len(old) == 50 and new != old


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_outside_zero_to_one_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match=r"replay fraction .*: should be between 0 .* and 1"):
        mix(pairs_of("a"), pairs_of("b"), fraction=fraction, seed=0)


def test_a_mixture_that_would_be_empty_is_refused() -> None:
    some = pairs_of("ab")
    for generated, offline, fraction in [([], some, 0.5), (some, [], 0.5), ([], [], 1), ([], [], 0)]:
        with pytest.raises(InputError, match=f"no mixture can be drawn from {len(generated)} generated"):
            mix(generated, offline, fraction=fraction, seed=0)
    with pytest.raises(InputError, match="mixture size 0: should be at least 1"):
        mix(pairs_of("a"), pairs_of("b"), fraction=0.5, size=0, seed=0)


def test_hold_out_splits_by_prompt_keeps_the_order_and_follows_the_seed() -> None:
    pairs = pairs_of(range(50))
    train, validation = hold_out(pairs, 12, seed=0)
    assert (len(train), len(validation)) == (38, 12)
    assert sorted([*train, *validation], key=lambda p: int(p.prompt.id)) == pairs
    assert [int(i) for i in ids(validation)] == sorted(int(i) for i in ids(validation))
    assert hold_out(pairs, 12, seed=0) == (train, validation)
    assert set(ids(hold_out(pairs, 12, seed=1)[1])) != set(ids(validation))
    assert hold_out(pairs, 0, seed=0) == (pairs, [])


def test_hold_out_never_has_a_prompt_on_both_sides() -> None:
    pairs = [pair(str(prompt), name) for prompt in range(10) for name in "xyz"]
    train, validation = hold_out(pairs, 11, seed=3)
    assert len(validation) == 9 and len(train) == 21
    assert not set(ids(train)) & set(ids(validation))


@pytest.mark.parametrize("n", [-1, 5, 6])
def test_hold_out_leaves_something_to_train_on(n: int) -> None:
    with pytest.raises(InputError, match=f"{n} validation pairs of 5"):
        hold_out(pairs_of(range(5)), n, seed=0)
