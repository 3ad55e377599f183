"""Training batches of the demo model: pictures to tiles, questions to packed token rows, drawings to cell labels.

One row holds one scene. Its questions share the prompt up to the pictures and do not see each
other, so that a row trains exactly what separate prompts would, for the price of one prefix.
"""

from dataclasses import dataclass
from os.path import commonprefix

import torch
from PIL import Image
from torch import Tensor

from vlquant.calib_data.drawing import COLORS, SHAPES, SYMBOLS, Figure, Picture
from vlquant.calib_data.drills import drills
from vlquant.calib_data.samples import Sample
from vlquant.calib_data.scenes import Question
from vlquant.config import ModelConfig
from vlquant.request import Request, encode_answer, encode_prompt, place_images
from vlquant.tiling import choose_grid, cut_tiles, normalize
from vlquant.tokenizer import Tokenizer

IGNORE = -100
READABLE = SYMBOLS + "."
SIDES = ("left side", "top", "right", "bottom")
CELL_CLASSES = {
    "left": 1 + len(READABLE),
    "first": 1 + len(READABLE),
    "second": 1 + len(READABLE),
    "shape": 1 + len(SHAPES),
    "color": 1 + len(COLORS),
    "bar": 1 + 20 + 1,
    **{f"{side} {digit}": 1 + answers for side in SIDES for digit, answers in (("tens", 11), ("half", 2))},
}
"""What is named under each visual token, with the number of answers; 0 is none. `left` is the symbol before
`first` in the same tile: knowing it, the language model finds what follows a symbol in one step. A bar has its
value from its top down to the tile's edge, and in the tile below "taller than this". Sides of boxes are tenths of
the picture and which half of that, named in the one tile that shows it whole."""
TALLER = 21
NAMES = list(CELL_CLASSES)
UNREADABLE = [NAMES.index(name) for name in ("left", "first", "second", "bar")]
"""Too small in a thumbnail."""


@dataclass(frozen=True)
class Row:
    """One scene, encoded."""

    sample: Sample
    ids: list[int]
    positions: list[int]
    segments: list[int]
    """0: shared prefix; n: the n-th question."""
    targets: list[int]
    """Next token where it belongs to an answer, else IGNORE."""
    weights: list[float]
    """What each target counts in the loss."""
    tiles: list[Image.Image]
    cells: Tensor
    """int64 [tiles, tokens, len(CELL_CLASSES)]."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, all tiles in a row."""

    rows: list[Row]
    ids: Tensor
    positions: Tensor
    visible: Tensor
    targets: Tensor
    weights: Tensor
    pixel_values: Tensor
    cells: Tensor


def encode_sample(sample: Sample, config: ModelConfig, tokenizer: Tokenizer) -> Row:
    """Encode a scene's pictures, all its questions and then its drills."""
    tiles, cells, counts = [], [], []
    for picture in sample.pictures:
        cut, labels = cut_picture(picture, config, max_tiles=1 if sample.video else config.chat.max_tiles)
        tiles += cut
        cells.append(labels)
        counts.append(len(cut))
    questions = (*sample.questions, *drills(sample))
    prompts = [encode_question(question, sample.video, counts, config, tokenizer) for question in questions]
    shared = len(commonprefix([prompt for prompt, _ in prompts])) if len(prompts) > 1 else 0
    return Row(sample, *pack_questions(prompts, shared), tiles, join_cells(cells, config))


