"""How honest the verdict is: gates at true drops that are known, decided by the arithmetic that `vlquant check` uses.

    python tests/simulate_verdict.py [--gates 100000] [--seed 0] [--output tests/data/verdict_simulation.json]

A question flips from right to wrong or from wrong to right. With flip rate f and true drop d it is lost with probability
(f + d) / 2 and won with (f - d) / 2; a drop beyond f raises f to it. Questions about one picture flip alike: with
probability `correlation` (their intra-cluster correlation) a picture has one fate for all of its questions, else each
has its own. Every cell is simulated independent, half correlated and with one fate for each picture; its false PASS rate is
the worst of them. Pictures are questions // cluster. What lies between the cells is computed exactly, for the hardest
case: every flip is a loss, one question for each picture. One minute on one core.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy

from vlquant.intervals import CONFIDENCE, HIGH_PSEUDO_PICTURES, LOW_PSEUDO_PICTURES, Moments, bound, bounds

RECORD = Path(__file__).parent / "data" / "verdict_simulation.json"
QUESTIONS = (100, 300, 1000, 3000)
FLIP_RATES = (0.01, 0.03, 0.06, 0.15)
CLUSTERS = (1, 3, 5)
MARGINS = (0.005, 0.01, 0.02)
CORRELATIONS = (0.0, 0.5, 1.0)
ALLOWED = 0.07
"""Largest rate of false PASSes in any cell."""
TRIED = {
    "no pseudo-pictures, 95 %": ((), 0.95),
    "-1 and +1, 95 %": ((-1.0, 1.0), 0.95),
    "-1 and +1, 97.5 %": ((-1.0, 1.0), 0.975),
    "-1, 95 %": ((-1.0,), 0.95),
    "-1 twice, 95 %": ((-1.0, -1.0), 0.95),
}
"""Low bounds that were compared: pseudo-pictures and confidence."""


@dataclass(frozen=True)
class Cell:
    """What is asked and how it flips."""

    questions: int
    flip_rate: float
    cluster: int
    """Questions about one picture."""
    margin: float
    correlation: float


def cells() -> Iterator[Cell]:
    """Every cell, at every correlation that makes a difference to it."""
    for questions, flip_rate, cluster, margin in product(QUESTIONS, FLIP_RATES, CLUSTERS, MARGINS):
        if margin <= flip_rate:
            for correlation in CORRELATIONS[: 1 if cluster == 1 else None]:
                yield Cell(questions, flip_rate, cluster, margin, correlation)


def picture_outcomes(cell: Cell, drop: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The values that a picture's mean difference can have, and the probability of each."""
    flips = max(cell.flip_rate, drop)
    fates = numpy.array([(flips + drop) / 2, 1 - flips, (flips - drop) / 2])
    independent = numpy.ones(1)
    for _ in range(cell.cluster):
        independent = numpy.convolve(independent, fates)
    alike = numpy.zeros_like(independent)
    alike[:: cell.cluster] = fates
    values = numpy.arange(-cell.cluster, cell.cluster + 1) / cell.cluster
    return values, (1 - cell.correlation) * independent + cell.correlation * alike


def draw_gates(cell: Cell, drop: float, gates: int, generator: numpy.random.Generator) -> Moments:
    """Moments of the per-picture differences of many gates at once; a set is drawn as how often it has each value."""
    values, probabilities = picture_outcomes(cell, drop)
    pictures = cell.questions // cell.cluster
    counts = generator.multinomial(pictures, probabilities, size=gates)  # [gates, values]
    return Moments(pictures, counts @ values, counts @ values**2)


def simulate(cell: Cell, gates: int, seed: int) -> dict:
    """How often the gates of a cell come out as they should not, and as they should."""
    order = [round(1000 * part) for part in (cell.flip_rate, cell.margin, cell.correlation)]
    generator = numpy.random.default_rng([seed, cell.questions, cell.cluster, *order])
    at_margin = draw_gates(cell, cell.margin, gates, generator)
    unharmed = draw_gates(cell, 0.0, gates, generator)
    harmed = bounds(draw_gates(cell, 2 * cell.margin, gates, generator))
    interval = bounds(at_margin)
    return {
        **asdict(cell),
        "false_pass": share(interval.low >= -cell.margin),
        "false_fail": share(interval.high < -cell.margin),
        "pass_without_drop": share(bounds(unharmed).low >= -cell.margin),
        "fail_at_double_margin": share(harmed.high < -cell.margin),
        "tried": {
            name: [share(tried_bound(name, moments) >= -cell.margin) for moments in (at_margin, unharmed)]
            for name in TRIED
        },
    }


