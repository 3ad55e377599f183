"""Scores of one answer against the right one, as each benchmark defines them. Knows no models and no files.

The definitions are those of VLMEvalKit's exact matching (no model judges an answer) and, for boxes, of InternVL's own
RefCOCO evaluation.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from vlquant.answer_forms import (
    edit_distance,
    read_choice,
    read_number,
    read_yes_no,
    single_spaced,
    vqa_form,
)

BOX = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*")
"""A box as InternVL writes it, in thousandths; the expression of its own RefCOCO evaluation."""
BOX_OVERLAP = 0.5
SMALLEST_IN_THOUSANDTHS = 4
"""A box whose sides sum to less is in fractions of the picture, says the same evaluation."""
ANLS_THRESHOLD = 0.5
RELATIVE_TOLERANCE = 0.05
AGREEING_PEOPLE = 3
"""An answer that so many others gave as well is right in full."""


@dataclass(frozen=True)
class Gold:
    """What is right."""

    answers: tuple[str, ...]
    """Any of them; for `vqa` the answers of the people that were asked."""
    options: tuple[tuple[str, str], ...] = ()
    """What there is to choose from: (letter, text)."""


@dataclass(frozen=True)
class Score:
    """How right an answer is."""

    value: float
    """0 .. 1."""
    parsed: bool = True
    """False: it has no readable form - no option, no box, neither yes nor no; then its value is 0."""


Metric = Callable[[str, Gold], Score]


def score_verbatim(prediction: str, gold: Gold) -> Score:
    """Right to the letter, but for space around it."""
    return Score(float(any(prediction.strip() == answer.strip() for answer in gold.answers)))


def score_exact(prediction: str, gold: Gold) -> Score:
    """Right but for case, and space around it: OCRVQA, GQA."""
    return Score(float(any(prediction.strip().lower() == answer.strip().lower() for answer in gold.answers)))


def score_contains(prediction: str, gold: Gold) -> Score:
    """A right answer is somewhere in it, whatever its case: OCRBench."""
    said = prediction.lower().strip().replace("\n", " ")
    return Score(float(any(answer.lower().strip().replace("\n", " ") in said for answer in gold.answers)))


def score_contains_formula(prediction: str, gold: Gold) -> Score:
    """A right formula is somewhere in it, spaces aside, in the same case: HME100k in OCRBench."""
    said = without_spaces(prediction)
    return Score(float(any(without_spaces(answer) in said for answer in gold.answers)))


def score_anls(prediction: str, gold: Gold) -> Score:
    """Normalized Levenshtein similarity, 0 below a half: DocVQA, InfoVQA."""
    nearness = max(similarity(prediction, answer) for answer in gold.answers)
    return Score(nearness if nearness >= ANLS_THRESHOLD else 0.0)


def score_relaxed(prediction: str, gold: Gold) -> Score:
    """Numbers within 5 %, all else exact: ChartQA."""
    return Score(float(any(is_close(prediction.strip(), answer.strip()) for answer in gold.answers)))


def score_vqa(prediction: str, gold: Gold) -> Score:
    """Mean over the people asked of min(1, agreeing others / 3): TextVQA, VizWiz.

    A lone answer is compared with, where the original would give 0 to everything.
    """
    said = vqa_form(prediction)
    agree = [vqa_form(answer) == said for answer in gold.answers]
    if len(agree) == 1:
        return Score(float(agree[0]))
    return Score(fmean(min(1.0, (sum(agree) - own) / AGREEING_PEOPLE) for own in agree))


def score_yes_no(prediction: str, gold: Gold) -> Score:
    """The word yes or no in it is the right one: MME, HallusionBench, POPE."""
    said = read_yes_no(prediction)
    return read_score(said, [read_yes_no(answer) for answer in gold.answers])


def score_choice(prediction: str, gold: Gold) -> Score:
    """The option it names, by letter or text, is the right one: AI2D, MMMU, MMBench, SEED-Bench, ScienceQA."""
    said = read_choice(prediction, gold.options)
    return read_score(said, [read_choice(answer, gold.options) for answer in gold.answers])


def score_box(prediction: str, gold: Gold) -> Score:
    """Its first box overlaps the right one by at least a half: RefCOCO."""
    said = read_box(prediction)
    overlap = max(box_overlap(thousandths(read_box(answer)), thousandths(said)) for answer in gold.answers)
    return Score(float(overlap >= BOX_OVERLAP), parsed=said is not None)


METRICS: Mapping[str, Metric] = {
    "verbatim": score_verbatim,
    "exact": score_exact,
    "contains": score_contains,
    "contains_formula": score_contains_formula,
    "anls": score_anls,
    "relaxed": score_relaxed,
    "vqa": score_vqa,
    "yes_no": score_yes_no,
    "choice": score_choice,
    "box": score_box,
}
BUILTIN_METRICS = {"locate": "box"}
"""Metric of the built-in kinds that are not scored verbatim."""


def builtin_metric(kind: str) -> str:
    """The metric of a built-in kind of question."""
    return BUILTIN_METRICS.get(kind, "verbatim")


def score(kind: str, answer: str, prediction: str) -> float:
    """1.0 if `prediction` answers a question of a built-in kind, else 0.0."""
    return METRICS[builtin_metric(kind)](prediction, Gold((answer,))).value


def read_score(said: str | None, right: list[str | None]) -> Score:
    """Of what was read in an answer, if anything was."""
    return Score(float(said is not None and said in right), parsed=said is not None)


def without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def similarity(prediction: str, answer: str) -> float:
    """1 - edit distance of the lower-cased, single-spaced texts / length of the longer text as it was given."""
    longest = max(len(prediction), len(answer))
    distance = edit_distance(single_spaced(prediction), single_spaced(answer))
    return 1 - distance / longest if longest else 1.0


def is_close(prediction: str, answer: str) -> bool:
    """Numbers within 5 % of the right one, unless that is 0; else the same but for case."""
    said, right = read_number(prediction), read_number(answer)
    if said is not None and right:
        return abs(said - right) / abs(right) <= RELATIVE_TOLERANCE
    return prediction.lower() == answer.lower()


def read_box(text: str) -> tuple[float, ...] | None:
    """The first box in `text` as left, top, right, bottom; None if there is none."""
    found = BOX.search(text)
    try:
        return tuple(float(side) for side in found.groups()) if found else None
    except ValueError:
        return None


def thousandths(box: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """A box in thousandths of the picture, whether it was that or in fractions."""
    in_fractions = box is not None and sum(box) < SMALLEST_IN_THOUSANDTHS
    return tuple(1000 * side for side in box) if in_fractions else box


def box_overlap(first: tuple[float, ...] | None, second: tuple[float, ...] | None) -> float:
    """Intersection over union of two boxes; 0 if either is missing or empty."""
    if first is None or second is None:
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)
