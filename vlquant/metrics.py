"""Scores of one answer against the right one. Knows no models."""

import re

BOX = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*")
"""A box as InternVL writes it, in thousandths; the expression of its own RefCOCO evaluation."""
BOX_OVERLAP = 0.5


def score(kind: str, answer: str, prediction: str) -> float:
    """1.0 if `prediction` is right, else 0.0: boxes ("locate") at IoU >= 0.5, all else to the letter."""
    if kind == "locate":
        return float(box_overlap(read_box(answer), read_box(prediction)) >= BOX_OVERLAP)
    return float(prediction.strip() == answer.strip())


def read_box(text: str) -> tuple[float, ...] | None:
    """The first box in `text` as left, top, right, bottom; None if there is none."""
    found = BOX.search(text)
    try:
        return tuple(float(side) for side in found.groups()) if found else None
    except ValueError:
        return None


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
