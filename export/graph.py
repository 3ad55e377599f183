"""Pieces of InternViT, pixel shuffle and projector as ONNX nodes.

Each piece is a function `piece(graph, input, weights, ...) -> output name`. Knows tensor names and
shapes; knows no checkpoints, folders or sessions. `vlquant.vision` is the same network in torch.
Residual stream, norms and patch embedding are float32; what the branches between them compute in, the graph says
(`vlquant.export.precisions`).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import onnx
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor

from vlquant.export.nodes import CONTRIB, Graph, reshape
from vlquant.vision import PROJECTOR_NORM_EPS, VisionConfig

Weights = Mapping[str, Tensor]

OPSET = 20  # the first with a native Gelu, which ONNX Runtime fuses with the bias before it
IR_VERSION = 10  # the newest that ONNX Runtime 1.23.2, the last for Pascal, is sure to read
INPUT, OUTPUT = "pixel_values", "features"
HIDDEN = "hidden_state_"
"""What the names of hidden states start with: 0 is the embedding."""
LEAST_GELU = -0.17
"""GELU is nowhere below."""


def vision_model(
    weights: Weights, config: VisionConfig, *, graph: Graph, written: Callable[[int], None] = lambda layer: None
) -> onnx.ModelProto:
    """The whole network, pixel_values [tiles, 3, side, side] to features [tiles, tokens, language hidden], both float32.

    weights: canonical names without "model."; each is asked for once, in graph order, and let go. graph: empty.
    written: told how many layers are in the weight file.
    """
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
    branch = mlp(graph, branch, weights, prefix=prefix + "mlp.", names=("fc1", "fc2"))
    return add_scaled(graph, hidden, branch, weights, name=prefix + "lambda_2")


def attention(graph: Graph, x: str, weights: Weights, config: VisionConfig, *, prefix: str) -> str:
    """Full self-attention over the tokens of each tile, [tiles, tokens, hidden_size]."""
    narrow, widen = partial(graph.narrow, branch=prefix), partial(graph.widen, branch=prefix)
    x = narrow(x)
    queries, keys, values = (linear(graph, x, weights, prefix + name) for name in ("q_proj", "k_proj", "v_proj"))
    if config.query_key_norm:
        queries = narrow(rms_norm(graph, widen(queries), weights, name=prefix + "q_norm", eps=config.norm_eps))
        keys = narrow(rms_norm(graph, widen(keys), weights, name=prefix + "k_norm", eps=config.norm_eps))
    # No exporter and no ONNX Runtime pass arrives at this fused node by itself; unfused, the scores of
    # one tile of InternViT-300M are 67 MB.
    inputs = [queries, keys, values]
    mixed = graph.node("MultiHeadAttention", inputs, domain=CONTRIB, num_heads=config.heads)
    return widen(linear(graph, mixed, weights, prefix + "projection_layer"))


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
    return mlp(graph, normed, weights, prefix=prefix, names=("linear_1", "linear_2"))


def mlp(graph: Graph, x: str, weights: Weights, *, prefix: str, names: tuple[str, str]) -> str:
    """Linear, exact GELU (erf), linear over the last axis.

    What the inner rows are made longer by comes out of the first matrix as zeros, and GELU leaves them zeros.
    """
    inner = linear(graph, graph.narrow(x, branch=prefix), weights, prefix + names[0], lengthen="output")
    inner = graph.node("Gelu", [inner], approximate="none")
    last = linear(graph, inner, weights, prefix + names[1], lengthen="weight", least=LEAST_GELU)
    return graph.widen(last, branch=prefix)


def linear(
    graph: Graph, x: str, weights: Weights, name: str, *, lengthen: str = "input", least: float | None = None
) -> str:
    """x @ weight.T + bias over the last axis; the bias only where the checkpoint has one.

    lengthen: besides the rows of x, where they need it, those of the "output"; or only the "weight", where x comes longer.
    least: what no x is below, where that is known.
    """
    weight, bias = weights[name + ".weight"].T, weights.get(name + ".bias")  # [in, out], [out]
    missing, columns = graph.missing(len(weight)), graph.missing(weight.shape[1]) if lengthen == "output" else 0
    weight = with_zeros(weight, rows=missing, columns=columns)
    bias = None if bias is None else with_zeros(bias, columns=columns)
    if missing and lengthen != "weight":
        # By ones: the first brings the bias, the others meet zeros. Queries, keys and values all ask for this Pad, and
        # ONNX Runtime runs it once.
        x = graph.node("Pad", [x, graph.integers(0, missing), graph.number(1.0), graph.integers(-1)])
        if bias is not None:
            weight[-missing], bias = bias, None
    product = graph.product(x, name + ".weight", weight, least=least)
    return product if bias is None else graph.node("Add", [product, graph.bias(name + ".bias", bias)])


def with_zeros(tensor: Tensor, *, rows: int = 0, columns: int = 0) -> Tensor:
    """A copy of a matrix or, without rows, a vector with zeros at its end; the tensor itself if none are asked for."""
    return F.pad(tensor, (0, columns, 0, rows)[: 2 * tensor.ndim]) if rows or columns else tensor


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
