"""What is measured when nobody has the weights: a bundle of random ones in a published model's shape."""

from pathlib import Path

from vlquant.bundle import MANIFEST, find_bundle
from vlquant.events import Report, silent
from vlquant.export.vision import export_vision
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.synthesize import require_shape, synthesize

RECIPE = Recipe(method="rtn", bits=4)
"""Speed and memory do not depend on how weights were rounded."""


def bundle_of_shape(
    name: str, place: Path, *, layers: int | None = None, vision_layers: int | None = None, report: Report = silent
) -> Path:
    """A bundle in 4 bits with its exported tower below `place`; one that is there is taken as it is.

    layers, vision_layers: None for all. Raises InvalidRequest as `require_shape`, OutputRefused without room.
    """
    require_shape(name, layers=layers, vision_layers=vision_layers)
    cut = "".join(f"-{count}{what}" for count, what in ((layers, "layers"), (vision_layers, "vision")) if count is not None)
    checkpoint, bundle = place / f"{name}{cut}", place / f"{name}{cut}-{RECIPE.label}"
    if not (bundle / MANIFEST).is_file():
        if not (checkpoint / "config.json").is_file():
            synthesize(name, checkpoint, layers=layers, vision_layers=vision_layers, report=report)
        quantize(checkpoint, recipe=RECIPE, output=bundle, report=report)
    find_bundle(bundle)
    export_vision(bundle, report=report)
    return bundle
