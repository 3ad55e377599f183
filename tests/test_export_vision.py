"""The exported vision tower: equal to the goldens, one graph plus one data file, all or nothing."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlquant.errors import OutputRefused, UnsupportedCheckpoint, VlquantError
from vlquant.export import nodes, verify
from vlquant.export.graph import IR_VERSION, OPSET
from vlquant.export.nodes import LARGE_ALIGNMENT, LARGE_TENSOR_BYTES, WeightFile
from vlquant.export.vision import VisionWeights, export_vision
from vlquant.model import open_model
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime.vision_session import OnnxVision
from vlquant.tiling import cut_tiles, normalize
from vlquant.vision import vision_features

from tests.golden_folder import golden_folder

GOLDEN = golden_folder()
ROOT = Path(__file__).parents[1]
SMALL = "qwen2_internvl2_5_vit6b"
VARIANTS = [(name, *variant) for name in ("qwen2_hermes2", SMALL) for variant in (("v1", -1), ("v2", -2), ("v1", -3))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports a golden checkpoint once and gives the folder."""

    @cache
    def export(folder: Path) -> Path:
        return export_vision(folder, output=tmp_path_factory.mktemp(folder.name) / "vision")

    return export


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the smallest golden checkpoint, to be spoiled."""
    return shutil.copytree(GOLDEN / SMALL, tmp_path / "checkpoint")


def golden_tiles(key: str, image_size: int) -> torch.Tensor:
    """The tiles of a key such as "features/wide_1280x720.png/m12"."""
    name, max_tiles = key.split("/")[-2:]
    image = Image.open(GOLDEN / "images" / name).convert("RGB")
    return normalize(cut_tiles(image, max_tiles=int(max_tiles[1:]), image_size=image_size, use_thumbnail=True))


def random_tiles(count: int, size: int = 112) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_tensor(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors")


def test_features_are_the_goldens(case, exported):
    vision = OnnxVision(exported(case.folder))
    features = {key: tensor for key, tensor in case.tensors.items() if key.startswith("features/")}
    assert features
    for key, expected in features.items():
        made = case.recorded_tokens(vision(golden_tiles(key, vision.manifest.tile_size)))
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "pixel_shuffle", "select_layer"), VARIANTS)
def test_variants_are_the_goldens(name, pixel_shuffle, select_layer, tmp_path):
    folder = shutil.copytree(GOLDEN / name, tmp_path / "checkpoint")
    change_config(folder, ps_version=pixel_shuffle, select_layer=select_layer)
    vision = OnnxVision(export_vision(folder, output=tmp_path / "vision"))
    recorded = load_file(GOLDEN / name / "golden.safetensors")
    (key,) = [key for key in recorded if key.startswith(f"features_variant/{pixel_shuffle}/select{select_layer}/")]
    torch.testing.assert_close(vision(golden_tiles(key, 112)), recorded[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 5, 13])
@pytest.mark.parametrize("name", [SMALL, "qwen2_hermes2"])
def test_any_number_of_tiles_in_one_run(name, count, exported):
    model, tiles = open_model(GOLDEN / name), random_tiles(count)
    session = onnxruntime.InferenceSession(exported(GOLDEN / name) / "model.onnx", providers=["CPUExecutionProvider"])
    (features,) = session.run(["features"], {"pixel_values": tiles.numpy()})
    expected = vision_features(tiles, VisionWeights(model), model.config.vision)
    torch.testing.assert_close(torch.from_numpy(features), expected, atol=1e-5, rtol=1e-5)


def test_the_graph_is_what_old_and_new_runtimes_read(exported):
    path = exported(GOLDEN / SMALL) / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert model.ir_version == IR_VERSION == 10
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": OPSET, "com.microsoft": 1}
    assert [each.dim_param for each in model.graph.input[0].type.tensor_type.shape.dim][:1] == ["tiles"]
    assert {node.op_type for node in model.graph.node if node.domain} == {"MultiHeadAttention"}
    assert "Conv" not in {node.op_type for node in model.graph.node}


def test_the_graph_holds_no_weights(exported):
    folder = exported(GOLDEN / SMALL)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    inside = [each for each in model.graph.initializer if each.data_location != onnx.TensorProto.EXTERNAL]
    assert max(len(each.raw_data) for each in inside) <= 64
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.data", "vlquant.json"}


def test_onnx_runtime_fuses_what_it_should(exported, tmp_path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(exported(GOLDEN / SMALL) / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    # 4 layers with two norms and normalized queries and keys; the projector has a LayerNorm.
    assert nodes.count("SimplifiedLayerNormalization") == 16 and nodes.count("LayerNormalization") == 1
    assert nodes.count("BiasGelu") == 5 and "Pow" not in nodes


def test_rows_of_whole_pages_are_made_longer(exported, tmp_path, monkeypatch):
    """Pages are smaller here, so that a small tower's rows are whole ones: its layers' and the inner ones of its MLPs."""
    before = exported(GOLDEN / "qwen2_hermes2")
    monkeypatch.setattr(nodes, "PAGE_NUMBERS", 32)
    after = export_vision(GOLDEN / "qwen2_hermes2", output=tmp_path / "vision")
    plain, model = (onnx.load(folder / "model.onnx", load_external_data=False) for folder in (before, after))
    rows, plain_rows = ([each.dims[0] for each in one.graph.initializer if len(each.dims) == 2] for one in (model, plain))
    assert sum(row % 32 == 0 for row in rows) == 0 < sum(row % 32 == 0 for row in plain_rows)
    # Queries, keys, values, the attention's projection and the MLP's input; the MLP's inner rows come out longer.
    layers = open_model(GOLDEN / "qwen2_hermes2").config.vision.layers_to_run
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Pad") == 5 * layers + 1
    # Each of these brings its bias along.
    plain_kinds = [node.op_type for node in plain.graph.node]
    assert plain_kinds.count("Add") - kinds.count("Add") == 5 * layers + 1
    tiles = random_tiles(3)
    torch.testing.assert_close(OnnxVision(after)(tiles), OnnxVision(before)(tiles), atol=1e-6, rtol=1e-6)


def test_large_tensors_start_where_a_memory_map_can(tmp_path):
    with open(tmp_path / "model.data", "wb") as file:
        weight_file = WeightFile(file)
        small = weight_file.append(np.arange(3, dtype=np.float32))
        large = weight_file.append(np.full((LARGE_TENSOR_BYTES // 4,), 7, dtype=np.float32))
    assert (small, large) == ((0, 12), (LARGE_ALIGNMENT, LARGE_TENSOR_BYTES))
    content = (tmp_path / "model.data").read_bytes()
    assert content[:12] == b"\0\0\0\0\0\0\x80?\0\0\0@" and content[LARGE_ALIGNMENT:][:4] == b"\0\0\xe0@"


def test_the_working_directory_does_not_matter(exported, tmp_path, monkeypatch):
    folder = exported(GOLDEN / SMALL)
    monkeypatch.chdir(tmp_path)
    assert OnnxVision(folder)(random_tiles(1)).isfinite().all()
    monkeypatch.chdir(folder.parent)
    assert OnnxVision("vision")(random_tiles(1)).isfinite().all()


def test_equal_input_gives_equal_bytes(exported, tmp_path):
    again = export_vision(GOLDEN / SMALL, output=tmp_path / "vision")
    for path in exported(GOLDEN / SMALL).iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_the_manifest_says_how_exact_it_is(exported):
    parity = OnnxVision(exported(GOLDEN / SMALL)).manifest.parity
    assert parity.tiles == verify.TILES and 0 < parity.largest_difference < 1e-5 < parity.feature_scale
    assert str(GOLDEN) not in (exported(GOLDEN / SMALL) / "vlquant.json").read_text()


def test_a_complete_export_is_kept(checkpoint, tmp_path):
    output, events = tmp_path / "vision", []
    export_vision(checkpoint, output=output)
    before = (output / "model.data").stat().st_ino
    export_vision(checkpoint, output=output, report=events.append)
    assert (output / "model.data").stat().st_ino == before
    assert [event.message for event in events] == [f"{output}: already exported from the same weights"]


def test_progress_is_reported_layer_by_layer(tmp_path):
    events = []
    export_vision(GOLDEN / SMALL, output=tmp_path / "vision", report=events.append)
    steps = [(event.stage, event.done, event.total) for event in events if event.total]
    assert steps == [("vision layers", done, 4) for done in range(1, 5)] + [("comparison", done, 6) for done in range(1, 7)]


def test_a_damaged_export_is_written_again(checkpoint, tmp_path):
    output = export_vision(checkpoint, output=tmp_path / "vision")
    whole = (output / "model.data").read_bytes()
    (output / "model.data").write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    export_vision(checkpoint, output=output)
    assert (output / "model.data").read_bytes() == whole


def test_an_export_of_other_weights_is_replaced_only_when_told(checkpoint, tmp_path):
    output = export_vision(GOLDEN / "qwen2_hermes2", output=tmp_path / "vision")
    with pytest.raises(OutputRefused, match="other weights; add --overwrite"):
        export_vision(checkpoint, output=output)
    export_vision(checkpoint, output=output, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "vision"}
    assert OnnxVision(output).manifest.source_sha256 == VisionWeights(open_model(checkpoint)).sha256()


def test_foreign_files_are_never_touched(checkpoint, tmp_path):
    output = tmp_path / "vision"
    output.mkdir()
    (output / "model.onnx").write_text("somebody else's")
    for overwrite in (False, True):
        with pytest.raises(OutputRefused, match="choose another folder with -o"):
            export_vision(checkpoint, output=output, overwrite=overwrite)
    assert (output / "model.onnx").read_text() == "somebody else's"


def test_an_export_of_a_newer_vlquant_is_not_replaced(checkpoint, tmp_path):
    output = export_vision(checkpoint, output=tmp_path / "vision")
    text = (output / "vlquant.json").read_text().replace('"format_version": 2', '"format_version": 3')
    (output / "vlquant.json").write_text(text)
    with pytest.raises(UnsupportedCheckpoint, match="upgrade vlquant"):
        export_vision(checkpoint, output=output)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad, checkpoint, tmp_path):
    change_tensor(checkpoint, "mlp1.1.bias", lambda bias: torch.full_like(bias, bad))
    with pytest.raises(VlquantError, match="nothing was written"):
        export_vision(checkpoint, output=tmp_path / "vision")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_graph_that_computes_something_else_is_refused(checkpoint, tmp_path, monkeypatch):
    right = verify.run_stage
    monkeypatch.setattr(verify, "run_stage", lambda *arguments: right(*arguments) * 1.001)
    with pytest.raises(VlquantError, match="is refused"):
        export_vision(checkpoint, output=tmp_path / "vision")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_disk_leaves_nothing_behind(checkpoint, tmp_path):
    code = """
import resource, signal, sys
from vlquant.errors import OutputRefused
from vlquant.export.vision import export_vision
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    export_vision(sys.argv[1], output=sys.argv[2])
except OutputRefused as error:
    print(error)
"""
    run = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "vision")]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "no space left" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_is_exported_beside_itself_by_default(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export_vision(checkpoint) == Path("checkpoint-vision")
    assert (tmp_path / "checkpoint-vision" / "model.onnx").is_file()


def test_a_bundle_gets_its_vision_folder(small_case, tmp_path, exported):
    bundle = quantize(small_case.folder, recipe=Recipe(method="bnb"), output=tmp_path / "bundle")
    assert export_vision(bundle) == bundle / "vision"
    for name in ("model.onnx", "model.data"):  # the same tower, read from another layout
        assert (bundle / "vision" / name).read_bytes() == (exported(small_case.folder) / name).read_bytes()
