"""From paired scores to bounds, p-values and numbers of pictures. Arithmetic only: no verdict, no files.

Answers about one picture are not independent, so the unit is the picture: its mean difference, quantized minus
reference, -1 .. 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean

import numpy

CONFIDENCE = 0.95
"""Of each bound by itself: a low and a high bound together are a 90 % interval."""
LOW_PSEUDO_PICTURES = (-1.0,)
HIGH_PSEUDO_PICTURES = (-1.0, 1.0)
"""Values of pictures that are added before a bound is taken; without them five pictures without a flip prove anything.

One at -1 and one at +1 are Bonett and Price's adjustment. The low bound does without the one at +1, which makes up for
a lost picture: with it, a true drop at the margin passes in up to 10.3 % of gates (7 % are wanted), without it in at
most 7.1 %. Two-sided 95 % bounds with both stay below 7 % as well, and need a quarter more pictures where answers flip often.
tests/simulate_verdict.py measures all of these, tests/RESULTS.md has what came out.
"""
POWER = 0.8
"""How often the number of pictures that `pictures_needed` names should decide."""
MOST_PICTURES = 10_000_000
"""More than anyone has: beyond it, no number decides."""
FREEDOM_OF_SERIES = 1000
"""From here on two terms of the series around the normal quantile are exact to 1e-6."""

Number = float | numpy.ndarray


@dataclass(frozen=True)
class Interval:
    """A mean difference with its two bounds, as fractions of 1 (quantized minus reference)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Moments:
    """Number, sum and sum of squares of per-picture values; arrays hold the sums of many sets of equal size."""

    count: int
    total: Number
    squares: Number

    @staticmethod
    def of(values: Sequence[float]) -> "Moments":
        """Of one set."""
        return Moments(len(values), math.fsum(values), math.fsum(value * value for value in values))

    def center_and_error(self, added: Sequence[float]) -> tuple[Number, Number]:
        """The mean and its standard error after pictures with the values `added` joined; two pictures at least."""
        count = self.count + len(added)
        center = (self.total + sum(added)) / count
        variance = (self.squares + sum(value * value for value in added)) / count - center**2
        return center, numpy.sqrt(numpy.maximum(variance, 0) / (count - 1))


def paired_interval(differences: Sequence[float]) -> Interval:
    """Mean of per-picture differences in -1 .. 1, and the bounds it surely lies above and below."""
    if not differences:
        return Interval(0.0, -1.0, 1.0)
    interval = bounds(Moments.of(differences))
    return Interval(fmean(differences), float(interval.low), float(interval.high))


def bounds(moments: Moments) -> Interval:
    """The interval of at least one picture; every field is an array if the moments are."""
    low = bound(moments, LOW_PSEUDO_PICTURES, side=-1)
    high = bound(moments, HIGH_PSEUDO_PICTURES, side=1)
    return Interval(moments.total / moments.count, numpy.maximum(low, -1.0), numpy.minimum(high, 1.0))


def bound(moments: Moments, added: Sequence[float], *, side: int, confidence: float = CONFIDENCE) -> Number:
    """One-sided t-bound of the mean with the pseudo-pictures `added`; side: -1 below, 1 above."""
    center, error = moments.center_and_error(added)
    return center + side * student_quantile(confidence, moments.count + len(added) - 1) * error


def ratio_values(totals: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Per-picture values whose mean is sum(totals) / sum(weights) and whose spread is that ratio's (linearized)."""
    ratio, average = math.fsum(totals) / math.fsum(weights), fmean(weights)
    return [ratio + (total - ratio * weight) / average for total, weight in zip(totals, weights, strict=True)]


def pictures_needed(differences: Sequence[float], margin: float, *, fail_confidence: float = CONFIDENCE) -> int | None:
    """About how many pictures would decide in four of five cases, if mean and spread stay; None if no number would.

    The spread is taken as if one more picture had flipped: no flip among few pictures does not mean that none will.
    fail_confidence: of the high bound, where several kinds share it.
    """
    mean = fmean(differences) if differences else 0.0
    variance = (math.fsum((value - mean) ** 2 for value in differences) + 1) / (len(differences) + 1)
    square = variance + mean**2

    def decides(count: int) -> bool:
        """Whether the bound still decides when the mean comes out as unluckily as in one of five cases."""
        moments = Moments(count, count * mean, count * square)
        luck = NormalDist().inv_cdf(POWER) * math.sqrt(variance / count)
        if mean < -margin:
            return bound(moments, HIGH_PSEUDO_PICTURES, side=1, confidence=fail_confidence) + luck < -margin
        return bound(moments, LOW_PSEUDO_PICTURES, side=-1) - luck >= -margin

    low = high = len(differences) + 1
    while not decides(high):
        low, high = high + 1, 2 * high
        if high > MOST_PICTURES:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle + 1, high)
    return high


def failure_probability(differences: Sequence[float], margin: float) -> float:
    """p-value against a drop within `margin`: below 0.05 exactly where the high bound is below -margin."""
    center, error = Moments.of(differences).center_and_error(HIGH_PSEUDO_PICTURES)
    return student_tail(float((-margin - center) / error), len(differences) + len(HIGH_PSEUDO_PICTURES) - 1)


def holm(probabilities: Sequence[float]) -> list[float]:
    """p-values adjusted so that all of them together are wrong as rarely as one alone (Holm's step-down)."""
    order = sorted(range(len(probabilities)), key=lambda index: probabilities[index])
    adjusted, largest = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * probabilities[index]))
        adjusted[index] = largest
    return adjusted


def bootstrap_interval(per_picture: Sequence[float], seed: int, resamples: int = 2000) -> Interval:
    """95 % percentile interval of the mean by resampling pictures: for display, too narrow where few answers flip."""
    if not per_picture:
        return Interval(0.0, -1.0, 1.0)
    values, generator = numpy.asarray(per_picture, dtype=numpy.float64), numpy.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = numpy.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def mcnemar_probability(lost: int, won: int) -> float:
    """Exact two-sided p-value of McNemar's test: how often chance alone parts the flips at least so unevenly."""
    flips = lost + won
    tail = sum(math.comb(flips, few) for few in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**flips)


@lru_cache(maxsize=4096)
def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t for `probability` > 0.5: bisection over its area, or a series for much freedom."""
    if freedom >= FREEDOM_OF_SERIES:
        normal = NormalDist().inv_cdf(probability)
        return normal + (normal**3 + normal) / (4 * freedom)
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        if 0.5 + student_area(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def student_tail(value: float, freedom: int) -> float:
    """Probability that Student's t exceeds `value`."""
    area = student_area(min(abs(value), 1e3), freedom)
    return max(0.0, 0.5 - area) if value > 0 else 0.5 + area


def student_area(limit: float, freedom: int, steps: int = 400) -> float:
    """Area under Student's density from 0 to `limit`: Simpson's rule after t = sqrt(freedom) * tan(angle)."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    # Beyond an angle of 40 / sqrt(freedom) nothing is left, and steps over all of it would miss the peak.
    end = min(math.atan(limit / math.sqrt(freedom)), 40 / math.sqrt(freedom))
    heights = numpy.cos(numpy.linspace(0, end, steps + 1)) ** (freedom - 1)
    weighted = heights[0] + 4 * heights[1:-1:2].sum() + 2 * heights[2:-1:2].sum() + heights[-1]
    return math.exp(log_scale) * end / steps / 3 * float(weighted)
