"""Results of checks as they may come out, made up: for the page and the terminal. Every number fits the others."""

import random
from dataclasses import replace
from functools import cache
from statistics import fmean

from vlquant.calib_data.samples import KINDS, draw_sample
from vlquant.check_result import (
    FORMAT_VERSION,
    AnswerFaults,
    AskedSet,
    Blame,
    CheckResult,
    Disagreement,
    Flips,
    GeneratedResult,
    HistogramBin,
    KindResult,
    LayerErrors,
    NoiseFloor,
)
from vlquant.distributions import DistributionSummary
from vlquant.intervals import bootstrap_interval, mcnemar_probability
from vlquant.part_limits import LayerDistance, PartDistances, WorstTile
from vlquant.report import Card
from vlquant.tiling import tile_picture
from vlquant.verdict import FAIL, INCONCLUSIVE, PASS, AnswerTokens, KindScores, judge_distribution, reach_verdict

OUTCOMES = (PASS, FAIL, INCONCLUSIVE)
PICTURES = {PASS: 110, FAIL: 60, INCONCLUSIVE: 16}
"""Per kind of question."""
CHANCES = {PASS: (0.004, 0.003), FAIL: (0.16, 0.03), INCONCLUSIVE: (0.06, 0.04)}
"""Of an answer to be lost, and to be won."""
REFERENCE = dict(zip(KINDS, (0.82, 0.79, 0.71, 0.93, 0.66, 0.985, 0.88, 0.37, 1.0, 0.74, 0.61), strict=True))
QUESTIONS_PER_PICTURE = 4
SHIFT = {PASS: -6.6, FAIL: -3.2, INCONCLUSIVE: -6.2}
"""Mean logarithm of a token's divergence."""
STRUCTURE = (
    "builtin check/0/3/chart, question 2: the prompts' token ids differ from token 6 on ([17, 4, 9] in the reference, [17, 9, 4] in the bundle)",
    "builtin check/0/8/several, question 1: pictures are cut into [2, 4] tiles by the reference, [4, 2] by the bundle",
)


