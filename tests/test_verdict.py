"""Every outcome and every ground, on made-up scores."""

import json
from dataclasses import asdict

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from vlquant.check_result import EXIT_CODES
from vlquant.intervals import paired_interval
from vlquant.verdict import (
    ACCURACY,
    DISTRIBUTION,
    FAIL,
    FAILED,
    INCONCLUSIVE,
    LIMITS,
    NOT_DECIDED,
    PASS,
    PASSED,
    STRUCTURE,
    UNINFORMATIVE,
    AnswerTokens,
    KindScores,
    decide,
    judge_distribution,
    judge_kinds,
    limits_for,
    reach_verdict,
)

QUICK = settings(max_examples=100, deadline=None)
UNHARMED = [0.0] * 980 + [-1.0] * 10 + [1.0] * 10
HARMED = [0.0] * 850 + [-1.0] * 140 + [1.0] * 10
ALIKE = AnswerTokens(tokens=10, divergence=0.02, same_top=10)
APART = AnswerTokens(tokens=10, divergence=3.0, same_top=6)


def kind(name: str, lost: int, of: int = 200, reference: float = 0.8, margin: float | None = None) -> KindScores:
    return KindScores(name, reference, (-1.0,) * lost + (0.0,) * (of - lost), margin)


def test_a_good_bundle_passes():
    verdict = reach_verdict(UNHARMED, 0.015, distribution=judge_distribution([ALIKE] * 50, 4))
    assert verdict.outcome == PASS and verdict.grounds == () and verdict.pictures_needed is None
    assert verdict.reason == "the score changed by +0.00 points, surely no worse than -0.85: within the margin of 1.5"


def test_a_worse_bundle_fails_on_accuracy():
    verdict = reach_verdict(HARMED, 0.015)
    assert verdict.outcome == FAIL and [ground.name for ground in verdict.grounds] == [ACCURACY]
    assert verdict.reason.startswith(
        "accuracy: over all pictures the score changed by -13.00 points, surely worse than -11."
    )
    assert verdict.reason.endswith("beyond the margin of 1.5") and verdict.pictures_needed is None


@pytest.mark.parametrize("pictures", [1, 5, 20])
def test_few_pictures_without_a_flip_prove_nothing(pictures):
    verdict = reach_verdict([0.0] * pictures, 0.01)
    assert verdict.outcome == INCONCLUSIVE and verdict.pictures_needed > 2000
    assert verdict.reason.endswith(f"; about {verdict.pictures_needed} pictures would decide")


def test_a_drop_of_just_the_margin_is_never_decided():
    verdict = reach_verdict([-0.01] * 100, 0.01)
    assert verdict.outcome == INCONCLUSIVE and verdict.pictures_needed is None
    assert verdict.reason.endswith("no number of pictures would decide, for the drop is the margin")


def test_any_difference_of_structure_fails():
    verdict = reach_verdict(UNHARMED, 0.015, structure=["prompt ids differ in 3 of 40 questions"])
    assert verdict.outcome == FAIL
    assert verdict.reason == "structure: prompt ids differ in 3 of 40 questions"
    assert reach_verdict([], 0.015, structure=["stop ids differ"]).outcome == FAIL


def test_distributions_far_apart_fail_however_good_the_answers():
    verdict = reach_verdict(UNHARMED, 0.015, distribution=judge_distribution([APART] * 50, 4))
    assert verdict.outcome == FAIL and [ground.name for ground in verdict.grounds] == [DISTRIBUTION] * 2
    assert "the mean KL divergence is 0.3000 nats, surely above 0.2" in verdict.grounds[0].reason
    assert "60.00 % of answer tokens have the same likeliest token, surely below 6" in verdict.grounds[1].reason


def test_every_ground_is_named():
    verdict = reach_verdict(
        HARMED,
        0.015,
        kinds=[kind("charts", lost=60), kind("receipts", lost=0)],
        distribution=judge_distribution([APART] * 50, 8),
        structure=["stop ids differ"],
    )
    names = [ground.name for ground in verdict.grounds]
    assert names == [STRUCTURE, DISTRIBUTION, DISTRIBUTION, ACCURACY, ACCURACY]
    assert all(f"{ground.name}: {ground.reason}" in verdict.reason for ground in verdict.grounds)
    assert "charts: the score changed by -30.00 points" in verdict.reason


def test_few_tokens_are_no_proof():
    for pictures in (1, 2):
        found = judge_distribution([APART] * pictures, 4)
        assert found.divergence == pytest.approx(0.3) and found.divergence_low < found.limits.divergence
        assert reach_verdict(UNHARMED, 0.015, distribution=found).outcome == PASS


def test_means_over_tokens_weigh_long_answers():
    found = judge_distribution([AnswerTokens(10, 1.0, 10), AnswerTokens(30, 0.0, 20)], 4)
    assert (found.divergence, found.top_agreement) == pytest.approx((1 / 40, 30 / 40))
    assert found.divergence_low <= found.divergence and found.top_agreement <= found.top_agreement_high


@pytest.mark.parametrize(("bits", "width"), [(8, 8), (4, 4), (4.6, 4), (7.5, 4), (3, 3), (2, 3), (16, 8)])
def test_limits_by_width(bits, width):
    assert limits_for(bits) is LIMITS[width]


