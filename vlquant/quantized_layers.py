"""Decoder layers, quantized one by one: what to store of each, and what it cost. Writes nothing.

Tensors are named relative to their layer ("self_attn.q_proj.weight"). The arithmetic is in `gptq` and `bnb`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlquant import bnb, gptq
from vlquant.activations import ENDS_OF_HALVES, JudgingInputs, SeenInputs, WatchedLinear, pass_on, record_inputs, watched
from vlquant.bundle import LayerRange, ModuleRecord, StageNoise
from vlquant.calibrate import CLASSES, CalibrationInputs
from vlquant.decoder import LINEARS, FloatLinear, float_layer
from vlquant.decoder_config import DecoderConfig
from vlquant.errors import BrokenCheckpoint
from vlquant.hf_layout import STAGES
from vlquant.model import Model
from vlquant.packing import pack_gptq
from vlquant.recipe import Recipe

Layer = dict[str, Tensor]
Streams = tuple[CalibrationInputs, CalibrationInputs | None]
"""Hidden states of the model as far as it is quantized, and of the float model; None: not to be compared with."""
StageBits = Mapping[tuple[str, ...], int]


@dataclass(frozen=True)
class QuantizedLayer:
    """One decoder layer as it is to be stored."""

    tensors: Layer
    records: list[ModuleRecord]
    """What was done to its linears, by relative name."""
    range: LayerRange | None = None
    """Of its activations, if any were seen."""


def gptq_layers(
    model: Model, inputs: CalibrationInputs, *, recipe: Recipe, chosen: Sequence[StageNoise] = (), device: str
) -> Iterator[QuantizedLayer]:
    """Layers by GPTQ from the one whose inputs are given, each calibrated on what the quantized layers before it pass on.

    chosen: stages with bits of their own; the others have the recipe's.
    """
    config, streams = model.config.decoder, (inputs, inputs.in_float_model() if recipe.compensation else None)
    for index in range(inputs.layer, config.layers):
        bits = dict.fromkeys(STAGES, recipe.bits) | {each.linears: each.bits for each in chosen if each.layer == index}
        layer, streams = quantize_layer(
            finite_layer(model, index), streams, config=config, recipe=recipe, bits=bits, device=device
        )
        yield layer
        # Only now nobody needs this layer's inputs any more: a run that stopped before would begin it anew.
        for stream in filter(None, streams):
            stream.forget_earlier()


def finite_layer(model: Model, index: int) -> Layer:
    """The tensors of a layer by relative name; raises BrokenCheckpoint if one holds what is not a number."""
    tensors = model.decoder_layer(index)
    broken = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    if broken:
        raise BrokenCheckpoint(
            f"layers.{index}.{broken} of {model.folder} holds values that are not finite; download the checkpoint again"
        )
    return tensors


def rounded_layers(model: Model, recipe: Recipe, *, start: int = 0, device: str = "cpu") -> Iterator[QuantizedLayer]:
    """Layers from `start` by a method that looks at nothing but weights; records hold errors of weights, not of outputs."""
    for index in range(start, model.config.decoder.layers):
        yield round_layer(finite_layer(model, index), dict.fromkeys(LINEARS, recipe), device)


def round_layer(floats: Layer, recipes: Mapping[str, Recipe], device: str) -> QuantizedLayer:
    """One layer, each linear by its own recipe of such a method."""
    tensors, records = {}, []
    for name, tensor in floats.items():
        module, _, kind = name.rpartition(".")
        if module not in LINEARS:
            tensors[name] = tensor
        elif kind == "bias":
            tensors[name] = tensor.to(torch.float16) if recipes[module].packed_as_gptq else tensor
        else:
            stored, error = round_weight(tensor, recipes[module], device)
            tensors |= {f"{module}.{part}": each for part, each in stored.items()}
            method = recipes[module].method
            records.append(ModuleRecord(name=module, method=method, error=error, nearest_error=error, damping=None, fallback=False))
    return QuantizedLayer(tensors, records)


def round_weight(weight: Tensor, recipe: Recipe, device: str) -> tuple[Layer, float | None]:
    """The tensors to store for one weight [out, in] of any float dtype, and its relative error."""
    floats = weight.to(device, torch.float32)
    if recipe.method == "rtn":
        rounding = gptq.round_weight(floats, bits=recipe.bits, group_size=recipe.group_size)
        stored = pack_gptq(rounding.codes.cpu(), rounding.scales.cpu(), bits=recipe.bits, group_size=recipe.group_size)
        rounded = gptq.dequantize(rounding.codes, rounding.scales, bits=recipe.bits)
    else:
        write, read = (bnb.quantize_nf4, bnb.dequantize_nf4) if recipe.bits == 4 else (bnb.quantize_int8, bnb.dequantize_int8)
        stored = write(weight)
        rounded = read(stored).to(device)
    length = floats.norm()
    return stored, rounded_off(float(rounded.sub_(floats).norm() / length))


def quantize_layer(
    tensors: Layer, streams: Streams, *, config: DecoderConfig, recipe: Recipe, bits: StageBits, device: str
) -> tuple[QuantizedLayer, Streams]:
    """Quantize one decoder layer, each stage calibrated on the outputs of the quantized stages before it.

    tensors: by relative name, any float dtype; streams: the layer's inputs. Returns the layer with the inputs of the next one.
    """
    inputs, floats = streams
    wide = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
    original = float_layer(wide, config)
    linears = {name: FloatLinear(wide[f"{name}.weight"], stored_bias(wide, name)) for name in LINEARS}
    stored, records, largest = {}, [], {}
    for stage in STAGES:
        layer = original.with_linears(watched(linears, largest))
        seen, floats = record_inputs(inputs, floats, (layer, original), stage, device=device)
        weights = {name: original.linears[name].weight for name in stage}
        for name, part, record in quantize_stage(weights, seen, recipe=recipe, bits=bits[stage]):
            records.append(record)
            linears[name] = FloatLinear(gptq.dequantize(part.codes, part.scales, bits=bits[stage]), linears[name].bias)
            packed = pack_gptq(part.codes.cpu(), part.scales.cpu(), bits=bits[stage], group_size=recipe.group_size)
            stored |= {f"{name}.{kind}": tensor for kind, tensor in packed.items()}
        if stage in ENDS_OF_HALVES:
            inputs = pass_on(inputs, WatchedLinear(stage[0], linears[stage[0]], largest), largest, device=device)
    biases = {f"{name}.bias": linears[name].bias.to("cpu", torch.float16) for name in LINEARS if linears[name].bias is not None}
    kept = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in LINEARS}
    return QuantizedLayer(kept | stored | biases, records, range_of(largest)), (inputs, floats)


def quantize_stage(
    weights: Layer, seen: SeenInputs, *, recipe: Recipe, bits: int
) -> Iterator[tuple[str, gptq.Rounding, ModuleRecord]]:
    """Round the weights of linears that share their inputs, as one stack: by name the rounding, and what it cost."""
    stacked = torch.cat(list(weights.values()))
    inverse = gptq.invert(seen.hessian, recipe.damping)
    target, share = stacked, None
    if seen.drift is not None and inverse is not None:
        target, share = compensated(stacked, seen, inverse, most=recipe.compensation)
    rounding = gptq.quantize_weight(target, seen.hessian.diagonal(), inverse, bits=bits, group_size=recipe.group_size)
    rows = [len(weight) for weight in weights.values()]
    parts = zip(
        weights.items(), target.split(rows), rounding.codes.split(rows), rounding.scales.split(rows, dim=1), strict=True
    )
    for (name, weight), own_target, codes, scales in parts:
        part, record = better_rounding(
            name, weight, own_target, gptq.Rounding(codes, scales, rounding.damping), judging=seen.judging, bits=bits
        )
        yield name, part, record.model_copy(update={"compensation": share})


def compensated(weight: Tensor, seen: SeenInputs, inverse: gptq.Inverse, *, most: float) -> tuple[Tensor, float]:
    """A weight [out, in] that makes up for the error of what came before, as far as unseen inputs gain by it; and that share.

    most: the largest share.
    """
    whole, judging = gptq.compensation(seen.drift, inverse), seen.judging
    missing, given = (judging.floats - judging.rows) @ weight.T, judging.rows @ whole.T
    # Of missing - share * given the smallest weighted square.
    wanted, length = ((missing * given).sum(1) @ judging.weights, given.square().sum(1) @ judging.weights)
    share = min(max(0.0, float(wanted / length)), most) if length > 0 else 0.0
    return weight + share * whole, rounded_off(share)


def range_of(largest: Mapping[str, float]) -> LayerRange:
    """What the manifest says of the largest values in a layer."""
    where, value = max(largest.items(), key=lambda each: (math.isnan(each[1]), each[1]))
    return LayerRange(largest=rounded_off(value), where=where)


def stored_bias(floats: Layer, name: str) -> Tensor | None:
    """A linear's bias as the GPTQ format keeps it, in float16, widened again."""
    bias = floats.get(f"{name}.bias")
    return None if bias is None else bias.to(torch.float16).float()


