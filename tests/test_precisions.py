"""Vision towers in float16 and int8: how near they are to float32, what stays float32, what is refused."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from vlquant.errors import InvalidRequest, OutputRefused, VlquantError
from vlquant.export import precisions, vision
from vlquant.export.graph import IR_VERSION, LEAST_GELU, OPSET
from vlquant.export.nodes import CONTRIB, DATA_FILE, WeightFile
from vlquant.export.precisions import GELU_ZERO, LARGEST_CODE, SIGNED_ZERO, Int8Graph, quantize_columns
from vlquant.export.verify import ACCEPTED, compare
from vlquant.export.vision import export_vision
from vlquant.model import open_model
from vlquant.runtime.vision_session import OnnxVision, TorchVision

from tests.golden_folder import golden_folder

GOLDEN = golden_folder()
TOWERS = {"300M": "qwen2_hermes2", "6B": "qwen2_internvl2_5_vit6b"}
"""Layer norms and biases; RMS norms, queries and keys normalized too."""
SMALL = GOLDEN / TOWERS["6B"]
FC1, FC2 = (f"vision_model.encoder.layers.1.mlp.{name}.weight" for name in ("fc1", "fc2"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports a golden checkpoint once per precision and gives the folder."""

    @cache
    def export(tower: str, precision: str) -> Path:
        output = tmp_path_factory.mktemp(tower) / precision
        return export_vision(GOLDEN / TOWERS[tower], output=output, precision=precision)

    return export


