"""Vision towers as the runtime calls them, and what it says about damaged or absent ones."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlquant.errors import BrokenCheckpoint, InvalidRequest, MissingDependency, UnsupportedCheckpoint
from vlquant.export.vision import export_vision
from vlquant.model import open_model
from vlquant.runtime import vision_session
from vlquant.runtime.vision_session import OnnxVision, TorchVision, bind, tiles_per_run
from vlquant.tiling import cut_tiles, normalize

from tests.golden_folder import golden_folder

ROOT = Path(__file__).parents[1]
GOLDEN = golden_folder()
SMALL = "qwen2_internvl2_5_vit6b"


@pytest.fixture
def folder(tmp_path):
    return export_vision(GOLDEN / SMALL, output=tmp_path / "vision")


def tiles(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 112, 112, generator=torch.Generator().manual_seed(count))


def test_nobody_is_told_what_is_run(folder, tmp_path):
    code = f"from vlquant.runtime.vision_session import OnnxVision\nprint(OnnxVision({str(folder)!r})._session.get_inputs()[0].name)"
    home = tmp_path / "home"
    home.mkdir()
    # It keeps quiet where it takes itself to be tested.
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "pixel_values\n"
    assert list(home.rglob("*onnxruntime*")) == [], "an identifier of this machine, or what is to be sent"


def test_torch_features_are_the_goldens(case):
    image_size = case.config.chat.image_size
    tiles = cut_tiles(case.image("wide_1280x720.png"), max_tiles=2, image_size=image_size, use_thumbnail=True)
    features = TorchVision(case.model)(normalize(tiles))
    torch.testing.assert_close(case.recorded_tokens(features), case.tensors["features/wide_1280x720.png/m2"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 5, 13, 17])
def test_onnx_equals_torch(count, folder):
    pixels = tiles(count)
    expected = TorchVision(open_model(GOLDEN / SMALL))(pixels)
    torch.testing.assert_close(OnnxVision(folder)(pixels), expected, atol=1e-5, rtol=1e-5)


def test_a_tile_does_not_depend_on_its_neighbours(folder):
    vision, pixels = OnnxVision(folder), tiles(18)  # 16 in the first run
    for index in (3, 17):
        torch.testing.assert_close(vision(pixels)[index], vision(pixels[index : index + 1])[0], atol=1e-6, rtol=1e-6)


def test_it_takes_as_many_threads_as_torch(folder):
    had = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert OnnxVision(folder)._session.get_session_options().intra_op_num_threads == threads
    finally:
        torch.set_num_threads(had)
    assert OnnxVision(folder, threads=2)._session.get_session_options().intra_op_num_threads == 2


@pytest.mark.parametrize(("tile_size", "count"), [(448, 1), (112, 16), (168, 7), (896, 1)])
def test_memory_is_bounded_by_pixels(tile_size, count):
    assert tiles_per_run(tile_size) == count


def test_any_layout_and_precision_of_pixels(folder):
    vision, pixels = OnnxVision(folder), tiles(2)
    strided = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(vision(strided), vision(pixels))
    assert torch.equal(vision(pixels.double()), vision(pixels))


def test_threads_can_be_chosen(folder):
    torch.testing.assert_close(OnnxVision(folder, threads=1)(tiles(1)), OnnxVision(folder)(tiles(1)))


def test_the_session_is_opened_once_by_the_first_picture(folder, monkeypatch):
    opened, really = [], vision_session.open_session
    monkeypatch.setattr(vision_session, "open_session", lambda *args, **named: opened.append(args) or really(*args, **named))
    vision = OnnxVision(folder)
    assert not opened
    assert torch.equal(vision(tiles(1)), vision(tiles(1))) and len(opened) == 1


def test_a_missing_export_names_the_command(tmp_path):
    with pytest.raises(InvalidRequest, match="`vlquant export-vision`"):
        OnnxVision(tmp_path / "vision")


@pytest.mark.parametrize("name", ["model.data", "model.onnx"])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(BrokenCheckpoint, match=f"{name} is missing or has the wrong size; remove .*export-vision"):
        OnnxVision(folder)


def test_a_truncated_file_is_named(folder):
    data = (folder / "model.data").read_bytes()
    (folder / "model.data").write_bytes(data[:-1])
    with pytest.raises(BrokenCheckpoint, match="model.data is missing or has the wrong size"):
        OnnxVision(folder)


def test_a_graph_onnx_runtime_cannot_read_is_one_sentence(folder):
    path = folder / "model.onnx"
    path.write_bytes(b"\xff" * path.stat().st_size)
    vision = OnnxVision(folder)
    with pytest.raises(BrokenCheckpoint, match="model.onnx cannot be loaded by ONNX Runtime") as caught:
        vision(tiles(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}'])
def test_a_manifest_that_is_none(text, folder):
    (folder / "vlquant.json").write_text(text)
    with pytest.raises(BrokenCheckpoint, match="is not the manifest of a vision export"):
        OnnxVision(folder)


def test_a_newer_format_is_refused(folder):
    manifest = json.loads((folder / "vlquant.json").read_text())
    (folder / "vlquant.json").write_text(json.dumps(manifest | {"format_version": 3, "news": 1}))
    with pytest.raises(UnsupportedCheckpoint, match="reads up to 2; upgrade vlquant"):
        OnnxVision(folder)


def test_onnxruntime_that_is_not_installed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match="pip install"):
        OnnxVision(folder)


def test_cuda_asked_for_and_absent_is_an_error(folder, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependency, match="onnxruntime-gpu"):
        OnnxVision(folder, "cuda")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_does_not_start_is_an_error(folder, monkeypatch):
    """onnxruntime-gpu without a working driver opens a session on the CPU without a word."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda session: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependency, match="did not start"):
        OnnxVision(folder, "cuda")


