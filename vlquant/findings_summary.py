"""From what two models answered to what a check says of it. Arithmetic: runs no model, reads no file."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy
import torch

from vlquant.asking import Asked
from vlquant.bundle import Manifest
from vlquant.check_result import AnswerFaults, Disagreement, Flips, GeneratedResult, HistogramBin, KindResult, LayerErrors
from vlquant.distributions import TokenComparison
from vlquant.examination import Findings, grade
from vlquant.intervals import bootstrap_interval, mcnemar_probability
from vlquant.kept_answers import KeptAnswer
from vlquant.known_sets import known_set
from vlquant.set_scores import Graded, set_scores
from vlquant.verdict import AnswerTokens, KindScores, KindVerdict

SEED_OF_DISPLAY = 0
HISTOGRAM_EDGES = (0.0, *(10.0**power for power in (-6, -5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1)))
"""Nats."""
BEYOND = 1e9
"""Where the last bin of the histogram ends."""
MOST_DISAGREEMENTS = 200


@dataclass(frozen=True)
class Pair:
    """One question with both answers."""

    number: int
    asked: Asked
    reference: KeptAnswer
    quantized: KeptAnswer
    scores: tuple[float, float] | None
    """Of the reference, of the bundle; None: no right answer is known."""
    parsed: tuple[bool, bool]

    @property
    def picture(self) -> tuple[str, str]:
        """What questions share that are not independent."""
        return self.asked.set, self.asked.question.picture


def pairs_of(findings: Findings) -> list[Pair]:
    """Questions with both answers; empty if a model did not answer."""
    pairs = []
    answers = zip(findings.asked, findings.reference, findings.quantized, strict=False)
    for number, (asked, reference, quantized) in enumerate(answers):
        grades = [grade(asked, each.text) for each in (reference, quantized)]
        scores = None if None in grades else (grades[0].value, grades[1].value)
        parsed = tuple(each is None or each.parsed for each in grades)
        pairs.append(Pair(number, asked, reference, quantized, scores, parsed))
    return pairs


def by_picture(pairs: Iterable[Pair]) -> list[tuple[float, float]]:
    """Mean scores of every picture with a scored question, reference and bundle."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for each in pairs:
        if each.scores is not None:
            groups.setdefault(each.picture, []).append(each.scores)
    return [tuple(fmean(side) for side in zip(*scores, strict=True)) for scores in groups.values()]


def differences(pairs: Iterable[Pair]) -> list[float]:
    """Quantized minus reference, by picture."""
    return [quantized - reference for reference, quantized in by_picture(pairs)]


def kind_scores(pairs: Sequence[Pair]) -> list[KindScores]:
    """Scores of every kind of question that has any, in the order of their first appearance."""
    kinds = dict.fromkeys(each.asked.question.kind for each in pairs if each.scores is not None)
    own = {kind: [each for each in pairs if each.asked.question.kind == kind] for kind in kinds}
    return [
        KindScores(kind, fmean(reference for reference, _ in by_picture(some)), tuple(differences(some)))
        for kind, some in own.items()
    ]


def flips_of(pairs: Iterable[Pair]) -> Flips:
    """How answers changed."""
    pairs = list(pairs)
    scored = [each.scores for each in pairs if each.scores is not None]
    return Flips(
        lost=sum(after < before for before, after in scored),
        won=sum(after > before for before, after in scored),
        changed=sum(each.reference.text != each.quantized.text for each in pairs),
    )


def generated_result(pairs: Sequence[Pair]) -> GeneratedResult | None:
    """What both models answered; None if nobody knows what is right."""
    means = by_picture(pairs)
    if not means:
        return None
    flips = flips_of(pairs)
    return GeneratedResult(
        questions=sum(each.scores is not None for each in pairs),
        reference=fmean(reference for reference, _ in means),
        quantized=fmean(quantized for _, quantized in means),
        display=bootstrap_interval(differences(pairs), SEED_OF_DISPLAY),
        flips=flips,
        chance=mcnemar_probability(flips.lost, flips.won),
        reference_faults=faults_of([(each.reference, each.parsed[0]) for each in pairs]),
        quantized_faults=faults_of([(each.quantized, each.parsed[1]) for each in pairs]),
        set_scores=scores_of_sets(pairs),
    )


def faults_of(answers: Sequence[tuple[KeptAnswer, bool]]) -> AnswerFaults:
    """Answers that are wrong by their form."""
    return AnswerFaults(
        truncated=sum(answer.truncated for answer, _ in answers),
        empty=sum(not answer.text.strip() for answer, _ in answers),
        unparsed=sum(not parsed for _, parsed in answers),
    )


