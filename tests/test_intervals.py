"""Bounds, p-values and numbers of pictures against tables, hand-worked examples and simulation."""

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from vlquant.intervals import (
    HIGH_PSEUDO_PICTURES,
    Moments,
    bootstrap_interval,
    bound,
    bounds,
    failure_probability,
    holm,
    mcnemar_probability,
    paired_interval,
    pictures_needed,
    ratio_values,
    student_quantile,
    student_tail,
)
from vlquant.verdict import INCONCLUSIVE, PASS, decide

QUICK = settings(max_examples=100, deadline=None)
DIFFERENCES = some.lists(some.sampled_from([-1.0, -0.5, -1 / 3, 0.0, 0.25, 1.0]), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 10, 2.2281), (0.95, 5, 2.0150), (0.975, 2000, 1.9612)],
)
def test_student_quantile_as_tabulated(probability, freedom, expected):
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("freedom", [1, 7, 999, 1000, 10**6])
def test_the_tail_is_what_the_quantile_leaves(freedom):
    assert student_tail(student_quantile(0.95, freedom), freedom) == pytest.approx(0.05, abs=1e-6)
    assert student_tail(-1.0, freedom) == pytest.approx(1 - student_tail(1.0, freedom))
    assert student_tail(1e9, freedom) == pytest.approx(0, abs=1e-3)


def test_bounds_by_hand():
    """One of four lost. Low, of -1 -1 0 0 0: -0.4 - 2.1318 * sqrt(0.3 / 5); high, of these and 1: t = 2.0150."""
    interval = paired_interval([-1.0, 0.0, 0.0, 0.0])
    assert interval.mean == -0.25
    assert interval.low == pytest.approx(-0.4 - 2.1318 * math.sqrt(0.3 / 5), abs=1e-4)
    assert interval.high == pytest.approx(-1 / 6 + 2.0150 * math.sqrt((3 - 1 / 6) / 5 / 6), abs=1e-4)


def test_nothing_measured_is_nothing_known():
    assert (paired_interval([]).low, paired_interval([]).high) == (-1, 1)
    assert (bootstrap_interval([], seed=0).low, bootstrap_interval([], seed=0).high) == (-1, 1)


@QUICK
@given(DIFFERENCES)
def test_bounds_enclose_the_mean_whatever_the_order(differences):
    interval = paired_interval(differences)
    assert -1 <= interval.low <= interval.mean <= interval.high <= 1
    assert paired_interval(differences[::-1]) == pytest.approx(interval)


@QUICK
@given(some.lists(DIFFERENCES.filter(lambda values: len(values) >= 5), min_size=1, max_size=5))
def test_many_sets_at_once_are_as_each_alone(sets):
    sets = [values[:5] for values in sets]
    together = bounds(
        Moments(5, numpy.array([sum(each) for each in sets]), numpy.array([sum(x * x for x in each) for each in sets]))
    )
    for index, each in enumerate(sets):
        alone = paired_interval(each)
        assert (together.mean[index], together.low[index], together.high[index]) == pytest.approx(
            (alone.mean, alone.low, alone.high)
        )


@QUICK
@given(DIFFERENCES, some.floats(0.001, 0.2))
def test_the_p_value_is_small_exactly_where_the_high_bound_is_beyond(differences, margin):
    high = bound(Moments.of(differences), HIGH_PSEUDO_PICTURES, side=1)
    probability = failure_probability(differences, margin)
    if abs(probability - 0.05) > 1e-5:
        assert (probability < 0.05) == (high < -margin)


def test_values_of_a_ratio():
    assert ratio_values([1.0, 3.0], [10, 10]) == pytest.approx([0.1, 0.3])
    assert ratio_values([1.0, 3.0], [10, 30]) == pytest.approx([0.1, 0.1])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("lost", "won", "expected"), [(0, 0, 1), (5, 1, 14 / 64), (1, 5, 14 / 64), (10, 0, 2 / 1024), (3, 3, 1)]
)
def test_mcnemar_by_hand(lost, won, expected):
    assert mcnemar_probability(lost, won) == pytest.approx(expected)


def test_the_bootstrap_repeats_itself_and_is_what_is_known_for_many_pictures():
    values = [-1.0] * 100 + [1.0] * 60 + [0.0] * 840
    interval = bootstrap_interval(values, seed=3)
    reach = 1.96 * numpy.std(values) / math.sqrt(1000)
    assert bootstrap_interval(values, seed=3) == interval != bootstrap_interval(values, seed=4)
    assert (interval.mean, interval.low, interval.high) == pytest.approx(
        (-0.04, -0.04 - reach, -0.04 + reach), abs=2e-3
    )


def test_no_flip_among_twenty_needs_many_more():
    differences = [0.0] * 20
    assert decide(paired_interval(differences), 0.01) == INCONCLUSIVE
    assert 2500 < pictures_needed(differences, 0.01) < 3500
    assert decide(paired_interval([0.0] * 264), 0.01) == INCONCLUSIVE
    assert decide(paired_interval([0.0] * 265), 0.01) == PASS


def test_a_drop_at_the_margin_needs_infinitely_many():
    assert pictures_needed([-0.01] * 100, 0.01) is None


@pytest.mark.parametrize("margin", [0.005, 0.01, 0.02])
@pytest.mark.parametrize(
    ("pictures", "lost", "won"),
    [
        (20, 0, 0),
        (100, 0, 0),
        (20, 1, 0),
        (100, 3, 3),
        (100, 8, 3),
        (300, 0, 3),
        (800, 18, 11),
        (800, 60, 20),
        (10, 4, 0),
    ],
)
def test_the_number_needed_decides_if_mean_and_spread_stay(pictures, lost, won, margin):
    differences = [-1.0] * lost + [1.0] * won + [0.0] * (pictures - lost - won)
    needed = pictures_needed(differences, margin)
    probabilities = [lost / pictures, 1 - (lost + won) / pictures, won / pictures]
    counts = numpy.random.default_rng(0).multinomial(needed, probabilities, size=2000)
    interval = bounds(Moments(needed, counts @ [-1.0, 0.0, 1.0], counts @ [1.0, 0.0, 1.0]))
    decided = (interval.low >= -margin) | (interval.high < -margin)
    assert needed > pictures or decide(paired_interval(differences), margin) != INCONCLUSIVE
    assert decided.mean() > 0.77


@pytest.mark.parametrize("flips", [0.03, 0.1])
def test_the_number_needed_is_no_more_than_prudent(flips):
    """Where flips are many the number is near quality's rule of thumb, 6.18 * flips / margin ** 2."""
    differences = [-1.0, 1.0] * round(500 * flips) + [0.0] * round(1000 * (1 - flips))
    assert pictures_needed(differences, 0.01) == pytest.approx(6.18 * flips / 0.01**2, rel=0.15)


def test_ten_kinds_at_their_margins_seldom_fail_any():
    """All true drops exactly at the margin: the adjusted p-values are below 0.05 for some kind in few sets of ten."""
    generator, alarms, unadjusted = numpy.random.default_rng(0), 0, 0
    for _ in range(300):
        draws = generator.choice([-1.0, 0.0, 1.0], p=[0.06, 0.9, 0.04], size=(10, 150)).tolist()
        probabilities = [failure_probability(each, 0.02) for each in draws]
        unadjusted += min(probabilities) < 0.05
        alarms += min(holm(probabilities)) < 0.05
    assert alarms <= 0.07 * 300 < unadjusted
