"""Training-only questions whose answer is everything a scene shows, from the record of what was drawn.

A hundred answered tokens a picture instead of five: finding, naming and pairing are learned from
these, and the real questions then have something to ask with.
"""

import re
from itertools import groupby

from vlquant.calib_data.drawing import ADVANCE, CELL, LINE, Glyph, Picture
from vlquant.calib_data.samples import Sample
from vlquant.calib_data.scenes import Question
from vlquant.metrics import read_box


def readout(sample: Sample) -> Question | None:
    """What the pictures of a scene show, in reading order; None where that is asked anyway or nothing is shown."""
    if not sample.pictures or sample.kind == "page":
        return None
    first = sample.pictures[0]
    if sample.kind == "locate":
        return Question("Where is everything?", list_boxes(sample), sample.kind)
    if first.bars:
        return Question("What are the values?", list_bars(first), sample.kind)
    if first.glyphs:
        return Question("What does the page say?", "\n".join(map(list_text, sample.pictures)), sample.kind)
    return Question("What is there?", ", ".join(map(list_figures, sample.pictures)), sample.kind)


def list_boxes(sample: Sample) -> str:
    """Shapes that are asked for with their boxes, from left to right: "star [[10, 20, 110, 120]], circle ..."."""
    ordered = sorted(sample.questions, key=lambda question: read_box(question.answer))
    return ", ".join(f"{re.search('<ref>(.*)</ref>', each.text)[1]} {each.answer}" for each in ordered)


def list_bars(picture: Picture) -> str:
    """Letters and values from left to right: "H 16, Y 8"."""
    names = {round(glyph.x): glyph.symbol for glyph in picture.glyphs if glyph.symbol.isalpha()}
    return ", ".join(f"{names[round(bar.x)]} {bar.value}" for bar in sorted(picture.bars, key=lambda bar: bar.x))


def list_text(picture: Picture) -> str:
    """Lines from top to bottom, words from left to right."""
    pitch = LINE * picture.scale
    lines = groupby(sorted(picture.glyphs, key=lambda glyph: (glyph.y // pitch, glyph.x)), key=lambda glyph: glyph.y // pitch)
    return "\n".join(list_line(list(glyphs), ADVANCE * picture.scale) for _, glyphs in lines)


def list_line(glyphs: list[Glyph], advance: float) -> str:
    """Symbols of one line, a space where more than one symbol's room is left."""
    text = glyphs[0].symbol
    for before, glyph in zip(glyphs, glyphs[1:], strict=False):
        text += (" " if glyph.x - before.x > 1.5 * advance else "") + glyph.symbol
    return text


def list_figures(picture: Picture) -> str:
    """Colours and shapes, row by row of half tiles: "red star, blue circle"."""
    half = CELL / 2 * picture.scale

    def place(figure) -> tuple[float, float]:
        left, top, right, bottom = figure.box
        return ((top + bottom) / 2 // half, left + right)

    return ", ".join(figure.name for figure in sorted(picture.figures, key=place))
