"""What the linears of a layer see while calibration conversations run through it: Hessians, inputs that judge, largest values."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from vlquant.calibrate import CalibrationInputs
from vlquant.decoder import DecoderLayer, Linear, rms_norm
from vlquant.rope import rotary_tables
from vlquant.hf_layout import STAGES

LARGEST_NORM = 10.0
"""A token counts at most as if its squared norm were this many times the median: first tokens are giants."""
LayerPair = tuple[DecoderLayer, DecoderLayer]
ENDS_OF_HALVES = (STAGES[1], STAGES[3])
ROWS_AT_ONCE = 2048
"""Inputs that wait to be added up together: longer products are faster ones."""
WIDE = 2048
"""Inputs of linears that have at least so many are summed in 8 bits where the processor is fast at that."""


@dataclass(frozen=True)
class JudgingInputs:
    """Inputs of a linear by which roundings are compared; where there are enough conversations, GPTQ has not seen them."""

    rows: Tensor
    """float32 [tokens, in]: what it sees where everything before it is quantized."""
    floats: Tensor
    """float32 [tokens, in]: what it sees in the float model, or the same again."""
    weights: Tensor
    """float32 [tokens]: how much each counts, as in the Hessian, for itself and those it stands for."""
    classes: Tensor
    """int64 [tokens]."""


@dataclass(frozen=True)
class SeenInputs:
    """What is known of the inputs x of linears whose weights W [out, in] are stacked."""

    hessian: Tensor
    """The weighted sum of x xT [in, in]."""
    drift: Tensor | None
    """The weighted sum of (W f - W x) xT [out, in], f being the float model's; None: that is not known. Where it is
    known of some inputs only, these stand for all."""
    judging: JudgingInputs


def record_inputs(
    inputs: CalibrationInputs, floats: CalibrationInputs | None, layers: LayerPair, stage: Sequence[str], *, device: str
) -> tuple[SeenInputs, CalibrationInputs | None]:
    """What the linears in `stage`, which share their inputs, see; and the float stream, passed on if they end their half.

    inputs: of the half of the layer that the stage belongs to, which is computed up to these linears and no further;
    floats: the same in the float model; layers: the layer as far as it is quantized, and the float one.
    """
    layer, original = layers
    stacked = torch.cat([original.linears[name].weight for name in stage])
    recorder = InputRecorder(stacked, inputs.token_weights.to(device), inputs.judging.stands_for.to(device))
    ends_half = stage in ENDS_OF_HALVES
    place_among_floats = {} if floats is None else {index: place for place, index in enumerate(inputs.compared)}

    def record() -> Iterator[Tensor]:
        with open(inputs.taps, "wb") if ends_half else nullcontext() as taps:
            for index, classes in enumerate(inputs.classes):
                rows, _ = tapped(inputs, index, layer, stage[0], device=device)
                there, hidden = None, None
                if index in place_among_floats:
                    place = place_among_floats[index]
                    there, hidden = tapped(floats, place, original, stage[0], goes_on=ends_half, device=device)
                judging, adds_up = inputs.judging.positions[index], index not in inputs.held_out
                recorder.add(rows, there, classes.to(device), judging=judging, adds_up=adds_up)
                if taps:
                    taps.write(rows.cpu().contiguous().numpy().data)
                if hidden is not None:
                    yield hidden

    if ends_half and floats is not None:
        floats = floats.following(record())
    else:
        for _ in record():
            pass
    return recorder.seen(), floats


def tapped(
    inputs: CalibrationInputs, index: int, layer: DecoderLayer, name: str, *, goes_on: bool = False, device: str
) -> tuple[Tensor, Tensor | None]:
    """Inputs [length, in] of one linear in one conversation; and the hidden states after its half of the layer if that goes on."""
    tap, hidden = Tap(layer.linears[name], goes_on), None
    with suppress(Reached):
        hidden = run_half(inputs, index, layer.with_linears({name: tap}), device)
    return tap.rows, hidden


class WatchedLinear:
    """A linear that notes the largest absolute values of its inputs and outputs."""

    def __init__(self, name: str, linear: Linear, largest: dict[str, float]):
        self.name, self.linear, self.largest = name, linear, largest

    def __call__(self, x: Tensor) -> Tensor:
        result = self.linear(x)
        note_largest(self.largest, f"{self.name} input", x)
        note_largest(self.largest, f"{self.name} output", result)
        return result


def pass_on(
    inputs: CalibrationInputs, last: WatchedLinear, largest: dict[str, float], *, device: str
) -> CalibrationInputs:
    """The inputs of the other half of the layer, or of the next layer, given the `last` linear of this half.

    What that linear sees was written down when its inputs were recorded. The largest hidden state goes to `largest`.
    """
    width = last.linear.weight.shape[1]

    def states() -> Iterator[Tensor]:
        for index in range(len(inputs.classes)):
            hidden = inputs.hidden(index).to(device) + last(inputs.tapped(index, width).to(device))
            note_largest(largest, "hidden state", hidden)
            yield hidden

    following = inputs.following(states())
    inputs.taps.unlink()
    return following


def run_half(inputs: CalibrationInputs, index: int, layer: DecoderLayer, device: str) -> Tensor:
    """Hidden states [1, length, hidden] of one conversation after the attention, or after the MLP."""
    hidden = inputs.hidden(index).to(device)
    if inputs.half:
        return hidden + layer.mlp(rms_norm(hidden, layer.norms["post_attention_layernorm"], layer.config.norm_eps))
    rotary = rotary_tables(torch.arange(hidden.shape[1], device=device)[None], layer.config)
    return hidden + layer.attention(rms_norm(hidden, layer.norms["input_layernorm"], layer.config.norm_eps), rotary)


def note_largest(largest: dict[str, float], name: str, values: Tensor) -> None:
    """Keep the largest absolute value seen under a name; once it is not a number it stays so."""
    lowest, highest = values.aminmax()  # Makes no copy, as abs() would.
    value, known = float(torch.maximum(-lowest, highest)), largest.get(name, 0.0)
    largest[name] = value if not value <= known else known


def watched(linears: Mapping[str, Linear], largest: dict[str, float]) -> dict[str, WatchedLinear]:
    """The same linears, whose largest values go to `largest`."""
    return {name: WatchedLinear(name, linear, largest) for name, linear in linears.items()}


class Reached(Exception):
    """What a layer was run for has been seen."""


class Tap:
    """Stands for a linear and keeps its inputs, whereupon the layer goes on or not."""

    def __init__(self, linear: Linear, goes_on: bool):
        self.linear, self.goes_on = linear, goes_on

    def __call__(self, x: Tensor) -> Tensor:
        self.rows = x.flatten(0, 1)  # [length, in]
        if not self.goes_on:
            raise Reached
        return self.linear(x)


class InputRecorder:
    """Adds up what `SeenInputs` holds, each token weighted by its class and capped in norm; keeps the inputs that judge.

    Of the drift D = sum of (f - x) xT, what is added up is D or, where that is smaller, W D.
    """

    def __init__(self, weight: Tensor, token_weights: Tensor, stands_for: Tensor):
        out_features, in_features = weight.shape
        self.weight, self.projects = weight, 2 * out_features < in_features
        self.token_weights, self.stands_for = token_weights, stands_for
        self.hessian = GramSum(in_features, like=weight)
        self.drift: Tensor | None = None
        self.mass, self.compared_mass = 0.0, 0.0
        """Sums of the weights of all inputs, and of those that are compared with the float model's."""
        self.waiting, self.missing = RowBuffer(like=weight), RowBuffer(like=weight)
        self.kept: list[tuple[Tensor, ...]] = []

    def add(self, rows: Tensor, floats: Tensor | None, classes: Tensor, *, judging: Tensor, adds_up: bool) -> None:
        """Take one conversation's inputs [length, in], here and, if known, in the float model; `judging`: positions to keep."""
        norms = torch.linalg.vector_norm(rows, dim=1).square()  # Without a copy of all rows.
        cap = (LARGEST_NORM * norms.median() / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)
        weights = self.token_weights[classes] * cap
        if len(judging):
            known = rows, rows if floats is None else floats, weights * self.stands_for[classes], classes
            self.kept.append(tuple(each[judging.to(rows.device)] for each in known))
        if adds_up:
            if floats is None and self.missing.filled or self.waiting.filled + len(rows) > ROWS_AT_ONCE:
                self.add_waiting()  # What waits together is compared, or none of it.
            root = weights.sqrt()[:, None]
            self.mass += float(weights.sum())
            torch.mul(rows, root, out=self.waiting.more(len(rows)))
            if floats is not None:
                self.compared_mass += float(weights.sum())
                torch.sub(floats, rows, out=self.missing.more(len(rows))).mul_(root)

    def add_waiting(self) -> None:
        """Add what waits."""
        rows, missing = self.waiting.take(), self.missing.take()
        if len(missing):
            update = (missing @ self.weight.T if self.projects else missing).T @ rows
            self.drift = update if self.drift is None else self.drift.add_(update)
        if len(rows):
            self.hessian.add_rows(rows)

    def seen(self) -> SeenInputs:
        """The whole sums."""
        self.add_waiting()
        drift = self.drift if self.projects or self.drift is None else self.weight @ self.drift
        if drift is not None:
            drift *= self.mass / self.compared_mass
        return SeenInputs(self.hessian.whole(), drift, JudgingInputs(*map(torch.cat, zip(*self.kept, strict=True))))


