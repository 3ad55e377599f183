"""Training batches of the demo model: pictures to tiles, questions to packed token rows, drawings to cell labels.

One row holds one scene. Its questions share the prompt up to the pictures and do not see each
other, so that a row trains exactly what separate prompts would, for the price of one prefix.
"""

from dataclasses import dataclass
from os.path import commonprefix

import torch
from PIL import Image
from torch import Tensor

from vlquant.calib_data.drawing import COLORS, SHAPES, SYMBOLS, Picture
from vlquant.calib_data.readouts import readout
from vlquant.calib_data.samples import Sample
from vlquant.calib_data.scenes import Question
from vlquant.config import ModelConfig
from vlquant.prompt import TEMPLATES, build_prompt, expand_images, frame_placeholders, picture_placeholders
from vlquant.tiling import choose_grid, cut_tiles, normalize
from vlquant.tokenizer import Tokenizer

IGNORE = -100
READABLE = SYMBOLS + "."
CELL_CLASSES = {
    "left": 1 + len(READABLE),
    "first": 1 + len(READABLE),
    "second": 1 + len(READABLE),
    "shape": 1 + len(SHAPES),
    "color": 1 + len(COLORS),
    "bar": 1 + 20,
}
"""What is named under each visual token, with the number of answers; 0 is none. `left` is the symbol before
`first` in the same tile: knowing it, the language model finds what follows a symbol in one step."""


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
    pixel_values: Tensor
    cells: Tensor


def encode_sample(sample: Sample, config: ModelConfig, tokenizer: Tokenizer) -> Row:
    """Encode a scene's pictures and all its questions, the readout of everything last."""
    tiles, cells, counts = [], [], []
    for picture in sample.pictures:
        cut, labels = cut_picture(picture, config, max_tiles=1 if sample.video else config.chat.max_tiles)
        tiles += cut
        cells.append(labels)
        counts.append(len(cut))
    everything = readout(sample)
    questions = [*sample.questions, *([everything] if everything else [])]
    prompts = [encode_question(question, sample.video, counts, config, tokenizer) for question in questions]
    shared = len(commonprefix([prompt for prompt, _ in prompts])) if len(prompts) > 1 else 0
    row = Row(sample, *pack_questions(prompts, shared), tiles, join_cells(cells, config))
    return row


def encode_question(question: Question, video: bool, counts: list[int], config: ModelConfig, tokenizer: Tokenizer):
    """Prompt ids and answer ids (stop token included) of one question."""
    template = TEMPLATES[config.chat.template]
    placeholders = ""
    if counts:
        placeholders = frame_placeholders(len(counts)) if video else picture_placeholders(len(counts))
    prompt = build_prompt(template, [(placeholders + question.text, None)])
    prompt_ids = tokenizer.encode(expand_images(prompt, counts, config.chat.tokens_per_tile))
    bos = tokenizer.encode("")
    answer_ids = tokenizer.encode(question.answer)[len(bos) :] + [tokenizer.token_id(template.stop_token)]
    return prompt_ids, answer_ids


def pack_questions(prompts: list[tuple[list[int], list[int]]], shared: int) -> tuple[list[int], ...]:
    """Ids, positions, segments and targets of a row whose prompts share their first `shared` ids."""
    ids, positions = prompts[0][0][:shared], list(range(shared))
    segments, targets = [0] * shared, [IGNORE] * shared
    for number, (prompt, answer) in enumerate(prompts, start=1):
        own = prompt[shared:] + answer[:-1]
        ids += own
        positions += range(shared, shared + len(own))
        segments += [number] * len(own)
        targets += [IGNORE] * (len(own) - len(answer)) + answer
    return ids, positions, segments, targets


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
        thumbnail[..., :3] = 0  # Text is too small to read there.
        cells = torch.cat((cells, thumbnail.flatten(0, 1)[None]))
    return tiles, cells


def label_cells(picture: Picture, columns: int, rows: int, config: ModelConfig) -> Tensor:
    """Labels int64 [rows * side, columns * side, len(CELL_CLASSES)] of the grid's visual tokens."""
    side = int(config.chat.tokens_per_tile**0.5)
    labels = torch.zeros(rows * side, columns * side, len(CELL_CLASSES), dtype=torch.long)
    width, height = (length / cells for length, cells in zip(picture.size, (columns * side, rows * side), strict=True))

    def cell_at(x: float, y: float) -> Tensor:
        return labels[min(int(y / height), rows * side - 1), min(int(x / width), columns * side - 1)]

    for glyph in picture.glyphs:
        if glyph.symbol in READABLE:
            second = glyph.x / width % 1 >= 0.5
            cell = cell_at(glyph.x, glyph.y)
            cell[2 if second else 1] = 1 + READABLE.index(glyph.symbol)
            cell[4] = 1 + list(COLORS).index(glyph.color)
    inside = torch.arange(columns * side) % side > 0  # A tile cannot see what is left of it.
    labels[:, 1:, 0] = labels[:, :-1, 2] * inside[1:]
    for figure in picture.figures:
        left, top, right, bottom = figure.box
        cell = cell_at((left + right) / 2, (top + bottom) / 2)
        cell[3], cell[4] = 1 + SHAPES.index(figure.shape), 1 + list(COLORS).index(figure.color)
    for bar in picture.bars:
        cell_at(bar.x, bar.y)[5] = bar.value
    return labels


def join_cells(cells: list[Tensor], config: ModelConfig) -> Tensor:
    empty = torch.zeros(0, config.chat.tokens_per_tile, len(CELL_CLASSES), dtype=torch.long)
    return torch.cat([empty, *cells])


def collate(rows: list[Row], pad_id: int) -> Batch:
    """Pad rows on the right and build who-sees-whom: own question and shared prefix, backwards only."""
    longest = max(len(row.ids) for row in rows)
    tiles = [tile for row in rows for tile in row.tiles]

    def padded(name: str, fill: int) -> Tensor:
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
        normalize(tiles) if tiles else torch.empty(0),
        torch.cat([row.cells for row in rows]),
    )

