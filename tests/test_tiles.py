"""`vlquant tiles` and the tile map of requests: what is printed, drawn and promised is what is cut."""

import pytest
from PIL import Image, ImageChops

from vlquant.errors import InvalidRequest
from vlquant.request import Request, encode_request
from vlquant.tiles import LINE_COLOR, tiles


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((2480, 3508), "2480x3508 -> 2x3 + thumbnail = 7 tiles = 1792 tokens"),
        ((448, 448), "448x448 -> 1x1 = 1 tile = 256 tokens"),
        ((3000, 1000), "3000x1000 -> 6x2 + thumbnail = 13 tiles = 3328 tokens"),
    ],
)
def test_what_is_printed(size, said):
    assert str(tiles(Image.new("RGB", size))) == said


def test_a_model_says_how_it_cuts(small_case):
    chat = small_case.config.chat
    found = tiles(Image.new("RGB", (224, 112)), model=small_case.folder)
    assert found.grid == (2, 1) and found.tokens == 3 * chat.tokens_per_tile
    assert tiles(Image.new("RGB", (224, 112)), model=small_case.folder, max_tiles=1).grid == (1, 1)


def test_the_tile_map_of_a_request_is_what_the_tiles_show(small_case):
    """Each tile resized from its box of the picture is nearly the tile: resampling differs at the edges."""
    picture = Image.effect_mandelbrot((300, 200), (-2, -1.2, 1, 1.2), 60).convert("RGB")
    encoded = encode_request(Request("What?", images=[picture, picture.crop((0, 0, 90, 90))]), small_case.config, small_case.tokenizer)
    (first, second), side = encoded.tile_map, small_case.config.chat.image_size
    assert encoded.tiles_per_image == [len(first), len(second)] and len(first) > 1 and sum(encoded.tiles_per_image) == len(encoded.tiles)
    for tile, box in zip(encoded.tiles, first, strict=False):
        expected = picture.resize((side, side), Image.Resampling.BICUBIC, box=box)
        differences = ImageChops.difference(tile, expected).convert("L").histogram()
        assert sum(differences[48:]) < 0.05 * side * side
    assert first[-1] == (0, 0, 300, 200)


def test_the_grid_is_drawn(tmp_path):
    tiles(Image.new("RGB", (300, 200)), draw=tmp_path / "grid.png")
    drawn = Image.open(tmp_path / "grid.png")
    assert drawn.size == (300, 200)
    assert drawn.getpixel((0, 0)) == drawn.getpixel((100, 10)) == LINE_COLOR and drawn.getpixel((50, 60)) == (0, 0, 0)


@pytest.mark.parametrize("target", ["nowhere/grid.png", "grid.nonsense"])
def test_what_cannot_be_written(tmp_path, target):
    with pytest.raises(InvalidRequest, match="cannot be written"):
        tiles(Image.new("RGB", (30, 20)), draw=tmp_path / target)
    assert not list(tmp_path.iterdir())


def test_too_few_tiles():
    with pytest.raises(InvalidRequest, match="1 to 1024"):
        tiles(Image.new("RGB", (30, 20)), max_tiles=0)


@pytest.mark.parametrize("name", ["precious.txt", "folder", "in.png"])
def test_drawing_spoils_nothing(name, tmp_path):
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (50, 20)).save(tmp_path / "in.png")
    (tmp_path / "precious.txt").write_text("precious")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(InvalidRequest):
        tiles(str(tmp_path / "in.png"), draw=tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_very_many_tiles_are_refused_at_once():
    with pytest.raises(InvalidRequest, match="1 to 1024"):
        tiles(Image.new("RGB", (50, 20)), max_tiles=200_000)