def share(outcomes: numpy.ndarray) -> float:
    """Rounded to what so many gates can tell."""
    return round(float(outcomes.mean()), 5)


def tried_bound(name: str, moments: Moments) -> numpy.ndarray:
    """The low bound by one of the compared rules."""
    added, confidence = TRIED[name]
    return bound(moments, added, side=-1, confidence=confidence)


def compare_rule(name: str, passes: list[list[float]]) -> dict:
    """One of the compared rules over all cells, given its PASSes at a drop of the margin and of 0 in each."""
    at_margin, unharmed = zip(*passes, strict=True)
    return {
        "rule": name,
        "false_pass": max(at_margin),
        "pass_without_drop": round(sum(unharmed) / len(unharmed), 5),
        "between": [worst_between(margin, name) for margin in MARGINS],
    }


def worst_between(margin: float, name: str) -> dict:
    """The number of pictures up to 3000 at which most false PASSes happen if every flip is a loss: exact binomials."""
    worst = {"false_pass": 0.0}
    for pictures in range(2, max(QUESTIONS) + 1):
        lost = numpy.arange(min(pictures, int(pictures * margin) + 1) + 1.0)
        passing = tried_bound(name, Moments(pictures, -lost, lost)) >= -margin
        if passing.any():
            rate = round(binomial_tail(pictures, margin, int(lost[passing].max())), 5)
            worst = max(worst, {"false_pass": rate, "pictures": pictures}, key=lambda each: each["false_pass"])
    return {"margin": margin, **worst}


def binomial_tail(count: int, probability: float, most: int) -> float:
    """Probability of at most `most` hits."""
    hits = numpy.arange(1.0, most + 1)
    ratios = (count - hits + 1) / hits * probability / (1 - probability)
    return float((1 - probability) ** count * (1 + numpy.cumprod(ratios).sum()))


def record(gates: int, seed: int) -> dict:
    """Everything, ready for JSON."""
    rows = [simulate(cell, gates, seed) for cell in cells()]
    tried = [row.pop("tried") for row in rows]
    return {
        "command": "python tests/simulate_verdict.py",
        "gates": gates,
        "seed": seed,
        "rule": {"low": LOW_PSEUDO_PICTURES, "high": HIGH_PSEUDO_PICTURES, "confidence": CONFIDENCE},
        "tried": [compare_rule(name, [row[name] for row in tried]) for name in TRIED],
        "cells": rows,
    }


def write(found: dict, path: Path) -> None:
    """One row for each line, so that a difference can be read."""
    parts = [f" {json.dumps(key)}: {json_lines(value)}" for key, value in found.items()]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def json_lines(value: object) -> str:
    """JSON with the rows of a table on lines of their own."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return json.dumps(value)
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"


def print_summary(found: dict) -> None:
    """The tables of RESULTS.md."""
    rows = found["cells"]
    print("| questions | flips | cluster | margin | correlation | false PASS | false FAIL |")
    for row in sorted(rows, key=lambda each: -each["false_pass"])[:6]:
        print(f"| {where(row)} | {percent(row['false_pass'])} | {percent(row['false_fail'])} |")
    worst = max(rows, key=lambda each: each["false_fail"])
    print(f"worst false FAIL: | {where(worst)} | {percent(worst['false_fail'])}\n")
    for rule in found["tried"]:
        rates = rule["false_pass"], max(each["false_pass"] for each in rule["between"]), rule["pass_without_drop"]
        print(f"| {rule['rule']} | {' | '.join(percent(rate) for rate in rates)} |")
    for key in ("pass_without_drop", "fail_at_double_margin"):
        print(f"\n{key}, one question for each picture")
        for margin, flip_rate in product(MARGINS, FLIP_RATES):
            mine = [row for row in rows if (row["margin"], row["flip_rate"], row["cluster"]) == (margin, flip_rate, 1)]
            if mine:
                print(f"| {margin:.1%} | {flip_rate:.0%} | " + " | ".join(f"{row[key]:.0%}" for row in mine) + " |")


def where(row: dict) -> str:
    """Which cell a row is."""
    cell = f"{row['questions']} | {row['flip_rate']:.0%} | {row['cluster']} | {row['margin']:.1%}"
    return f"{cell} | {row['correlation']:g}"


def percent(rate: float) -> str:
    """With two digits behind the point."""
    return f"{100 * rate:.2f} %"


def main() -> None:
    """Simulate, print what is worst and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RECORD)
    options = parser.parse_args()
    found = record(options.gates, options.seed)
    write(found, options.output)
    print_summary(found)


if __name__ == "__main__":
    main()
