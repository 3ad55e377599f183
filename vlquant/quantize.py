"""`vlquant quantize`: a float checkpoint becomes a bundle, one decoder layer at a time.

Only the linears of the language model are ever quantized; everything else is copied as it is.
"""

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

import torch

import vlquant
from vlquant.bundle import (
    MANIFEST,
    Calibration,
    Manifest,
    ModuleRecord,
    Source,
    missing_files,
    read_manifest,
    write_manifest,
)
from vlquant.calibrate import CalibrationInputs, calibration_inputs
from vlquant.config import ModelConfig
from vlquant.decoder import LINEARS
from vlquant.errors import BrokenCheckpoint, InvalidRecipe
from vlquant.events import Event, Report, silent
from vlquant.hf_layout import inexpressible, write_settings
from vlquant.layout import EMBEDDING, layer_prefix, layer_shapes, tensor_shapes
from vlquant.model import Model, open_model, resolve_model
from vlquant.publishing import publishing, require_replaceable, require_space
from vlquant.quantized_layers import QuantizedLayer, gptq_layers, rounded_layers
from vlquant.recipe import Recipe
from vlquant.shards import ShardWriter, file_hash
from vlquant.tokenizer import load_tokenizer, write_fast_tokenizer

LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers", "bitsandbytes")
SOURCE_FILES = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model", "tokenizer.json", "vocab.json",
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip
"""What a bundle is made from."""


@torch.inference_mode()
def quantize(
    model: str | Path,
    *,
    recipe: Recipe = Recipe(),
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    report: Report | None = None,
) -> Path:
    """Quantize the language model of a checkpoint and write a bundle; returns its folder.

    output: None means NAME-METHOD-BITSbit in the current directory. A bundle already there that was made from the same
    source with the same recipe is returned as it is; any other needs `overwrite`. `report` receives events.
    Raises InvalidRecipe, UnsupportedCheckpoint, BrokenCheckpoint or OutputRefused; then nothing is left behind.
    """
    report = report or silent
    folder = resolve_model(model)
    source = open_float_model(folder)
    require_fitting(source.config, recipe)
    output = Path(output) if output is not None else Path(default_name(folder, recipe))
    origin = describe_source(folder)
    if is_done(output, recipe, origin):
        report(Event("quantize", message=f"{output} is already this model with this recipe"))
        return output
    require_replaceable(output, overwrite=overwrite)
    require_space(output, bundle_bytes(source, recipe))
    for remark in remarks(source, output):
        report(Event("quantize", message=remark))
    with publishing(output) as hidden:
        write_bundle(hidden, source, recipe=recipe, origin=origin, device=device, report=report)
    return output


def remarks(source: Model, output: Path) -> Iterable[str]:
    """What the user should know before it starts."""
    if reason := inexpressible(source.config):
        yield f"only vlquant will read {output}: {reason}"
    if source.checkpoint.adapters:
        yield f"{len(source.checkpoint.adapters)} LoRA adapters in {source.folder} are merged into their weights"
    if (output / "vision").is_dir():
        yield f"{output} is replaced: export its vision tower and check it again afterwards"


def write_bundle(
    folder: Path, model: Model, *, recipe: Recipe, origin: Source, device: str = "cpu", report: Report = silent
) -> None:
    """Write the whole bundle of `model` into the empty `folder`."""
    tokenizer = load_tokenizer(model.folder)
    writer = ShardWriter(folder)
    embedding = model.tensor(EMBEDDING)
    for name in names_outside_layers(model.config):
        writer.add(name, embedding if name == EMBEDDING else model.tensor(name))
    dtype = str(embedding.dtype).removeprefix("torch.")
    del embedding
    calibration, layers = None, rounded_layers(model, recipe, device=device)
    if recipe.method == "gptq":
        inputs = calibration_inputs(model, tokenizer, recipe=recipe, device=device, report=report)
        calibration = describe_calibration(recipe, inputs)
        layers = gptq_layers(model, inputs, recipe=recipe, device=device)
    modules = add_layers(writer, layers, count=model.config.decoder.layers, report=report)
    writer.close()
    write_fast_tokenizer(model.folder, folder)
    write_settings(folder, model.config, tokenizer, recipe=recipe, dtype=dtype)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    manifest = Manifest(
        name=f"{origin.name}-{recipe.label}",
        source=origin,
        source_config=model.config.source,
        recipe=recipe.to_dict(),
        calibration=calibration,
        modules=modules,
        libraries=library_versions(),
        files={path.name: file_hash(path) for path in paths},
        sizes={path.name: path.stat().st_size for path in paths},
    )
    write_manifest(folder, manifest)
    warn_of_fallbacks(manifest, report)


