"""`vlquant tiles`: what a model sees of a picture: how it is cut, and how many tokens that makes."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from vlquant.config import read_config
from vlquant.errors import InvalidRequest
from vlquant.model import resolve_model
from vlquant.request import Picture, open_image
from vlquant.tiling import Box, choose_grid, require_tiles, tile_boxes

TILE_SIZE, TOKENS_PER_TILE, MAX_TILES = 448, 256, 12
"""Of every published InternVL, where no model is named."""
LINE_COLOR = (255, 40, 40)


@dataclass(frozen=True)
class Tiling:
    """How one picture is cut."""

    size: tuple[int, int]
    """Width and height of the picture in pixels."""
    grid: tuple[int, int]
    """Columns and rows."""
    boxes: tuple[Box, ...]
    """What each tile shows, in pixels of the picture; a thumbnail last."""
    tokens: int

    def __str__(self) -> str:
        """ "2480x3508 -> 2x3 + thumbnail = 7 tiles = 1792 tokens"."""
        columns, rows = self.grid
        thumbnail = " + thumbnail" if len(self.boxes) > columns * rows else ""
        count = "1 tile" if len(self.boxes) == 1 else f"{len(self.boxes)} tiles"
        return f"{self.size[0]}x{self.size[1]} -> {columns}x{rows}{thumbnail} = {count} = {self.tokens} tokens"


def tiles(
    image: Picture, *, model: str | Path | None = None, max_tiles: int | None = None, draw: str | Path | None = None
) -> Tiling:
    """How `image` is cut into tiles by a model, or as by every published one.

    max_tiles: None for the model's own; draw: a picture file to write, with the grid drawn on it.
    Raises InvalidRequest for a picture that cannot be read or written.
    """
    picture = open_image(image)
    size, tokens_per_tile, most, least, use_thumbnail = TILE_SIZE, TOKENS_PER_TILE, MAX_TILES, 1, True
    if model is not None:
        chat = read_config(resolve_model(model)).chat
        size, tokens_per_tile, use_thumbnail = chat.image_size, chat.tokens_per_tile, chat.use_thumbnail
        most, least = chat.max_tiles, chat.min_tiles
    most = most if max_tiles is None else max_tiles
    require_tiles(least, most)
    grid = choose_grid(*picture.size, min_tiles=least, max_tiles=most, image_size=size)
    boxes = tuple(tile_boxes(picture.size, grid, use_thumbnail=use_thumbnail))
    if draw is not None:
        if isinstance(image, str | os.PathLike) and Path(draw).exists() and os.path.samefile(draw, image):
            raise InvalidRequest(f"{draw} is the picture itself; name another file to draw on")
        save(draw_grid(picture, boxes[: grid[0] * grid[1]]), Path(draw))
    return Tiling(picture.size, grid, boxes, len(boxes) * tokens_per_tile)


def draw_grid(picture: Image.Image, boxes: tuple[Box, ...]) -> Image.Image:
    """A copy of `picture` with a frame around each tile and its number inside."""
    drawn = picture.copy()
    pen, width = ImageDraw.Draw(drawn), max(1, round(max(picture.size) / 400))
    for number, (left, top, right, bottom) in enumerate(boxes, start=1):
        pen.rectangle((left, top, right - 1, bottom - 1), outline=LINE_COLOR, width=width)
        pen.text((left + 3 * width, top + 3 * width), str(number), fill=LINE_COLOR, font_size=12 * width)
    return drawn


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture file; raises InvalidRequest if Pillow cannot write one there."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        kind = Image.registered_extensions()[path.suffix.lower()]
        picture.save(partial, format=kind)
        os.replace(partial, path)
    except (OSError, ValueError, KeyError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = "no kind of picture has that ending" if isinstance(error, KeyError) else error
        raise InvalidRequest(f"{path} cannot be written ({reason}); name a .png or .jpg file in an existing folder") from None
