"""Pictures to tiles to pixel values, bit for bit as the original preprocessing. Opens no files."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlquant.errors import InvalidRequest

MEAN = (0.485, 0.456, 0.406)
STANDARD_DEVIATION = (0.229, 0.224, 0.225)

MOST_TILES = 1024
"""More of one picture no InternVL has room for."""

Box = tuple[float, float, float, float]


def require_tiles(min_tiles: int, max_tiles: int) -> None:
    """Raise InvalidRequest unless a picture can be cut into that many tiles."""
    if not 1 <= min_tiles <= max_tiles <= MOST_TILES:
        raise InvalidRequest(f"max_tiles is {max_tiles}, but a picture is cut into {min_tiles} to {MOST_TILES} tiles; give one of these")


@lru_cache
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_tiles <= columns * rows <= max_tiles, fewest tiles first."""
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in range(-(-min_tiles // columns), max_tiles // columns + 1)]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def choose_grid(width: int, height: int, *, min_tiles: int, max_tiles: int, image_size: int) -> tuple[int, int]:
    """The (columns, rows) whose aspect ratio is nearest to that of a width x height picture.

    Of equally near grids a later, larger one wins if the picture has more than half its pixels.
    """
    aspect, area = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in candidate_grids(min_tiles, max_tiles):
        distance = abs(aspect - columns / rows)
        enough_pixels = area > 0.5 * image_size * image_size * columns * rows
        if distance < best_distance or (distance == best_distance and enough_pixels):
            best, best_distance = (columns, rows), distance
    return best


def cut_tiles(
    image: Image.Image, *, max_tiles: int, image_size: int, use_thumbnail: bool, min_tiles: int = 1
) -> list[Image.Image]:
    """Square tiles of `image` (RGB), row by row, then the thumbnail if there is more than one tile."""
    columns, rows = choose_grid(*image.size, min_tiles=min_tiles, max_tiles=max_tiles, image_size=image_size)
    resized = image.resize((image_size * columns, image_size * rows), Image.Resampling.BICUBIC)
    tiles = []
    for row in range(rows):
        for column in range(columns):
            left, top = column * image_size, row * image_size
            tiles.append(resized.crop((left, top, left + image_size, top + image_size)))
    if use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((image_size, image_size), Image.Resampling.BICUBIC))
    return tiles


def tile_boxes(size: tuple[int, int], grid: tuple[int, int], *, use_thumbnail: bool) -> list[Box]:
    """What each tile of `cut_tiles` shows, as (left, top, right, bottom) in pixels of the original picture.

    size: (width, height); grid: (columns, rows).
    """
    (width, height), (columns, rows) = size, grid
    xs = [width * column / columns for column in range(columns + 1)]
    ys = [height * row / rows for row in range(rows + 1)]
    boxes = [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(rows) for c in range(columns)]
    if use_thumbnail and len(boxes) > 1:
        boxes.append((0.0, 0.0, float(width), float(height)))
    return boxes


def tile_picture(
    image: Image.Image, *, max_tiles: int, image_size: int, use_thumbnail: bool, min_tiles: int = 1
) -> tuple[list[Image.Image], list[Box]]:
    """The tiles of `cut_tiles`, and what each shows as in `tile_boxes`."""
    limits = {"min_tiles": min_tiles, "max_tiles": max_tiles, "image_size": image_size}
    tiles = cut_tiles(image, use_thumbnail=use_thumbnail, **limits)
    return tiles, tile_boxes(image.size, choose_grid(*image.size, **limits), use_thumbnail=use_thumbnail)


def normalize(tiles: Sequence[Image.Image]) -> Tensor:
    """Pixel values float32 [tiles, 3, side, side] of RGB tiles, ImageNet mean and deviation."""
    pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles]))  # uint8 [tiles, side, side, 3]
    scaled = pixels.permute(0, 3, 1, 2).float().contiguous() / 255
    mean = torch.tensor(MEAN).view(3, 1, 1)
    return scaled.sub_(mean).div_(torch.tensor(STANDARD_DEVIATION).view(3, 1, 1))


def frame_indices(bound: tuple[float, float] | None, fps: float, max_frame: int, count: int) -> list[int]:
    """Indices of `count` frames from the middles of equal stretches of a video.

    bound: (start, end) in seconds, None for the whole video; max_frame: index of the last frame.
    """
    start, end = bound if bound else (-100_000, 100_000)
    first, last = max(0, round(start * fps)), min(round(end * fps), max_frame)
    stretch = (last - first) / count
    # np.round rounds halves to even, as the original; plain integer arithmetic would differ.
    return [int(first + stretch / 2 + np.round(stretch * index)) for index in range(count)]