@pytest.mark.parametrize("pictures", [30, 300])
def test_a_true_divergence_at_the_limit_rarely_fails(pictures):
    """Divergences of pictures have a long tail: lognormal, some of them ten times the mean."""
    generator, fails = numpy.random.default_rng(0), 0
    for _ in range(400):
        sums = generator.lognormal(mean=-(1.2**2) / 2, sigma=1.2, size=pictures) * 0.06 * 10
        found = judge_distribution([AnswerTokens(10, each, 10) for each in sums.tolist()], 4)
        fails += found.divergence_low > found.limits.divergence
    assert fails <= 0.07 * 400


def test_kinds_by_outcome():
    kinds = [kind("good", 0, of=400), kind("bad", 60), kind("open", 4)]
    good, bad, open_ = judge_kinds(kinds, 0.015)
    assert (good.outcome, bad.outcome, open_.outcome) == (PASSED, FAILED, NOT_DECIDED)
    assert good.pictures_needed is None and bad.pictures_needed is None and open_.pictures_needed > 200
    assert open_.reason.endswith(f"about {open_.pictures_needed} pictures of this kind would decide")


def test_a_kind_has_its_own_margin():
    (strict, lenient) = judge_kinds([kind("strict", 60), kind("lenient", 60, margin=0.5)], 0.015)
    assert (strict.outcome, strict.margin) == (FAILED, 0.015)
    assert (lenient.outcome, lenient.margin) == (PASSED, 0.5)


@pytest.mark.parametrize(("reference", "why"), [(0.98, "hardly an answer"), (0.39, "it cannot do this itself")])
def test_a_kind_without_information_decides_nothing(reference, why):
    verdict = reach_verdict(UNHARMED, 0.015, kinds=[kind("boxes", lost=150, reference=reference)])
    (boxes,) = verdict.kinds
    assert verdict.outcome == PASS and boxes.outcome == UNINFORMATIVE
    assert f"scores {100 * reference:.1f}: {why}" in boxes.reason
    assert boxes.probability is None and boxes.difference.mean == -0.75


def test_kinds_at_the_edges_are_informative():
    outcomes = [
        each.outcome for each in judge_kinds([kind("a", 60, reference=0.97), kind("b", 60, reference=0.4)], 0.01)
    ]
    assert outcomes == [FAILED, FAILED]


def test_what_fails_alone_need_not_fail_among_ten():
    """Seven of sixty lost: p is 0.045 or so alone, ten times that among ten. Uninformative kinds do not count."""
    suspect = kind("suspect", 7, of=60)
    (alone,) = judge_kinds([suspect], 0.03)
    assert alone.outcome == FAILED and 0.01 < alone.probability < 0.05
    idle = [kind(f"idle {index}", 0, of=60, reference=0.99) for index in range(9)]
    assert judge_kinds([suspect, *idle], 0.03)[0].outcome == FAILED
    among_ten = judge_kinds([suspect, *(kind(f"other {index}", 0, of=60) for index in range(9))], 0.03)[0]
    assert among_ten.outcome == NOT_DECIDED and among_ten.probability == pytest.approx(10 * alone.probability)
    assert among_ten.pictures_needed > 60


def test_kinds_that_are_not_decided_do_not_stop_a_pass():
    verdict = reach_verdict(UNHARMED, 0.015, kinds=[kind("rare", 0, of=10)])
    assert verdict.outcome == PASS and verdict.kinds[0].outcome == NOT_DECIDED


def test_a_failed_kind_fails_the_whole():
    verdict = reach_verdict(UNHARMED, 0.015, kinds=[kind("charts", 60)])
    assert verdict.outcome == FAIL and verdict.grounds[0].reason.startswith("charts: ")


def test_a_verdict_is_json():
    verdict = reach_verdict(
        HARMED,
        0.015,
        kinds=[kind("charts", 60), kind("rare", 0, of=3)],
        distribution=judge_distribution([APART] * 9, 3),
    )
    read = json.loads(json.dumps(asdict(verdict), allow_nan=False))
    assert read["outcome"] == FAIL and read["kinds"][1]["outcome"] == NOT_DECIDED
    assert read["distribution"]["limits"] == {"divergence": 0.25, "top_agreement": 0.88}


def test_every_outcome_has_an_exit_code():
    assert [EXIT_CODES[outcome] for outcome in (PASS, FAIL, INCONCLUSIVE)] == [0, 3, 4]


@some.composite
def flips_and_more_losses(draw):
    """Differences in thirds, and the same after some answers were lost."""
    pictures = draw(some.integers(1, 400))
    lost, won = draw(some.integers(0, pictures)), draw(some.integers(0, 20))
    before = [-1 / 3] * lost + [1 / 3] * won + [0.0] * (pictures - lost)
    more = draw(some.integers(0, len(before)))
    return before, [max(-1.0, each - 2 / 3) for each in before[:more]] + before[more:]


@QUICK
@given(flips_and_more_losses(), some.floats(0.001, 0.3))
def test_more_lost_answers_never_turn_a_fail_into_a_pass(sets, margin):
    before, after = (decide(paired_interval(each), margin) for each in sets)
    assert (before, after) != (FAIL, PASS)


@QUICK
@given(flips_and_more_losses(), some.floats(0.001, 0.1), some.floats(0.0, 0.1))
def test_a_wider_margin_is_never_harder(sets, margin, more):
    order = [FAIL, INCONCLUSIVE, PASS]
    interval = paired_interval(sets[0])
    assert order.index(decide(interval, margin + more)) >= order.index(decide(interval, margin))
