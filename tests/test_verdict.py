"""Intervals and verdicts against tables and simulation."""

import random

import pytest

from vlquant.verdict import FAIL, INCONCLUSIVE, PASS, decide, paired_interval, pictures_needed, student_quantile


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 10, 2.2281), (0.95, 5, 2.0150), (0.975, 2000, 1.9612)],
)
def test_student_quantile_as_tabulated(probability, freedom, expected):
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-4)


def test_few_pictures_without_a_flip_prove_nothing():
    for count in (1, 5, 20):
        assert decide(paired_interval([0.0] * count), 0.01) == INCONCLUSIVE


def test_the_number_needed_without_flips_decides():
    needed = pictures_needed([0.0] * 20, 0.01)
    assert decide(paired_interval([0.0] * needed), 0.01) == PASS
    assert decide(paired_interval([0.0] * (needed - 5)), 0.01) == INCONCLUSIVE


def test_clear_cases():
    assert decide(paired_interval([0.0] * 980 + [-1.0] * 20), 0.05) == PASS
    assert decide(paired_interval([0.0] * 800 + [-1.0] * 200), 0.05) == FAIL


def test_a_drop_at_the_margin_needs_infinitely_many():
    assert pictures_needed([-0.01] * 100, 0.01) is None or pictures_needed([-0.01] * 100, 0.01) > 10**6


@pytest.mark.parametrize(("count", "flips"), [(100, 0.02), (300, 0.04)])
def test_a_true_drop_at_the_margin_rarely_passes(count, flips):
    """Net drop of 1 point: the interval may be wrong about one time in forty, and is allowed five in a hundred here."""
    chance, margin = random.Random(0), 0.01
    passes = 0
    for _ in range(400):
        draws = [chance.random() for _ in range(count)]
        lost, won = (flips + margin) / 2, (flips - margin) / 2
        differences = [-1.0 if draw < lost else 1.0 if draw < lost + won else 0.0 for draw in draws]
        passes += decide(paired_interval(differences), margin) == PASS
    assert passes <= 20