def better_rounding(
    name: str, weight: Tensor, target: Tensor, part: gptq.Rounding, *, judging: JudgingInputs, bits: int
) -> tuple[gptq.Rounding, ModuleRecord]:
    """GPTQ's rounding of a linear, or that to the nearest code with the same scales where the judging inputs suffer less.

    target: what was rounded in place of the linear's `weight`. Returns it with what it cost, over all tokens and by
    class, and what the nearest code costs.
    """
    nearest = gptq.nearest_codes(target, gptq.expand_scales(part.scales, weight.shape[1] // part.scales.shape[0]), bits)
    wanted = judging.floats @ weight.T
    output = wanted.square().sum(1)
    rounded = (gptq.dequantize(codes, part.scales, bits=bits) for codes in (part.codes, nearest))
    ours, theirs = (gptq.squared_errors(wanted, each, judging.rows) for each in rounded)
    error, nearest_error = (relative_error(lost, output, judging.weights) for lost in (ours, theirs))
    worse = nearest_error < error
    lost = theirs if worse else ours
    record = ModuleRecord(
        name=name,
        method="gptq" if part.damping is not None and not worse else "rounding",
        error=rounded_off(nearest_error if worse else error),
        nearest_error=rounded_off(nearest_error),
        class_errors={
            CLASSES[each]: rounded_off(relative_error(lost, output, judging.classes == each))
            for each in judging.classes.unique().tolist()
        },
        damping=part.damping,
        fallback=part.damping is None,
    )
    return (replace(part, codes=nearest) if worse else part), record


def relative_error(lost: Tensor, output: Tensor, weights: Tensor) -> float:
    """The root of squared errors over squared outputs [tokens], both weighted; 0 for outputs that are all 0."""
    total = (output * weights).sum()
    return 0.0 if total == 0 else float(((lost * weights).sum() / total).sqrt())


def rounded_off(error: float) -> float | None:
    """Four digits of a relative error; None if it is not a number, which JSON cannot write."""
    return float(f"{error:.4g}") if math.isfinite(error) else None
