"""What the linears of a layer see while calibration conversations run through it: Hessians, inputs that judge, largest values."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from vlquant.calibrate import CalibrationInputs
from vlquant.decoder import DecoderConfig, DecoderLayer, FloatLinear, Linear, rms_norm, rotary_tables

LARGEST_NORM = 10.0
"""A token counts at most as if its squared norm were this many times the median: first tokens are giants."""
ROWS_AT_ONCE = 2048
"""Inputs that wait to be added up together: longer products are faster ones."""


@dataclass(frozen=True)
class JudgingInputs:
    """Inputs of a linear by which roundings are compared; where there are enough conversations, GPTQ has not seen them."""

    rows: Tensor
    """float32 [tokens, in]."""
    weights: Tensor
    """float32 [tokens]: how much each counts, as in the Hessian."""
    classes: Tensor
    """int64 [tokens]."""


def record_inputs(
    inputs: CalibrationInputs, layer: DecoderLayer, stage: Sequence[str], *, device: str
) -> tuple[Tensor, JudgingInputs]:
    """The weighted sum of x xT [in, in] over the inputs of the linears in `stage`, which share them; and inputs that judge.

    inputs: of the half of the layer that the stage belongs to, which is computed up to these linears and no further.
    """
    recorder = InputRecorder(layer.linears[stage[0]], inputs.token_weights.to(device))
    listening = DecoderLayer(layer.config, {**layer.linears, stage[0]: recorder}, layer.norms)
    for index, classes in enumerate(inputs.classes):
        recorder.expect(classes.to(device), inputs.judging[index].to(device), adds_up=not inputs.holds_out(index))
        with suppress(Recorded):
            run_half(inputs, index, listening, device)
    return recorder.total(), recorder.judging()


def pass_on(inputs: CalibrationInputs, layer: DecoderLayer, *, device: str) -> tuple[CalibrationInputs, dict[str, float]]:
    """Run all conversations through the half of a layer that `inputs` belong to.

    Returns the inputs of the other half, or of the next layer, and the largest absolute values by what had them.
    """
    largest: dict[str, float] = {}
    watched = {name: WatchedLinear(name, linear, largest) for name, linear in layer.linears.items()}
    following = inputs.following(hidden_states(inputs, DecoderLayer(layer.config, watched, layer.norms), largest, device))
    return following, largest


def hidden_states(
    inputs: CalibrationInputs, layer: DecoderLayer, largest: dict[str, float], device: str
) -> Iterator[Tensor]:
    """What half a layer makes of every conversation; its largest value goes to `largest`."""
    for index in range(len(inputs.classes)):
        hidden = run_half(inputs, index, layer, device)
        note_largest(largest, "hidden state", hidden)
        yield hidden


def run_half(inputs: CalibrationInputs, index: int, layer: DecoderLayer, device: str) -> Tensor:
    """Hidden states [1, length, hidden] of one conversation after the attention, or after the MLP."""
    hidden = inputs.hidden(index).to(device)
    if inputs.half:
        return hidden + layer.mlp(rms_norm(hidden, layer.norms["post_attention_layernorm"], layer.config.norm_eps))
    rotary = rotary_tables(torch.arange(hidden.shape[1], device=device)[None], layer.config)
    return hidden + layer.attention(rms_norm(hidden, layer.norms["input_layernorm"], layer.config.norm_eps), rotary)


def note_largest(largest: dict[str, float], name: str, values: Tensor) -> None:
    """Keep the largest absolute value seen under a name; once it is not a number it stays so."""
    value, known = float(values.abs().amax()), largest.get(name, 0.0)
    largest[name] = value if not value <= known else known


class WatchedLinear:
    """A linear that notes the largest absolute values of its inputs and outputs."""

    def __init__(self, name: str, linear: Linear, largest: dict[str, float]):
        self.name, self.linear, self.largest = name, linear, largest

    def __call__(self, x: Tensor) -> Tensor:
        result = self.linear(x)
        note_largest(self.largest, f"{self.name} input", x)
        note_largest(self.largest, f"{self.name} output", result)
        return result


class Recorded(Exception):
    """What a layer was run for has been seen."""


class InputRecorder:
    """Stands for a linear: adds up x xT over its inputs, each token weighted by its class and capped in norm; keeps some."""

    def __init__(self, linear: FloatLinear, token_weights: Tensor):
        in_features = linear.weight.shape[1]
        self.token_weights = token_weights
        self.hessian = token_weights.new_zeros(in_features, in_features)
        self.blocks = torch.arange(in_features).split(max(512, in_features // 8))
        self.waiting: list[Tensor] = []
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def expect(self, classes: Tensor, judging: Tensor, *, adds_up: bool) -> None:
        """Announce the next conversation: its tokens' classes [length], which of them to keep, whether they count."""
        self.classes, self.positions, self.adds_up = classes, judging, adds_up

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # [length, in]
        norms = rows.square().sum(1)
        cap = (LARGEST_NORM * norms.median() / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)
        weights = self.token_weights[self.classes] * cap
        self.kept.append((rows[self.positions], weights[self.positions], self.classes[self.positions]))
        if self.adds_up:
            self.waiting.append(rows * weights.sqrt()[:, None])
        if sum(map(len, self.waiting)) >= ROWS_AT_ONCE:
            self.add_waiting()
        raise Recorded

    def add_waiting(self) -> None:
        """Add what waits to the upper triangle, block by block: the lower one is its mirror."""
        rows, self.waiting = torch.cat(self.waiting), []
        for block in self.blocks:
            first, last = int(block[0]), int(block[-1]) + 1
            self.hessian[first:last, first:].addmm_(rows[:, first:last].T, rows[:, first:])

    def total(self) -> Tensor:
        """The whole sum."""
        if self.waiting:
            self.add_waiting()
        for block in self.blocks:
            first, last = int(block[0]), int(block[-1]) + 1
            self.hessian[last:, first:last] = self.hessian[first:last, last:].T
        return self.hessian

    def judging(self) -> JudgingInputs:
        """The inputs that were kept."""
        return JudgingInputs(*map(torch.cat, zip(*self.kept, strict=True)))


def layer_of(tensors: Mapping[str, Tensor], linears: Mapping[str, Linear], config: DecoderConfig) -> DecoderLayer:
    """A decoder layer with the given linears and the norms among `tensors`."""
    norms = {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.endswith(".weight") and name.removesuffix(".weight") not in linears
    }
    return DecoderLayer(config, linears, norms)
