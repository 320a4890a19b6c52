"""The rule that judges trends: its interval against oracles and simulation, and what it refuses."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from kdtrain.reports.tables import verdicts
from kdtrain.reports.tables.verdicts import at_least, compare, neutral, pooled


def arms(
    generator: np.random.Generator,
    gain: float,
    *,
    seeds: int = 3,
    items: int = 300,
    seed_effect: float = 0.01,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Right-or-wrong scores of two arms; items differ in difficulty, seeds in luck."""
    ease = generator.normal(0.7, 0.25, items)  # shared by all: what pairing takes out
    taste = generator.normal(0, 0.15, items)  # an item's own liking for one arm, in every seed
    better, worse = [], []
    for _ in range(seeds):
        luck = gain + generator.normal(0, seed_effect)
        better.append((generator.random(items) < ease + taste + luck).astype(float))
        worse.append((generator.random(items) < ease - taste).astype(float))
    return better, worse


def test_a_clear_gain_is_held_and_turned_round_it_is_reversed() -> None:
    better, worse = arms(np.random.default_rng(0), 0.2)
    held = compare(better, worse, higher_is_better=True)
    assert held.state == "held"
    assert held.difference == pytest.approx(100 * (np.mean(better) - np.mean(worse)))
    assert held.difference is not None
    assert held.low is not None
    assert held.high is not None
    assert 0 < held.low < held.difference < held.high
    assert (held.seeds, held.agreeing, held.items) == (3, 3, 300)

    turned = compare(worse, better, higher_is_better=True)
    assert turned.state == "reversed"
    assert turned.difference == pytest.approx(-held.difference)
    assert turned.high is not None
    assert turned.high < 0
    assert turned.agreeing == 0


def test_lower_is_better_turns_the_sign_so_that_positive_still_means_as_claimed() -> None:
    generator = np.random.default_rng(1)
    errors = [generator.gamma(2.0, 0.05, 200) for _ in range(3)]
    smaller = [0.8 * one for one in errors]
    claimed = compare(smaller, errors, higher_is_better=False)
    assert claimed.state == "held"
    assert claimed.difference == pytest.approx(20 * np.mean(errors))
    assert compare(smaller, errors, higher_is_better=True).state == "reversed"


def test_simulated_experiments_without_a_difference_rarely_get_a_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verdicts, "RESAMPLES", 400)
    generator = np.random.default_rng(2)
    states = [
        compare(*arms(generator, 0.0, items=150), higher_is_better=True).state for _ in range(300)
    ]
    missed = 1 - states.count("inconclusive") / len(states)
    assert 0.0 < missed <= 0.10


def test_simulated_gains_lie_within_the_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verdicts, "RESAMPLES", 400)
    generator = np.random.default_rng(3)
    inside = 0
    for _ in range(200):
        noise = generator.normal(0, 0.02, (3, 1)) + generator.normal(0, 0.3, (1, 120))
        paired = 0.05 + noise + generator.normal(0, 0.2, (3, 120))
        found = compare(list(paired), [np.zeros(120)] * 3, higher_is_better=True)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 5.0 <= found.high
    assert inside >= 180


def test_one_seed_has_scipys_interval_and_no_verdict() -> None:
    generator = np.random.default_rng(4)
    better, worse = arms(generator, 0.1, seeds=1, items=80)
    found = compare(better, worse, higher_is_better=True)
    oracle = stats.bootstrap(
        (better[0] - worse[0],), np.mean, n_resamples=10_000, method="percentile", rng=generator
    ).confidence_interval
    assert (found.seeds, found.state) == (1, "one seed: no verdict")
    assert found.low == pytest.approx(100 * oracle.low, abs=0.8)
    assert found.high == pytest.approx(100 * oracle.high, abs=0.8)


def test_no_rule_gives_a_verdict_on_one_seed() -> None:
    ones, zeros = np.ones(40), np.zeros(40)
    better = compare([ones, None], [zeros, ones], higher_is_better=True)
    for found in (better, neutral([ones], [ones]), at_least([ones], [zeros])):
        assert (found.state, found.seeds, found.agreeing) == ("one seed: no verdict", 1, 1)
        assert found.difference == found.low == found.high


def test_several_seeds_agree_with_a_plain_loop_over_resamples() -> None:
    generator = np.random.default_rng(5)
    better, worse = arms(generator, 0.1, items=60, seed_effect=0.08)
    found = compare(better, worse, higher_is_better=True)
    means = []
    for _ in range(4000):
        drawn_seeds = generator.integers(3, size=3)
        drawn_items = generator.integers(60, size=60)
        means.append(np.mean([(better[s] - worse[s])[drawn_items].mean() for s in drawn_seeds]))
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.low == pytest.approx(100 * low, abs=1.0)
    assert found.high == pytest.approx(100 * high, abs=1.0)


def test_the_seeds_are_resampled_and_not_the_items_alone() -> None:
    # items all alike, so that only the seeds can widen the interval
    better = [np.full(50, value) for value in (0.5, 0.6, 0.7)]
    found = compare(better, [np.full(50, 0.4)] * 3, higher_is_better=True)
    assert found.difference == pytest.approx(20.0)
    assert found.low == pytest.approx(10.0)
    assert found.high == pytest.approx(30.0)
    assert found.state == "held"


def test_items_that_either_arm_did_not_measure_are_dropped_in_every_seed() -> None:
    better, worse = arms(np.random.default_rng(6), 0.2, items=100)
    better[0][:10] = np.nan
    worse[2][90:] = np.nan
    found = compare(better, worse, higher_is_better=True)
    kept = [[seed[10:90] for seed in arm] for arm in (better, worse)]
    assert found == compare(kept[0], kept[1], higher_is_better=True)
    assert found.items == 80


