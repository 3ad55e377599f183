"""Can a model be quantized as it is asked for, here? Everything that refuses before the work begins, or warns."""

from collections.abc import Iterable
from pathlib import Path

import torch

from vlquant.bundle import MANIFEST
from vlquant.calibrate import CLASSES, CalibrationInputs
from vlquant.config import ModelConfig, quantization_settings
from vlquant.decoder import LINEARS
from vlquant.decoder_config import DecoderConfig
from vlquant.errors import InvalidRecipe, InvalidRequest
from vlquant.events import Event, Report
from vlquant.hf_layout import inexpressible
from vlquant.layout import layer_shapes, tensor_shapes
from vlquant.model import Model, is_quantized, open_model
from vlquant.publishing import require_renamable, require_replaceable, require_space
from vlquant.recipe import Recipe
from vlquant.unfinished import bytes_so_far
from vlquant.vision_manifest import has_exported_tower

FEW_ANSWER_TOKENS = 1000
"""Fewer say little of what a model writes."""


def open_float_model(folder: Path) -> Model:
    """Open a checkpoint that is still to be quantized; raises InvalidRecipe for a bundle."""
    if (folder / MANIFEST).is_file():
        raise InvalidRecipe(f"{folder} is already quantized; give the checkpoint it was made from")
    model = open_model(folder)
    packed = [name for name in layer_shapes(model.config.decoder, 0) if is_quantized(model, name)]
    if packed or quantization_settings(folder):
        raise InvalidRecipe(f"{folder} is already quantized, as its config.json or weights say; give the unquantized checkpoint")
    return model


def require_fitting(config: ModelConfig, recipe: Recipe) -> None:
    """Raise InvalidRecipe unless every linear's shape allows the recipe. Reads no weights."""
    for name, shape in layer_shapes(config.decoder, 0).items():
        if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS)):
            recipe.require_shape(name.removesuffix(".weight"), out_features=shape[0], in_features=shape[1])


def require_writable(output: Path, model: Model, recipe: Recipe, *, overwrite: bool) -> None:
    """Raise OutputRefused unless `output` is free or may be replaced, and its disk has room."""
    require_replaceable(output, overwrite=overwrite)
    require_renamable(output)
    # Finished layers lie beside the bundle until it is whole.
    require_space(output, 2 * bundle_bytes(model, recipe) - bytes_so_far(output))


def require_useful(inputs: CalibrationInputs, recipe: Recipe, report: Report) -> None:
    """Raise InvalidRequest for calibration data none of which counts, and say so where it is little."""
    counts = torch.bincount(torch.cat(inputs.classes), minlength=len(CLASSES)).tolist()
    if not any(count and share for count, share in zip(counts, inputs.shares, strict=True)):
        raise InvalidRequest(
            f"the calibration data holds {' and '.join(name for name, count in zip(CLASSES, counts, strict=True) if count)} tokens "
            "only, and the recipe gives these no weight; change --vision-share or --answer-share"
        )
    if not inputs.held_out:
        report(Event("calibration", message=f"warning: {len(inputs.classes)} conversations are too few to judge by unseen ones"))
    if counts[-1] < FEW_ANSWER_TOKENS:
        report(Event("calibration", message=f"warning: {counts[-1]} answer tokens are few to calibrate on; use more --samples"))


def remarks(source: Model, output: Path, recipe: Recipe) -> Iterable[str]:
    """What the user should know before it starts."""
    if recipe.bits == 3:
        yield "3 bits are experimental: the loss is large, and few other programs read them"
    if recipe.average_bits:
        yield "linears of 4 and 8 bits side by side are read by vlquant, GPTQModel and vLLM, not by transformers or LMDeploy"
    elif recipe.packed_as_gptq and (recipe.bits, recipe.group_size) != (4, 128):
        yield f"LMDeploy reads 4 bits in groups of 128 only, not {recipe.bits} bits in groups of {recipe.group_size}"
    if reason := inexpressible(source.config):
        yield f"only vlquant will read {output}: {reason}"
    if source.checkpoint.adapters:
        yield f"{len(source.checkpoint.adapters)} LoRA adapters in {source.folder} are merged into their weights"
    if has_exported_tower(output):
        yield f"{output} is replaced: export its vision tower and check it again afterwards"


def bundle_bytes(model: Model, recipe: Recipe) -> int:
    """About how many bytes the bundle will have, for the check of the disk."""
    inside = {
        name
        for index in range(model.config.decoder.layers)
        for name in layer_shapes(model.config.decoder, index)
        if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS))
    }
    itemsize = torch.float32.itemsize if model.config.source.get("torch_dtype") == "float32" else torch.bfloat16.itemsize
    each = (recipe.average_bits or recipe.bits) * 1.1
    bits = {name: each if name in inside else 8 * itemsize for name in tensor_shapes(model.config)}
    elements = {name: torch.Size(shape).numel() for name, shape in tensor_shapes(model.config).items()}
    return int(sum(elements[name] * bits[name] for name in elements) / 8)


def states_bytes(config: DecoderConfig, inputs: CalibrationInputs) -> int:
    """How many bytes the files of hidden states take at most: layer, middle and next layer of two streams, and a linear's inputs."""
    compared = sum(len(inputs.classes[index]) for index in inputs.compared)
    floats = (3 * config.hidden_size + config.intermediate_size) * inputs.tokens + 3 * config.hidden_size * compared
    return torch.float32.itemsize * floats