def add_layers(
    writer: ShardWriter, layers: Iterable[QuantizedLayer], *, count: int, report: Report
) -> list[ModuleRecord]:
    """Write decoder layers one after the other as they are quantized; returns what it did to their linears."""
    modules = []
    for index, layer in enumerate(layers):
        for name, tensor in layer.tensors.items():
            writer.add(layer_prefix(index) + name, tensor)
        modules += [record.model_copy(update={"name": layer_prefix(index) + record.name}) for record in layer.records]
        report(Event("layers", index + 1, count))
    return modules


def open_float_model(folder: Path) -> Model:
    """Open a checkpoint that is still to be quantized; raises InvalidRecipe for a bundle."""
    if (folder / MANIFEST).is_file():
        raise InvalidRecipe(f"{folder} is already quantized; give the checkpoint it was made from")
    return open_model(folder)


def require_fitting(config: ModelConfig, recipe: Recipe) -> None:
    """Raise InvalidRecipe unless every linear's shape allows the recipe. Reads no weights."""
    for name, shape in layer_shapes(config.decoder, 0).items():
        if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS)):
            recipe.require_shape(name.removesuffix(".weight"), out_features=shape[0], in_features=shape[1])


def names_outside_layers(config: ModelConfig) -> Iterable[str]:
    """Canonical names of everything that is copied as it is: vision tower, projector, embedding, norm, head."""
    in_layers = {name for index in range(config.decoder.layers) for name in layer_shapes(config.decoder, index)}
    return [name for name in tensor_shapes(config) if name not in in_layers]


def default_name(folder: Path, recipe: Recipe) -> str:
    """Folder name of the bundle when none is given."""
    return f"{source_name(folder)}-{recipe.label}"


def source_name(folder: Path) -> str:
    """The model's name: that of its folder, or of the hub repository whose download the folder is."""
    parts = folder.resolve().parts
    downloaded = next((part for part in reversed(parts) if part.startswith("models--")), None)
    return downloaded.rpartition("--")[2] if downloaded else parts[-1]


def describe_source(folder: Path) -> Source:
    """Name and hashes of a checkpoint."""
    paths = sorted({path for pattern in SOURCE_FILES for path in folder.glob(pattern)})
    return Source(name=source_name(folder), files={path.name: file_hash(path) for path in paths})


def is_done(output: Path, recipe: Recipe, origin: Source) -> bool:
    """Whether `output` is a complete bundle of this source with this recipe."""
    if not (output / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(output)
    except (BrokenCheckpoint, InvalidRecipe):
        return False
    same = manifest.recipe == recipe.to_dict() and manifest.source.files == origin.files
    return same and not missing_files(output, manifest)


def bundle_bytes(model: Model, recipe: Recipe) -> int:
    """About how many bytes the bundle will have, for the check of the disk."""
    inside = {
        name
        for index in range(model.config.decoder.layers)
        for name in layer_shapes(model.config.decoder, index)
        if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS))
    }
    itemsize = torch.float32.itemsize if model.config.source.get("torch_dtype") == "float32" else torch.bfloat16.itemsize
    bits = {name: recipe.bits * 1.1 if name in inside else 8 * itemsize for name in tensor_shapes(model.config)}
    elements = {name: torch.Size(shape).numel() for name, shape in tensor_shapes(model.config).items()}
    return int(sum(elements[name] * bits[name] for name in elements) / 8)


def library_versions() -> dict[str, str]:
    """Versions of what computed the weights."""
    return {"vlquant": vlquant.__version__, **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def describe_calibration(recipe: Recipe, inputs: CalibrationInputs) -> Calibration:
    """What the manifest says of the pictures and texts that a recipe calibrates on."""
    from vlquant.calib_data.samples import set_hash

    identity = set_hash("calibration", recipe.samples, seed=recipe.seed)
    return Calibration(set=recipe.calibration, sha256=identity, samples=recipe.samples, tokens=inputs.tokens)


def warn_of_fallbacks(manifest: Manifest, report: Report) -> None:
    """Say which linears GPTQ could not handle."""
    if manifest.fallbacks:
        names = ", ".join(manifest.fallbacks[:3]) + (" ..." if len(manifest.fallbacks) > 3 else "")
        report(
            Event(
                "layers",
                message=f"warning: {len(manifest.fallbacks)} linears were rounded to the nearest because GPTQ failed: {names}",
            )
        )
