"""Matmuls with packed weights in torch. Knows tensors; no model, text, pictures or files.

Weights stay packed. A call expands one block of rows to float32, multiplies and reuses the memory; every block goes
through one shared buffer, because fresh memory for each call costs twice the arithmetic (page faults).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlquant.bnb import nf4_block_maxima, nf4_state
from vlquant.decoder import FloatLinear, Linear
from vlquant.errors import UnsupportedCheckpoint
from vlquant.packing import symmetric_zero, unpack_gptq
from vlquant.runtime.cuda_linear import make_cuda_linear

BLOCK_ELEMENTS = 16 * 2**20
"""Weights expanded at a time: 64 MiB of float32. Measured: smaller blocks lose to thread start-up."""

ROWS_MULTIPLE = 64
"""Blocks of rows start at multiples of this, so that NF4's blocks of 64 weights never straddle two of them."""


class Workspace:
    """Buffers that all linears of one decoder expand their weights into. Not for two threads at a time."""

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = device
        self._buffers: dict[torch.dtype, Tensor] = {}

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """`count` uninitialised elements, valid until the next call with the same dtype."""
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < count:
            # A buffer first made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                buffer = self._buffers[dtype] = torch.empty(count, dtype=dtype, device=self.device)
        return buffer[:count]


class PackedLinear:
    """`x @ weight.T + bias` for a weight [out_features, in_features] that is expanded block by block.

    A subclass says how: `expand(start, stop)` returns rows start .. stop in float32.
    """

    def __init__(self, shape: tuple[int, int], *, workspace: Workspace, bias: Tensor | None = None):
        self.out_features, self.in_features = shape
        self.workspace = workspace
        self.bias = None if bias is None else bias.float().to(workspace.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Map float32 `x` [..., in_features] to [..., out_features]."""
        rows = max(ROWS_MULTIPLE, BLOCK_ELEMENTS // self.in_features // ROWS_MULTIPLE * ROWS_MULTIPLE)
        if rows >= self.out_features:
            return F.linear(x, self.expand(0, self.out_features), self.bias)
        result = x.new_empty(*x.shape[:-1], self.out_features)
        for start in range(0, self.out_features, rows):
            stop = min(start + rows, self.out_features)
            result[..., start:stop] = F.linear(x, self.expand(start, stop))
        return result if self.bias is None else result.add_(self.bias)

    def expand(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop of the weight, float32 [stop - start, in_features], in the shared buffer."""
        raise NotImplementedError

    def _floats(self, rows: int) -> Tensor:
        return self.workspace.take(rows * self.in_features, torch.float32).view(rows, self.in_features)


class StoredLinear(PackedLinear):
    """A float weight kept in the precision it is stored in; float16 and bfloat16 are widened block by block."""

    def __init__(self, weight: Tensor, *, workspace: Workspace, bias: Tensor | None = None):
        super().__init__(tuple(weight.shape), workspace=workspace, bias=bias)
        self.weight = weight

    def expand(self, start: int, stop: int) -> Tensor:
        return self._floats(stop - start).copy_(self.weight[start:stop])


class PackedGptqLinear(PackedLinear):
    """Signed codes times one scale per group of input columns, from GPTQ's tensors.

    4 bits: a byte holds column i in its low half and column i + in_features / 2 in its high half, so that both halves
    unpack to contiguous columns. 8 bits: one byte per code. Columns that are not in the order of their groups (what others
    call desc_act) are put there, and the inputs with them; zeros other than the middle become an offset per group.
    """

    def __init__(self, tensors: dict[str, Tensor], *, workspace: Workspace, gptq_version: int = 1):
        in_features = tensors["g_idx"].numel()
        super().__init__((tensors["qweight"].shape[1], in_features), workspace=workspace, bias=tensors.get("bias"))
        self.bits = 32 * tensors["qweight"].shape[0] // in_features
        codes, scales, zeros = unpack_gptq(tensors, self.bits, gptq_version)
        group, zero = tensors["g_idx"].long(), symmetric_zero(self.bits)
        if not torch.equal(group.bincount(minlength=len(scales)), torch.full((len(scales),), in_features // len(scales))):
            raise UnsupportedCheckpoint("GPTQ groups of different sizes are not supported; quantize again with vlquant")
        order = group.argsort(stable=True)
        self.order = None if torch.equal(order, torch.arange(in_features)) else order.to(workspace.device)
        codes = codes if self.order is None else codes[:, order]
        offsets = (zero - zeros).to(torch.float32) * scales.float()
        self.offsets = offsets.T.contiguous().to(workspace.device) if bool(offsets.any()) else None  # [out, groups]
        signed = (codes.to(torch.int16) - zero).to(torch.int8)  # [out, in]
        if self.bits == 4:
            low, high = signed.chunk(2, dim=1)
            signed = (low & 15) | (high << 4)
        self.codes = signed.contiguous().to(workspace.device)
        self.scales = scales.T.contiguous().to(workspace.device)  # [out, groups]

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x if self.order is None else x[..., self.order])

    def expand(self, start: int, stop: int) -> Tensor:
        """The rows, their columns in the order of groups."""
        weight, codes = self._floats(stop - start), self.codes[start:stop]
        scales = self.scales[start:stop].float()
        if self.bits == 4:
            half = self.in_features // 2
            sixteenfold = self.workspace.take(codes.numel(), torch.int8).view(codes.shape)
            # A half byte moved to the top of a signed byte is 16 times its signed value: no sign extension needed.
            weight[:, :half] = torch.bitwise_left_shift(codes, 4, out=sixteenfold)
            weight[:, half:] = torch.bitwise_and(codes, -16, out=sixteenfold)
            scales = scales / 16
        else:
            weight.copy_(codes)
        grouped = weight.view(stop - start, scales.shape[1], -1).mul_(scales[:, :, None])
        if self.offsets is not None:
            grouped.add_(self.offsets[start:stop, :, None])
        return weight


class PackedNf4Linear(PackedLinear):
    """Bytes of two NF4 codes, high half first, times one maximum per 64 consecutive weights."""

    def __init__(self, tensors: dict[str, Tensor], *, workspace: Workspace):
        state = nf4_state(tensors)
        super().__init__(tuple(state["shape"]), workspace=workspace, bias=tensors.get("bias"))
        self.block = state["blocksize"]
        self.maxima = nf4_block_maxima(tensors).float().to(workspace.device)  # [blocks]
        packed = tensors["weight"].reshape(-1)
        self.codes = F.pad(packed, (0, self.maxima.numel() * self.block // 2 - packed.numel())).to(workspace.device)
        values, byte = tensors["weight.quant_map"].float(), torch.arange(256)
        pairs = torch.stack((values[byte >> 4], values[byte & 15]), dim=1)  # [256, 2]
        self.pairs = torch.view_as_complex(pairs).to(workspace.device)  # one 8-byte look-up yields two weights

    def expand(self, start: int, stop: int) -> Tensor:
        first, last = start * self.in_features // self.block, -(-stop * self.in_features // self.block)
        codes = self.codes[first * self.block // 2 : last * self.block // 2]
        floats = self.workspace.take(2 * codes.numel(), torch.float32)
        if codes.device.type == "cpu":
            # torch has no look-up by uint8; by int64 it takes ten times the memory and the same time.
            destination = floats.view(torch.complex64).numpy()
            np.take(self.pairs.numpy(), codes.numpy(), out=destination, mode="clip")
        else:
            floats.view(torch.complex64).copy_(self.pairs[codes.int()])
        floats.view(-1, self.block).mul_(self.maxima[first:last, None])
        return floats[: (stop - start) * self.in_features].view(stop - start, self.in_features)


class PackedInt8Linear(PackedLinear):
    """int8 codes times one scale per output row, from bitsandbytes' tensors. Activations stay float."""

    def __init__(self, tensors: dict[str, Tensor], *, workspace: Workspace):
        super().__init__(tuple(tensors["weight"].shape), workspace=workspace, bias=tensors.get("bias"))
        self.codes = tensors["weight"].to(workspace.device)
        self.scales = (tensors["SCB"].float() / 127).to(workspace.device)  # [out]

    def expand(self, start: int, stop: int) -> Tensor:
        return self._floats(stop - start).copy_(self.codes[start:stop]).mul_(self.scales[start:stop, None])


def make_linear(tensors: dict[str, Tensor], *, workspace: Workspace, gptq_version: int = 1) -> Linear:
    """The linear that tensors stand for, told by their names: {"qweight", ...}, {"weight", "SCB"}, {"weight", "bias"} ..."""
    if torch.device(workspace.device).type == "cuda":
        linear = make_cuda_linear(tensors, workspace=workspace, gptq_version=gptq_version)
        if linear is not None:
            return linear
    if "qweight" in tensors:
        return PackedGptqLinear(tensors, workspace=workspace, gptq_version=gptq_version)
    if "weight.absmax" in tensors:
        return PackedNf4Linear(tensors, workspace=workspace)
    if "SCB" in tensors:
        return PackedInt8Linear(tensors, workspace=workspace)
    weight, bias = tensors["weight"].to(workspace.device), tensors.get("bias")
    if weight.dtype == torch.float32:
        return FloatLinear(weight, bias if bias is None else bias.float().to(workspace.device))
    return StoredLinear(weight, workspace=workspace, bias=bias)