class RowBuffer:
    """Rows written one after the other into the same memory: fresh memory costs more than what is done with it (page faults)."""

    def __init__(self, like: Tensor):
        self.rows, self.filled = like.new_empty(0, like.shape[1]), 0

    def more(self, count: int) -> Tensor:
        """The next `count` rows, to be written."""
        start, self.filled = self.filled, self.filled + count
        if self.filled > len(self.rows):
            larger = self.rows.new_empty(max(self.filled, ROWS_AT_ONCE), self.rows.shape[1])
            larger[:start] = self.rows[:start]
            self.rows = larger
        return self.rows[start : self.filled]

    def take(self) -> Tensor:
        """All that was written, valid until more is."""
        rows, self.filled = self.rows[: self.filled], 0
        return rows


class GramSum:
    """The sum of x xT over many inputs: the upper triangle, block by block, of which the lower one is the mirror.

    On a CPU with 8-bit dot products wide inputs are rounded to 8 bits for it, each column by its largest value: the sum
    stays that of squares, what rounding adds is small beside the damping, and it takes 0.42 of the time.
    """

    def __init__(self, size: int, like: Tensor):
        self.sums = like.new_zeros(size, size)
        self.blocks = [(int(each[0]), int(each[-1]) + 1) for each in torch.arange(size).split(max(512, size // 8))]
        self.in_eight_bits = like.device.type == "cpu" and size >= WIDE and has_byte_products()

    def add_rows(self, rows: Tensor) -> None:
        """Add inputs [tokens, size], which are used up."""
        if not self.in_eight_bits:
            for first, last in self.blocks:
                self.sums[first:last, first:].addmm_(rows[:, first:last].T, rows[:, first:])
            return
        lowest, highest = rows.aminmax(dim=0)
        steps = torch.maximum(-lowest, highest).div_(127).clamp_(min=torch.finfo(rows.dtype).tiny)
        codes = rows.div_(steps).round_().to(torch.int8)
        for first, last in self.blocks:
            products = torch._int_mm(codes[:, first:last].T, codes[:, first:])
            self.sums[first:last, first:].addcmul_(products.to(steps.dtype).mul_(steps[first:]), steps[first:last, None])

    def whole(self) -> Tensor:
        """The sum, both triangles."""
        for first, last in self.blocks:
            self.sums[last:, first:last] = self.sums[first:last, last:].T
        return self.sums


def has_byte_products() -> bool:
    """Whether this processor multiplies bytes (VNNI), and torch with it."""
    return torch.cpu._is_vnni_supported() and hasattr(torch, "_int_mm")