def test_tensors_are_bound_where_they_are(folder):
    """The device is data: the same lines bind a GPU's memory, of which this machine has a tensor without storage at most."""
    session, pixels = OnnxVision(folder)._session, tiles(2)
    features = torch.full((2, *OnnxVision(folder)._feature_shape), float("nan"))
    binding = session.io_binding()
    bind(binding, pixels, features)
    session.run_with_iobinding(binding)
    (value,) = binding.get_outputs()
    assert (value.device_name(), value.data_ptr()) == ("cpu", features.data_ptr())
    torch.testing.assert_close(features, OnnxVision(folder)(pixels), atol=0, rtol=0)
    assert torch.equal(torch.from_numpy(value.numpy()), features)


def test_memory_of_a_gpu_is_named_by_its_number():
    bound = []
    binding = SimpleNamespace(bind_input=lambda *each: bound.append(each), bind_output=lambda *each: bound.append(each))
    pixels, features = (SimpleNamespace(device=torch.device("cuda:1"), shape=(2, size), data_ptr=lambda at=size: at) for size in (3, 5))
    bind(binding, pixels, features)
    assert bound == [("pixel_values", "cuda", 1, np.float32, (2, 3), 3), ("features", "cuda", 1, np.float32, (2, 5), 5)]


def test_a_gpu_is_used_within_bounds(folder, monkeypatch):
    """What ONNX Runtime is asked for: no doubling arena, a limit, no search that takes gigabytes."""
    asked = []
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None, raising=False)

    class Session:
        def __init__(self, path, options, providers):
            asked.extend(providers)

        def get_providers(self):
            return ["CUDAExecutionProvider"]

    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    OnnxVision(folder, "cuda:1")
    ((provider, options),) = asked
    size = sum((folder / name).stat().st_size for name in ("model.onnx", "model.data"))
    assert provider == "CUDAExecutionProvider" and options["device_id"] == 1
    assert options["arena_extend_strategy"] == "kSameAsRequested" and options["use_tf32"] == 0
    assert options["gpu_mem_limit"] == size + 2 * 2**30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_torch(folder):
    pixels = tiles(5)
    expected = TorchVision(open_model(GOLDEN / SMALL))(pixels)
    torch.testing.assert_close(OnnxVision(folder, "cuda")(pixels), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(OnnxVision(folder, "cuda")(pixels.cuda()).cpu(), expected, atol=1e-4, rtol=1e-4)