def random_tiles(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 112, 112, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_features_are_as_near_to_torch_as_stated(tower, precision, exported):
    folder, tiles = exported(tower, precision), random_tiles(5)
    expected = TorchVision(open_model(GOLDEN / TOWERS[tower]))(tiles)
    parity = compare(expected, OnnxVision(folder)(tiles), ACCEPTED[precision])
    assert parity.accepted and parity.largest_difference > 0


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_manifest_says_what_was_found_and_what_accepted(precision, exported):
    parity = OnnxVision(exported("6B", precision)).manifest.parity
    accepted = ACCEPTED[precision]
    assert (parity.tolerance, parity.least_cosine) == (accepted.difference, accepted.cosine)
    assert accepted.cosine <= parity.cosine < 1 and parity.largest_difference > 1e-5 * parity.feature_scale


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_equal_input_gives_equal_bytes(precision, exported, tmp_path):
    again = export_vision(SMALL, output=tmp_path / "again", precision=precision)
    for path in exported("6B", precision).iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_narrow_towers_are_small(exported):
    sizes = {name: (exported("300M", name) / DATA_FILE).stat().st_size for name in ("fp32", "fp16", "int8")}
    assert sizes["fp16"] < 0.65 * sizes["fp32"] and sizes["int8"] < 0.5 * sizes["fp32"]


def test_norms_and_the_residual_stream_stay_float32(exported):
    graph = onnx.load(exported("6B", "fp16") / "model.onnx", load_external_data=False).graph
    types = {each.name: each.data_type for each in graph.initializer}
    assert types["vision_tower.encoder.layer.0.mlp.fc1.weight"] == types["multi_modal_projector.linear_2.bias"] == TensorProto.FLOAT16
    for name in ("layernorm_before.weight", "lambda_1", "attention.q_norm.weight"):
        assert types[f"vision_tower.encoder.layer.0.{name}"] == TensorProto.FLOAT
    ends = [each.type.tensor_type.elem_type for each in (*graph.input, *graph.output)]
    assert ends == [TensorProto.FLOAT] * 2


def test_every_constant_matrix_but_the_first_is_int8(exported):
    graph = onnx.load(exported("6B", "int8") / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 4 * 6 + 2 and kinds.count("MatMul") == 1
    # Queries, keys and values share theirs.
    assert kinds.count("QuantizeLinear") == 4 * 4 + 2


def product_session(weight: torch.Tensor, folder: Path, least: float | None = None):
    """A session that multiplies x [tiles, tokens, in] with one constant matrix in int8."""
    with open(folder / DATA_FILE, "wb") as file:
        graph = Int8Graph(WeightFile(file))
        graph.product("x", "w", weight, least=least)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", graph.nodes[-1].output[0])]
    ends[0].type.tensor_type.shape.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", "t", len(weight)]).tensor_type.shape)
    body = helper.make_graph(graph.nodes, "product", ends[:1], ends[1:], list(graph.initializers.values()))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    (folder / "product.onnx").write_bytes(helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString())
    session = onnxruntime.InferenceSession(folder / "product.onnx", providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def twin(x: torch.Tensor, weight: torch.Tensor, zero: int) -> torch.Tensor:
    """The same in NumPy: integers by a scale per token and a scale per column."""
    codes, column_scales = quantize_columns(weight)
    reach = x.abs().amax(-1, keepdim=True) / 127 if zero == SIGNED_ZERO else x.amax(-1, keepdim=True) / 235
    scales = reach.clamp(min=1e-30 if zero == SIGNED_ZERO else -LEAST_GELU / zero)
    rounded = np.clip(np.rint((x / scales).numpy()) + zero, 0, 255).astype(np.int64) - zero
    return torch.from_numpy(rounded @ codes.numpy().astype(np.int64)).float() * scales * column_scales


@pytest.mark.parametrize(("least", "zero"), [(None, SIGNED_ZERO), (LEAST_GELU, GELU_ZERO)])
def test_the_product_is_integer_arithmetic(least, zero, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 48, generator=generator), 3 * torch.randn(2, 9, 64, generator=generator)
    x[0, 3] = 0.0
    x[1, 5] *= 0.01
    x = x if least is None else torch.nn.functional.gelu(x)
    found = product_session(weight, tmp_path, least)(x)
    torch.testing.assert_close(found, twin(x, weight, zero), rtol=1e-4, atol=1e-4)
    assert (found - x @ weight).norm() / (x @ weight).norm() < 0.02
    assert found.isfinite().all() and found[0, 3].abs().max() == 0


def test_a_massive_token_costs_the_others_nothing(tmp_path):
    """One scale for all tokens would leave the others without a code: what large vision transformers really do."""
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(64, 48, generator=generator), torch.randn(1, 9, 64, generator=generator)
    multiply = product_session(weight, tmp_path)
    alone = multiply(x)
    x[0, 4, 7] = 1000.0
    assert torch.equal(multiply(x)[0, [0, 1, 2, 3, 5, 6, 7, 8]], alone[0, [0, 1, 2, 3, 5, 6, 7, 8]])


def test_a_tile_does_not_depend_on_its_neighbours(exported):
    run, pixels = OnnxVision(exported("300M", "int8")), random_tiles(18)
    for index in (3, 17):
        torch.testing.assert_close(run(pixels)[index], run(pixels[index : index + 1])[0], atol=1e-5, rtol=1e-5)


def saturating_sum(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What VPMADDUBSW gives of pairs of unsigned and signed bytes: sums of two products in 16 bits that saturate."""
    products = activations.astype(np.int64) * weights.astype(np.int64)
    return np.clip(products[..., ::2] + products[..., 1::2], -(2**15), 2**15 - 1).sum(-1)


def test_no_pair_of_products_saturates_without_vnni(exported):
    rng = np.random.default_rng(0)
    activations = rng.choice([0, 128, 254, 255], size=(64, 32))
    for largest, exact in ((LARGEST_CODE, True), (127, False)):
        weights = rng.choice([-largest, largest - 1, largest], size=(64, 32))
        true = (activations * weights).sum(-1)
        assert np.array_equal(saturating_sum(activations, weights), true) == exact
    folder = exported("300M", "int8")
    model = onnx.load(folder / "model.onnx")
    codes = [onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.data_type == TensorProto.INT8]
    assert len(codes) > 10 and all(np.abs(each.astype(int)).max() == LARGEST_CODE for each in codes)


@pytest.fixture
def overflowing(tmp_path):
    """A checkpoint whose features are finite in float32 while the inside of one MLP leaves float16."""
    folder = shutil.copytree(SMALL, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    tensors[FC1], tensors[FC2] = tensors[FC1].float() * 2e5, tensors[FC2].float() * 1e-5
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_what_overflows_becomes_an_island(overflowing, tmp_path):
    events, branch = [], "vision_tower.encoder.layer.1.mlp."
    folder = export_vision(overflowing, output=tmp_path / "vision", precision="fp16", report=events.append)
    manifest = OnnxVision(folder).manifest
    assert manifest.islands == (branch,) and 0 < manifest.largest_value < 20_000
    assert any(event.message and event.message.startswith(f"{branch}* reaches") for event in events)
    types = {each.name: each.data_type for each in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer}
    assert types[branch + "fc1.weight"] == TensorProto.FLOAT and types[branch.replace("1", "2") + "fc1.weight"] == TensorProto.FLOAT16


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_without_its_island_it_is_refused(overflowing, tmp_path, monkeypatch):
    """Overflow shows in the rounded network, though the CPU that runs the graph computes in float32."""
    monkeypatch.setattr(vision, "too_large", lambda largest: ())
    with pytest.raises(VlquantError, match="in fp16 is refused .*nothing was written; .*--precision fp32"):
        export_vision(overflowing, output=tmp_path / "vision", precision="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_too_coarse_a_tower_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(precisions, "LARGEST_CODE", 1)
    with pytest.raises(VlquantError, match=r"in int8 is refused \(.*cosine 0.99\) and nothing was written; .*--precision fp32"):
        export_vision(SMALL, output=tmp_path / "vision", precision="int8")
    assert list(tmp_path.iterdir()) == []


def test_unknown_precisions_are_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="precision 'int4' is unknown; use fp32, fp16, int8"):
        export_vision(SMALL, output=tmp_path / "vision", precision="int4")


def test_an_export_in_another_precision_is_replaced_only_when_told(tmp_path):
    output = export_vision(SMALL, output=tmp_path / "vision", precision="int8")
    with pytest.raises(OutputRefused, match="vision was exported in int8; add --overwrite"):
        export_vision(SMALL, output=output)
    export_vision(SMALL, output=output, overwrite=True)
    assert json.loads((output / "vlquant.json").read_text())["precision"] == "float32"
