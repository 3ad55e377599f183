"""Questions that two models answered differently, prepared for a page: pictures small and with their tiles, differences marked."""

import base64
import io
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from PIL import Image

from vlquant.check_result import Disagreement
from vlquant.part_limits import WorstTile
from vlquant.tiling import Box

LONGEST_SIDE = 640
MOST_PICTURES = 6
"""Of one card: a video has many frames."""
CARD_BYTES = 120_000
"""For the pictures of one card together, as far as the coarsest of FORMS allows."""
FORMS = ((1.0, 80), (1.0, 55), (0.7, 55), (0.5, 40))
"""Share of the longest side, and quality: the first that is small enough is taken."""
MOST_CHARACTERS = 2000
"""Of an answer; what follows is counted."""
CHARACTERWISE = 200
"""Longer answers are compared by words: it is quicker, and single letters in common say nothing there."""

Run = tuple[str, bool]
"""A piece of an answer, and whether the other answer lacks it."""


@dataclass(frozen=True)
class Card:
    """A disagreement with what was asked about."""

    disagreement: Disagreement
    pictures: tuple[Image.Image, ...]
    tile_map: tuple[tuple[Box, ...], ...]
    """What each tile of each picture shows, in pixels of the picture; the last of several may be the thumbnail."""


@dataclass(frozen=True)
class TileMark:
    """A tile's outline, as percentages of its picture, and its number among all tiles of the question."""

    left: str
    top: str
    width: str
    height: str
    number: int
    worst: bool


@dataclass(frozen=True)
class ShownPicture:
    """A picture as a page shows it."""

    address: str
    """A data: URL."""
    width: int
    height: int
    tiles: tuple[TileMark, ...]
    caption: str


@dataclass(frozen=True)
class ShownCard:
    """All of a card that a page shows."""

    disagreement: Disagreement
    pictures: tuple[ShownPicture, ...]
    more_pictures: int
    reference: tuple[Run, ...]
    quantized: tuple[Run, ...]


def show_card(card: Card, worst: WorstTile | None) -> ShownCard:
    """Prepare a card; `worst` is marked if it is one of its tiles."""
    pictures = card.pictures[:MOST_PICTURES]
    side = LONGEST_SIDE if len(pictures) == 1 else LONGEST_SIDE // 2
    number, shown = 1, []
    for place, (picture, boxes) in enumerate(zip(pictures, card.tile_map[:MOST_PICTURES], strict=True), 1):
        marks = mark_tiles(picture.size, boxes, number, worst.tile if worst and worst.key == card.disagreement.key else 0)
        about = f"{place} of {len(card.pictures)}: " if len(card.pictures) > 1 else ""
        caption = f"{about}{picture.width} × {picture.height} pixels, {tiles_text(number, len(boxes), len(marks))}"
        address, size = embed(picture, side, CARD_BYTES // len(pictures))
        shown.append(ShownPicture(address, *size, marks, caption))
        number += len(boxes)
    reference, quantized = mark_differences(card.disagreement.reference, card.disagreement.quantized)
    return ShownCard(card.disagreement, tuple(shown), len(card.pictures) - len(pictures), reference, quantized)


def mark_tiles(size: tuple[int, int], boxes: Sequence[Box], first: int, worst: int) -> tuple[TileMark, ...]:
    """Outlines of tiles that show a part of a picture of `size`; the thumbnail has none. `first`: number of the first."""
    width, height = size
    parts = boxes[:-1] if len(boxes) > 1 and is_whole(boxes[-1], size) else boxes
    return tuple(
        TileMark(
            left=share(left, width),
            top=share(top, height),
            width=share(right - left, width),
            height=share(bottom - top, height),
            number=number,
            worst=number == worst,
        )
        for number, (left, top, right, bottom) in enumerate(parts, first)
    )


def is_whole(box: Box, size: tuple[int, int]) -> bool:
    """Whether a box is the whole picture."""
    return tuple(round(each) for each in box) == (0, 0, *size)


def share(part: float, whole: int) -> str:
    """A percentage as SVG takes it."""
    return f"{100 * part / whole:.3f}%"


def tiles_text(first: int, tiles: int, parts: int) -> str:
    """How a picture was cut: the numbers of its tiles, and which of them is the thumbnail."""
    if tiles == 0:
        return "not cut"
    if parts == 1:
        return f"tile {first}"
    whole = f"; tile {first + parts} is the whole picture" if tiles > parts else ""
    return f"tiles {first} {'and' if parts == 2 else 'to'} {first + parts - 1}{whole}"


def embed(picture: Image.Image, side: int, most_bytes: int) -> tuple[str, tuple[int, int]]:
    """A data: URL of a picture scaled to `side` at most, and its size there."""
    for scale, quality in FORMS:
        small = picture.convert("RGB")
        small.thumbnail((max(1, round(side * scale)),) * 2, Image.Resampling.LANCZOS)
        written = io.BytesIO()
        small.save(written, "WEBP", quality=quality)
        if written.tell() <= most_bytes:
            break
    return "data:image/webp;base64," + base64.b64encode(written.getvalue()).decode(), small.size


def mark_differences(first: str, second: str) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """Both answers, as far as they are shown, in runs that are in the other one or not."""
    characterwise = max(len(first), len(second)) <= CHARACTERWISE
    pieces = [split(text[:MOST_CHARACTERS], characterwise=characterwise) for text in (first, second)]
    marked: tuple[list[Run], list[Run]] = ([], [])
    for kind, *bounds in matched(*pieces):
        for runs, own, (low, high) in zip(marked, pieces, (bounds[:2], bounds[2:]), strict=True):
            if low < high:
                runs.append(("".join(own[low:high]), kind != "equal"))
    for runs, text in zip(marked, (first, second), strict=True):
        if len(text) > MOST_CHARACTERS:
            runs.append((f" … and {len(text) - MOST_CHARACTERS:,} more characters", False))
    return tuple(marked[0]), tuple(marked[1])


def matched(first: list[str], second: list[str]) -> list[tuple[str, int, int, int, int]]:
    """Opcodes as SequenceMatcher has them; some may be empty.

    Pieces that are everywhere count for nothing between what the texts begin and end with in common: a model that repeats
    itself would take minutes.
    """
    start = len(os.path.commonprefix([first, second]))
    end = len(os.path.commonprefix([first[start:][::-1], second[start:][::-1]]))
    stops = len(first) - end, len(second) - end
    middle = SequenceMatcher(None, first[start : stops[0]], second[start : stops[1]]).get_opcodes()
    between = [(kind, *(start + bound for bound in bounds)) for kind, *bounds in middle]
    return [("equal", 0, start, 0, start), *between, ("equal", stops[0], len(first), stops[1], len(second))]


def split(text: str, *, characterwise: bool) -> list[str]:
    """Characters, or words and what is between them."""
    return list(text) if characterwise else re.findall(r"\w+|\W", text)