@cache
def made_up(outcome: str) -> CheckResult:
    """A whole result with this outcome."""
    chance = random.Random(outcome)
    scores = {kind: differences(chance, outcome, kind) for kind in KINDS}
    tokens = [picture_tokens(chance, SHIFT[outcome]) for _ in range(200)]
    divergences = [each for picture in tokens for each in picture]
    pictures = [AnswerTokens(len(own), sum(own), sum(each < 0.25 for each in own)) for own in tokens]
    every = [each for own in scores.values() for each in own]
    verdict = reach_verdict(
        every,
        0.015,
        kinds=[KindScores(kind, REFERENCE[kind], own, 0.05 if kind == "text" else None) for kind, own in scores.items()],
        distribution=judge_distribution(pictures, 4),
        structure=STRUCTURE if outcome == FAIL else (),
        parts=parts(24, worse=outcome == FAIL),
    )
    assert verdict.outcome == outcome, verdict.reason
    kinds = tuple(kind_result(chance, each) for each in verdict.kinds)
    questions = sum(each.questions for each in kinds)
    return CheckResult(
        format_version=FORMAT_VERSION,
        bundle="InternVL2_5-8B-gptq-4bit",
        bundle_sha256="3f" * 32,
        reference="InternVL2_5-8B",
        reference_sha256="a0" * 32,
        vision="onnx",
        sets=(AskedSet("builtin", "5c" * 32, len(every), questions, ("exact", "anls", "iou")),),
        seed=0,
        max_new_tokens=128,
        predictions_sha256=None,
        forced_text="reference",
        verdict=verdict,
        distribution=summary(divergences, verdict.distribution.top_agreement),
        histogram=histogram(divergences),
        generated=generated_result(every, kinds, questions),
        kinds=kinds,
        noise_floor=NoiseFloor(questions=64, changed=0, divergence=2.1e-9),
        blame=Blame(48, 0.00004, fmean(divergences), 1.02 * fmean(divergences)),
        layers=layers(24, worse=outcome == FAIL),
        disagreements=disagreements(30),
        recipe={"method": "gptq", "bits": 4, "group_size": 128, "damping": 0.05, "calibration": ["builtin"], "samples": 128, "tokens": 2048, "seed": 0},
        libraries={"vlquant": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.31.1", "transformers": "5.23.0"},
    )


def minimal() -> CheckResult:
    """What is left where the models do not fit the memory, nothing was exported, and nothing was asked twice."""
    result = made_up(INCONCLUSIVE)
    return replace(
        result,
        vision="torch (vision not checked)",
        verdict=reach_verdict([], 0.015),
        distribution=None,
        histogram=(),
        generated=None,
        kinds=(),
        noise_floor=None,
        blame=None,
        layers=(),
        disagreements=(),
        recipe={},
        libraries={},
    )


def differences(chance: random.Random, outcome: str, kind: str) -> tuple[float, ...]:
    """Per picture, a mean over its questions."""
    lost, won = CHANCES[outcome]
    if kind == "several":
        lost = won = 0.0
    if kind == "yes_no":
        won = 0.0  # The reference has hardly a wrong answer to correct.

    def flip() -> int:
        value = chance.random()
        return -1 if value < lost else int(value > 1 - won)

    return tuple(fmean(flip() for _ in range(QUESTIONS_PER_PICTURE)) for _ in range(PICTURES[outcome]))


def kind_result(chance, verdict) -> KindResult:
    change = verdict.difference.mean * verdict.pictures * QUESTIONS_PER_PICTURE
    lost, won = max(0, round(-change)), max(0, round(change))
    both = chance.randrange(4) if verdict.reference < 0.98 else 0
    flips = Flips(lost + both, won + both, changed=lost + won + 2 * both + chance.randrange(40))
    questions = verdict.pictures * QUESTIONS_PER_PICTURE
    return KindResult(verdict.kind, questions, verdict, verdict.reference + verdict.difference.mean, flips, chance.uniform(0.001, 0.004))


def generated_result(every, kinds, questions: int) -> GeneratedResult:
    lost, won, changed = (sum(getattr(each.flips, name) for each in kinds) for name in ("lost", "won", "changed"))
    reference = fmean(REFERENCE.values())
    return GeneratedResult(
        questions=questions,
        reference=reference,
        quantized=reference + fmean(every),
        display=bootstrap_interval(every, seed=0, resamples=50),
        flips=Flips(lost, won, changed),
        chance=mcnemar_probability(lost, won),
        reference_faults=AnswerFaults(truncated=0, empty=0, unparsed=3),
        quantized_faults=AnswerFaults(truncated=2, empty=1, unparsed=5),
        set_scores={"MME": {"perception": (1584.2, 1571.9), "reasoning": (612.5, 601.1), "total": (2196.7, 2173.0)}},
    )


def picture_tokens(chance: random.Random, shift: float) -> list[float]:
    """Divergences of the answer tokens about one picture."""
    return [chance.lognormvariate(shift, 1.6) for _ in range(chance.randrange(4, 30))]


def summary(divergences: list[float], agreement: float) -> DistributionSummary:
    ordered = sorted(divergences)
    return DistributionSummary(
        tokens=len(ordered),
        mean_divergence=fmean(ordered),
        median_divergence=ordered[len(ordered) // 2],
        high_divergence=ordered[len(ordered) * 99 // 100],
        largest_divergence=ordered[-1],
        top_agreement=agreement,
        mean_probability_change=-0.0021,
        probability_change_spread=0.031,
        surprise_ratio=1.0043,
    )


def histogram(divergences: list[float]) -> tuple[HistogramBin, ...]:
    """Half a decade each, from what float32 cannot tell from nothing."""
    edges = [0.0, *(10 ** (step / 2) for step in range(-14, 5))]
    pairs = zip(edges, edges[1:], strict=False)
    return tuple(HistogramBin(low, high, sum(low <= each < high for each in divergences)) for low, high in pairs)


def layers(count: int, *, worse: bool) -> tuple[LayerErrors, ...]:
    """Errors that grow with depth; with `worse`, one layer stands out."""

    def errors(layer: int) -> LayerErrors:
        error = (0.01 + 0.0004 * layer) * (6 if worse and layer == 13 else 1)
        return LayerErrors(layer, error, {"vision": 0.8 * error, "prompt": 1.3 * error, "answer": 1.1 * error if layer else None})

    return tuple(map(errors, range(count)))


def parts(count: int, *, worse: bool) -> PartDistances:
    """Layers better than plain rounding, but for the one that stands out; a tower as exact as its precision."""
    distances = (0.6 * (4.5 if worse and layer == 13 else 1) for layer in range(count))
    layers = tuple(LayerDistance(layer, distance, 0.95 * distance) for layer, distance in enumerate(distances))
    tile = WorstTile(key(1), 3, 88.4, 0.999999998, 3e-6, precision="fp32", least_cosine=0.999999, most_difference=1e-4)
    return PartDistances(layers, tile)


def key(index: int) -> str:
    return f"builtin {draw_sample('development', index).key}, question 1"


@cache
def disagreements(count: int) -> tuple[Disagreement, ...]:
    """One question about each scene of the development split, answered differently; lost ones first."""
    found = []
    for index in range(count):
        sample, question = draw_sample("development", index), draw_sample("development", index).questions[0]
        wrong = question.answer[:-1] + "8" if question.answer[-1:] != "8" else question.answer[:-1] + "3"
        other = question.answer.lower() + " ."
        scores, answers = [
            ((1.0, 0.0), (question.answer, wrong)),
            ((1.0, 0.5), (question.answer, wrong)),
            ((0.0, 1.0), (wrong, question.answer)),
            ((1.0, 1.0), (question.answer, other)),
        ][4 * index // count]
        found.append(Disagreement(key(index), sample.kind, question.text, (question.answer,), *answers, *scores))
    return tuple(found)


def made_up_cards(count: int = 24) -> list[Card]:
    """Cards of the first disagreements, with the scenes' own pictures and tiles."""
    cards = []
    for index, disagreement in enumerate(disagreements(30)[:count]):
        pictures = draw_sample("development", index).images
        maps = [tile_picture(picture, max_tiles=6, image_size=112, use_thumbnail=True)[1] for picture in pictures]
        cards.append(Card(disagreement, pictures, tuple(tuple(boxes) for boxes in maps)))
    return cards