def scores_of_sets(pairs: Sequence[Pair]) -> dict[str, dict[str, tuple[float, float]]]:
    """Scores as sets are published with, for those that have some of their own."""
    found = {}
    for name in dict.fromkeys(each.asked.set for each in pairs):
        own = [each for each in pairs if each.asked.set == name and each.scores is not None]
        try:
            sides = [set_scores(name, [graded(each, side) for each in own]) for side in (0, 1)]
        except ValueError:  # Its name is that of a published set, its indices are not.
            continue
        if sides[0]:
            found[name] = {score: (sides[0][score], sides[1][score]) for score in sides[0]}
    return found


def unlike_published(pairs: Sequence[Pair], generated: GeneratedResult | None) -> list[str]:
    """Sets named as one with scores of its own that could not be reckoned."""
    names = dict.fromkeys(each.asked.set for each in pairs if each.scores is not None)
    return [name for name in names if known_set(name).own_scores and generated and name not in generated.set_scores]


def graded(pair: Pair, side: int) -> Graded:
    question = pair.asked.question
    return Graded(pair.scores[side], question.kind, question.picture, question.index)


def kind_results(
    asked: Sequence[Asked], pairs: Sequence[Pair], verdicts: Sequence[KindVerdict], compared: dict[int, TokenComparison]
) -> tuple[KindResult, ...]:
    """Everything about each kind of question; compared: answers along which distributions were compared, by number."""
    by_name, counts = {each.kind: each for each in verdicts}, Counter(each.question.kind for each in asked)
    results = []
    for kind in counts:
        own = [each for each in pairs if each.asked.question.kind == kind]
        means = by_picture(own)
        tokens = [each.divergence[each.finite] for number, each in compared.items() if asked[number].question.kind == kind]
        results.append(KindResult(
            kind=kind,
            questions=counts[kind],
            verdict=by_name.get(kind),
            quantized=fmean(quantized for _, quantized in means) if means else None,
            flips=flips_of(own) if own else None,
            divergence=float(torch.cat(tokens).mean()) if sum(map(len, tokens)) else None,
        ))  # fmt: skip
    return tuple(results)


def answer_tokens(asked: Sequence[Asked], compared: dict[int, TokenComparison]) -> list[AnswerTokens]:
    """What teacher forcing found, picture by picture."""
    groups: dict[tuple[str, str], list[TokenComparison]] = {}
    for number, each in compared.items():
        groups.setdefault((asked[number].set, asked[number].question.picture), []).append(each)
    return [
        AnswerTokens(
            tokens=sum(len(each.divergence) for each in own),
            divergence=sum(float(each.divergence[each.finite].sum()) for each in own),
            same_top=sum(int(each.same_top[each.finite].sum()) for each in own),
            not_finite=sum(int((~each.finite).sum()) for each in own),
        )
        for own in groups.values()
    ]


def histogram(compared: Iterable[TokenComparison]) -> tuple[HistogramBin, ...]:
    """Answer tokens by their divergence."""
    values = [each.divergence[each.finite] for each in compared]
    if not values:
        return ()
    edges = [*HISTOGRAM_EDGES, BEYOND]
    counts, _ = numpy.histogram(torch.cat(values).clamp(max=BEYOND).numpy(), bins=edges)
    return tuple(HistogramBin(low, high, int(count)) for low, high, count in zip(edges, edges[1:], counts, strict=False))


def layer_errors(manifest: Manifest) -> tuple[LayerErrors, ...]:
    """Mean errors of the linears of each layer, as the quantizer recorded them."""
    layers: dict[int, list] = {}
    for record in manifest.modules:
        number = next((int(part) for part in record.name.split(".") if part.isdigit()), None)
        if number is not None:
            layers.setdefault(number, []).append(record)
    return tuple(
        LayerErrors(
            layer=number,
            error=mean_known(record.error for record in records),
            class_errors={
                name: mean_known(record.class_errors.get(name) for record in records)
                for name in dict.fromkeys(name for record in records for name in record.class_errors)
            },
        )
        for number, records in sorted(layers.items())
    )


def mean_known(values: Iterable[float | None]) -> float | None:
    """The mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def disagreements(pairs: Sequence[Pair]) -> list[tuple[int, Disagreement]]:
    """Questions that both answered differently, with their numbers: what was lost first, then what was won, then the rest."""
    apart = [each for each in pairs if each.reference.text != each.quantized.text]
    change = {each.number: 0.0 if each.scores is None else each.scores[1] - each.scores[0] for each in apart}
    apart.sort(key=lambda each: (0 if change[each.number] < 0 else 1 if change[each.number] > 0 else 2, each.number))
    return [(each.number, disagreement(each)) for each in apart[:MOST_DISAGREEMENTS]]


def disagreement(pair: Pair) -> Disagreement:
    question = pair.asked.question
    gold = () if question.gold is None else tuple(dict.fromkeys(question.gold.answers))
    scores = pair.scores or (None, None)
    return Disagreement(question.key, question.kind, question.text, gold, pair.reference.text, pair.quantized.text, *scores)
