"""A graph while it is being built: nodes, constants, and the file its weights go to. Knows no network.

`Graph` computes in float32; `vlquant.export.precisions` has those that store and multiply constant matrices otherwise.
"""

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import Tensor

CONTRIB = "com.microsoft"
DATA_FILE = "model.data"

# A memory map starts at a page (Windows: at 64 KiB); tensors too small to be worth mapping stay close together.
LARGE_TENSOR_BYTES = 1 << 20
LARGE_ALIGNMENT, SMALL_ALIGNMENT = 1 << 16, 64

# A processor reads several rows of a product's input side by side. Rows that start a multiple of 4096 bytes apart share
# one set of its first-level cache and drive each other out of it, so they are made longer by a cache line: InternViT-300M,
# 1024 and 4096 wide, takes about a tenth less time with ONNX Runtime, and with OpenVINO almost that.
PAGE_NUMBERS, LINE_NUMBERS = 4096 // 4, 64 // 4


class WeightFile:
    """Tensors one after the other in an open file; none of them stays in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        """Bytes written so far."""
        self._file = file

    def append(self, array: np.ndarray) -> tuple[int, int]:
        """Write one array, aligned for mapping; returns its offset and length in bytes."""
        alignment = LARGE_ALIGNMENT if array.nbytes >= LARGE_TENSOR_BYTES else SMALL_ALIGNMENT
        self._write(bytes(-self.size % alignment))
        offset = self.size
        self._write(memoryview(array.reshape(-1)).cast("B"))
        return offset, array.nbytes

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.size += len(data)


class Graph:
    """A graph being built: its nodes, and where in the weight file each initializer lies."""

    line = LINE_NUMBERS
    """What a row of whole pages is made longer by."""

    def __init__(self, weight_file: WeightFile) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._weight_file = weight_file

    def node(self, operator: str, inputs: Sequence[str], *, domain: str = "", **attributes) -> str:
        """Append a node with one output and return that output's name."""
        output = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def rename_last(self, name: str) -> str:
        """Give the output of the newest node another name, and return it."""
        self.nodes[-1].output[0] = name
        return name

    def weight(self, name: str, tensor: Tensor, dtype: str = "<f4") -> str:
        """Write a tensor to the weight file, little-endian as `dtype`, and return its name in the graph."""
        array = np.ascontiguousarray(tensor.numpy(), dtype=dtype)
        offset, length = self._weight_file.append(array)
        proto = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dims=array.shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA_FILE), ("offset", offset), ("length", length)):
            proto.external_data.add(key=key, value=str(value))
        self.initializers[name] = proto
        return name

    def narrow(self, x: str, branch: str) -> str:
        """x, float32, as what a branch computes in. branch: what the names of its weights start with."""
        return x

    def widen(self, x: str, branch: str) -> str:
        """The reverse of `narrow`."""
        return x

    def product(self, x: str, name: str, weight: Tensor, *, least: float | None = None) -> str:
        """x [..., in] @ weight [in, out], a constant called `name`. least: what no x is below, where that is known."""
        return self.node("MatMul", [x, self.weight(name, weight)])

    def missing(self, width: int) -> int:
        """How many numbers rows of that width are to be made longer by."""
        return 0 if width % PAGE_NUMBERS else self.line

    def bias(self, name: str, tensor: Tensor) -> str:
        """The constant that is added to a product."""
        return self.weight(name, tensor)

    def integers(self, *values: int) -> str:
        """The name of a constant int64 vector kept inside the graph."""
        return self.constant("integers_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def number(self, value: float) -> str:
        """The name of a constant float32 scalar kept inside the graph."""
        return self.constant(f"number_{value!r}", np.array(value, dtype=np.float32))

    def constant(self, name: str, array: np.ndarray) -> str:
        """The name of a small array kept inside the graph."""
        self.initializers.setdefault(name, onnx.numpy_helper.from_array(array, name))
        return name


def reshape(graph: Graph, x: str, *shape: int) -> str:
    """Reshape; a 0 keeps the size of that axis."""
    return graph.node("Reshape", [x, graph.integers(*shape)])
