"""`vlquant bisect` on a small checkpoint: it names the part that was broken, and nothing where nothing fails."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from vlquant.bisect import VISION, Bisection, bisect, search
from vlquant.check import check
from vlquant.check_options import CheckOptions
from vlquant.check_table import print_bisection
from vlquant.errors import InvalidRequest
from vlquant.export.vision import export_vision
from vlquant.intervals import Interval
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.verdict import ACCURACY, DISTRIBUTION, FAIL, INCONCLUSIVE, PASS, DistributionLimits, Ground, Verdict

from tests import planted
from tests.golden_folder import golden_folder
from tests.test_check import write_set

SOURCE = golden_folder() / "internlm2_internvl2_5"
FEW = CheckOptions(limit=12, max_new_tokens=4)
SURE = CheckOptions(limit=20, max_new_tokens=4)
"""Six pictures: of three, nothing about a layer is sure."""


def verdict(outcome: str) -> Verdict:
    grounds = (Ground(ACCURACY, "it is worse"),) if outcome == FAIL else ()
    return Verdict(outcome, "because", grounds, Interval(0, 0, 0), 0.01, 1, None, (), None)


class Made:
    """Parts of which some are broken: each adds its own divergence, and the FAIL ends without the guilty ones."""

    def __init__(self, divergences: dict, guilty: set):
        self.divergences, self.guilty, self.parts = divergences, guilty, list(divergences)

    def divergence(self, parts):
        return sum(each for part, each in self.divergences.items() if part not in parts)

    def verdict(self, parts):
        return verdict(FAIL) if self.guilty - parts else verdict(PASS)


@pytest.mark.parametrize("guilty", [{2}, {VISION}, {0, 2}, {1}])
def test_the_smallest_set_is_named(guilty):
    found = search(Made({VISION: 0.1, 0: 0.2, 1: 0.3, 2: 0.9}, guilty), lambda event: None)
    names = {part if part == VISION else f"layer {part}" for part in guilty}
    assert set(found.parts) == names and found.after.outcome == PASS
    assert [name for name, _ in found.gains] == ["layer 2", "layer 1", "layer 0", VISION]
    assert dict(found.gains)["layer 2"] == pytest.approx(0.9)


def test_without_a_fail_there_is_nothing_to_find():
    found = search(Made({0: 0.1}, set()), lambda event: None)
    assert found == Bisection(verdict(PASS), (), verdict(PASS), ())


def test_no_part_is_to_blame_for_another_prompt(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = quantize(SOURCE, recipe=Recipe(method="rtn", bits=4, group_size=32), output=tmp_path / "bundle")
    planted.set_system_message(bundle, "You are a parrot.")
    with pytest.raises(InvalidRequest, match="not read as its reference"):
        bisect(bundle, reference=SOURCE, options=FEW)


def test_what_lies_outside_all_parts_is_said_at_once():
    made = Made({VISION: 0.1, 0: 0.2}, {"the head"})
    with pytest.raises(InvalidRequest, match="embedding, final norm or head"):
        search(made, lambda event: None)


def test_what_is_printed():
    console = Console(file=io.StringIO(), width=100, record=True)
    found = search(Made({VISION: 0.1, 0: 0.2}, {0}), lambda event: None)
    print_bisection(found, console)
    print_bisection(search(Made({0: 0.1}, set()), lambda event: None), console)
    text = console.export_text()
    assert "with layer 0 in float: PASS" in text and "-0.20000" in text and "there is nothing to find: PASS" in text


def test_a_broken_layer_of_a_real_bundle(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Random weights: no score means anything, so that only distributions count.
    monkeypatch.setattr("vlquant.verdict.LIMITS", {4: DistributionLimits(0.05, 0.0)})
    bundle = quantize(SOURCE, recipe=Recipe(method="rtn", bits=4, group_size=32), output=tmp_path / "bundle")
    broken = planted.copied(bundle, tmp_path / "broken")
    planted.scale_layer(broken, 1, 3.0)
    found = bisect(broken, reference=SOURCE, options=FEW)
    assert found.before.outcome == FAIL and found.parts == ("layer 1",) and found.after.outcome == INCONCLUSIVE
    assert bisect(bundle, reference=SOURCE, options=FEW).parts == ()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    bundle = quantize(SOURCE, recipe=Recipe(method="rtn", bits=4, group_size=32), output=tmp_path_factory.mktemp("bisect") / "bundle")
    export_vision(bundle)
    return bundle


@pytest.fixture
def lenient(tmp_path, monkeypatch):
    """The limits of the whole model let everything through: random weights, whose scores and likelihoods mean nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("vlquant.verdict.LIMITS", {4: DistributionLimits(100.0, 0.0)})


def test_a_layer_beyond_its_own_limit_is_named(exported, tmp_path, lenient):
    broken = planted.copied(exported, tmp_path / "broken")
    planted.scale_layer(broken, 1, 1.3)
    found = bisect(broken, reference=SOURCE, options=SURE)
    assert {each.name for each in found.before.grounds} == {DISTRIBUTION} and "layer 1 of the language model" in found.before.reason
    assert found.parts == ("layer 1",) and found.after.outcome == INCONCLUSIVE


@pytest.mark.parametrize("memory", [None, 0.0001])
def test_a_tower_beyond_its_own_limit_is_named(exported, tmp_path, lenient, memory):
    broken = planted.copied(exported, tmp_path / "broken")
    planted.zero_head(broken, 0, 0)
    found = bisect(broken, reference=SOURCE, options=replace(FEW, memory=memory))
    assert {each.name for each in found.before.grounds} == {DISTRIBUTION} and "the exported vision tower gives" in found.before.reason
    assert found.parts == (VISION,) and found.after.outcome == INCONCLUSIVE


def test_several_broken_parts_are_all_named(exported, tmp_path, lenient):
    broken = planted.copied(exported, tmp_path / "broken")
    planted.scale_layer(broken, 0, 1.3)
    planted.zero_head(broken, 1, 1)
    assert bisect(broken, reference=SOURCE, options=SURE).parts == (VISION, "layer 0")


def test_whole_parts_are_not_accused(exported, lenient):
    found = bisect(exported, reference=SOURCE, options=SURE)
    assert found.before.outcome == INCONCLUSIVE and found.parts == () and found.before.parts.tile is not None
    assert [each.roundings for each in found.before.parts.layers] == pytest.approx([1] * 3)


def test_a_tower_is_judged_without_any_answer(exported, tmp_path, lenient):
    broken, options = planted.copied(exported, tmp_path / "broken"), CheckOptions(sets=(str(write_set(tmp_path, answers=False)),), memory=0.0001)
    planted.zero_head(broken, 0, 0)
    result = check(broken, reference=SOURCE, options=options)
    assert result.distribution is None and result.blame is None and result.verdict.parts.layers == ()
    assert result.verdict.outcome == FAIL and "the exported vision tower gives" in result.verdict.reason
    assert bisect(broken, reference=SOURCE, options=options).parts == (VISION,)
