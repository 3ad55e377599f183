"""Scores of a whole set as it is published, where that is not the mean of its questions. Arithmetic only."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from vlquant.known_sets import known_set

PERCEPTION = (
    "OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene",
)  # fmt: skip
REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
VARIANTS_APART = 1_000_000
"""Variants of a question with its options in another order have indices that differ by a multiple of this."""


@dataclass(frozen=True)
class Graded:
    """One scored answer and what belongs together with it."""

    score: float
    category: str
    picture: str
    index: str


def set_scores(name: str, rows: Sequence[Graded]) -> dict[str, float]:
    """The scores that a set of this name is published with, as published (MME in points, others of 100); {} if it has none.

    Raises ValueError if an index is not as in that set.
    """
    own = known_set(name).own_scores
    return SET_SCORES[own](rows) if own and rows else {}


def mme_scores(rows: Sequence[Graded]) -> dict[str, float]:
    """By category: 100 for all questions right and 100 for all pictures with every question right; and their sums."""
    by_category = {category: points(own) for category, own in grouped(rows, lambda row: row.category).items()}
    sums = {
        "perception": sum(by_category.get(category, 0.0) for category in PERCEPTION),
        "reasoning": sum(by_category.get(category, 0.0) for category in REASONING),
        "total": sum(by_category.values()),
    }
    return {**sums, **by_category}


def points(rows: Sequence[Graded]) -> float:
    """Accuracy and accuracy+ of one category of MME, added."""
    return 100 * fmean(row.score for row in rows) + share_all_right(rows, lambda row: row.picture)


def hallusion_scores(rows: Sequence[Graded]) -> dict[str, float]:
    """HallusionBench: right answers, figures with all answers right, questions answered right about all their figures."""
    return {
        "aAcc": 100 * fmean(row.score for row in rows),
        "fAcc": share_all_right(rows, lambda row: hallusion_group(row, 4)),
        "qAcc": share_all_right(rows, lambda row: hallusion_group(row, 5)),
    }


def hallusion_group(row: Graded, place: int) -> tuple[str, str, str]:
    """What a figure (place 4 of the index) or question (5) is known by: it is counted within its set, and that by category."""
    parts = row.index.split("_")
    if len(parts) < 6:
        raise ValueError(f"index {row.index!r} is not HallusionBench's, which has set, figure and question between _")
    return row.category, parts[3], parts[place]


def circular_scores(rows: Sequence[Graded]) -> dict[str, float]:
    """MMBench: questions right in every order of their options, and single answers right."""
    return {
        "circular": share_all_right(rows, lambda row: int(row.index) % VARIANTS_APART),
        "vanilla": 100 * fmean(row.score for row in rows),
    }


def share_all_right(rows: Iterable[Graded], key: Callable[[Graded], Hashable]) -> float:
    """Percentage of groups in which every answer is right."""
    return 100 * fmean(all(row.score == 1 for row in group) for group in grouped(rows, key).values())


def grouped(rows: Iterable[Graded], key: Callable[[Graded], Hashable]) -> dict[Hashable, list[Graded]]:
    """Rows by what they have in common, in the order of the first."""
    groups: dict[Hashable, list[Graded]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


SET_SCORES: Mapping[str, Callable[[Sequence[Graded]], dict[str, float]]] = {
    "mme": mme_scores,
    "hallusion": hallusion_scores,
    "circular": circular_scores,
}
