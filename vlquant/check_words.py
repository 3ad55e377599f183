"""What a check's findings are called and what they mean: the words that the terminal and the page share."""

import re
from collections.abc import Sequence

from vlquant.check_result import AnswerFaults, Blame, CheckResult, KindResult
from vlquant.intervals import Interval
from vlquant.part_limits import LayerDistance, WorstTile
from vlquant.verdict import (
    ACCURACY,
    DISTRIBUTION,
    FAIL,
    FAILED,
    INCONCLUSIVE,
    INFORMATIVE_SCORES,
    NOT_DECIDED,
    PASS,
    PASSED,
    STRUCTURE,
    UNINFORMATIVE,
    Verdict,
    drop_text,
)

NOT_SCORED = "not scored"
"""A kind of question whose answers nobody could score."""
SYMBOLS = {
    PASS: "✓", FAIL: "✗", INCONCLUSIVE: "?",
    PASSED: "✓", FAILED: "✗", NOT_DECIDED: "?", UNINFORMATIVE: "○", NOT_SCORED: "–",
}  # fmt: skip
KIND_ORDER = (FAILED, NOT_DECIDED, PASSED, UNINFORMATIVE, NOT_SCORED)
"""What asks for attention comes first."""
MEANINGS = {
    PASS: "On questions like these, the bundle can stand in for its reference.",
    FAIL: "The bundle cannot stand in for its reference.",
    INCONCLUSIVE: "These questions do not tell whether the bundle can stand in for its reference.",
}
GROUND_MEANINGS = {
    STRUCTURE: "The bundle is not shown what its reference is shown. That is a defect, whatever the scores say.",
    DISTRIBUTION: "The bundle, or a part of it, is further from its reference than this many bits per weight should leave it.",
    ACCURACY: "The bundle answers worse than its reference by more than the margin, and chance does not explain it.",
}
FORCED_TEXTS = {
    "imported": "answers imported from a file",
    "reference": "the reference's own answers",
    "gold": "the known right answers",
    "bundle": "the bundle's own answers, for lack of others",
}
CLASS_WORDS = {"vision": "picture tokens", "prompt": "prompt tokens", "answer": "answer tokens"}
FAULTS = {
    "truncated": "cut off at the largest number of tokens",
    "empty": "empty",
    "unparsed": "without a form that can be scored (no option, no box, neither yes nor no)",
}
INFINITE_DECIBELS = 999
"""How check_result writes that nothing differs."""
UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]|\r(?!\n)"
)
"""Controls, marks of direction, invisible signs and halves of pairs. Not the joiners, which emoji and scripts are written with."""


def points(share: float, signed: bool = False) -> str:
    """A share of 1 in points with two decimals."""
    return f"{100 * share:{'+' if signed else ''}.2f}"


def interval_text(interval: Interval) -> str:
    """A mean and its interval in points."""
    return f"{points(interval.mean, True)} [{points(interval.low, True)}, {points(interval.high, True)}]"


def nats(value: float) -> str:
    """A divergence; what four decimals do not show is no more than noise of the arithmetic."""
    return "< 0.0001" if 0 < value < 0.00005 else f"{value:.4f}"


def percent(share: float, digits: int = 2) -> str:
    """A share of 1 as a percentage."""
    return f"{100 * share:.{digits}f} %"


def decibels(value: float) -> str:
    """A ratio of signal to noise."""
    return "no difference at all" if value >= INFINITE_DECIBELS else f"{value:.1f} dB"


def outcome_of(kind: KindResult) -> str:
    """The outcome of a kind of question, or that there is none."""
    return kind.verdict.outcome if kind.verdict else NOT_SCORED


def sorted_kinds(result: CheckResult) -> list[KindResult]:
    """Kinds of questions by outcome, otherwise in the order of the result."""
    return sorted(result.kinds, key=lambda kind: KIND_ORDER.index(outcome_of(kind)))


def grounds_by_name(verdict: Verdict) -> dict[str, list[str]]:
    """The reasons of a FAIL by the name of their ground, in the verdict's order."""
    names = dict.fromkeys(ground.name for ground in verdict.grounds)
    return {name: [ground.reason for ground in verdict.grounds if ground.name == name] for name in names}


