"""Weights in the order the CUDA kernels read them (cuda_kernels/weights.cu says why). Knows tensors of one linear."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlquant.errors import UnsupportedCheckpoint
from vlquant.packing import symmetric_zero, unpack_gptq

CHUNK = 8
"""Columns that a lane takes at a time; a group of columns is a power of two of them."""
WHOLE_ROW = 31
"""`group_shift` of weights without groups: every chunk of a row is in group 0."""
KINDS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class KernelWeight:
    """One weight [out_features, in_features] as kernels take it."""

    kind: str
    """"4bit", "8bit", "float16" or "bfloat16": the middle of the kernels' names."""
    codes: Tensor
    """int32 [out_features, words]."""
    in_features: int
    scales: Tensor | None = None
    """float16 [out_features, groups]."""
    offsets: Tensor | None = None
    """float32 [out_features, groups], where zeros are not in the middle."""
    order: Tensor | None = None
    """int64 [in_features]: which input each column belongs to, where columns are not in order."""
    row_scale: Tensor | None = None
    """float32 [out_features], multiplied to the result."""
    group_shift: int = WHOLE_ROW
    """A group has 2**group_shift chunks."""

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]


def lay_out_gptq(tensors: dict[str, Tensor], *, gptq_version: int = 1) -> KernelWeight:
    """GPTQ's tensors of 3, 4 or 8 bits; 3 take the room of 4.

    Raises UnsupportedCheckpoint for groups of different sizes, or of other sizes than powers of two from 8.
    """
    group, out_features = tensors["g_idx"].long(), tensors["qweight"].shape[1]
    in_features = group.numel()
    bits = 32 * tensors["qweight"].shape[0] // in_features
    codes, scales, zeros = unpack_gptq(tensors, bits, gptq_version)
    groups, width = len(scales), 8 if bits == 8 else 4
    order = group.argsort(stable=True)
    in_order = torch.equal(order, torch.arange(in_features, device=order.device))
    offsets = (symmetric_zero(bits) - zeros).float() * scales.float()  # [groups, out]
    shifted = (codes if in_order else codes[:, order]) + (symmetric_zero(width) - symmetric_zero(bits))
    return KernelWeight(
        kind=f"{width}bit",
        codes=pack_half_bytes(shifted) if width == 4 else shifted.contiguous().view(torch.int32),
        in_features=in_features,
        scales=scales.to(torch.float16).T.contiguous().reshape(out_features, groups),
        offsets=offsets.T.contiguous() if bool(offsets.any()) else None,
        order=None if in_order else order,
        group_shift=_group_shift(group.bincount(minlength=groups), in_features),
    )


def lay_out_int8(codes: Tensor, row_maxima: Tensor) -> KernelWeight:
    """LLM.int8's signed codes [out, in] with the largest absolute value of each row.

    Raises UnsupportedCheckpoint unless columns are whole chunks: the kernels would leave out the rest.
    """
    if codes.shape[1] % CHUNK:
        raise UnsupportedCheckpoint(f"int8 weights of {codes.shape[1]} columns have no CUDA kernel; use --device cpu")
    # 2**-7 is exact, and keeps a product with inputs up to 1 within float16.
    scales = torch.full((len(codes), 1), 2.0**-7, dtype=torch.float16, device=codes.device)
    stored = (codes.to(torch.int16) + 128).to(torch.uint8).contiguous().view(torch.int32)
    row_scale = row_maxima.float() * (2**7 / 127)
    return KernelWeight("8bit", stored, codes.shape[1], scales=scales, row_scale=row_scale)


def lay_out_float(weight: Tensor) -> KernelWeight:
    """A float16 or bfloat16 weight [out, in] as it is."""
    return KernelWeight(KINDS[weight.dtype], weight.contiguous().view(torch.int32), weight.shape[1])


def pack_half_bytes(codes: Tensor) -> Tensor:
    """uint8 codes 0 .. 15 [out, in] -> int32 [out, in / 8]: byte b of a word has column b low and column b + 4 high."""
    low, high = codes.reshape(len(codes), -1, 2, 4).unbind(dim=2)  # [out, chunks, 4]
    return (low | high << 4).reshape(len(codes), -1).contiguous().view(torch.int32)


def _group_shift(columns_per_group: Tensor, in_features: int) -> int:
    """Log2 of the chunks in a group."""
    columns = int(columns_per_group[0])
    if bool((columns_per_group != columns).any()):
        raise UnsupportedCheckpoint("GPTQ groups of different sizes are not supported; quantize again with vlquant")
    if in_features % CHUNK == 0 and len(columns_per_group) == 1:
        return WHOLE_ROW
    chunks = columns // CHUNK
    if columns % CHUNK or chunks & (chunks - 1):
        raise UnsupportedCheckpoint(f"GPTQ groups of {columns} columns have no CUDA kernel; use --device cpu, or quantize again")
    return chunks.bit_length() - 1
