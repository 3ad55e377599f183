"""Products with packed codes and whole decoder steps, compiled: tensors in and out of runtime/native/*.c by ctypes.

Inputs are rounded to twice as many bits as the codes have, one scale for 32 of them; sums of these are exact integers,
then float32. Beside codes of 8 bits that is what float32 gives; beside codes of 4 it costs a fiftieth of what they cost.
Built when vlquant is installed, if there is a C compiler; for x86-64 processors with AVX2, better with AVX-512 VNNI.
"""

import ctypes
import math
import os
import threading
from collections.abc import Mapping
from ctypes import Structure, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vlquant.errors import InvalidRequest
from vlquant.packing import symmetric_zero, unpack_gptq
from vlquant.runtime.kernel_library import CHOICES, library_path, open_library

PANEL = 16
"""Rows of a matrix whose codes lie side by side."""
BLOCK = 32
"""Columns whose codes lie together."""
ROWS_AT_ONCE = 4096
"""Of a head, while it is rounded: all of them in float32 are the largest thing that a first load would hold."""
INSTRUCTIONS = {1: "AVX2", 2: "AVX-512 VNNI"}


class MatrixFields(Structure):
    """`Matrix` of runtime/native/model.h."""

    _fields_ = [(name, c_void_p) for name in ("codes", "scales", "bias")] + [
        (name, c_int64) for name in ("rows", "columns", "group_size", "bits")
    ] + [("factor", c_float)]


