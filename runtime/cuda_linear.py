"""Matmuls with packed weights on a GPU: our kernels for few tokens, expanding and a GEMM for many. Knows tensors only."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlquant.errors import InvalidRequest
from vlquant.runtime.cuda_driver import MAX_WARPS, WARP, Card, Kernels, card_of, kernels_of
from vlquant.runtime.cuda_layout import CHUNK, KINDS, KernelWeight, lay_out_float, lay_out_gptq, lay_out_int8

if TYPE_CHECKING:
    from vlquant.runtime.linear import Workspace

LINEAR_FILES = ("numbers", "weights", "rows", "gemv", "dequantize")
INT8_FILES = ("numbers", "weights", "rows", "gemv_int8")

TOKENS = (1, 2, 4, 8)
"""How many tokens the kernels are compiled for; more than the last are a GEMM's."""
ROWS = 4
"""Rows of one block, as in gemv.cu."""
INPUT_BLOCK = 32
"""Columns that share one scale of 8-bit activations, as in gemv_int8.cu."""
EXPANDED = 64 * 2**20
"""Weights expanded at a time: 128 MB of float16, the widest matrix of an 8B model."""

GEMM_DTYPES = (((6, 0), torch.float16), ((0, 0), torch.float32))
"""From which compute capability many tokens are multiplied in which precision, the newest first.

float16 is the storage: sums are float32, in cuBLAS on 6.x the products too (a P40 is reported with 8.3 TFLOPS so and 4.9 in
float32); from 7.0 on tensor cores multiply. bfloat16 would lose three bits and gain a range that scaled rows do not need.
"""
DP4A_FROM = (6, 1)

Linear = Callable[[Tensor], Tensor]


