"""The recorded calls as requests to a pipeline."""

import dataclasses
import functools

from vlquant.request import EncodedRequest, Request, encode_prompt, open_image
from vlquant.runtime import load
from vlquant.tiling import cut_tiles

from tests.golden_folder import golden_folder


@functools.cache
def pipeline(folder):
    """The pipeline of a golden checkpoint, loaded once."""
    pipe = load(folder, vision="torch")
    # The small NTK case is run far beyond its 96 x 2 positions on purpose.
    pipe.position_limit = 4096
    return pipe


def picture(name):
    return golden_folder() / "images" / name


def request_of(turn, question, images):
    history = tuple(map(tuple, turn.get("history_in") or ())) or None
    return Request(question, images=[picture(image["file"]) for image in images], history=history)


def encoded_of(pipe, turn, question, images):
    """What no Request can say: pictures with different max_num, or several behind one placeholder."""
    side, tiles = pipe.config.chat.image_size, []
    for image in images:
        opened = open_image(picture(image["file"]))
        tiles.append(cut_tiles(opened, image_size=side, use_thumbnail=True, max_tiles=image["max_num"]))
    counts = turn["num_patches_list"] or [sum(map(len, tiles))]
    request = request_of(turn, question, images)
    prompt, ids = encode_prompt(request, question, counts, config=pipe.config, tokenizer=pipe.tokenizer)
    unmapped = [[(0.0, 0.0, 0.0, 0.0)] * count for count in counts]
    return EncodedRequest(prompt, ids, [tile for each in tiles for tile in each], unmapped, question)


def requests_of(pipe, turn):
    """The requests of one golden call, as Request wherever that can express it."""
    if turn["call"] == "batch_chat":
        pairs = zip(turn["questions"], turn["images"], strict=True)
        return [Request(question, [picture(image["file"])], max_tiles=image["max_num"]) for question, image in pairs]
    limits = {image["max_num"] for image in turn["images"]}
    separate = turn["num_patches_list"] is not None or len(turn["images"]) == 1
    if turn["images"] and not (separate and len(limits) == 1):
        return [encoded_of(pipe, turn, turn["question"], turn["images"])]
    request = request_of(turn, turn["question"], turn["images"])
    return [dataclasses.replace(request, max_tiles=max(limits, default=None))]