def test_a_seed_that_one_arm_lacks_is_left_out_of_both() -> None:
    better, worse = arms(np.random.default_rng(7), 0.2)
    two = compare(better[1:], worse[1:], higher_is_better=True)
    assert two.seeds == 2
    assert compare([None, *better[1:]], worse, higher_is_better=True) == two
    nothing = np.full(300, np.nan)
    assert compare(better, [nothing, *worse[1:]], higher_is_better=True) == two


def test_a_later_seed_that_both_arms_lack_is_left_out() -> None:
    better, worse = np.full(50, 1.0), np.zeros(50)
    one = compare([better], [worse], higher_is_better=True)
    both = compare([better, None], [worse, None], higher_is_better=True)
    assert both == one


def test_what_was_not_measured_is_not_run_and_has_no_number() -> None:
    some = [np.array([1.0, 0.0])]
    nothing = [np.full(2, np.nan)]
    disjoint = ([np.array([1.0, np.nan])], [np.array([np.nan, 1.0])])
    for pair in (([], some), (some, []), ([None], some), (nothing, some), disjoint):
        found = compare(*pair, higher_is_better=True)
        assert found.state == "not run"
        assert found.difference is found.low is found.high is None
        assert neutral(*pair).state == "not run"


def test_no_difference_at_all_is_inconclusive_and_neutral() -> None:
    same = [np.array([1.0, 0.0, 1.0])] * 2
    assert compare(same, same, higher_is_better=True).state == "inconclusive"
    assert neutral(same, same).state == "held"


def test_neutral_is_held_within_the_margin_reversed_beyond_it_and_open_across_its_end() -> None:
    generator = np.random.default_rng(8)
    base = [generator.random(400) for _ in range(3)]

    def judge(points: float, spread: float = 0.02) -> str:
        moved = [one + points / 100 + generator.normal(0, spread, 400) for one in base]
        return neutral(moved, base).state

    assert judge(1.0) == judge(-1.0) == "held"
    assert judge(4.0) == judge(-4.0) == "reversed"
    assert judge(2.0) == judge(-2.0) == "inconclusive"
    assert judge(0.0, spread=1.0) == "inconclusive"  # too wide to say
    close = neutral([one + 0.01 for one in base], base)
    assert (close.state, close.margin, close.agreeing) == ("held", 2.0, 3)


def test_an_interval_that_ends_at_zero_is_inconclusive_whatever_the_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verdicts, "RESAMPLES", 200)
    generator = np.random.default_rng(0)
    ended = 0
    for _ in range(400):
        better = list((generator.random((3, 12)) < 0.45).astype(float))
        worse = list((generator.random((3, 12)) < 0.2).astype(float))
        found = compare(better, worse, higher_is_better=True)
        assert found.low is not None
        assert found.low == 0 or abs(found.low) > 1e-6
        if found.low == 0:
            ended += 1
            assert found.state == "inconclusive"
    assert ended > 0


def test_the_same_arguments_give_the_same_verdict() -> None:
    generator = np.random.default_rng(9)
    pair = ([generator.random(50) for _ in range(3)], [generator.random(50) for _ in range(3)])
    first = compare(*pair, higher_is_better=True)
    assert compare(*pair, higher_is_better=True) == first


def test_pooled_arms_are_means_over_settings_where_all_were_measured() -> None:
    wide = [np.array([1.0, 0.0, np.nan]), np.array([1.0, 1.0, 1.0]), None]
    narrow = [np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0]), np.zeros(3)]
    first, second, third = pooled([wide, narrow])
    np.testing.assert_array_equal(first, [0.5, 0.0, np.nan])
    np.testing.assert_array_equal(second, [0.5, 1.0, 1.0])
    assert third is None
    assert pooled([]) == []


def test_arms_that_do_not_fit_are_refused() -> None:
    one, two = np.zeros(4), np.zeros(5)
    with pytest.raises(ValueError, match=r"same seeds, got 1 and 2"):
        compare([one], [one, one], higher_is_better=True)
    with pytest.raises(ValueError, match=r"same test items, got 4 and 5"):
        compare([one], [two], higher_is_better=True)
    with pytest.raises(ValueError, match=r"same test items, got 5 and 4 items \(seed number 1\)"):
        neutral([one, two], [one, two])
    with pytest.raises(ValueError, match=r"\(items,\) for each seed, got \(2, 2\)"):
        compare([np.zeros((2, 2))], [np.zeros((2, 2))], higher_is_better=True)
    with pytest.raises(ValueError, match="infinity"):
        compare([np.array([np.inf])], [np.array([0.0])], higher_is_better=False)
    with pytest.raises(ValueError, match="longer"):
        pooled([[one], [one, one]])
    with pytest.raises(ValueError, match="shape"):
        pooled([[one], [two]])


def test_ten_thousand_resamples_of_a_real_test_split_take_a_moment() -> None:
    pair = arms(np.random.default_rng(10), 0.05, items=846)
    start = time.process_time()
    compare(*pair, higher_is_better=True)
    assert time.process_time() - start < 4.0  # 0.3 s on one core when nothing else runs


def test_at_least_is_held_within_the_margin_and_reversed_beyond_it():
    ones = np.ones(400)
    lower = [np.where(np.arange(400) < lost, 0.0, 1.0) for lost in (2, 60)]
    close, far = (at_least([worse] * 3, [ones] * 3) for worse in lower)
    assert (close.state, close.margin, close.agreeing) == ("held", 2.0, 3)
    assert close.one_sided
    assert close.difference == pytest.approx(-0.5)
    assert (far.state, far.agreeing) == ("reversed", 0)
    assert at_least([ones] * 2, [ones] * 2).state == "held"
    assert at_least([], []).state == "not run"
