"""`vlquant quantize`: a float checkpoint becomes a bundle, one decoder layer at a time.

Only the linears of the language model are ever quantized; everything else is copied as it is.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from vlquant.activations import has_byte_products
from vlquant.bit_choice import choose_bits
from vlquant.bundle import (
    FLOAT16_ROOM,
    MANIFEST,
    Calibration,
    Manifest,
    Source,
    library_versions,
    missing_files,
    read_manifest,
    write_manifest,
)
from vlquant.calibrate import CLASSES, CalibrationInputs, calibration_inputs
from vlquant.calibration_sets import ChosenConversations, choose_conversations, require_encodable
from vlquant.checkpoint import unreadable
from vlquant.config import ModelConfig
from vlquant.errors import BrokenCheckpoint, InvalidRecipe
from vlquant.events import Event, Report, silent
from vlquant.feasibility import (
    open_float_model,
    remarks,
    require_fitting,
    require_useful,
    require_writable,
    states_bytes,
)
from vlquant.hf_layout import quantization_config, write_settings
from vlquant.layout import EMBEDDING, layer_prefix, layer_shapes, tensor_shapes
from vlquant.model import Model, resolve_model
from vlquant.publishing import publishing, require_space, sweep
from vlquant.quantized_layers import QuantizedLayer, gptq_layers, rounded_layers
from vlquant.recipe import Recipe
from vlquant.reference_answers import with_answers
from vlquant.rehearsal import rehearse
from vlquant.reload import reload_elsewhere
from vlquant.runtime.reader import require_device
from vlquant.shards import ShardWriter, file_hash
from vlquant.tokenizer import load_tokenizer, write_fast_tokenizer
from vlquant.unfinished import UnfinishedRun, forget_finished, resuming

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
    source and data with the same recipe is returned as it is; any other needs `overwrite`. `report` receives events.
    A run that was killed goes on after its last finished layer if it is repeated; what it has is hidden beside the output.
    Raises InvalidRecipe, InvalidRequest for calibration data, UnsupportedCheckpoint, BrokenCheckpoint or OutputRefused.
    """
    report = report or silent
    folder = resolve_model(model)
    source = open_float_model(folder)
    require_fitting(source.config, recipe)
    place = require_device(device)
    output = Path(output) if output is not None else Path(default_name(folder, recipe))
    sweep(output)
    origin = describe_source(folder)
    chosen = choose_conversations(recipe, report) if recipe.method == "gptq" else None
    if is_done(output, recipe, origin, chosen):
        report(Event("quantize", message=f"{output} is already this model with this recipe"))
        forget_finished(output)
        return output
    require_encodable(chosen, source.config, load_tokenizer(folder), recipe, report)  # RTN needs a tokenizer too, though last.
    require_writable(output, source, recipe, overwrite=overwrite)
    for remark in remarks(source, output, recipe):
        report(Event("quantize", message=remark))
    if place.type == "cuda" and recipe.method == "gptq":
        rehearse(source.config, recipe, device=device)
    settings = {"recipe": recipe.to_dict(), "source": origin.model_dump(), "device": device, **machine()}
    settings["calibration data"] = chosen and chosen.sha256
    with resuming(output, settings, overwrite=overwrite, report=report) as run:
        known = quantize_layers(run, source, chosen, recipe=recipe, device=device, report=report)
        with publishing(output) as hidden:
            manifest = begun_manifest(source, origin, recipe, known)
            write_bundle(hidden, source, run, recipe=recipe, manifest=manifest, report=report)
            reload_elsewhere(hidden)
    return output


def machine() -> dict:
    """What else decides the last bits of the weights."""
    return {"libraries": library_versions(), "threads": torch.get_num_threads(), "byte products": has_byte_products()}


def quantize_layers(
    run: UnfinishedRun, model: Model, chosen: ChosenConversations | None, *, recipe: Recipe, device: str, report: Report
) -> dict:
    """Quantize what layers of `model` are not finished, each kept as soon as it is; returns what the manifest says of it.

    chosen: what to calibrate on, for GPTQ.
    """
    count, start, known = model.config.decoder.layers, run.layers, {"calibration": None}
    if start:
        report(Event("layers", start, count, message=f"going on after layer {start} of {count}"))
    if chosen is not None:
        shared = {"most_tokens": recipe.tokens, "device": device, "report": report}
        answered = with_answers(chosen, model, run.answers, **shared)
        inputs = replace(calibration_inputs(model, run.folder, answered, **shared), layer=start, shares=recipe.class_shares)
        require_useful(inputs, recipe, report)
        if not start:
            require_space(run.folder, states_bytes(model.config.decoder, inputs))
        known["calibration"] = describe_calibration(recipe, chosen, inputs)
        if recipe.average_bits:
            known["bit_choice"] = choose_bits(model, inputs, recipe=recipe, device=device, report=report)
        layers = gptq_layers(model, inputs, recipe=recipe, chosen=known.get("bit_choice", ()), device=device)
    else:
        layers = rounded_layers(model, recipe, start=start, device=device)
    for index, layer in enumerate(layers, start):
        run.keep(index, layer)
        report(Event("layers", index + 1, count, details=tuple(told(index, layer))))
    return known


