"""Pieces of InternViT, pixel shuffle and projector as ONNX nodes.

Each piece is a function `piece(graph, input, weights, ...) -> output name`. Knows tensor names and
shapes; knows no checkpoints, folders or sessions. `vlquant.vision` is the same network in torch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import Tensor

from vlquant.vision import PROJECTOR_NORM_EPS, VisionConfig

Weights = Mapping[str, Tensor]

OPSET = 20  # the first with a native Gelu, which ONNX Runtime fuses with the bias before it
IR_VERSION = 10  # the newest that ONNX Runtime 1.23.2, the last for Pascal, is sure to read
CONTRIB = "com.microsoft"
GRAPH_FILE = "model.onnx"
DATA_FILE = "model.data"
INPUT, OUTPUT = "pixel_values", "features"
HIDDEN = "hidden_state_"
"""What the names of hidden states start with: 0 is the embedding."""

# A memory map starts at a page (Windows: at 64 KiB); tensors too small to be worth mapping stay close together.
LARGE_TENSOR_BYTES = 1 << 20
LARGE_ALIGNMENT, SMALL_ALIGNMENT = 1 << 16, 64


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

    def weight(self, name: str, tensor: Tensor) -> str:
        """Write a tensor to the weight file as float32 and return its name in the graph."""
        array = np.ascontiguousarray(tensor.float().numpy(), dtype="<f4")
        offset, length = self._weight_file.append(array)
        proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA_FILE), ("offset", offset), ("length", length)):
            proto.external_data.add(key=key, value=str(value))
        self.initializers[name] = proto
        return name

    def integers(self, *values: int) -> str:
        """The name of a constant int64 vector kept inside the graph."""
        return self._constant("integers_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def number(self, value: float) -> str:
        """The name of a constant float32 scalar kept inside the graph."""
        return self._constant(f"number_{value!r}", np.array(value, dtype=np.float32))

    def _constant(self, name: str, array: np.ndarray) -> str:
        self.initializers.setdefault(name, onnx.numpy_helper.from_array(array, name))
        return name


def vision_model(
    weights: Weights, config: VisionConfig, *, weight_file: WeightFile, written: Callable[[int], None] = lambda layer: None
) -> onnx.ModelProto:
    """The whole network, pixel_values [tiles, 3, side, side] to features [tiles, tokens, language hidden].

    weights: canonical names without "model."; each is asked for once, in graph order, and let go.
    written: told how many layers are in the weight file.
    """
    graph = Graph(weight_file)
    embed_patches(graph, INPUT, weights, config)
    hidden = graph.rename_last(f"{HIDDEN}0")
    for index in range(config.layers_to_run):
        encoder_layer(graph, hidden, weights, config, prefix=f"vision_tower.encoder.layer.{index}.")
        hidden = graph.rename_last(f"{HIDDEN}{index + 1}")
        written(index + 1)
    project(graph, shuffle_pixels(graph, drop_class_token(graph, hidden), config), weights)
    graph.rename_last(OUTPUT)
    return _as_model(graph, config)


def split_stages(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """`model` cut after every hidden state: models of one input and one output that share its weight file.

    The stages are those of `vlquant.vision.vision_stages`.
    """
    initializers = {each.name: each for each in model.graph.initializer}
    source, nodes = INPUT, []
    for node in model.graph.node:
        nodes.append(node)
        target = node.output[0]
        if target != OUTPUT and not target.startswith(HIDDEN):
            continue
        used = {name for each in nodes for name in each.input} & initializers.keys()
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (source, target)]
        body = helper.make_graph(nodes, target, ends[:1], ends[1:], [initializers[name] for name in sorted(used)])
        yield helper.make_model(body, opset_imports=model.opset_import, ir_version=model.ir_version)
        source, nodes = target, []


def _as_model(graph: Graph, config: VisionConfig) -> onnx.ModelProto:
    side = config.image_size
    width = graph.initializers["multi_modal_projector.linear_2.bias"].dims[0]
    pixels = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["tiles", 3, side, side])
    features = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["tiles", config.tokens_per_tile, width])
    body = helper.make_graph(graph.nodes, "vision", [pixels], [features], list(graph.initializers.values()))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="vlquant")


def embed_patches(graph: Graph, pixels: str, weights: Weights, config: VisionConfig) -> str:
    """Class token and patch embeddings with positions, [tiles, 1 + patches, hidden_size]."""
    prefix = "vision_tower.embeddings."
    side, size = config.patches_per_side, config.patch_size
    # A convolution whose stride is its kernel is a matmul over patches; a matmul needs no cuDNN.
    blocks = reshape(graph, pixels, 0, 3, side, size, side, size)
    blocks = graph.node("Transpose", [blocks], perm=[0, 2, 4, 1, 3, 5])  # [tiles, side, side, 3, size, size]
    patches = reshape(graph, blocks, 0, side**2, 3 * size**2)
    kernel = weights[prefix + "patch_embeddings.projection.weight"].float().flatten(1)
    kernel = graph.weight(prefix + "patch_embeddings.projection.weight", kernel.T)
    embedded = graph.node("MatMul", [patches, kernel])  # [tiles, patches, hidden_size]

    # Positions are constants of a tower with one tile size: the bias and the class token are added to them here.
    positions = weights[prefix + "position_embeddings"].float()  # [1, 1 + patches, hidden_size]
    bias = weights[prefix + "patch_embeddings.projection.bias"].float()
    first = weights[prefix + "cls_token"].float() + positions[:, :1]
    embedded = graph.node("Add", [embedded, graph.weight(prefix + "patch_positions", positions[:, 1:] + bias)])
    tiles = graph.node("Shape", [pixels], start=0, end=1)
    shape = graph.node("Concat", [tiles, graph.integers(1, config.hidden_size)], axis=0)
    class_tokens = graph.node("Expand", [graph.weight(prefix + "class_position", first), shape])
    return graph.node("Concat", [class_tokens, embedded], axis=1)


def encoder_layer(graph: Graph, hidden: str, weights: Weights, config: VisionConfig, *, prefix: str) -> str:
    """One InternViT layer over [tiles, tokens, hidden_size]; each branch is scaled by its lambda."""
    branch = normalise(graph, hidden, weights, config, name=prefix + "layernorm_before")
    branch = attention(graph, branch, weights, config, prefix=prefix + "attention.")
    hidden = add_scaled(graph, hidden, branch, weights, name=prefix + "lambda_1")
    branch = normalise(graph, hidden, weights, config, name=prefix + "layernorm_after")
    branch = mlp(graph, branch, weights, names=(prefix + "mlp.fc1", prefix + "mlp.fc2"))
    return add_scaled(graph, hidden, branch, weights, name=prefix + "lambda_2")


def attention(graph: Graph, x: str, weights: Weights, config: VisionConfig, *, prefix: str) -> str:
    """Full self-attention over the tokens of each tile, [tiles, tokens, hidden_size]."""
    queries, keys, values = (linear(graph, x, weights, prefix + name) for name in ("q_proj", "k_proj", "v_proj"))
    if config.query_key_norm:
        queries = rms_norm(graph, queries, weights, name=prefix + "q_norm", eps=config.norm_eps)
        keys = rms_norm(graph, keys, weights, name=prefix + "k_norm", eps=config.norm_eps)
    # No exporter and no ONNX Runtime pass arrives at this fused node by itself; unfused, the scores of
    # one tile of InternViT-300M are 67 MB.
    inputs = [queries, keys, values]
    mixed = graph.node("MultiHeadAttention", inputs, domain=CONTRIB, num_heads=config.heads)
    return linear(graph, mixed, weights, prefix + "projection_layer")


def drop_class_token(graph: Graph, hidden: str) -> str:
    """[tiles, 1 + patches, hidden_size] -> [tiles, patches, hidden_size]."""
    end = np.iinfo(np.int64).max
    return graph.node("Slice", [hidden, graph.integers(1), graph.integers(end), graph.integers(1)])


def shuffle_pixels(graph: Graph, patches: str, config: VisionConfig) -> str:
    """Fold neighbouring patches into one token: [tiles, tokens_per_tile, hidden_size / downsample_ratio ** 2]."""
    side, ratio = config.patches_per_side, config.downsample_ratio
    small, wide = int(side * ratio), int(config.hidden_size / ratio)
    x = reshape(graph, patches, 0, side, small, wide)
    x = graph.node("Transpose", [x], perm=[0, 2, 1, 3])  # [tiles, small, side, wide]
    x = reshape(graph, x, 0, small, small, int(wide / ratio))
    if config.pixel_shuffle != "v1":
        x = graph.node("Transpose", [x], perm=[0, 2, 1, 3])
    return reshape(graph, x, 0, small**2, int(wide / ratio))


def project(graph: Graph, tokens: str, weights: Weights) -> str:
    """The MLP between tower and language model: norm, linear, GELU, linear."""
    prefix = "multi_modal_projector."
    normed = layer_norm(graph, tokens, weights, name=prefix + "layer_norm", eps=PROJECTOR_NORM_EPS)
    return mlp(graph, normed, weights, names=(prefix + "linear_1", prefix + "linear_2"))


def mlp(graph: Graph, x: str, weights: Weights, *, names: tuple[str, str]) -> str:
    """Linear, exact GELU (erf), linear over the last axis."""
    inner = graph.node("Gelu", [linear(graph, x, weights, names[0])], approximate="none")
    return linear(graph, inner, weights, names[1])


def linear(graph: Graph, x: str, weights: Weights, name: str) -> str:
    """x @ weight.T + bias over the last axis; the bias only where the checkpoint has one."""
    product = graph.node("MatMul", [x, graph.weight(name + ".weight", weights[name + ".weight"].T)])
    bias = weights.get(name + ".bias")
    return product if bias is None else graph.node("Add", [product, graph.weight(name + ".bias", bias)])


def add_scaled(graph: Graph, hidden: str, branch: str, weights: Weights, *, name: str) -> str:
    """hidden + branch * lambda, the residual connection of an InternViT layer."""
    return graph.node("Add", [hidden, graph.node("Mul", [branch, graph.weight(name, weights[name])])])


def normalise(graph: Graph, x: str, weights: Weights, config: VisionConfig, *, name: str) -> str:
    """LayerNorm or RMSNorm over the last axis, as the tower was built."""
    norm = rms_norm if config.norm == "rms_norm" else layer_norm
    return norm(graph, x, weights, name=name, eps=config.norm_eps)


def layer_norm(graph: Graph, x: str, weights: Weights, *, name: str, eps: float) -> str:
    """LayerNorm over the last axis."""
    parameters = [graph.weight(f"{name}.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias")]
    return graph.node("LayerNormalization", [x, *parameters], axis=-1, epsilon=eps)


def rms_norm(graph: Graph, x: str, weights: Weights, *, name: str, eps: float) -> str:
    """Scale each vector of the last axis to unit root mean square, times a weight.

    Opset 20 has no such operator; ONNX Runtime fuses exactly these six nodes into its own.
    """
    square = graph.node("Pow", [x, graph.number(2.0)])
    mean = graph.node("ReduceMean", [square, graph.integers(-1)], keepdims=1)
    root = graph.node("Sqrt", [graph.node("Add", [mean, graph.number(eps)])])
    scaled = graph.node("Div", [x, root])
    return graph.node("Mul", [scaled, graph.weight(name + ".weight", weights[name + ".weight"])])


def reshape(graph: Graph, x: str, *shape: int) -> str:
    """Reshape; a 0 keeps the size of that axis."""
    return graph.node("Reshape", [x, graph.integers(*shape)])
