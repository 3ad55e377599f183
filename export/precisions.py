"""Graphs whose branches are not float32: float16 for a GPU, 8-bit integers for a CPU. Knows no network.

What is narrow lies between a norm and the residual stream: neither of these two is.
"""

from collections.abc import Collection

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from vlquant.export.nodes import CONTRIB, Graph, WeightFile, reshape

LARGEST_CODE = 64
"""Of a weight, of either sign. Without VNNI, x86 adds the products of two activations (0 to 255) and two weights in 16
bits that saturate: 2 * 255 * 64 = 32,640 is the most that fits. With 127 it would not, and only on such machines."""
GELU_ZERO, SIGNED_ZERO = 20, 128
"""The codes of an activation of 0: after GELU, which is hardly ever negative, 235 codes are left for the positive ones."""
TINY = 1e-30
"""Smallest scale of a token, so that one of zeros has a code."""


class HalfGraph(Graph):
    """Branches in float16, except for those that are known to leave its range."""

    line = 0

    def __init__(self, weight_file: WeightFile, *, islands: Collection[str] = ()) -> None:
        """islands: branches that stay float32, by what the names of their weights start with."""
        super().__init__(weight_file)
        self._islands = tuple(islands)

    def narrow(self, x: str, branch: str) -> str:
        return self.node("Cast", [x], to=TensorProto.FLOAT16) if self._is_half(branch) else x

    def widen(self, x: str, branch: str) -> str:
        return self.node("Cast", [x], to=TensorProto.FLOAT) if self._is_half(branch) else x

    def product(self, x: str, name: str, weight: Tensor, *, least: float | None = None) -> str:
        return self.node("MatMul", [x, self.bias(name, weight)])

    def bias(self, name: str, tensor: Tensor) -> str:
        return self.weight(name, tensor, "<f2" if self._is_half(name) else "<f4")

    def _is_half(self, name: str) -> bool:
        return not name.startswith(self._islands)


class Int8Graph(Graph):
    """Products with constant matrices in 8 bits: a scale for each token, found as it comes, and one for each column.

    One scale for all tokens, which ONNX Runtime's own dynamic quantization uses, leaves few codes to the others where one
    token is a hundred times larger, as some are in every large vision transformer; and then a tile's features would
    depend on the tiles beside it.
    """

    line = 0

    def __init__(self, weight_file: WeightFile) -> None:
        super().__init__(weight_file)
        self._quantized: dict[str, tuple[str, str, str]] = {}

    def product(self, x: str, name: str, weight: Tensor, *, least: float | None = None) -> str:
        codes, scales = quantize_columns(weight)
        activations, token_scales, zero = self._quantize_tokens(x, least)
        matrix = self.weight(name, codes, "|i1"), self.number(1.0), self.weight(name + ".scales", scales)
        product = self.node("MatMulIntegerToFloat", [activations, *matrix, zero], domain=CONTRIB)
        return self.node("Mul", [product, token_scales])

    def _quantize_tokens(self, x: str, least: float | None) -> tuple[str, str, str]:
        """Codes uint8 of x [tiles, tokens, width], scales [tiles, tokens, 1], and the code of 0; the same for equal x."""
        if x not in self._quantized:
            zero = SIGNED_ZERO if least is None else GELU_ZERO
            scales = self._token_scales(x, least, zero)
            flat = reshape(self, scales, -1)  # [tiles * tokens]: QuantizeLinear takes scales of one axis only.
            zeros = self.constant(f"code_{zero}", np.array(zero, dtype=np.uint8))
            each_zero = self.node("Expand", [zeros, self.node("Shape", [flat])])
            rows = self.node("Flatten", [x], axis=2)  # [tiles * tokens, width]
            codes = self.node("QuantizeLinear", [rows, flat, each_zero], axis=0)
            self._quantized[x] = self.node("Reshape", [codes, self.node("Shape", [x])]), scales, zeros
        return self._quantized[x]

    def _token_scales(self, x: str, least: float | None, zero: int) -> str:
        """What one code step is worth, [tiles, tokens, 1]."""
        largest = self.node("ReduceMax", [x, self.integers(-1)], keepdims=1)
        if least is None:
            lowest = self.node("Neg", [self.node("ReduceMin", [x, self.integers(-1)], keepdims=1)])
            reach = self.node("Max", [largest, lowest, self.number(TINY)])
            return self.node("Div", [reach, self.number(float(255 - zero))])
        steps = self.node("Div", [largest, self.number(float(255 - zero))])
        return self.node("Max", [steps, self.number(-least / zero)])


def quantize_columns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [in, out], at most LARGEST_CODE from 0, and scales float32 [out] of `weight` [in, out]."""
    scales = weight.abs().amax(dim=0).clamp(min=TINY) / LARGEST_CODE
    return torch.round(weight / scales).to(torch.int8), scales
