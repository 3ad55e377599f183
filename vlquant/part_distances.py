"""How far single parts of a bundle are from its reference's: each layer given what the reference gives its own, and features by tile.

A layer's error says little by itself; beside that of the same layer plainly rounded it says what quantizing did. Three layers
are built one after the other, while the reference's states before and after lie in files; one is in memory.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlquant.bundle import Manifest
from vlquant.decoder import LINEARS
from vlquant.forced import LayerPassed, run_layer
from vlquant.hidden_states import HiddenStates
from vlquant.model import Model
from vlquant.part_limits import SMALLEST_ERROR, LayerNoise, WorstTile
from vlquant.quantized_layers import round_layer
from vlquant.recipe import Recipe
from vlquant.runtime.linear import Workspace
from vlquant.runtime.loading import load_layer
from vlquant.vision_manifest import ACCEPTED

NO_NOISE = 999.0
"""Decibels that stand for infinitely many."""
LARGEST_ERROR = 1e4
"""Squared, relative, of a token; what is not finite counts as this far. So does a feature of a tile."""


class PlainRounding:
    """Read like a `Model`: the reference with each linear rounded to the bits that the bundle's recipe gave it, looking at nothing else."""

    def __init__(self, reference: Model, manifest: Manifest, device: str):
        self.reference, self.device, self.recipe = reference, device, Recipe.from_dict(manifest.recipe)
        self.config, self.folder, self.gptq_version = reference.config, reference.folder, 1
        self._chosen = {(each.layer, name): each.bits for each in manifest.bit_choice for name in each.linears}

    def decoder_layer(self, index: int) -> dict[str, Tensor]:
        """All tensors of decoder layer `index` by relative name, packed."""
        recipes = {name: self._plain(self._chosen.get((index, name), self.recipe.bits)) for name in LINEARS}
        return round_layer(self.reference.decoder_layer(index), recipes, self.device).tensors

    def _plain(self, bits: int) -> Recipe:
        if self.recipe.packed_as_gptq:
            return Recipe(method="rtn", bits=bits, group_size=self.recipe.group_size)
        return Recipe(method="bnb", bits=bits)


@dataclass
class LayerNoises:
    """Hears of the reference's layers one by one, and keeps what the bundle's add to the same states."""

    bundle: Model
    rounded: PlainRounding
    asked: dict[int, tuple[str, str]]
    """By place among the answers, the picture of each question that is looked at."""
    starts: Sequence[int]
    """Of every answer, the length of its prompt."""
    found: list[LayerNoise] = field(default_factory=list)

    def hear(self, passed: LayerPassed) -> None:
        """Run the bundle's layer, then the rounded one, on what went into the reference's."""
        if self.asked:
            added, rounding = (self._errors(model, passed) for model in (self.bundle, self.rounded))
            self.found.append(LayerNoise(passed.index, added, rounding))

    @torch.inference_mode()
    def _errors(self, model: Model | PlainRounding, passed: LayerPassed) -> tuple[float, ...]:
        """Squared errors of a model's own layer, relative to the reference's hidden states, token by token summed by picture."""
        device = self.rounded.device
        layer, by_picture = load_layer(model, passed.index, Workspace(device)), dict.fromkeys(self.asked.values(), 0.0)
        for place, picture in self.asked.items():
            wanted = passed.after[place].to(device)
            found = run_layer(layer, passed.before[place].to(device), self.starts[place])
            by_picture[picture] += float(relative_squares(wanted, found).sum())
        return tuple(by_picture.values())


def relative_squares(wanted: Tensor, found: Tensor) -> Tensor:
    """Squared distance of each token [tokens], relative to what it should be: the next layer's norm takes the length away."""
    squares = (found - wanted).double().square().sum(1) / wanted.double().square().sum(1)
    return squares.nan_to_num(LARGEST_ERROR, LARGEST_ERROR).clamp(SMALLEST_ERROR, LARGEST_ERROR)


def worst_tile(
    keys: Sequence[str], places: Iterable[Tensor], prompts: tuple[HiddenStates, HiddenStates], *, tokens_per_tile: int, precision: str
) -> WorstTile | None:
    """The tile that takes most of what the precision allows its visual tokens to differ; None if none differs.

    keys: of the questions; places: bool [length], where visual tokens stand in each; prompts: the reference's, the bundle's.
    """
    accepted, scale, seen = ACCEPTED[precision], torch.finfo(torch.float32).tiny, []
    for key, own, wanted, given in zip(keys, places, *prompts, strict=True):
        if not bool(own.any()):
            continue  # A question without pictures.
        pairs = zip(wanted[own].split(tokens_per_tile), given[own].split(tokens_per_tile), strict=True)
        for tile, (right, found) in enumerate(pairs, 1):
            scale = max(scale, float(right.abs().max()))
            if not torch.equal(right, found):
                seen.append((key, tile, *tile_distance(right, found)))
    if not seen:
        return None

    def share(distance: tuple) -> float:
        """Of what is allowed, how much a tile takes."""
        *_, cosine, difference = distance
        return max((1 - cosine) / (1 - accepted.cosine), difference / scale / accepted.difference)

    key, tile, decibels, cosine, difference = max(seen, key=share)
    return WorstTile(
        key, tile, round(decibels, 2), round(cosine, 9), min(difference / scale, LARGEST_ERROR),
        precision=precision, least_cosine=accepted.cosine, most_difference=accepted.difference,
    )  # fmt: skip


def tile_distance(right: Tensor, found: Tensor) -> tuple[float, float, float]:
    """Signal to noise in decibels, cosine and largest difference of a tile's features [tokens, hidden_size]."""
    right, found = right.double().flatten(), found.double().flatten()
    difference = (found - right).abs().max()
    if not bool(torch.isfinite(difference)):
        return -NO_NOISE, 0.0, math.inf
    signal, noise = float(right.square().sum()), float((found - right).square().sum())
    decibels = 10 * math.log10(signal / noise) if signal and noise else math.copysign(NO_NOISE, signal - noise)
    return decibels, float(torch.cosine_similarity(right, found, dim=0)), float(difference)
