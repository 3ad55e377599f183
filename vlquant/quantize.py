"""`vlquant quantize`: a float checkpoint becomes a bundle, one decoder layer at a time.

Only the linears of the language model are ever quantized; everything else is copied as it is.
"""

import importlib.metadata
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import vlquant
from vlquant import bnb, gptq
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
from vlquant.calibrate import CalibrationInputs, calibration_inputs, layer_of, record_hessian, run_layer
from vlquant.config import ModelConfig
from vlquant.decoder import LINEARS, DecoderConfig, FloatLinear
from vlquant.errors import BrokenCheckpoint, InvalidRecipe
from vlquant.events import Event, Report, silent
from vlquant.hf_layout import STAGES, inexpressible, write_settings
from vlquant.layout import EMBEDDING, layer_prefix, layer_shapes, tensor_shapes
from vlquant.model import Model, open_model, resolve_model
from vlquant.packing import pack_gptq
from vlquant.publishing import publishing, require_replaceable, require_space
from vlquant.recipe import Recipe
from vlquant.shards import ShardWriter, file_hash
from vlquant.tokenizer import Tokenizer, load_tokenizer, write_fast_tokenizer

LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers", "bitsandbytes")
SOURCE_FILES = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model", "tokenizer.json", "vocab.json",
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip
"""What a bundle is made from."""

Layer = dict[str, Tensor]


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
    if recipe.method == "gptq":
        calibration, modules = add_gptq_layers(writer, model, tokenizer, recipe=recipe, device=device, report=report)
    else:
        calibration, modules = None, add_bitsandbytes_layers(writer, model, recipe=recipe, report=report)
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


def add_gptq_layers(
    writer: ShardWriter, model: Model, tokenizer: Tokenizer, *, recipe: Recipe, device: str, report: Report
) -> tuple[Calibration, list[ModuleRecord]]:
    """Quantize all layers with GPTQ, each calibrated on what the quantized layers before it pass on."""
    inputs = calibration_inputs(model, tokenizer, recipe=recipe, device=device, report=report)
    config, modules = model.config.decoder, []
    for index in range(config.layers):
        packed, records = quantize_layer(
            model.decoder_layer(index), inputs, config=config, recipe=recipe, device=device
        )
        for name, tensor in packed.items():
            writer.add(layer_prefix(index) + name, tensor)
        modules += [record.model_copy(update={"name": layer_prefix(index) + record.name}) for record in records]
        report(Event("layers", index + 1, config.layers))
    calibration = Calibration(
        set=recipe.calibration,
        sha256=calibration_hash(recipe),
        samples=recipe.samples,
        tokens=inputs.tokens,
    )
    return calibration, modules


def quantize_layer(
    tensors: Layer, inputs: CalibrationInputs, *, config: DecoderConfig, recipe: Recipe, device: str
) -> tuple[Layer, list[ModuleRecord]]:
    """Quantize one decoder layer, each stage calibrated on the outputs of the quantized stages before it.

    tensors: by relative name, any float dtype. Returns the tensors to store and what it cost; `inputs` move on to the
    next layer.
    """
    floats = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
    linears = {name: FloatLinear(floats[f"{name}.weight"], stored_bias(floats, name)) for name in LINEARS}
    layer, stored, records = layer_of(floats, linears, config), {}, []
    for stage in STAGES:
        hessian = record_hessian(inputs, layer, stage, device=device)
        weight = torch.cat([linears[name].weight for name in stage])
        rounding = gptq.quantize_weight(
            weight, hessian, bits=recipe.bits, group_size=recipe.group_size, damping=recipe.damping
        )
        for name, part in split_rounding(rounding, {name: linears[name].weight.shape[0] for name in stage}).items():
            linear = linears[name]
            records.append(describe_module(name, linear.weight, part, hessian, recipe.bits))
            rounded = gptq.dequantize(part.codes, part.scales, bits=recipe.bits)
            linears[name] = FloatLinear(rounded, linear.bias)
            packed = pack_gptq(part.codes.cpu(), part.scales.cpu(), bits=recipe.bits, group_size=recipe.group_size)
            stored |= {f"{name}.{kind}": tensor for kind, tensor in packed.items()}
        layer = layer_of(floats, linears, config)
    for conversation in inputs.conversations:
        conversation.hidden = run_layer(layer, conversation, device).cpu()
    biases = {f"{name}.bias": linears[name].bias.to(torch.float16) for name in LINEARS if linears[name].bias is not None}
    kept = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in LINEARS}
    return kept | stored | biases, records


def stored_bias(floats: Layer, name: str) -> Tensor | None:
    """A linear's bias as the GPTQ format keeps it, in float16, widened again."""
    bias = floats.get(f"{name}.bias")
    return None if bias is None else bias.to(torch.float16).float()


def split_rounding(rounding: gptq.Rounding, rows: Mapping[str, int]) -> dict[str, gptq.Rounding]:
    """Cut a rounded stack of weights into those of its linears, given their numbers of rows."""
    codes, scales = rounding.codes.split(list(rows.values())), rounding.scales.split(list(rows.values()), dim=1)
    return {name: gptq.Rounding(*parts, rounding.damping) for name, *parts in zip(rows, codes, scales, strict=True)}


def describe_module(name: str, weight: Tensor, part: gptq.Rounding, hessian: Tensor, bits: int) -> ModuleRecord:
    """What rounding `weight` cost, and what rounding it to the nearest code would have cost."""
    group_size = weight.shape[1] // part.scales.shape[0]
    nearest = gptq.nearest_codes(weight, gptq.expand_scales(part.scales, group_size), bits)
    error, nearest_error = (
        rounded_off(gptq.output_error(weight, gptq.dequantize(codes, part.scales, bits=bits), hessian))
        for codes in (part.codes, nearest)
    )
    return ModuleRecord(
        name=name, error=error, nearest_error=nearest_error, damping=part.damping, fallback=part.damping is None
    )


def rounded_off(error: float) -> float | None:
    """Four digits of a relative error; None if it is not a number, which JSON cannot write."""
    return float(f"{error:.4g}") if math.isfinite(error) else None


def add_bitsandbytes_layers(
    writer: ShardWriter, model: Model, *, recipe: Recipe, report: Report
) -> list[ModuleRecord]:
    """Quantize all layers with bitsandbytes, which needs no calibration. Records hold weight errors, not output errors."""
    write, read = (
        (bnb.quantize_nf4, bnb.dequantize_nf4) if recipe.bits == 4 else (bnb.quantize_int8, bnb.dequantize_int8)
    )
    modules = []
    for index in range(model.config.decoder.layers):
        prefix = layer_prefix(index)
        for name, tensor in model.decoder_layer(index).items():
            module = name.removesuffix(".weight")
            if module not in LINEARS:
                writer.add(prefix + name, tensor)
                continue
            stored = write(tensor)
            error = rounded_off(float((read(stored) - tensor.float()).norm() / tensor.float().norm()))
            modules.append(ModuleRecord(name=prefix + module, error=error, nearest_error=error, damping=None, fallback=False))
            for kind, part in stored.items():
                writer.add(f"{prefix}{module}.{kind}", part)
        report(Event("layers", index + 1, model.config.decoder.layers))
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


def calibration_hash(recipe: Recipe) -> str:
    """Identity of the pictures and texts that a recipe calibrates on."""
    from vlquant.calib_data.samples import set_hash

    return set_hash("calibration", recipe.samples, seed=recipe.seed)


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
