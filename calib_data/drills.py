"""Training-only questions about a scene, from the record of what was drawn.

A hundred answered tokens a picture instead of five: finding, naming, pairing and counting are
learned from these, and the real questions then have something to ask with.
"""

import random
import re
from collections import Counter
from itertools import groupby

from vlquant.calib_data.drawing import ADVANCE, CELL, COLORS, LINE, SHAPES, Figure, Glyph, Picture
from vlquant.calib_data.samples import Sample
from vlquant.calib_data.scenes import (
    Question,
    ask_color,
    ask_count_of_color,
    ask_count_of_shape,
    ask_follower,
    ask_presence,
    ask_value,
    choose_color,
    find_frame,
    name_color,
    random_word,
)
from vlquant.metrics import read_box

MOST_DRILLS = 8
"""Questions drilled about one scene, besides its readout."""
COUNT_SHARES = {1: 0.0, 2: 0.05, 3: 0.15, 4: 0.3}
"""Of the small numbers, those that are drilled."""
READOUTS = 1 / 3
"""Share of scenes that are read out: reading is learned soon, and readouts are long. Bars, boxes and frames always are."""


def drills(sample: Sample) -> tuple[Question, ...]:
    """Everything the scene shows, read out, and short questions it could have been asked."""
    chance = random.Random(f"drills/{sample.key}")
    if sample.kind == "page":
        return ()
    if not sample.pictures:
        return tuple(drill_text(chance))
    first = sample.pictures[0]
    short: list[Question] = []
    if first.bars:
        short = drill_bars(name_bars(first))
    elif sample.kind in ("document", "receipt"):
        short = [find_line(question) for question in sample.questions]
    elif sample.video:
        short = drill_frames([picture.figures[0] for picture in sample.pictures])
    elif first.figures and sample.kind != "locate":
        short = drill_figures(first.figures, chance)
    fresh = [each for each in short if each.text not in {asked.text for asked in sample.questions}]
    always = sample.kind in ("chart", "locate", "video")
    long = [readout(sample)] if always or chance.random() < READOUTS else []
    return (*chance.sample(fresh, min(MOST_DRILLS, len(fresh))), *long)


def drill_text(chance: random.Random) -> list[Question]:
    """What follows what, and which letter an option has: looking things up, without a picture's cost."""
    questions = []
    for _ in range(5):
        word = random_word(chance)
        index = chance.randrange(1, len(word))
        if word.count(word[index - 1]) == 1:
            questions.append(ask_follower(word, index))
        color = chance.choice(list(COLORS))
        questions.append(choose_color(chance, ask_letter(color), color))
    return questions


def ask_letter(color: str) -> str:
    return f"Which letter is {color}?"


def drill_figures(figures: list[Figure], chance: random.Random) -> list[Question]:
    """How many, whether, and of what colour: with options, without, and the options alone."""
    shapes, colors = Counter(each.shape for each in figures), Counter(each.color for each in figures)
    counts = [(ask_count_of_shape(shape), number) for shape, number in shapes.items()]
    counts += [(ask_count_of_color(color), number) for color, number in colors.items()]
    # Small numbers are the most frequent by far: all nine shall be, or guessing two would pay.
    kept = [(asked, number) for asked, number in counts if number <= 9 and chance.random() < COUNT_SHARES.get(number, 1.0)]
    questions = [Question(asked, str(number), "count") for asked, number in kept]
    present = {(each.shape, each.color) for each in figures}
    absent = [(shape, color) for shape in SHAPES for color in COLORS if (shape, color) not in present]
    for pair in (chance.choice(sorted(present)), chance.choice(absent)):
        questions.append(Question(ask_presence(*pair), "yes" if pair in present else "no", "yes_no"))
    alone = [each for each in figures if shapes[each.shape] == 1]
    for each in alone[:1]:
        questions.append(Question(ask_color(each.shape), each.color, "choice"))
        questions.append(choose_color(chance, ask_letter(each.color), each.color))
    return questions + [choose_color(chance, ask_color(each.shape), each.color) for each in alone]


def drill_bars(bars: list[tuple[str, int]]) -> list[Question]:
    """Values by letter, letters by value, and both at once: saying the letter first is half way to looking it up."""
    drilled = []
    for name, value in bars:
        drilled.append(Question(ask_value(name), str(value), "chart"))
        drilled.append(Question(f"Which bar has the value {value}?", name, "chart"))
        drilled.append(Question(f"Read bar {name}.", f"{name} {value}", "chart"))
    return drilled


def find_line(question: Question) -> Question:
    """The other way round: which label stands before a value."""
    label = question.text.removesuffix("?").split()[-1]
    return Question(f"Which line says {question.answer}?", label, question.kind)


def drill_frames(figures: list[Figure]) -> list[Question]:
    """Both questions about every frame."""
    numbered = list(enumerate(figures, start=1))
    found = [find_frame(number, each.shape, each.color) for number, each in numbered]
    return found + [name_color(number, each.color) for number, each in numbered]


def readout(sample: Sample) -> Question:
    """What the pictures of a scene show, in reading order."""
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
    return ", ".join(f"{name} {value}" for name, value in name_bars(picture))


def name_bars(picture: Picture) -> list[tuple[str, int]]:
    """Letter and value of each bar, from left to right."""
    names = {round(glyph.x): glyph.symbol for glyph in picture.glyphs if glyph.symbol.isalpha()}
    return [(names[round(bar.x)], bar.value) for bar in sorted(picture.bars, key=lambda bar: bar.x)]


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