def is_scored(result: CheckResult) -> bool:
    """Whether there are scores of both models to compare."""
    return result.generated is not None and result.generated.questions > 0


def unscored_reason(result: CheckResult) -> str:
    """Why there are no scores; empty if there are."""
    if result.generated is None:
        return "No answers were generated, for the models did not fit into the memory allowed."
    return "" if is_scored(result) else "No question has a known answer: nothing was scored."


def known_text(result: CheckResult) -> str:
    """What is known of the score where nothing failed, as a sentence; empty if there is no score."""
    verdict = result.verdict
    if verdict.outcome == FAIL or not is_scored(result):
        return ""
    text = drop_text(verdict.difference, verdict.margin, verdict.outcome)
    return f"{text[0].upper()}{text[1:]}."


def advice(result: CheckResult) -> str:
    """What would decide an inconclusive check; empty for any other."""
    verdict = result.verdict
    if verdict.outcome != INCONCLUSIVE:
        return ""
    if result.generated is None:
        return "Scores would decide: allow more memory, or check where there is more."
    if not is_scored(result):
        return "Scores would decide: ask questions with known answers."
    if verdict.pictures_needed is None:
        return "No number of pictures would decide, for the measured drop is the margin itself: choose another margin, or go by the kinds."
    return (
        f"About {verdict.pictures_needed:,} pictures would decide in four of five cases, if the answers go on to "
        f"differ as they do; {verdict.pictures:,} were asked about."
    )


def kind_advice(kind: KindResult) -> str:
    """What stands beside the outcome of a kind: what would decide, or why it tells nothing."""
    verdict = kind.verdict
    if verdict is None:
        return "no known answers"
    if verdict.outcome == UNINFORMATIVE:
        easy = verdict.reference > INFORMATIVE_SCORES[1]
        return f"too {'easy' if easy else 'hard'} to tell: the reference scores {points(verdict.reference)}"
    if verdict.outcome != NOT_DECIDED:
        return ""
    needed = verdict.pictures_needed
    return "no number would decide" if needed is None else f"about {needed:,} pictures would decide"


def blame_sentence(blame: Blame) -> str:
    """Which part the divergence comes from, in words."""
    if blame.both < 1e-5:
        return "There is nothing to blame: with both parts, the likelihoods are the reference's."
    if blame.vision is None:
        return "Everything measured comes from the language model: no exported vision tower took part."
    if blame.vision >= 2 * blame.language_model:
        return "Most of it comes from the exported vision tower."
    if blame.language_model >= 2 * blame.vision:
        return "Most of it comes from the quantized language model."
    return "The vision tower and the language model both have their share."


def tile_text(tile: WorstTile) -> str:
    """The tile whose features differ most, beside what its precision keeps."""
    found = f"{decibels(tile.signal_to_noise)}, cosine {tile.cosine:.7g}"
    return f"{tile.tile} of {tile.key}: {found} ({tile.precision} keeps {tile.least_cosine:g})"


def layers_text(layers: Sequence[LayerDistance]) -> str:
    """The layer that is furthest from its reference's, beside plain rounding."""
    worst = max(layers, key=lambda each: each.roundings)
    times = f"{worst.roundings:.2f} times what plain rounding to the same bits would"
    return f"layer {worst.layer} adds most: {times} (the limit is {worst.limit:g})"


def fault_counts(faults: AnswerFaults) -> list[int]:
    """The counts in the order of FAULTS."""
    return [getattr(faults, name) for name in FAULTS]


def chance_text(probability: float) -> str:
    """How often chance alone does what was seen, in words."""
    if probability >= 0.995:
        return "chance alone parts them at least so unevenly nearly always"
    often = "less than 1" if probability < 0.01 else f"{100 * probability:.0f}"
    return f"chance alone parts them at least so unevenly in {often} of 100 cases"


def visible(text: str) -> str:
    """The text with characters that hide or reorder what is around them written out as ⟨U+202E⟩; lines stay lines."""
    return UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
