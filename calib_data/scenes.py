"""One function per kind of question: draw pictures with a random generator and ask about them."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from vlquant.calib_data import drawing
from vlquant.calib_data.drawing import ADVANCE, CELL, COLORS, INK, LINE, SHAPES, SYMBOLS, Box, Picture

LABELS = ("NAME", "CODE", "CITY", "DATE", "ROOM", "UNIT", "PAGE", "TYPE", "BANK", "SHIP", "FLAT", "TEAM")
ITEMS = (
    "TEA", "MILK", "RICE", "SOAP", "CAKE", "BREAD", "FISH", "SALT", "PEAR", "LAMP",
    "PEN", "CORN", "EGGS", "BEER", "WINE", "JAM", "SUGAR", "HONEY", "PASTA", "COLA",
)  # fmt: skip
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, and whether it needs more than one tile."""

    text: str
    answer: str
    kind: str
    crosses_tiles: bool = False
    """The answer needs content of several tiles, or a tile's place in the picture."""


@dataclass(frozen=True)
class Scene:
    """Pictures and the questions about them."""

    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...]
    video: bool = False


def random_word(chance: random.Random, shortest: int = 3, longest: int = 8) -> str:
    return "".join(chance.choice(SYMBOLS) for _ in range(chance.randint(shortest, longest)))


