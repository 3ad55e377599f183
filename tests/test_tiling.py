"""Tiles bit for bit, grids and frame indices, against what the original recorded."""

import functools
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlquant.tiling import candidate_grids, choose_grid, cut_tiles, frame_indices, normalize, tile_boxes


@functools.cache
def recorded(root):
    return json.loads((root / "preprocess" / "golden.json").read_text()), load_file(root / "preprocess" / "golden.safetensors")


def rgb_bytes(image):
    return hashlib.sha256(image.tobytes()).hexdigest()


def test_tiles_match_bit_for_bit(golden_root):
    golden, tensors = recorded(golden_root)
    exact = 0
    for name, image_record in golden["images"].items():
        image = Image.open(golden_root / "images" / name).convert("RGB")
        same_pixels = rgb_bytes(image) == image_record["rgb_sha256"]
        assert same_pixels or name.endswith(".jpg"), f"{name}: only a JPEG may decode differently"
        for case in image_record["cases"]:
            size, limit, thumbnail = case["image_size"], case["max_num"], case["use_thumbnail"]
            grid = choose_grid(*image.size, min_tiles=1, max_tiles=limit, image_size=size)
            tiles = cut_tiles(image, max_tiles=limit, image_size=size, use_thumbnail=thumbnail)
            assert [list(grid), len(tiles)] == [case["grid"], case["tiles"]], (name, case)
            if same_pixels and "tile_sha256" in case:
                assert [rgb_bytes(tile) for tile in tiles] == case["tile_sha256"], (name, case)
                exact += len(tiles)
            if "samples_key" in case:
                check_samples(normalize(tiles), tensors, case["samples_key"], tolerance=1e-6 if same_pixels else 0.05)
    assert exact > 100


def check_samples(pixels, tensors, key, *, tolerance):
    step = pixels.shape[-1] // 7
    samples = pixels[:, :, step // 2 :: step, step // 2 :: step]
    assert (samples - tensors[key + "/grid_samples"]).abs().max() <= tolerance
    assert torch.allclose(pixels.mean((2, 3)), tensors[key + "/channel_mean"], atol=max(tolerance, 1e-4))
    deviation = pixels.std((2, 3), unbiased=False)
    assert torch.allclose(deviation, tensors[key + "/channel_std"], atol=max(tolerance, 1e-4))


def test_whole_pixel_values_are_equal(golden_root):
    golden, tensors = recorded(golden_root)
    compared = 0
    for name, image_record in golden["images"].items():
        for entry in as_list(image_record.get("full_pixel_values")):
            image = Image.open(golden_root / "images" / name).convert("RGB")
            tiles = cut_tiles(image, max_tiles=entry["max_num"], image_size=entry["image_size"], use_thumbnail=entry["use_thumbnail"])
            assert (normalize(tiles) - tensors[entry["key"]]).abs().max() <= 1e-6
            compared += 1
    assert compared


def as_list(value):
    return [] if value is None else value if isinstance(value, list) else [value]


def test_grid_table(golden_root):
    golden, _ = recorded(golden_root)
    for width, height, grids in golden["grid_table"]:
        for column, grid in zip(golden["grid_table_columns"], grids, strict=True):
            limits = {"min_tiles": column["min_num"], "max_tiles": column["max_num"]}
            assert choose_grid(width, height, **limits, image_size=column["image_size"]) == tuple(grid), (width, height, column)


def test_frame_index_table(golden_root):
    for row in recorded(golden_root)[0]["frame_index_table"]:
        bound = tuple(row["bound"]) if row["bound"] else None
        assert frame_indices(bound, row["fps"], row["max_frame"], row["num_segments"]) == row["indices"], row


def test_no_grid_in_the_limits_is_one_tile():
    assert candidate_grids(3, 2) == ()
    assert choose_grid(100, 50, min_tiles=3, max_tiles=2, image_size=112) == (1, 1)


def test_a_tie_goes_to_the_larger_grid_only_for_large_pictures():
    limits = {"min_tiles": 1, "max_tiles": 4, "image_size": 100}
    assert choose_grid(141, 141, **limits) == (1, 1)
    assert choose_grid(142, 142, **limits) == (2, 2)  # more than half of 200 x 200 pixels


@pytest.mark.parametrize("thumbnail", [True, False])
def test_boxes_say_what_each_tile_shows(thumbnail):
    """Every tile of a picture whose colour encodes the position holds the colours of its box."""
    width, height = 600, 300
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = (np.arange(width) * 255 // width)[None, :]
    pixels[..., 1] = (np.arange(height) * 255 // height)[:, None]
    tiles = cut_tiles(Image.fromarray(pixels), max_tiles=8, image_size=112, use_thumbnail=thumbnail)
    grid = choose_grid(width, height, min_tiles=1, max_tiles=8, image_size=112)
    boxes = tile_boxes((width, height), grid, use_thumbnail=thumbnail)
    assert len(boxes) == len(tiles)
    for tile, (left, top, right, bottom) in zip(tiles, boxes, strict=True):
        expected = pixels[round(top) : round(bottom), round(left) : round(right)].mean((0, 1))
        assert np.abs(np.asarray(tile).mean((0, 1)) - expected).max() < 2
