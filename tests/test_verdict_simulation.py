"""The committed record of tests/simulate_verdict.py holds what RESULTS.md claims, and is what is simulated today."""

import json
import math
from dataclasses import asdict
from itertools import product

import numpy
import pytest

from vlquant.intervals import CONFIDENCE, HIGH_PSEUDO_PICTURES, LOW_PSEUDO_PICTURES, paired_interval
from vlquant.verdict import PASS, decide

from tests.simulate_verdict import ALLOWED, RECORD, TRIED, Cell, cells, picture_outcomes, simulate, write

FOUND = json.loads(RECORD.read_text())
RULES = {rule["rule"]: rule for rule in FOUND["tried"]}
HARDEST = Cell(questions=3000, flip_rate=0.01, cluster=5, margin=0.01, correlation=1.0)
TYPICAL = Cell(questions=300, flip_rate=0.06, cluster=3, margin=0.02, correlation=0.5)


def row_of(cell: Cell) -> dict:
    return next(row for row in FOUND["cells"] if row.items() >= asdict(cell).items())


def test_every_cell_was_simulated_often_enough():
    asked = {
        each
        for each in product((100, 300, 1000, 3000), (0.01, 0.03, 0.06, 0.15), (1, 3, 5), (0.005, 0.01, 0.02))
        if each[3] <= each[1]
    }
    found = {(row["questions"], row["flip_rate"], row["cluster"], row["margin"]) for row in FOUND["cells"]}
    assert found == asked and len(FOUND["cells"]) == len(list(cells()))
    assert FOUND["gates"] >= 20_000


def test_false_passes_are_rare_in_every_cell():
    assert [row for row in FOUND["cells"] if row["false_pass"] > ALLOWED] == []


def test_false_fails_are_rare_in_every_cell():
    assert [row for row in FOUND["cells"] if row["false_fail"] > 0.055] == []


def test_the_record_is_of_todays_rule():
    rule = {"low": list(LOW_PSEUDO_PICTURES), "high": list(HIGH_PSEUDO_PICTURES), "confidence": CONFIDENCE}
    assert FOUND["rule"] == rule
    assert TRIED["-1, 95 %"] == (LOW_PSEUDO_PICTURES, CONFIDENCE)
    assert RULES["-1, 95 %"]["false_pass"] == max(row["false_pass"] for row in FOUND["cells"])


def test_what_was_tried_is_worse_between_the_cells_or_slower():
    between = {name: [each["false_pass"] for each in rule["between"]] for name, rule in RULES.items()}
    assert max(between["-1, 95 %"]) <= 0.071 < min(between["-1 and +1, 95 %"])
    for slower in ("-1 and +1, 97.5 %", "-1 twice, 95 %"):
        assert RULES["-1, 95 %"]["pass_without_drop"] > RULES[slower]["pass_without_drop"]


@pytest.mark.parametrize("cell", [HARDEST, TYPICAL], ids=["hardest", "typical"])
def test_two_cells_again(cell):
    gates, row = 20_000, row_of(cell)
    again = simulate(cell, gates, seed=1)
    for name in ("false_pass", "false_fail", "pass_without_drop", "fail_at_double_margin"):
        error = math.sqrt(row[name] * (1 - row[name]) * (1 / gates + 1 / FOUND["gates"]))
        assert again[name] == pytest.approx(row[name], abs=4 * error + 1e-4)


def test_the_simulated_gates_are_those_of_the_verdict():
    """Picture by picture, through the functions that a check calls."""
    generator, gates, passes = numpy.random.default_rng(0), 2000, 0
    values, probabilities = picture_outcomes(TYPICAL, 0.0)
    for _ in range(gates):
        differences = generator.choice(values, p=probabilities, size=TYPICAL.questions // TYPICAL.cluster)
        passes += decide(paired_interval(differences.tolist()), TYPICAL.margin) == PASS
    expected = row_of(TYPICAL)["pass_without_drop"]
    assert passes / gates == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / gates))


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_pictures_flip_as_described(correlation):
    """Drop, flips and correlation of a cell, from the probabilities of a picture's outcomes."""
    cell = Cell(questions=300, flip_rate=0.06, cluster=3, margin=0.01, correlation=correlation)
    values, probabilities = picture_outcomes(cell, 0.02)
    mean = probabilities @ values
    assert (probabilities.sum(), mean) == pytest.approx((1, -0.02))
    alone = 0.06 - 0.02**2
    assert probabilities @ values**2 - mean**2 == pytest.approx(alone * (1 + 2 * correlation) / 3)


def test_a_record_is_read_back_as_written(tmp_path):
    path = tmp_path / "record.json"
    write(FOUND, path)
    assert path.read_text() == RECORD.read_text() and json.loads(path.read_text()) == FOUND
