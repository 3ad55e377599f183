"""Whatever picture, conversation or text comes: a right result or one of our errors, never a traceback."""

import random
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from PIL import Image

from vlquant.errors import InvalidRequest
from vlquant.request import Request, encode_request, open_image
from vlquant.tiling import choose_grid, cut_tiles, tile_boxes

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F")

sides = some.integers(1, 400)
words = some.text(alphabet=string.ascii_letters + " \n<>|图é🙂", max_size=30)
markers = some.sampled_from(["<image>", "<IMG_CONTEXT>", "<img>", "</img>", "<|im_end|>", "<s>", "</s>", "<0x41>", "▁"])
texts = some.lists(words | markers, max_size=5).map("".join)


@QUICK
@given(mode=some.sampled_from(MODES), width=sides, height=sides, most=some.integers(1, 12))
def test_pictures_of_every_mode_and_size(mode, width, height, most):
    picture = open_image(Image.new(mode, (width, height)))
    assert picture.mode == "RGB" and picture.size == (width, height)
    limits = {"min_tiles": 1, "max_tiles": most, "image_size": 28}
    tiles, (columns, rows) = cut_tiles(picture, use_thumbnail=True, **limits), choose_grid(width, height, **limits)
    assert len(tiles) == columns * rows + (columns * rows > 1) and columns * rows <= most
    assert {tile.size for tile in tiles} == {(28, 28)}
    boxes = tile_boxes(picture.size, (columns, rows), use_thumbnail=True)
    shown = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes[: columns * rows])
    assert len(boxes) == len(tiles) and shown == pytest.approx(width * height)


@QUICK
@given(
    question=texts,
    history=some.lists(some.tuples(texts, texts), max_size=2),
    pictures=some.lists(some.tuples(sides, sides), max_size=3),
    most=some.none() | some.integers(1, 4),
)
@pytest.mark.parametrize("name", ["internlm2_chat_ntk", "qwen2_hermes2"])
def test_conversations_have_a_token_for_every_piece_of_picture_or_are_refused(named_case, name, question, history, pictures, most):
    case, images = named_case(name), [Image.new("RGB", size) for size in pictures]
    request = Request(question, images=images, history=history or None, max_tiles=most)
    try:
        encoded = encode_request(request, case.config, case.tokenizer)
    except InvalidRequest:
        return
    typed = sum(text.count("<IMG_CONTEXT>") for turn in history for text in turn) + question.count("<IMG_CONTEXT>")
    expected = len(encoded.tiles) * case.config.chat.tokens_per_tile
    found = encoded.ids.count(case.tokenizer.token_id("<IMG_CONTEXT>"))
    assert found == expected if images else found <= typed
    assert max(encoded.ids) < case.config.decoder.vocab_size


@QUICK
@given(text=texts)
@pytest.mark.parametrize("name", ["internlm2_chat_ntk", "internlm2_internvl2_5", "qwen2_hermes2", "qwen2_internvl2_5_vit6b"])
def test_tokenizers_take_and_give_back_any_text(named_case, name, text):
    tokenizer = named_case(name).tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.encode(text) == ids and all(0 <= each < tokenizer.vocabulary_size for each in ids)
    assert isinstance(tokenizer.decode(ids), str) and isinstance(tokenizer.decode(ids, skip_special=False), str)
    plain = not any(marker in text for marker in ("<", "▁", "|"))
    if plain and name.startswith("qwen2"):
        assert tokenizer.decode(ids) == text


def obvious_grid(width, height, most):
    """The rule of the model cards written out as slowly as possible.

    Distances are floats there too: 2240x1920 lies exactly between 4x3 and 4x4, and rounding decides.
    """
    grids = {(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if 1 <= i * j <= most}
    best, best_distance = (1, 1), None
    for i, j in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        distance = abs(width / height - i / j)
        better = best_distance is None or distance < best_distance
        if better or distance == best_distance and 2 * width * height > 448 * 448 * i * j:
            best, best_distance = (i, j), distance
    return best


def test_six_thousand_grids_are_those_of_the_obvious_rule():
    chance, checked = random.Random(0), set()
    nice = [112, 224, 336, 448, 640, 672, 896, 1024, 1344, 1792, 1920, 2240, 3584]
    while len(checked) < 6000:
        side = (lambda: chance.choice(nice)) if chance.random() < 0.2 else (lambda: int(2 ** chance.uniform(0, 13)))
        width, height, most = side(), side(), chance.choice([1, 2, 3, 4, 6, 8, 12, 12, 18, 24])
        if (width, height, most) in checked:
            continue
        checked.add((width, height, most))
        grid = choose_grid(width, height, min_tiles=1, max_tiles=most, image_size=448)
        assert grid == obvious_grid(width, height, most), (width, height, most)