class CudaLinear:
    """`x @ weight.T + bias` for a weight in the kernels' layout. Up to 8 tokens are exact: float32 sums of float32 products.

    int8_kernels: those of INT8_FILES, for few tokens by dp4a instead, with activations rounded to 8 bits.
    """

    def __init__(
        self,
        weight: KernelWeight,
        *,
        bias: Tensor | None,
        workspace: "Workspace",
        card: Card,
        kernels: Kernels,
        int8_kernels: Kernels | None = None,
    ) -> None:
        self.weight, self.workspace, self.card = weight, workspace, card
        self.kernels, self.int8_kernels = kernels, int8_kernels
        self.bias = None if bias is None else bias.float().contiguous()
        self.gemm_dtype = gemm_dtype(card.capability)

    def __call__(self, x: Tensor) -> Tensor:
        """Map `x` [..., in_features] to float32 [..., out_features]."""
        weight, rows = self.weight, x.reshape(-1, self.weight.in_features).float()
        if weight.order is not None:
            rows = rows[:, weight.order]
        few = len(rows) <= TOKENS[-1]
        y = self._few(rows.contiguous()) if few else multiply(rows, self.expand, weight.out_features, self.gemm_dtype)
        if weight.row_scale is not None:
            y = y * weight.row_scale
        if self.bias is not None and not (few and weight.row_scale is None):
            y = y + self.bias
        return y.view(*x.shape[:-1], weight.out_features)

    def _few(self, x: Tensor) -> Tensor:
        """float32 [tokens, in] -> [tokens, out] by a kernel, which adds the bias unless rows are scaled first."""
        weight, tokens = self.weight, len(x)
        y = torch.empty(tokens, weight.out_features, device=x.device)
        inputs, kernels, product = (x,), self.kernels, "gemv"
        if self.int8_kernels is not None:
            inputs, kernels, product = self._round(x), self.int8_kernels, "gemv_int8"
        chunks, compiled_for = weight.in_features // CHUNK, next(count for count in TOKENS if count >= tokens)
        bias = self.bias if weight.row_scale is None else None
        kernels.launch(
            f"{product}_{weight.kind}_{compiled_for}",
            (-(-weight.out_features // ROWS), 1, 1),
            (WARP, min(MAX_WARPS, -(-chunks // WARP)), 1),
            *(weight.codes, weight.scales, weight.offsets, *inputs, bias, y),
            *(weight.out_features, weight.in_features, weight.group_shift, tokens),
        )
        return y

    def _round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations in 8 bits: int8 [tokens, in], float32 [tokens, in / 32]."""
        tokens, blocks = len(x), self.weight.in_features // INPUT_BLOCK
        codes, scales = torch.empty_like(x, dtype=torch.int8), torch.empty(tokens, blocks, device=x.device)
        grid = (-(-blocks // MAX_WARPS), tokens, 1)
        self.int8_kernels.launch("round_activations", grid, (WARP, MAX_WARPS, 1), x, codes, scales, self.weight.in_features)
        return codes, scales

    def expand(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop of the weight without `row_scale`, in the GEMM's precision [stop - start, in_features]."""
        weight = self.weight
        out = self.workspace.take((stop - start) * weight.in_features, self.gemm_dtype).view(-1, weight.in_features)
        if weight.scales is None:
            stored = next(dtype for dtype, kind in KINDS.items() if kind == weight.kind)
            return out.copy_(weight.codes[start:stop].view(stored))
        rows = [None if each is None else each[start:stop] for each in (weight.codes, weight.scales, weight.offsets)]
        name = f"dequantize_{weight.kind}_{str(self.gemm_dtype).removeprefix('torch.')}"
        self.kernels.launch(
            name, (stop - start, 1, 1), (WARP * MAX_WARPS, 1, 1), *rows, out, weight.in_features, weight.group_shift
        )
        return out


def with_int8_activations(linear: Linear) -> Linear:
    """The same linear with activations rounded to 8 bits for few tokens, if its weight is packed in 4 or 8.

    Not exact: no command and no setting does this, only tests/test_gpu.py and tests/measure_gpu.py, and whoever wraps the
    linears of a decoder himself; tests/test_int8_activations.py says what it costs. Raises InvalidRequest on a card without dp4a.
    """
    if not isinstance(linear, CudaLinear) or linear.weight.scales is None or linear.weight.in_features % INPUT_BLOCK:
        return linear
    if linear.card.capability < DP4A_FROM:
        raise InvalidRequest("8-bit activations need compute capability 6.1 or newer; leave them as they are")
    given = {name: getattr(linear, name) for name in ("bias", "workspace", "card", "kernels")}
    return CudaLinear(linear.weight, **given, int8_kernels=kernels_of(linear.weight.codes.device, INT8_FILES))


class BnbNf4Linear:
    """NF4 through the kernels of bitsandbytes: its product for few tokens, its dequantizing and a GEMM for many.

    Inputs stay float32: nothing is lost, and its half-precision kernels multiply in half, which is slow on 6.1.
    """

    def __init__(self, tensors: dict[str, Tensor], *, card: Card) -> None:
        from bitsandbytes.functional import QuantState

        self.packed, bias = tensors["weight"], tensors.get("bias")
        self.bias = None if bias is None else bias.float()
        parts = {name: each for name, each in tensors.items() if name.startswith("weight.")}
        self.gemm_dtype = gemm_dtype(card.capability)
        # A state says what its weight is expanded to, and remembers the checkpoint's bfloat16.
        self.state, self.expanding = (QuantState.from_dict(dict(parts), device=self.packed.device) for _ in range(2))
        self.state.dtype, self.expanding.dtype = torch.float32, self.gemm_dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Map `x` [..., in_features] to float32 [..., out_features]."""
        from bitsandbytes import matmul_4bit

        out_features, in_features = self.state.shape
        rows = x.reshape(-1, in_features).float()
        if len(rows) <= TOKENS[-1]:
            y = matmul_4bit(rows, self.packed.t(), self.state)
        else:
            y = multiply(rows, self.expand, out_features, self.gemm_dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], out_features)

    def expand(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop of the weight; all are expanded, as bitsandbytes has it."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed, self.expanding)[start:stop]


def multiply(x: Tensor, expand: Callable[[int, int], Tensor], out_features: int, dtype: torch.dtype) -> Tensor:
    """`x @ weight.T` in float32 [tokens, out], for float32 x [tokens, in] and a weight expanded block by block.

    In float16, rows of x are first divided by a power of two that brings their largest value to 0.5 .. 1: however large a
    model's activations are, they stay within its range, and so do results for weights below 2 (30,000 inputs at worst).
    """
    if dtype == torch.float16:
        _, exponents = torch.frexp(x.abs().amax(dim=1, keepdim=True))
        x = torch.ldexp(x, -exponents)
    rows = max(1, EXPANDED // x.shape[1])
    x, blocks = x.to(dtype), range(0, out_features, rows)
    parts = [(x @ expand(start, min(start + rows, out_features)).to(dtype).T).float() for start in blocks]
    result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return torch.ldexp(result, exponents) if dtype == torch.float16 else result


def gemm_dtype(capability: tuple[int, int]) -> torch.dtype:
    """The precision in which a card multiplies many tokens."""
    return next(dtype for lowest, dtype in GEMM_DTYPES if capability >= lowest)


def make_cuda_linear(tensors: dict[str, Tensor], *, workspace: "Workspace", gptq_version: int = 1) -> Linear | None:
    """The linear that tensors stand for, on the workspace's GPU; None for a weight that torch itself multiplies (float32)."""
    device = torch.device(workspace.device)
    # cuBLAS may otherwise add partial sums in half precision.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    tensors = {name: each.to(device) for name, each in tensors.items()}
    if "weight.absmax" in tensors:
        return BnbNf4Linear(tensors, card=card_of(device))
    weight = kernel_weight(tensors, gptq_version)
    if weight is None:
        return None
    kernels = kernels_of(device, LINEAR_FILES)
    return CudaLinear(weight, bias=tensors.get("bias"), workspace=workspace, kernels=kernels, card=card_of(device))


def kernel_weight(tensors: dict[str, Tensor], gptq_version: int = 1) -> KernelWeight | None:
    """Tensors of a linear in the kernels' layout; None for float weights that have none."""
    if "qweight" in tensors:
        return lay_out_gptq(tensors, gptq_version=gptq_version)
    if "SCB" in tensors:
        return lay_out_int8(tensors["weight"], tensors["SCB"])
    weight = tensors["weight"]
    return lay_out_float(weight) if weight.dtype in KINDS and weight.shape[1] % CHUNK == 0 else None
