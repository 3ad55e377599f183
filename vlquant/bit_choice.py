"""Which linears get 8 bits so that the average stays within a budget: those whose rounding adds most noise to the hidden states.

Measured in the float model, one layer in memory: each stage of a layer alone is rounded, to 4 and to 8 bits, and what that
changes in the half of the layer it belongs to is set against the hidden states there, class by class.
"""

import json
import random
import shutil
from collections.abc import Sequence

import torch

from vlquant import gptq
from vlquant.activations import run_half
from vlquant.bundle import StageNoise
from vlquant.calibrate import CLASSES, CalibrationInputs
from vlquant.decoder import DecoderLayer, FloatLinear, float_layer
from vlquant.events import Event, Report
from vlquant.hf_layout import STAGES
from vlquant.hidden_states import write_states
from vlquant.model import Model
from vlquant.publishing import replace_text
from vlquant.recipe import Recipe

NARROW, WIDE = 4, 8
CHOICE_FILE = "bit-choice.json"
CONVERSATIONS = 8
"""How many of the calibration's are run through the float model to measure noise."""


def choose_bits(
    model: Model, inputs: CalibrationInputs, *, recipe: Recipe, device: str, report: Report
) -> list[StageNoise]:
    """The noise of every stage of every layer, with the bits it is to have so that the average is at most the recipe's.

    inputs: the first layer's; their folder keeps the choice for a run that is interrupted.
    """
    path = inputs.folder / CHOICE_FILE
    if path.exists():
        return [StageNoise.model_validate(fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
    few = some_conversations(inputs)
    measured: list[StageNoise] = []
    for index in range(model.config.decoder.layers):
        noises, few = measure_layer(model, few, recipe=recipe, device=device)
        few.forget_earlier()
        measured += noises
        report(Event("choosing bits", index + 1, model.config.decoder.layers))
    shutil.rmtree(few.folder)
    chosen = within_budget(measured, recipe)
    replace_text(path, json.dumps([each.model_dump() for each in chosen], indent=1))
    return chosen


def within_budget(measured: Sequence[StageNoise], recipe: Recipe) -> list[StageNoise]:
    """Give 8 bits to stages in the order of noise removed per weight while the average allows it.

    A class of tokens counts with its share, as in the Hessian.
    """
    budget = (recipe.average_bits - NARROW) / (WIDE - NARROW) * sum(each.weights for each in measured)
    shares = dict(zip(CLASSES, recipe.class_shares, strict=True))

    def removed(each: StageNoise) -> float:
        return sum(shares[name] * (each.noise[NARROW][name] - each.noise[WIDE][name]) for name in each.noise[NARROW])

    wide = set()
    for place in sorted(range(len(measured)), key=lambda place: -removed(measured[place]) / measured[place].weights):
        if measured[place].weights <= budget:
            wide.add(place)
            budget -= measured[place].weights
    return [each.model_copy(update={"bits": WIDE if place in wide else NARROW}) for place, each in enumerate(measured)]


def some_conversations(inputs: CalibrationInputs) -> CalibrationInputs:
    """A few of the conversations, drawn from all, as inputs with a folder of their own."""
    every = range(len(inputs.classes))
    chosen = sorted(random.Random(0).sample(every, min(CONVERSATIONS, len(every))))
    folder = inputs.folder / "choice"
    folder.mkdir(exist_ok=True)
    few = CalibrationInputs(folder, tuple(inputs.classes[index] for index in chosen), inputs.width, inputs.shares)
    write_states(few.path, (inputs.hidden(index) for index in chosen))
    return few


def measure_layer(
    model: Model, inputs: CalibrationInputs, *, recipe: Recipe, device: str
) -> tuple[list[StageNoise], CalibrationInputs]:
    """Noise of the four stages of the layer whose inputs are given; and the float inputs of the next layer."""
    index, noises = inputs.layer, []
    floats = {name: tensor.to(device, torch.float32) for name, tensor in model.decoder_layer(index).items()}
    layer = float_layer(floats, model.config.decoder)
    for half in (STAGES[:2], STAGES[2:]):
        after = inputs.following(run_half(inputs, each, layer, device) for each in range(len(inputs.classes)))
        for stage in half:
            noise = {bits: stage_noise(inputs, after, layer, stage, bits, recipe.group_size) for bits in (NARROW, WIDE)}
            weights = sum(layer.linears[name].weight.numel() for name in stage)
            noises.append(StageNoise(layer=index, linears=stage, weights=weights, noise=noise, bits=NARROW))
        inputs = after
    return noises, inputs


def stage_noise(
    inputs: CalibrationInputs, after: CalibrationInputs, layer: DecoderLayer, stage: Sequence[str], bits: int, group_size: int
) -> dict[str, float]:
    """What rounding one stage changes in the hidden states after its half of the layer: squares, relative, by class."""
    rounded = {name: rounded_linear(layer.linears[name], bits, group_size) for name in stage}
    changed, device = layer.with_linears(rounded), rounded[stage[0]].weight.device
    lost, whole = torch.zeros(len(CLASSES)), torch.zeros(len(CLASSES))
    for index, classes in enumerate(inputs.classes):
        wanted, given = after.hidden(index)[0], run_half(inputs, index, changed, str(device))[0].cpu()
        lost.index_add_(0, classes, (given - wanted).square().sum(1))
        whole.index_add_(0, classes, wanted.square().sum(1))
    return {name: float(f"{lost[each] / whole[each]:.4g}") for each, name in enumerate(CLASSES) if whole[each] > 0}


def rounded_linear(linear: FloatLinear, bits: int, group_size: int) -> FloatLinear:
    """A linear with its weight rounded."""
    rounding = gptq.round_weight(linear.weight, bits=bits, group_size=group_size)
    return FloatLinear(gptq.dequantize(rounding.codes, rounding.scales, bits=bits), linear.bias)