def encode_question(
    question: Question, video: bool, counts: list[int], config: ModelConfig, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """Prompt ids and answer ids (stop token included) of one question about pictures or frames of `counts` tiles."""
    request, images = Request(question.text), len(counts)
    placed = place_images(request, *((0, images) if video else (images, 0)))
    prompt, ids = encode_prompt(request, placed, counts, config=config, tokenizer=tokenizer)
    return ids, encode_answer(question.answer, prompt, ids, config=config, tokenizer=tokenizer)


def pack_questions(prompts: list[tuple[list[int], list[int]]], shared: int) -> tuple[list[int], ...]:
    """Ids, positions, segments, targets and weights of a row whose prompts share their first `shared` ids.

    An answer weighs the root of its length: a digit must not drown in a page that is read out.
    """
    ids, positions = prompts[0][0][:shared], list(range(shared))
    segments, targets, weights = [0] * shared, [IGNORE] * shared, [0.0] * shared
    for number, (prompt, answer) in enumerate(prompts, start=1):
        own = prompt[shared:] + answer[:-1]
        ids += own
        positions += range(shared, shared + len(own))
        segments += [number] * len(own)
        targets += [IGNORE] * (len(own) - len(answer)) + answer
        weights += [len(answer) ** -0.5] * len(own)
    return ids, positions, segments, targets, weights


def cut_picture(picture: Picture, config: ModelConfig, *, max_tiles: int):
    """Tiles as the original cuts them, and what is drawn under each visual token of each tile."""
    chat = config.chat
    limits = {"max_tiles": max_tiles, "min_tiles": chat.min_tiles, "image_size": chat.image_size}
    tiles = cut_tiles(picture.image, use_thumbnail=chat.use_thumbnail, **limits)
    columns, rows = choose_grid(*picture.size, **limits)
    cells = label_cells(picture, columns, rows, config)  # [rows * side, columns * side, names]
    cells = cells.unflatten(0, (rows, -1)).unflatten(2, (columns, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    if len(tiles) > columns * rows:
        thumbnail = label_cells(picture, 1, 1, config)
        thumbnail[..., UNREADABLE] = 0
        cells = torch.cat((cells, thumbnail.flatten(0, 1)[None]))
    return tiles, cells


def label_cells(picture: Picture, columns: int, rows: int, config: ModelConfig) -> Tensor:
    """Labels int64 [rows * side, columns * side, len(CELL_CLASSES)] of the grid's visual tokens."""
    side = int(config.chat.tokens_per_tile**0.5)
    labels = torch.zeros(rows * side, columns * side, len(CELL_CLASSES), dtype=torch.long)
    width, height = (length / cells for length, cells in zip(picture.size, (columns * side, rows * side), strict=True))

    def place(x: float, y: float) -> tuple[int, int]:
        return min(int(y / height), rows * side - 1), min(int(x / width), columns * side - 1)

    for glyph in picture.glyphs:
        if glyph.symbol in READABLE:
            half = "second" if glyph.x / width % 1 >= 0.5 else "first"
            cell = labels[place(glyph.x, glyph.y)]
            cell[NAMES.index(half)] = 1 + READABLE.index(glyph.symbol)
            cell[NAMES.index("color")] = 1 + list(COLORS).index(glyph.color)
    inside = torch.arange(columns * side) % side > 0  # A tile cannot see what is left of it.
    labels[:, 1:, NAMES.index("left")] = labels[:, :-1, NAMES.index("second")] * inside[1:]
    for figure in picture.figures:
        left, top, right, bottom = figure.box
        cell = labels[place((left + right) / 2, (top + bottom) / 2)]
        cell[NAMES.index("shape")] = 1 + SHAPES.index(figure.shape)
        cell[NAMES.index("color")] = 1 + list(COLORS).index(figure.color)
        if columns * rows == 1:
            cell[NAMES.index(f"{SIDES[0]} tens") :] = name_sides(figure, picture)
    for bar in picture.bars:
        row, column = place(bar.x, bar.y)
        seam = (row // side + 1) * side
        labels[row:seam, column, NAMES.index("bar")] = bar.value
        labels[seam:, column, NAMES.index("bar")] = TALLER
    return labels


def name_sides(figure: Figure, picture: Picture) -> Tensor:
    """Labels of the box's four sides."""
    parts = [round(100 * side / length) for side, length in zip(figure.box, picture.size * 2, strict=True)]
    return torch.tensor([label for part in parts for label in (1 + part // 10, 1 + part % 10 // 5)])


def join_cells(cells: list[Tensor], config: ModelConfig) -> Tensor:
    empty = torch.zeros(0, config.chat.tokens_per_tile, len(CELL_CLASSES), dtype=torch.long)
    return torch.cat([empty, *cells])


def collate(rows: list[Row], pad_id: int) -> Batch:
    """Pad rows on the right and build who-sees-whom: own question and shared prefix, backwards only."""
    longest = max(len(row.ids) for row in rows)
    tiles = [tile for row in rows for tile in row.tiles]

    def padded(name: str, fill: float) -> Tensor:
        lists = [getattr(row, name) for row in rows]
        return torch.tensor([each + [fill] * (longest - len(each)) for each in lists])

    segments = padded("segments", -1)
    steps = torch.arange(longest)
    same = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)
    return Batch(
        rows,
        padded("ids", pad_id),
        padded("positions", 0),
        same & (steps[None, :, None] >= steps[None, None, :]),
        padded("targets", IGNORE),
        padded("weights", 0.0),
        normalize(tiles) if tiles else torch.empty(0),
        torch.cat([row.cells for row in rows]),
    )

