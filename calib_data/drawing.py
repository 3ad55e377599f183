"""Drawing pictures and remembering what was drawn where. Knows no questions and no models."""

import random
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from math import cos, pi, sin

from PIL import Image, ImageDraw, ImageFont

CELL = 112
"""Side in pixels of the demo model's tiles; pictures are drawn in multiples of it."""

SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

ADVANCE = 14
"""Pixels from one symbol to the next: typewritten, two symbols to a visual token."""
LINE = 28
"""Pixels from one line of text to the next: a visual token's height."""

COLORS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 70, 210),
    "yellow": (236, 200, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
    "black": (20, 20, 20),
    "cyan": (40, 190, 205),
}
INK = ("red", "green", "blue", "purple", "black")
"""Colours dark enough for text."""

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Glyph:
    """One drawn symbol and its centre in pixels."""

    symbol: str
    color: str
    x: float
    y: float


@dataclass(frozen=True)
class Figure:
    """One drawn shape."""

    shape: str
    color: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Bar:
    """One drawn bar and the middle of its top in pixels."""

    value: int
    x: float
    y: float


@dataclass
class Picture:
    """An image and the record of what it shows."""

    image: Image.Image
    glyphs: list[Glyph] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    scale: float = 1.0
    """Size in parts of the size it was drawn in."""

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size


def blank_page(columns: int, rows: int, chance: random.Random) -> Picture:
    """An empty light page of `columns` x `rows` tiles."""
    shade = tuple(chance.randint(228, 255) for _ in range(3))
    return Picture(Image.new("RGB", (columns * CELL, rows * CELL), shade))


def draw_text(picture: Picture, text: str, *, x: float, y: float, color: str = "black", size: int = 22) -> Box:
    """Type `text` with its left end at `x` and its capitals centred on `y`; returns its box."""
    pen, font = ImageDraw.Draw(picture.image), load_font(size)
    for index, symbol in enumerate(text):
        if symbol != " ":
            center = x + (index + 0.5) * ADVANCE
            pen.text((center, y), symbol, fill=COLORS[color], font=font, anchor="mm")
            picture.glyphs.append(Glyph(symbol, color, center, y))
    return (x, y - LINE / 2, x + len(text) * ADVANCE, y + LINE / 2)


def draw_figure(picture: Picture, shape: str, color: str, *, center: tuple[float, float], radius: float) -> Figure:
    """Draw a filled shape inside the square of half side `radius` around `center`."""
    x, y = center
    box = (x - radius, y - radius, x + radius, y + radius)
    pen = ImageDraw.Draw(picture.image)
    if shape == "circle":
        pen.ellipse(box, fill=COLORS[color])
    else:
        pen.polygon([(x + radius * a, y + radius * b) for a, b in OUTLINES[shape]], fill=COLORS[color])
    figure = Figure(shape, color, box)
    picture.figures.append(figure)
    return figure


def draw_bar(picture: Picture, box: Box, color: str) -> None:
    """A filled upright bar."""
    ImageDraw.Draw(picture.image).rectangle(box, fill=COLORS[color])


def draw_line(picture: Picture, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A thin grey line, for axes and rulings."""
    ImageDraw.Draw(picture.image).line((*start, *end), fill=(150, 150, 150), width=1)


def rescale(picture: Picture, scale: float) -> Picture:
    """The picture at another size, with everything it records moved along."""
    width, height = (round(side * scale) for side in picture.size)
    return Picture(
        picture.image.resize((width, height), Image.Resampling.BICUBIC),
        [Glyph(each.symbol, each.color, each.x * scale, each.y * scale) for each in picture.glyphs],
        [Figure(each.shape, each.color, tuple(side * scale for side in each.box)) for each in picture.figures],
        [Bar(each.value, each.x * scale, each.y * scale) for each in picture.bars],
        scale,
    )


@lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """The one font shipped with the package, so that pictures are the same everywhere."""
    path = files("vlquant.calib_data") / "fonts" / "DejaVuSansMono-Bold.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def star_outline() -> list[tuple[float, float]]:
    points = []
    for index in range(10):
        reach = 1.0 if index % 2 == 0 else 0.45
        points.append((reach * sin(pi * index / 5), -reach * cos(pi * index / 5)))
    return points


OUTLINES = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "star": star_outline(),
    "cross": [
        (-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35),
        (0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35),
    ],
}  # fmt: skip
