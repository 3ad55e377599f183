"""Whether a bundle reads a question exactly as its reference does. Exact: no tolerance, no statistics."""

from collections.abc import Iterator

from vlquant.config import ModelConfig
from vlquant.request import EncodedRequest
from vlquant.tokenizer import Tokenizer

Reader = tuple[ModelConfig, Tokenizer]
SHOWN = 3
"""Tokens that a sentence quotes."""


def structure_faults(key: str, reference: EncodedRequest, bundle: EncodedRequest) -> Iterator[str]:
    """A sentence for each way in which what the bundle is shown of a question differs from what the reference is shown."""
    if reference.ids != bundle.ids:
        place = first_difference(reference.ids, bundle.ids)
        yield (
            f"{key}: the prompts' token ids differ from token {place + 1} on "
            f"({reference.ids[place : place + SHOWN]} in the reference, {bundle.ids[place : place + SHOWN]} in the bundle)"
        )
    if reference.tiles_per_image != bundle.tiles_per_image:
        yield f"{key}: pictures are cut into {reference.tiles_per_image} tiles by the reference, {bundle.tiles_per_image} by the bundle"
    else:
        tiles = zip(reference.tiles, bundle.tiles, strict=True)
        other = [number for number, (first, second) in enumerate(tiles, 1) if first.tobytes() != second.tobytes()]
        if other:
            yield f"{key}: {len(other)} of {len(reference.tiles)} tiles show something else, the first is tile {other[0]}"


def stop_faults(reference: Reader, bundle: Reader) -> Iterator[str]:
    """A sentence if the models end their answers with different tokens."""
    stops = [(config.chat.conversation.stop_token, config, words) for config, words in (reference, bundle)]
    ids = [words.token_id(stop) for stop, _, words in stops]
    if ids[0] != ids[1]:
        yield f"answers end with token {ids[0]} ({stops[0][0]}) in the reference, with {ids[1]} ({stops[1][0]}) in the bundle"


def first_difference(first: list[int], second: list[int]) -> int:
    """Index of the first entry that differs, or at which the shorter list has ended."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
