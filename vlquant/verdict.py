"""From paired scores to an interval and a verdict. Arithmetic only.

Answers about one picture are not independent, so the unit is the picture: its mean difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean difference with its confidence interval, as fractions of 1 (quantized minus reference)."""

    mean: float
    low: float
    high: float


def paired_interval(differences: Sequence[float]) -> Interval:
    """95 % t-interval of the mean of per-picture differences in -1 .. 1.

    One pseudo-picture at -1 and one at +1 are added, which keeps the interval honest when few or no answers
    flip (Bonett and Price's adjustment): without them five pictures without a flip would prove anything.
    """
    padded = [*differences, -1.0, 1.0]
    count = len(padded)
    reach = student_quantile(0.5 + CONFIDENCE / 2, count - 1) * stdev(padded) / math.sqrt(count)
    center = fmean(padded)
    mean = fmean(differences) if differences else 0.0
    return Interval(mean, max(-1.0, center - reach), min(1.0, center + reach))


def decide(interval: Interval, margin: float) -> str:
    """PASS if the drop is surely within `margin`, FAIL if it is surely beyond, else INCONCLUSIVE."""
    if interval.low >= -margin:
        return PASS
    return FAIL if interval.high < -margin else INCONCLUSIVE


def pictures_needed(differences: Sequence[float], margin: float) -> int | None:
    """About how many pictures would decide, if mean and spread stay as they are; None if no number would."""
    distance = abs((fmean(differences) if differences else 0.0) + margin)
    if distance < 1e-9:
        return None
    variance = stdev(differences) ** 2 if len(differences) > 1 else 0.0
    quantile = student_quantile(0.5 + CONFIDENCE / 2, 1000)
    # Solves quantile * sqrt(count * variance + 2) / count = distance; the 2 is the pseudo-pictures' share.
    spread = quantile**2 * variance
    return math.ceil((spread + math.sqrt(spread**2 + 8 * (quantile * distance) ** 2)) / (2 * distance**2))


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t for `probability` > 0.5, by bisection over its integrated density."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        if 0.5 + student_area(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def student_area(limit: float, freedom: int, steps: int = 400) -> float:
    """Area under Student's density from 0 to `limit`: Simpson's rule after t = sqrt(freedom) * tan(angle)."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    end = math.atan(limit / math.sqrt(freedom))
    width = end / steps
    weights = [1, *[4 if index % 2 else 2 for index in range(1, steps)], 1]
    heights = [math.cos(index * width) ** (freedom - 1) for index in range(steps + 1)]
    return math.exp(log_scale) * width / 3 * sum(a * b for a, b in zip(weights, heights, strict=True))
