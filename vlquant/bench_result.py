"""What a bench found: values of every round, their medians and quartiles, ratios, the machine. Measures nothing."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vlquant.bench_options import BenchOptions
from vlquant.machine import Machine

FORMAT_VERSION = 1
OURS = "vlquant"
SPEED = "tokens/s"
"""The unit of which more is better."""


@dataclass(frozen=True)
class Spread:
    """Half of the values lie between the quartiles."""

    median: float
    first_quartile: float
    third_quartile: float


@dataclass(frozen=True)
class Series:
    """What one contestant needed or reached, round by round."""

    measure: str
    """Such as "decode after 512"."""
    unit: str
    """"s", "tokens/s" or "bytes"."""
    contestant: str
    values: tuple[float, ...]
    tower: str | None = None
    """Precision of the vision tower that this contestant ran; None: none took part."""

    @property
    def better(self) -> str:
        """Whether "more" of the unit is better, or "less"."""
        return "more" if self.unit == SPEED else "less"

    @property
    def spread(self) -> Spread:
        """Median and quartiles, by linear interpolation between values."""
        if len(self.values) == 1:
            return Spread(*self.values * 3)
        first, median, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return Spread(median, first, third)


@dataclass(frozen=True)
class BenchResult:
    """Everything a bench found."""

    model: str
    shape: dict
    """Of the decoder and the vision tower."""
    date: str
    """UTC."""
    options: BenchOptions
    machine: Machine
    contestants: dict[str, dict]
    """By name, what each says of itself: kernels, precision, instruction sets."""
    series: tuple[Series, ...]
    not_measured: dict[str, str]
    """By name of a contestant or of measures, why not."""

    def find(self, measure: str, contestant: str) -> Series | None:
        """One contestant's values of a measure."""
        return next((each for each in self.series if (each.measure, each.contestant) == (measure, contestant)), None)

    def ratio(self, series: Series) -> float | None:
        """Median of ours by the median of `series`; None for ours, or where ours was not measured."""
        ours = self.find(series.measure, OURS)
        peer = series.spread.median
        return None if ours is None or series.contestant == OURS or not peer else ours.spread.median / peer


def to_json(result: BenchResult) -> str:
    """The result as JSON, with medians, quartiles and ratios beside the values."""
    fields = {"format_version": FORMAT_VERSION, **asdict(result)}
    fields["series"] = [
        {**asdict(each), **asdict(each.spread), "better": each.better, "ours_to_this": result.ratio(each)} for each in result.series
    ]
    return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def measures_of(series: Sequence[Series]) -> list[str]:
    """Their measures in order, once each."""
    return list(dict.fromkeys(each.measure for each in series))
