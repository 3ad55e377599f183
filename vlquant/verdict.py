"""From measured differences to a verdict with named grounds. Arithmetic only: no models, no files.

Scores, differences and margins are fractions of 1; sentences speak of points, and "surely" is 95 % confidence of that
bound. `asdict` makes JSON of every record.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vlquant.intervals import (
    CONFIDENCE,
    Interval,
    Moments,
    bound,
    failure_probability,
    holm,
    paired_interval,
    pictures_needed,
    ratio_values,
)
from vlquant.part_limits import PartDistances, part_faults

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
PASSED, FAILED, NOT_DECIDED, UNINFORMATIVE = "passed", "failed", "not decided", "uninformative"
"""Outcomes of a kind of question."""
KIND_OUTCOMES = {PASS: PASSED, FAIL: FAILED, INCONCLUSIVE: NOT_DECIDED}
STRUCTURE, DISTRIBUTION, ACCURACY = "structure", "distribution", "accuracy"
"""Grounds of a FAIL."""
INFORMATIVE_SCORES = (0.40, 0.97)
"""A kind whose reference scores outside decides nothing: nearly all its answers are wrong, or too easy to lose."""


@dataclass(frozen=True)
class DistributionLimits:
    """How far the likelihoods of answer tokens may be from the reference's."""

    divergence: float
    """Largest mean KL(reference || quantized) in nats."""
    top_agreement: float
    """Smallest share of tokens with the same likeliest token."""


LIMITS = {8: DistributionLimits(0.01, 0.985), 4: DistributionLimits(0.06, 0.95), 3: DistributionLimits(0.25, 0.88)}
"""By bits per weight; an average between 4 and 8 is held to the limits of 4, whose linears it has."""


@dataclass(frozen=True)
class AnswerTokens:
    """What teacher forcing found at the answer tokens of one picture's questions."""

    tokens: int
    divergence: float
    """Sum over the tokens, in nats."""
    same_top: int
    """Tokens with the same likeliest token."""
    not_finite: int = 0
    """Tokens at which the bundle's numbers overflowed; they agree in nothing."""


@dataclass(frozen=True)
class Distribution:
    """Means over all answer tokens, and the bounds that are held against the limits."""

    divergence: float
    divergence_low: float
    """What the mean KL surely exceeds."""
    top_agreement: float
    top_agreement_high: float
    """What the agreement surely stays below."""
    limits: DistributionLimits
    not_finite: int = 0
    """Tokens at which the bundle has no distribution, left out of the divergence."""


@dataclass(frozen=True)
class KindScores:
    """What was measured on one kind of question."""

    kind: str
    reference: float
    """The reference's score."""
    differences: tuple[float, ...]
    """Per picture, quantized minus reference."""
    margin: float | None = None
    """Largest acceptable drop; None: the overall one."""


@dataclass(frozen=True)
class KindVerdict:
    """What is known of one kind of question."""

    kind: str
    outcome: str
    reason: str
    reference: float
    difference: Interval
    margin: float
    pictures: int
    pictures_needed: int | None
    """About how many would decide; only when not decided."""
    probability: float | None
    """p-value against a drop within the margin, adjusted for the number of informative kinds; None if uninformative."""