@dataclass(frozen=True)
class PackedMatrix:
    """Codes and scales of one linear as the kernels read them."""

    codes: Tensor
    """uint8 [panels, blocks, bytes]: `pack_codes`."""
    scales: Tensor
    """float16 [panels, groups, 16]."""
    bias: Tensor | None
    """float32 [padded rows]."""
    rows: int
    """Without padding."""
    factor: float = 1.0
    """Of all results, before the bias: a power of two."""

    @property
    def columns(self) -> int:
        """Inputs."""
        return BLOCK * self.codes.shape[1]

    @property
    def bits(self) -> int:
        """4 or 8."""
        return 8 * self.codes.shape[2] // (PANEL * BLOCK)

    def fields(self) -> MatrixFields:
        """What the kernels take; valid as long as the tensors are."""
        bias = None if self.bias is None else self.bias.data_ptr()
        padded, group_size = PANEL * len(self.codes), self.columns // self.scales.shape[1]
        shape = padded, self.columns, group_size, self.bits
        return MatrixFields(self.codes.data_ptr(), self.scales.data_ptr(), bias, *shape, self.factor)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes uint8 [rows, columns], 0 .. 255, in the order the kernels read: [panels, blocks of 32 columns, 512 bytes].

    A block holds, for each four columns, four bytes of each of 16 rows.
    """
    rows, columns = codes.shape
    codes = F.pad(codes, (0, 0, 0, -rows % PANEL), value=0)
    quads = codes.view(-1, PANEL, columns // BLOCK, 8, 4).permute(0, 2, 3, 1, 4)  # [panels, blocks, quads, rows, 4]
    return quads.reshape(len(quads), columns // BLOCK, PANEL * BLOCK)


def pack_half_bytes(codes: Tensor) -> Tensor:
    """Codes uint8 [rows, columns], 0 .. 15: as `pack_codes`, the second half of each block in the high half bytes of the first."""
    low, high = pack_codes(codes).chunk(2, dim=2)
    return low | high << 4


def pack_scales(scales: Tensor) -> Tensor:
    """Scales [groups, rows] as float16 [panels, groups, 16]."""
    padded = F.pad(scales.to(torch.float16), (0, -scales.shape[1] % PANEL))
    return padded.view(len(scales), -1, PANEL).transpose(0, 1).contiguous()


def factor_of(scales: Tensor) -> float:
    """The power of two that scales have to be divided by for halves to hold the smallest in full precision; 1 wherever it can be."""
    if scales.dtype == torch.float16 or not bool(scales.any()):
        return 1.0
    wide = scales.abs().double()
    up = math.floor(math.log2(torch.finfo(torch.float16).smallest_normal)) - math.floor(math.log2(wide[wide > 0].min()))
    room = 15 - math.ceil(math.log2(wide.max()))  # A half reaches to nearly 2 ** 16.
    return 2.0 ** -max(0, min(up, room))


def padded_bias(bias: Tensor | None) -> Tensor | None:
    """A bias [rows] for whole panels."""
    return None if bias is None else F.pad(bias.float(), (0, -len(bias) % PANEL))


def pack_linear(tensors: Mapping[str, Tensor], gptq_version: int = 1) -> PackedMatrix | None:
    """What the kernels need of a linear's tensors as a bundle holds them; None for what they do not compute.

    They compute GPTQ with 4 or 8 bits and bitsandbytes' int8: symmetric, groups of consecutive columns in multiples of 32.
    """
    if "SCB" in tensors:
        codes, scales = tensors["weight"].to(torch.int16) + 128, tensors["SCB"].float()[None] / 127
        return packed_matrix(codes.to(torch.uint8), scales, tensors.get("bias"), bits=8)
    if "qweight" not in tensors:
        return None
    columns = tensors["g_idx"].numel()
    bits = 32 * tensors["qweight"].shape[0] // columns
    groups = len(tensors["scales"])
    if bits not in (4, 8) or columns % (groups * BLOCK):
        return None
    codes, scales, zeros = unpack_gptq(tensors, bits, gptq_version)
    in_order = torch.equal(tensors["g_idx"], torch.arange(columns, dtype=torch.int32) // (columns // groups))
    if not in_order or bool((zeros != symmetric_zero(bits)).any()):
        return None
    return packed_matrix(codes, scales, tensors.get("bias"), bits=bits)


def packed_matrix(codes: Tensor, scales: Tensor, bias: Tensor | None, *, bits: int) -> PackedMatrix | None:
    """Codes uint8 [rows, columns] with scales [groups, rows]; None if the columns are not whole blocks."""
    rows, columns = codes.shape
    if columns % BLOCK:
        return None
    packed = pack_half_bytes(codes) if bits == 4 else pack_codes(codes)
    factor = factor_of(scales)
    return PackedMatrix(packed, pack_scales(scales / factor), padded_bias(bias), rows, factor)


def round_rows(weight: Tensor) -> PackedMatrix | None:
    """A float weight [rows, columns] in 8 bits with one scale per row: the head at run time."""
    # A half may round down by a 2048th: nothing is cut off for it.
    scales = torch.cat([rows.float().abs().amax(1) for rows in weight.split(ROWS_AT_ONCE)]) / 126.9
    factor = factor_of(scales)
    scales = (scales / factor).to(torch.float16).float() * factor
    codes, divisors = torch.empty(weight.shape, dtype=torch.uint8), torch.where(scales == 0, 1, scales)[:, None]
    for parts in zip(codes.split(ROWS_AT_ONCE), weight.split(ROWS_AT_ONCE), divisors.split(ROWS_AT_ONCE), strict=True):
        own, rows, steps = parts
        own.copy_((rows.float() / steps).round().clamp(-127, 127) + 128)
    return packed_matrix(codes, scales[None], None, bits=8)


class NativeLinear:
    """`x @ weight.T + bias` by the kernels; called like any other linear."""

    def __init__(self, kernels: "Kernels", matrix: PackedMatrix):
        self.kernels, self.matrix = kernels, matrix

    def __call__(self, x: Tensor) -> Tensor:
        """Map float32 `x` [..., columns] to [..., rows]."""
        return self.kernels.product(x.flatten(0, -2), self.matrix).unflatten(0, x.shape[:-1])


TURN = threading.Lock()
"""Held while the library works: it has one team of threads, and ctypes lets other Python threads run."""


def renew_turn() -> None:
    """Whoever held it before a fork is not in the child."""
    global TURN
    TURN = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renew_turn)


class Kernels:
    """The compiled library and what it is handed. Raises as `open_library`."""

    def __init__(self, path: str, instructions: int | None = None):
        self.library = library = open_library(path)
        found = library.vlquant_instructions()
        self.instructions = found if instructions is None else min(found, instructions)
        for name in ("vlquant_stack_scratch", "vlquant_product_scratch"):
            getattr(library, name).restype = c_int64
        library.vlquant_stack_scratch.argtypes = [c_void_p, c_void_p, c_int64]
        library.vlquant_product_scratch.argtypes = [c_void_p, c_int64]
        library.vlquant_run_stack.argtypes = [c_int] + [c_void_p] * 4
        library.vlquant_run_product.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_void_p, c_void_p]
        self._scratch = torch.empty(0)

    def gather(self) -> None:
        """Have as many threads as torch uses; raises OSError if the system gives none."""
        if self.library.vlquant_threads(torch.get_num_threads()):
            raise OSError("the system gives no more threads")

    def scratch(self, floats: int) -> int:
        """Address of so many floats, kept for the next call: fresh memory costs more than the arithmetic."""
        if self._scratch.numel() < floats:
            with torch.inference_mode(False):
                self._scratch = torch.empty(floats)
        return self._scratch.data_ptr()

    def run_stack(self, stack: Structure, cache: Structure, step: Structure) -> None:
        """Let all layers transform the hidden states of a step, in place, and fill the cache; with logits, where it has room for them."""
        stack, cache = ctypes.byref(stack), ctypes.byref(cache)
        with TURN:
            self.gather()
            scratch = self.scratch(self.library.vlquant_stack_scratch(stack, cache, step.length))
            self.library.vlquant_run_stack(self.instructions, stack, cache, ctypes.byref(step), scratch)

    def product(self, values: Tensor, matrix: PackedMatrix) -> Tensor:
        """values float32 [rows, columns] @ matrix.T + bias: float32 [rows, matrix rows]."""
        values, fields = values.float().contiguous(), matrix.fields()
        outputs, own = torch.empty(len(values), fields.rows), ctypes.byref(fields)
        with TURN:
            self.gather()
            scratch = self.scratch(self.library.vlquant_product_scratch(own, len(values)))
            self.library.vlquant_run_product(self.instructions, own, values.data_ptr(), len(values), outputs.data_ptr(), scratch)
        return outputs[:, : matrix.rows]


def native_kernels() -> Kernels | None:
    """The kernels of this installation and processor; None where there are none, or VLQUANT_KERNELS asks for torch.

    Raises InvalidRequest if VLQUANT_KERNELS is neither torch, avx2 nor vnni, or asks for what the processor lacks, and as
    `open_library`.
    """
    with TURN:  # Two threads that ask first would both load them, each with a scratch of its own.
        return kernels_for(os.environ.get("VLQUANT_KERNELS", ""))


@cache
def kernels_for(wanted: str) -> Kernels | None:
    """What `native_kernels` returns for a value of VLQUANT_KERNELS."""
    if wanted not in ("", "torch", *CHOICES):
        raise InvalidRequest(f"the environment variable VLQUANT_KERNELS is {wanted!r}; set it to torch, avx2 or vnni, or unset it")
    path = library_path() if wanted != "torch" else None
    kernels = Kernels(path, CHOICES.get(wanted)) if path else None
    if wanted in CHOICES and (kernels is None or kernels.instructions != CHOICES[wanted]):
        raise InvalidRequest(f"VLQUANT_KERNELS asks for {wanted}, which this processor or installation lacks; unset it")
    return kernels if kernels and kernels.instructions else None