def told(index: int, layer: QuantizedLayer) -> Iterator[str]:
    """What was done to the linears of a layer, as a table; errors in percent."""
    heads = [name for name in CLASSES if any(name in record.class_errors for record in layer.records)]
    columns = ["error", *heads, "rounded only", "method", "compensated", "damping"]
    yield f"{f'layer {index}':<18}" + "".join(f"{column:>14}" for column in columns)
    for record in layer.records:
        errors = [record.error, *(record.class_errors.get(name) for name in heads), record.nearest_error]
        cells = ["not finite" if each is None else f"{100 * each:.2f}" for each in errors]
        cells += [record.method, "" if record.compensation is None else f"{record.compensation:.2f}"]
        cells += ["" if record.damping is None else f"{record.damping:g}"]
        yield f"{record.name:<18}" + "".join(f"{cell:>14}" for cell in cells)
    if layer.range:
        yield f"largest activation {layer.range.largest}: {layer.range.where}"


def begun_manifest(source: Model, origin: Source, recipe: Recipe, known: dict) -> Manifest:
    """What is known of a bundle before its files are written; `known`: from `quantize_layers`."""
    return Manifest(
        name=f"{origin.name}-{recipe.label}",
        source=origin,
        source_config=source.config.source,
        recipe=recipe.to_dict(),
        libraries=library_versions(),
        **known,
    )


def write_bundle(
    folder: Path, model: Model, run: UnfinishedRun, *, recipe: Recipe, manifest: Manifest, report: Report
) -> None:
    """Write the whole bundle of `model`, whose layers are all in `run`, into the empty `folder`.

    manifest: from `begun_manifest`.
    """
    written = write_weights(folder, model, run, report=report)
    tokenizer = load_tokenizer(model.folder)
    write_fast_tokenizer(model.folder, folder)
    dtype = str(model.stored_dtype(EMBEDDING)).removeprefix("torch.")
    quantization = quantization_config(recipe, dtype, manifest.bit_choice)
    write_settings(folder, model.config, tokenizer, quantization=quantization, dtype=dtype)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    written |= {
        "files": {path.name: file_hash(path) for path in paths},
        "sizes": {path.name: path.stat().st_size for path in paths},
    }
    manifest = manifest.model_copy(update=written)
    write_manifest(folder, manifest)
    for warning in warnings(manifest):
        report(Event("layers", message=f"warning: {warning}"))


def write_weights(folder: Path, model: Model, run: UnfinishedRun, *, report: Report) -> dict:
    """Write the shards: what is copied as it is, then the finished layers; returns what the manifest says of these."""
    writer, modules, ranges = ShardWriter(folder), [], []
    for name in names_outside_layers(model.config):
        writer.add(name, model.tensor(name))
    count = model.config.decoder.layers
    for index in range(count):
        layer, prefix = run.layer(index), layer_prefix(index)
        for name, tensor in layer.tensors.items():
            writer.add(prefix + name, tensor)
        modules += [record.model_copy(update={"name": prefix + record.name}) for record in layer.records]
        ranges += [layer.range] if layer.range else []
        report(Event("packing", index + 1, count))
    writer.close()
    safe = all(each.largest is not None and each.largest <= FLOAT16_ROOM for each in ranges) if ranges else None
    return {"modules": modules, "ranges": ranges, "float16_safe": safe}


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
    """Name and hashes of a checkpoint. Raises BrokenCheckpoint for what cannot be read, such as a folder in place of a file."""
    hashes = {}
    for path in sorted({path for pattern in SOURCE_FILES for path in folder.glob(pattern)}):
        try:
            hashes[path.name] = file_hash(path)
        except OSError as error:
            raise unreadable(path, error) from None
    return Source(name=source_name(folder), files=hashes)


def is_done(output: Path, recipe: Recipe, origin: Source, chosen: ChosenConversations | None) -> bool:
    """Whether `output` is a complete bundle of this source with this recipe, calibrated on the same conversations."""
    if not (output / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(output)
    except (BrokenCheckpoint, InvalidRecipe):
        return False
    same = manifest.recipe == recipe.to_dict() and manifest.source.files == origin.files
    data = manifest.calibration and manifest.calibration.sha256
    return same and data == (chosen and chosen.sha256) and not missing_files(output, manifest)


def describe_calibration(recipe: Recipe, chosen: ChosenConversations, inputs: CalibrationInputs) -> Calibration:
    """What the manifest says of the pictures and texts that a recipe calibrates on."""
    return Calibration(
        set=recipe.to_dict()["calibration"],
        sha256=chosen.sha256,
        samples=len(chosen),
        tokens=inputs.tokens,
        generated=len(chosen.unanswered),
        pictures=chosen.pictures,
    )


def warnings(manifest: Manifest) -> Iterator[str]:
    """What whoever uses the bundle should know: linears GPTQ could not handle, layers that float16 cannot hold."""
    if manifest.fallbacks:
        names = ", ".join(manifest.fallbacks[:3]) + (" ..." if len(manifest.fallbacks) > 3 else "")
        yield f"{len(manifest.fallbacks)} linears were rounded to the nearest because GPTQ failed: {names}"
    if manifest.float16_safe is False:
        too_large = [index for index, each in enumerate(manifest.ranges) if each.largest is None or each.largest > FLOAT16_ROOM]
        worst = manifest.ranges[too_large[0]]
        reach = "are not finite" if worst.largest is None else f"reach {worst.largest:.3g}"
        yield (
            f"float16 may overflow in {len(too_large)} of {len(manifest.ranges)} layers, first in layer {too_large[0]}, whose "
            f"values {reach} ({worst.where}); vlquant computes in float32, other programs need bfloat16 or float32"
        )