@dataclass(frozen=True)
class Ground:
    """One reason for a FAIL."""

    name: str
    """"structure", "distribution" or "accuracy"."""
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The outcome with everything it rests on."""

    outcome: str
    reason: str
    grounds: tuple[Ground, ...]
    """Every ground of a FAIL; empty otherwise."""
    difference: Interval
    margin: float
    pictures: int
    pictures_needed: int | None
    """About how many would decide; only when INCONCLUSIVE, None if no number would."""
    kinds: tuple[KindVerdict, ...]
    distribution: Distribution | None
    parts: PartDistances = PartDistances()
    """Of layers and vision tower; those beyond their limits are grounds."""


def reach_verdict(
    differences: Sequence[float],
    margin: float,
    *,
    kinds: Sequence[KindScores] = (),
    distribution: Distribution | None = None,
    structure: Sequence[str] = (),
    parts: PartDistances = PartDistances(),
) -> Verdict:
    """FAIL on any ground, else PASS if the drop over all pictures is surely within `margin`, else INCONCLUSIVE.

    differences: per picture, -1 .. 1; structure: one sentence for each difference of prompt ids, tiles or stop ids.
    Kinds that are not decided, and distributions and parts within their limits, do not stand in the way of a PASS.
    """
    interval = paired_interval(differences)
    decided = decide(interval, margin)
    by_kind = judge_kinds(kinds, margin)
    grounds = [Ground(STRUCTURE, each) for each in structure]
    grounds += [Ground(DISTRIBUTION, each) for each in (*distribution_faults(distribution), *part_faults(parts))]
    if decided == FAIL:
        grounds.append(Ground(ACCURACY, f"over all pictures {drop_text(interval, margin, FAIL)}"))
    grounds += [Ground(ACCURACY, f"{each.kind}: {each.reason}") for each in by_kind if each.outcome == FAILED]
    outcome = FAIL if grounds else decided
    needed = pictures_needed(differences, margin) if outcome == INCONCLUSIVE else None
    reason = "; ".join(f"{ground.name}: {ground.reason}" for ground in grounds) or drop_text(interval, margin, decided)
    if outcome == INCONCLUSIVE:
        reason += needed_text(needed, "pictures")
    return Verdict(
        outcome, reason, tuple(grounds), interval, margin, len(differences), needed, by_kind, distribution, parts
    )


def decide(interval: Interval, margin: float) -> str:
    """PASS if the drop is surely within `margin`, FAIL if it is surely beyond, else INCONCLUSIVE."""
    if interval.low >= -margin:
        return PASS
    return FAIL if interval.high < -margin else INCONCLUSIVE


def judge_kinds(kinds: Sequence[KindScores], margin: float) -> tuple[KindVerdict, ...]:
    """What each kind of question shows at its own margin, or at `margin` if it has none.

    FAILs are adjusted by Holm's method, or among ten kinds of a good model one would soon fail by chance. That all
    kinds passed needs no such care: each has to show it by itself.
    """
    informative = [each for each in kinds if is_informative(each)]
    adjusted = iter(holm([failure_probability(each.differences, margin_of(each, margin)) for each in informative]))
    return tuple(
        judge_kind(each, margin_of(each, margin), next(adjusted), among=len(informative))
        if is_informative(each)
        else uninformative_kind(each, margin_of(each, margin))
        for each in kinds
    )


def is_informative(scores: KindScores) -> bool:
    """Whether the reference leaves room to lose answers and has enough to lose."""
    return INFORMATIVE_SCORES[0] <= scores.reference <= INFORMATIVE_SCORES[1]


def judge_kind(scores: KindScores, margin: float, probability: float, *, among: int) -> KindVerdict:
    """An informative kind; `probability` is adjusted for `among` of them."""
    interval, needed = paired_interval(scores.differences), None
    decided = decide(interval, margin)
    if decided == FAIL and probability >= 1 - CONFIDENCE:
        decided = INCONCLUSIVE
    reason = drop_text(interval, margin, decided)
    if decided == INCONCLUSIVE:
        # The strictest of Holm's levels: which one this kind will get depends on the others.
        strictest = 1 - (1 - CONFIDENCE) / among
        needed = pictures_needed(scores.differences, margin, fail_confidence=strictest)
        reason += needed_text(needed, "pictures of this kind")
    outcome = KIND_OUTCOMES[decided]
    count = len(scores.differences)
    return KindVerdict(scores.kind, outcome, reason, scores.reference, interval, margin, count, needed, probability)


def uninformative_kind(scores: KindScores, margin: float) -> KindVerdict:
    """A kind that the reference itself masters or fails."""
    too_low = scores.reference < INFORMATIVE_SCORES[0]
    meaning = "it cannot do this itself" if too_low else "hardly an answer is near enough to the edge to be lost"
    reason = f"the reference scores {100 * scores.reference:.1f}: {meaning}"
    interval, count = paired_interval(scores.differences), len(scores.differences)
    return KindVerdict(scores.kind, UNINFORMATIVE, reason, scores.reference, interval, margin, count, None, None)


def margin_of(scores: KindScores, margin: float) -> float:
    """The kind's own margin, or the overall one."""
    return margin if scores.margin is None else scores.margin


def judge_distribution(pictures: Sequence[AnswerTokens], bits: float) -> Distribution:
    """Means over the answer tokens of at least one picture, and what is sure about them from picture to picture.

    Few tokens are no proof: the bounds are taken as if one more picture had agreed entirely.
    """
    tokens = [each.tokens for each in pictures]
    divergences = ratio_values([each.divergence for each in pictures], tokens)
    agreements = ratio_values([each.same_top for each in pictures], tokens)
    return Distribution(
        divergence=sum(each.divergence for each in pictures) / sum(tokens),
        divergence_low=max(0.0, float(bound(Moments.of(divergences), (0.0,), side=-1))),
        top_agreement=sum(each.same_top for each in pictures) / sum(tokens),
        top_agreement_high=min(1.0, float(bound(Moments.of(agreements), (1.0,), side=1))),
        limits=limits_for(bits),
        not_finite=sum(each.not_finite for each in pictures),
    )


def limits_for(bits: float) -> DistributionLimits:
    """The limits of the largest listed width that is not above `bits`; below 3 bits, those of 3."""
    return LIMITS[max((width for width in LIMITS if width <= bits), default=min(LIMITS))]


def distribution_faults(distribution: Distribution | None) -> list[str]:
    """A sentence for every limit that is surely broken."""
    if distribution is None:
        return []
    limits, faults = distribution.limits, []
    if distribution.not_finite:
        faults.append(f"the bundle's numbers are not finite at {distribution.not_finite} answer tokens")
    if distribution.divergence_low > limits.divergence:
        faults.append(
            f"the mean KL divergence is {distribution.divergence:.4f} nats, surely above "
            f"{distribution.divergence_low:.4f}: beyond the limit of {limits.divergence:g}"
        )
    if distribution.top_agreement_high < limits.top_agreement:
        faults.append(
            f"{100 * distribution.top_agreement:.2f} % of answer tokens have the same likeliest token, "
            f"surely below {100 * distribution.top_agreement_high:.2f} %: "
            f"under the limit of {100 * limits.top_agreement:g} %"
        )
    return faults


def drop_text(interval: Interval, margin: float, outcome: str) -> str:
    """What is known of a difference beside its margin."""
    low, high = 100 * interval.low, 100 * interval.high
    known = {
        PASS: f"surely no worse than {low:+.2f}: within the margin of {100 * margin:g}",
        FAIL: f"surely worse than {high:+.2f}: beyond the margin of {100 * margin:g}",
        INCONCLUSIVE: f"somewhere between {low:+.2f} and {high:+.2f}: the margin of {100 * margin:g} is not decided",
    }[outcome]
    return f"the score changed by {100 * interval.mean:+.2f} points, {known}"


def needed_text(needed: int | None, pictures: str) -> str:
    """What would decide."""
    if needed is None:
        return f"; no number of {pictures} would decide, for the drop is the margin"
    return f"; about {needed} {pictures} would decide"
