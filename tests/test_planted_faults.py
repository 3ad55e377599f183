"""What `check` and `bisect` said of the demo model with a fault planted: recorded by tests/planted_faults.py.

250 questions; tests/RESULTS.md has the numbers behind the outcomes.
"""

import json
from pathlib import Path

import pytest

RECORD = json.loads((Path(__file__).parent / "data" / "planted_faults.json").read_text())["found"]
STRUCTURE = ("system message", "tiles turned")
MEASURED = ("scales of layer", "2 bits in layer", "head ")


def of_kind(*beginnings: str) -> dict[str, dict]:
    return {name: found for name, found in RECORD.items() if name.startswith(beginnings)}


@pytest.mark.parametrize("beginning", [*STRUCTURE, *MEASURED])
def test_each_fault_was_planted_at_three_places(beginning):
    assert len(of_kind(beginning)) == 3


def test_good_bundles_do_not_fail():
    good = of_kind("clean-", "float copy", "reference")
    assert len(good) == 7 and all(found["outcome"] != "FAIL" for found in good.values())


def test_the_reference_loses_nothing_against_itself():
    found = RECORD["reference"]
    assert found["mean_difference"] == 0 and found["divergence"] == 0 and found["top_agreement"] == 1


def test_another_prompt_or_order_fails_by_structure():
    for found in of_kind(*STRUCTURE).values():
        assert found["outcome"] == "FAIL" and "structure" in found["grounds"]


@pytest.mark.parametrize("name", of_kind(*MEASURED))
def test_damaged_weights_fail_and_their_part_is_named(name):
    found = RECORD[name]
    assert found["outcome"] == "FAIL" and set(found["grounds"]) <= {"distribution", "accuracy"}
    part = "the vision tower" if name.startswith("head ") else f"layer {name.split()[-1]}"
    assert found["parts"] == [part] and found["after"] != "FAIL"
