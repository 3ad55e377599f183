"""When a layer or the vision tower is further away than its form promises, on numbers worked out by hand."""

import json
import math
from dataclasses import asdict, replace

import numpy
import pytest

from vlquant.intervals import student_quantile
from vlquant.part_limits import MOST_ROUNDINGS, LayerNoise, PartDistances, WorstTile, judge_layers, part_faults
from vlquant.verdict import DISTRIBUTION, FAIL, PASS, reach_verdict

UNHARMED = [0.0] * 980 + [-1.0] * 10 + [1.0] * 10
TILE = WorstTile("q", 3, 90.0, 0.9999999, 2e-5, precision="fp32", least_cosine=0.999999, most_difference=1e-4)


def noise(added, rounding=None, layer=0) -> LayerNoise:
    return LayerNoise(layer, tuple(added), tuple(rounding or [1.0] * len(added)))


def test_a_ratio_of_squares_is_a_square():
    # 4 + 5 beside 1 + 3: nine quarters, so three halves as far.
    (found,) = judge_layers([noise([4.0, 5.0], [1.0, 3.0])])
    assert found.roundings == 1.5 and found.roundings_low < 1.5


def test_the_bound_is_a_students_with_one_more_picture_rounded_plainly():
    # Squares 9, 9, 9 and the added 1: mean 7, standard error 2 = sqrt(mean square 61 - 49) / sqrt(3).
    (found,) = judge_layers([noise([9.0, 9.0, 9.0])])
    assert found.roundings == 3
    assert found.roundings_low == pytest.approx(math.sqrt(max(0.0, 7 - 2 * student_quantile(0.95, 3))))
    assert found.roundings_low == pytest.approx(1.514, abs=1e-3)


def test_more_layers_have_to_be_surer():
    alone, among = (judge_layers([noise([9.0] * 8, layer=layer) for layer in range(count)])[0] for count in (1, 20))
    assert among.roundings == alone.roundings and among.roundings_low < alone.roundings_low
    # 73 / 9 and sqrt((8 * 81 + 1) / 9 - (73 / 9) ** 2) / sqrt(8).
    error = math.sqrt((649 / 9 - (73 / 9) ** 2) / 8)
    assert among.roundings_low == pytest.approx(math.sqrt(73 / 9 - error * student_quantile(1 - 0.05 / 20, 8)))


def test_few_pictures_are_no_proof_and_many_are():
    assert [judge_layers([noise([6.25] * count)])[0].is_broken for count in (1, 2, 24)] == [False, False, True]


def test_float_and_plainly_rounded_layers_never_fail():
    layers = judge_layers([noise([0.0] * 40, layer=0), noise([1.0] * 40, layer=1)])
    assert [each.roundings for each in layers] == [0, 1] and [each.roundings_low for each in layers] == [0, 1]
    assert not any(each.is_broken for each in layers) and part_faults(PartDistances(layers)) == []


@pytest.mark.parametrize("pictures", [24, 200])
def test_a_layer_at_the_limit_rarely_fails(pictures):
    """Ratios that differ from picture to picture by a third and more, as the widest that was measured."""
    generator, fails = numpy.random.default_rng(0), 0
    for _ in range(400):
        squares = MOST_ROUNDINGS**2 * generator.lognormal(mean=-(0.7**2) / 2, sigma=0.7, size=pictures)
        fails += judge_layers([noise(squares.tolist())])[0].is_broken
    assert fails <= 0.07 * 400


def test_a_broken_layer_fails_the_whole_and_is_named():
    layers = judge_layers([noise([0.25] * 40, layer=2), noise([9.0] * 40, layer=3)])
    verdict = reach_verdict(UNHARMED, 0.015, parts=PartDistances(layers))
    assert verdict.outcome == FAIL and [each.name for each in verdict.grounds] == [DISTRIBUTION]
    assert verdict.grounds[0].reason.startswith(
        "layer 3 of the language model is 3.00 times as far from the reference's as plain rounding to the same bits would "
        "leave it, surely more than 2."
    )
    assert verdict.grounds[0].reason.endswith(": beyond the limit of 1.5")
    assert reach_verdict(UNHARMED, 0.015, parts=PartDistances(layers[:1])).outcome == PASS


def test_a_broken_tower_fails_the_whole():
    turned, spiked = replace(TILE, cosine=0.98), replace(TILE, difference=0.27)
    assert not TILE.is_broken and turned.is_broken and spiked.is_broken
    assert reach_verdict(UNHARMED, 0.015, parts=PartDistances(tile=TILE)).outcome == PASS
    reasons = [reach_verdict(UNHARMED, 0.015, parts=PartDistances(tile=each)).reason for each in (turned, spiked)]
    assert reasons == [
        "distribution: the exported vision tower gives tile 3 of q features of cosine 0.98 with the reference's, where fp32 keeps 0.999999",
        "distribution: the exported vision tower gives tile 3 of q features up to 0.27 of the largest feature away, where fp32 keeps within 0.0001",
    ]


def test_distances_are_json():
    verdict = reach_verdict([], 0.015, parts=PartDistances(judge_layers([noise([1e4] * 3)]), TILE))
    read = json.loads(json.dumps(asdict(verdict), allow_nan=False))
    assert read["parts"]["layers"][0]["roundings"] == 100 and read["parts"]["tile"]["precision"] == "fp32"