def spans_tiles(*boxes: Box) -> bool:
    """Whether the corners of `boxes` lie in more than one tile."""
    corners = [(x // CELL, y // CELL) for box in boxes for x, y in ((box[0], box[1]), (box[2], box[3]))]
    return len(set(corners)) > 1


def line_heights(chance: random.Random, height: int, count: int) -> list[float]:
    """Vertical centres of `count` lines of text, one below the other, anywhere they fit."""
    first = chance.randint(0, height // LINE - count)
    return [(first + index + 0.5) * LINE + chance.uniform(-2, 2) for index in range(count)]


def place_text(chance: random.Random, width: int, longest: int, *, after: int = 0) -> float:
    """A left end for `longest` symbols within `width`, at a visual token's edge give or take two pixels."""
    last = (width - longest * ADVANCE) // LINE
    return chance.randint(-(-after // LINE), last) * LINE + chance.uniform(-2, 2)


def document(chance: random.Random) -> Scene:
    """Labelled fields, label on the left and value on the right."""
    columns, rows = chance.choice(((2, 1), (2, 2), (2, 2), (2, 3), (3, 2), (3, 1), (3, 3)))
    page = drawing.blank_page(columns, rows, chance)
    width, height = page.size
    count = chance.randint(3, min(8, rows * 4))
    labels = chance.sample(LABELS, count)
    left, value_left = chance.uniform(0, 4), place_text(chance, width, 8, after=84)
    questions = []
    for label, y in zip(labels, line_heights(chance, height, count), strict=True):
        value = random_word(chance)
        label_box = drawing.draw_text(page, label, x=left, y=y, color="blue")
        value_box = drawing.draw_text(page, value, x=value_left, y=y)
        asked = f"What is the {label.lower()}?"
        questions.append(Question(asked, value, "document", spans_tiles(label_box, value_box)))
    return Scene((page,), tuple(chance.sample(questions, min(5, count))))


def receipt(chance: random.Random) -> Scene:
    """Items with prices and, below a ruling, their total."""
    columns, rows = chance.choice(((2, 1), (2, 2), (2, 2), (2, 3), (3, 2), (3, 3)))
    page = drawing.blank_page(columns, rows, chance)
    width, height = page.size
    count = chance.randint(3, min(8, rows * 4 - 1))
    items = chance.sample(ITEMS, count)
    cents = [chance.randint(50, 1999) for _ in items]
    lines = [*zip(items, cents, strict=True), ("TOTAL", sum(cents))]
    left, price_left = chance.uniform(0, 4), place_text(chance, width, 6, after=112)
    questions = []
    for (item, price), y in zip(lines, line_heights(chance, height, count + 1), strict=True):
        text = f"{price / 100:.2f}"
        if item == "TOTAL":
            drawing.draw_line(page, (left, y - LINE / 2), (price_left + 6 * ADVANCE, y - LINE / 2))
        item_box = drawing.draw_text(page, item, x=left, y=y)
        price_box = drawing.draw_text(page, f"{text:>6}", x=price_left, y=y)
        asked = "What is the total?" if item == "TOTAL" else f"What is the price of {item.lower()}?"
        questions.append(Question(asked, text, "receipt", spans_tiles(item_box, price_box)))
    return Scene((page,), (questions[-1], *chance.sample(questions[:-1], min(4, count))))


def chart(chance: random.Random) -> Scene:
    """Bars of height 1 to 20 named by letters, with rulings at every five."""
    columns = chance.choice((2, 2, 3))
    page = drawing.blank_page(columns, 2, chance)
    width, height = page.size
    unit, base = 9, height - LINE - 2
    for mark in (5, 10, 15, 20):
        drawing.draw_line(page, (LINE, base - mark * unit), (width - 4, base - mark * unit))
        drawing.draw_text(page, f"{mark:>2}", x=0, y=base - mark * unit, size=16)
    count = chance.randint(3, 7 if columns == 2 else 8)
    names, values = chance.sample(LETTERS, count), chance.sample(range(1, 21), count)
    slots = sorted(chance.sample(range(1, width // LINE), count))
    color = chance.choice(("red", "green", "blue", "purple", "orange"))
    for slot, name, value in zip(slots, names, values, strict=True):
        middle = (slot + 0.5) * LINE
        drawing.draw_bar(page, (middle - 9, base - value * unit, middle + 9, base), color)
        drawing.draw_text(page, name, x=middle - ADVANCE / 2, y=height - LINE / 2)
        page.bars.append(drawing.Bar(value, middle, base - value * unit))
    asked = [(ask_value(name), str(value)) for name, value in zip(names, values, strict=True)]
    asked = chance.sample(asked, min(4, count))
    asked.append(("Which bar is the tallest?", names[values.index(max(values))]))
    asked.append(("Which bar is the shortest?", names[values.index(min(values))]))
    chance.shuffle(asked)
    return Scene((page,), tuple(Question(text, answer, "chart", True) for text, answer in asked))


def ask_value(name: str) -> str:
    return f"What is the value of bar {name}?"


def text(chance: random.Random) -> Scene:
    """One to three coloured words anywhere on a page."""
    columns, rows = chance.choice(((1, 1), (2, 1), (2, 2), (3, 1), (1, 2), (3, 2)))
    page = drawing.blank_page(columns, rows, chance)
    width, height = page.size
    count = chance.randint(1, 3)
    lines = chance.sample(range(height // LINE), count)
    questions = []
    for line, color in zip(lines, chance.sample(INK, count), strict=True):
        word = random_word(chance)
        x, y = place_text(chance, width, len(word)), (line + 0.5) * LINE + chance.uniform(-3, 3)
        box = drawing.draw_text(page, word, x=x, y=y, color=color)
        asked = "What does the text say?" if count == 1 else f"What does the {color} text say?"
        questions.append(Question(asked, word, "text", spans_tiles(box)))
    return Scene((page,), tuple(questions))


def scatter(chance: random.Random, figures: list[tuple[str, str]], columns: int, rows: int) -> Picture:
    """Shapes (shape, colour), each in its own cell of half a tile, in no order."""
    page = drawing.blank_page(columns, rows, chance)
    half = CELL / 2
    cells = chance.sample([(x, y) for x in range(columns * 2) for y in range(rows * 2)], len(figures))
    for (shape, color), (column, row) in zip(figures, cells, strict=True):
        radius = chance.uniform(15, 24)
        slack = half / 2 - radius
        center = [half * (cell + 0.5) + chance.uniform(-slack, slack) for cell in (column, row)]
        drawing.draw_figure(page, shape, color, center=tuple(center), radius=radius)
    return page


def any_figures(chance: random.Random, count: int, *, without_shape=None, without_color=None) -> list[tuple[str, str]]:
    shapes = [shape for shape in SHAPES if shape != without_shape]
    colors = [color for color in COLORS if color != without_color]
    return [(chance.choice(shapes), chance.choice(colors)) for _ in range(count)]


def count(chance: random.Random) -> Scene:
    """One to nine shapes of a kind, or of a colour, among others."""
    columns, rows = chance.choice(((2, 2), (2, 2), (3, 2)))
    target, others = chance.randint(1, 9), chance.randint(0, 5)
    if chance.random() < 0.5:
        shape = chance.choice(SHAPES)
        figures = [(shape, chance.choice(list(COLORS))) for _ in range(target)]
        figures += any_figures(chance, others, without_shape=shape)
        asked = ask_count_of_shape(shape)
    else:
        color = chance.choice(list(COLORS))
        figures = [(chance.choice(SHAPES), color) for _ in range(target)]
        figures += any_figures(chance, others, without_color=color)
        asked = ask_count_of_color(color)
    page = scatter(chance, figures, columns, rows)
    return Scene((page,), (Question(asked, str(target), "count", True),))


def ask_count_of_shape(shape: str) -> str:
    return f"How many {shape}{'es' if shape == 'cross' else 's'} are there?"


def ask_count_of_color(color: str) -> str:
    return f"How many {color} shapes are there?"


def yes_no(chance: random.Random) -> Scene:
    """Whether a coloured shape is there; the wrong ones mix what is there."""
    columns, rows = chance.choice(((1, 1), (2, 1), (2, 2), (1, 2)))
    figures = any_figures(chance, chance.randint(2, 4))
    page = scatter(chance, figures, columns, rows)
    present = sorted(set(figures))
    mixed = sorted({(a[0], b[1]) for a in figures for b in figures} - set(present))
    absent = mixed + [pair for pair in any_figures(chance, 6) if pair not in figures]
    asked = [(pair, "yes") for pair in chance.sample(present, min(2, len(present)))]
    asked += [(pair, "no") for pair in absent[: len(asked)]]
    chance.shuffle(asked)
    return Scene((page,), tuple(Question(ask_presence(*pair), answer, "yes_no") for pair, answer in asked))


def ask_presence(shape: str, color: str) -> str:
    return f"Is there {'an' if color[0] in 'aeiou' else 'a'} {color} {shape}?"


def choice(chance: random.Random) -> Scene:
    """Six options, one of them the colour of the only shape of its kind."""
    columns, rows = chance.choice(((1, 1), (2, 1), (2, 2), (1, 2)))
    shapes = chance.sample(SHAPES, chance.randint(2, 4))
    figures = [(shape, chance.choice(list(COLORS))) for shape in shapes]
    page = scatter(chance, figures, columns, rows)
    questions = []
    for shape, color in figures[:3]:
        questions.append(choose_color(chance, ask_color(shape), color))
    return Scene((page,), tuple(questions))


def ask_color(shape: str) -> str:
    return f"What color is the {shape}?"


def choose_color(chance: random.Random, asked: str, color: str) -> Question:
    """A question with six options, one of them `color`, answered by its letter."""
    options = chance.sample([other for other in COLORS if other != color], 5)
    options.insert(chance.randrange(6), color)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDEF", options, strict=True))
    return Question(f"{asked}\n{listed}", "ABCDEF"[options.index(color)], "choice")


def locate(chance: random.Random) -> Scene:
    """Boxes of shapes, in thousandths of the picture's sides (rounded to tens)."""
    columns, rows = chance.choice(((2, 2), (2, 1), (1, 2), (3, 2), (2, 3)))
    page = drawing.blank_page(columns, rows, chance)
    width, height = page.size
    cells = [(x, y) for x in range(columns) for y in range(rows)]
    cells = chance.sample(cells, chance.randint(min(2, len(cells)), min(4, len(cells))))
    questions = []
    for (column, row), shape in zip(cells, chance.sample(SHAPES, len(cells)), strict=True):
        radius = chance.uniform(24, 50)
        slack = CELL / 2 - radius
        center = tuple(CELL * (cell + 0.5) + chance.uniform(-slack, slack) for cell in (column, row))
        figure = drawing.draw_figure(page, shape, chance.choice(list(COLORS)), center=center, radius=radius)
        sides = [round(100 * side / length) * 10 for side, length in zip(figure.box, (width, height) * 2, strict=True)]
        asked = f"Please provide the bounding box coordinate of the region this sentence describes: <ref>{shape}</ref>"
        questions.append(Question(asked, f"[[{', '.join(map(str, sides))}]]", "locate", True))
    return Scene((page,), tuple(questions[-3:]))


def several(chance: random.Random) -> Scene:
    """Two or three pictures with a word each; the question names one."""
    pictures, questions = [], []
    for number in range(1, chance.randint(2, 3) + 1):
        columns = chance.choice((1, 1, 2))
        page = drawing.blank_page(columns, 1, chance)
        word = random_word(chance)
        x, y = place_text(chance, page.size[0], len(word)), (chance.randrange(4) + 0.5) * LINE + chance.uniform(-3, 3)
        box = drawing.draw_text(page, word, x=x, y=y, color=chance.choice(INK))
        pictures.append(page)
        questions.append(Question(f"What does Image-{number} say?", word, "several", spans_tiles(box)))
    return Scene(tuple(pictures), tuple(questions))


def video(chance: random.Random) -> Scene:
    """Six to eight frames with one shape each; one of them differs from its neighbours."""
    length = chance.randint(6, 8)
    seen = chance.sample([(shape, color) for shape in SHAPES for color in COLORS], length)
    frames = []
    for shape, color in seen:
        frame = drawing.blank_page(1, 1, chance)
        radius = chance.uniform(18, 40)
        center = tuple(chance.uniform(radius, CELL - radius) for _ in range(2))
        drawing.draw_figure(frame, shape, color, center=center, radius=radius)
        frames.append(frame)
    questions = []
    for index in chance.sample(range(length), 5):
        shape, color = seen[index]
        if chance.random() < 0.6:
            questions.append(find_frame(index + 1, shape, color))
        else:
            questions.append(name_color(index + 1, color))
    return Scene(tuple(frames), tuple(questions), video=True)


def find_frame(number: int, shape: str, color: str) -> Question:
    return Question(f"Which frame shows the {color} {shape}?", f"Frame{number}", "video", True)


def name_color(number: int, color: str) -> Question:
    return Question(f"What color is the shape in Frame{number}?", color, "video", True)


def text_only(chance: random.Random) -> Scene:
    """Questions without a picture, about the word they contain."""
    word = random_word(chance)
    index = chance.randrange(1, len(word))
    asked = [
        (f"Repeat {word}", word),
        (f"Spell {word} backwards", word[::-1]),
        (f"What is the first symbol of {word}?", word[0]),
        (f"What is the last symbol of {word}?", word[-1]),
    ]
    questions = [Question(text, answer, "text_only") for text, answer in asked]
    if word.count(word[index - 1]) == 1:
        questions.append(ask_follower(word, index))
    chance.shuffle(questions)
    return Scene((), tuple(questions[:4]))


def ask_follower(word: str, index: int) -> Question:
    """What comes after the symbol before `index`, which the word must hold only once."""
    return Question(f"Which symbol follows {word[index - 1]} in {word}?", word[index], "text_only")


def page(chance: random.Random) -> Scene:
    """Lines of words, to be read out whole: for training only, since it teaches reading by the hundred symbols."""
    columns, rows = chance.choice(((1, 1), (2, 1), (1, 2), (2, 2)))
    sheet = drawing.blank_page(columns, rows, chance)
    width, height = sheet.size
    words = [random_word(chance) for _ in range(chance.randint(2, rows * 4))]
    for word, y in zip(words, line_heights(chance, height, len(words)), strict=True):
        drawing.draw_text(sheet, word, x=place_text(chance, width, len(word)), y=y, color=chance.choice(INK))
    return Scene((sheet,), (Question("What does the page say?", " ".join(words), "page", True),))


SCENES: dict[str, Callable[[random.Random], Scene]] = {
    "document": document,
    "receipt": receipt,
    "chart": chart,
    "text": text,
    "count": count,
    "yes_no": yes_no,
    "choice": choice,
    "locate": locate,
    "several": several,
    "video": video,
    "text_only": text_only,
}
TRAINING_SCENES = {**SCENES, "page": page}
