"""Which part of a bundle is further from its reference than its form promises. Arithmetic only: no models, no files.

Limits of the whole model are wide enough for any model of that many bits. A part is held against itself: a layer against
plain rounding of the same layer, the exported vision tower against what its precision was accepted with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlquant.intervals import CONFIDENCE, Moments, bound, ratio_values

MOST_ROUNDINGS = 1.5
"""How many times as far from the float layer as plain rounding would leave it a layer may be.

Good ones are at 0.4 to 0.75 (GPTQ, 3 to 8 bits) and 1 (whatever rounds plainly), those with scales a tenth too large at
2.7 and more, at 2 bits instead of 4 at 3.8 and more: tests/RESULTS.md.
"""
SMALLEST_ERROR = 1e-14
"""Squared, relative, of a token: float32 knows no smaller one."""


@dataclass(frozen=True)
class LayerNoise:
    """What one decoder layer adds to hidden states of the float model: squared errors relative to what it makes of them."""

    layer: int
    """Counted from 0, as in the manifest."""
    added: tuple[float, ...]
    """By the bundle's layer: sums over the tokens of each picture's questions."""
    rounding: tuple[float, ...]
    """By the float layer plainly rounded to the same bits."""


@dataclass(frozen=True)
class LayerDistance:
    """How far a layer is from the reference's, in multiples of what plain rounding to the same bits would leave."""

    layer: int
    roundings: float
    roundings_low: float
    """What it surely exceeds, all layers together."""
    limit: float = MOST_ROUNDINGS

    @property
    def is_broken(self) -> bool:
        """Whether it is surely beyond its limit."""
        return self.roundings_low > self.limit


@dataclass(frozen=True)
class WorstTile:
    """The tile that takes most of what the precision of the exported vision tower allows."""

    key: str
    """The question it was seen in."""
    tile: int
    """Counted from 1."""
    signal_to_noise: float
    """Decibels; infinite ones are written as 999."""
    cosine: float
    """Between its features and torch's, all tokens together."""
    difference: float
    """Largest of any of its features, as a share of the largest feature of all tiles."""
    precision: str
    """"fp32", "fp16" or "int8"."""
    least_cosine: float
    """What an export in this precision is accepted with."""
    most_difference: float

    @property
    def is_broken(self) -> bool:
        """Whether such an export would have been refused."""
        return self.cosine < self.least_cosine or self.difference > self.most_difference


@dataclass(frozen=True)
class PartDistances:
    """How far single parts of a bundle are from its reference's."""

    layers: tuple[LayerDistance, ...] = ()
    tile: WorstTile | None = None
    """None: vision was not exported, no question has pictures, or nothing differs."""


def judge_layers(noises: Sequence[LayerNoise]) -> tuple[LayerDistance, ...]:
    """Each layer beside plain rounding; what is sure is sure of all of them together (Bonferroni).

    Few pictures are no proof: the bounds are taken as if one more had been rounded plainly.
    """
    return tuple(judge_layer(each, confidence=1 - (1 - CONFIDENCE) / len(noises)) for each in noises)


def judge_layer(noise: LayerNoise, *, confidence: float) -> LayerDistance:
    """One layer of at least one picture."""
    squares = ratio_values(noise.added, noise.rounding)
    low = float(bound(Moments.of(squares), (1.0,), side=-1, confidence=confidence))
    return LayerDistance(
        layer=noise.layer,
        roundings=math.sqrt(math.fsum(noise.added) / math.fsum(noise.rounding)),
        roundings_low=math.sqrt(max(0.0, low)),
    )


def part_faults(parts: PartDistances) -> list[str]:
    """A sentence for every part that is surely beyond its limit: the vision tower, then layers in order."""
    return tile_faults(parts.tile) + [layer_fault(each) for each in parts.layers if each.is_broken]


def layer_fault(layer: LayerDistance) -> str:
    """What is wrong with a layer."""
    return (
        f"layer {layer.layer} of the language model is {layer.roundings:.2f} times as far from the reference's as plain rounding "
        f"to the same bits would leave it, surely more than {layer.roundings_low:.2f}: beyond the limit of {layer.limit:g}"
    )


def tile_faults(tile: WorstTile | None) -> list[str]:
    """What is wrong with the exported vision tower, if anything is."""
    if tile is None or not tile.is_broken:
        return []
    if tile.cosine < tile.least_cosine:
        found, promised = f"of cosine {tile.cosine:.7g} with the reference's", f"{tile.least_cosine:g}"
    else:
        found, promised = f"up to {tile.difference:.2g} of the largest feature away", f"within {tile.most_difference:g}"
    return [f"the exported vision tower gives tile {tile.tile} of {tile.key} features {found}, where {tile.precision} keeps {promised}"]
