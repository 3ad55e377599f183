"""Which of several exported vision towers runs, and that it is said."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from vlquant.check import check
from vlquant.check_options import CheckOptions
from vlquant.errors import BrokenCheckpoint, InvalidRequest
from vlquant.export.vision import export_vision
from vlquant.inspect import inspect
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime.chat import chat, default_vision
from vlquant.runtime.generate import Generation
from vlquant.runtime.pipeline import load
from vlquant.runtime.vision_session import pick_tower
from vlquant.vision_manifest import FOLDERS, exported_towers, read_vision_manifest

from tests.golden_folder import golden_folder

SOURCE = golden_folder() / "qwen2_internvl2_5_vit6b"
PICTURE = golden_folder() / "images" / "square_224.png"


@pytest.fixture(scope="module")
def all_three(tmp_path_factory):
    """A bundle with a tower in every precision."""
    bundle = quantize(SOURCE, recipe=Recipe(method="bnb"), output=tmp_path_factory.mktemp("bundles") / "tiny")
    for precision, name in FOLDERS.items():
        assert export_vision(bundle, precision=precision) == bundle / name
    return bundle


@pytest.fixture
def bundle(all_three, tmp_path):
    return shutil.copytree(all_three, tmp_path / "tiny")


def without(bundle, *precisions):
    for each in precisions:
        shutil.rmtree(bundle / FOLDERS[each])
    return bundle


def test_the_best_for_the_device_is_picked(bundle):
    assert exported_towers(bundle) == {precision: bundle / name for precision, name in FOLDERS.items()}
    assert [pick_tower(bundle, "onnx", device).name for device in ("cpu", "cuda:0")] == ["vision-int8", "vision-fp16"]
    without(bundle, "int8", "fp16")
    assert {pick_tower(bundle, "onnx", device).name for device in ("cpu", "cuda:0")} == {"vision"}
    assert pick_tower(without(bundle, "fp32"), "onnx", "cpu") is None


@pytest.mark.parametrize("precision", FOLDERS)
def test_one_can_be_named(precision, bundle):
    assert load(bundle, vision=precision).tile_features.session.name == f"onnx {precision}"
    assert pick_tower(bundle, "torch", "cpu") is None


def test_only_float16_runs_on_a_cpu_too(bundle):
    pipe = load(without(bundle, "int8", "fp32"))
    assert pipe.tile_features.session.name == "onnx fp16"
    assert pipe.ask("What?", images=[PICTURE], generation=Generation(max_new_tokens=2)).ids


def test_what_was_not_exported_names_the_command(bundle):
    without(bundle, "int8")
    with pytest.raises(InvalidRequest, match="no vision tower in int8; run `vlquant export-vision --precision int8 .*--vision fp32 or fp16 or torch"):
        load(bundle, vision="int8")


def test_int8_is_not_for_cuda(bundle):
    for vision in ("onnx", "int8"):
        with pytest.raises(InvalidRequest, match="int8 is for CPUs; run `vlquant export-vision .* --precision fp16` for cuda"):
            pick_tower(without(bundle, "fp16", "fp32") if vision == "onnx" else bundle, vision, "cuda")


def test_the_manifest_counts_not_the_folder(bundle):
    without(bundle, "fp32", "fp16")
    (bundle / "vision-int8").rename(bundle / "vision")
    assert exported_towers(bundle) == {"int8": bundle / "vision"}
    with pytest.raises(InvalidRequest, match="no vision tower in fp32"):
        pick_tower(bundle, "fp32", "cpu")


def test_a_tower_of_format_1_is_read(bundle):
    path = bundle / "vision" / "vlquant.json"
    fields = json.loads(path.read_text())
    old = {name: value for name, value in fields.items() if name not in ("islands", "largest_value")} | {"format_version": 1}
    old["parity"] = {name: value for name, value in old["parity"].items() if "cosine" not in name}
    path.write_text(json.dumps(old))
    manifest = read_vision_manifest(bundle / "vision")
    assert manifest.name == "fp32" and manifest.parity.cosine is None
    assert load(bundle, vision="fp32").tile_features.session.name == "onnx fp32"


def test_a_damaged_tower_names_its_own_command(bundle):
    (bundle / "vision-int8" / "model.data").unlink()
    with pytest.raises(BrokenCheckpoint, match="vision-int8 and run `vlquant export-vision --precision int8` again"):
        load(bundle)
    with pytest.raises(BrokenCheckpoint, match="model.data is missing"):
        inspect(bundle, verify=True)


@pytest.mark.parametrize("damaged", ["vlquant.json", "model.data"])
def test_a_damaged_tower_blocks_nobody_who_asks_for_another(damaged, bundle):
    os.truncate(bundle / "vision-int8" / damaged, 10)
    for vision in ("fp32", "fp16"):
        assert load(bundle, vision=vision).tile_features.session.name == f"onnx {vision}"
    assert pick_tower(bundle, "onnx", "cuda").name == "vision-fp16"
    os.truncate(bundle / "vision-fp16" / damaged, 10)
    with pytest.raises(BrokenCheckpoint, match=f"vision-int8/{damaged} .*--precision int8` again, or choose --vision fp32 or torch$"):
        load(bundle)
    without(bundle, "fp32")
    with pytest.raises(InvalidRequest, match="no vision tower in fp32; run `vlquant export-vision "):
        load(bundle, vision="fp32")


def test_a_tower_without_its_manifest_is_found_by_verify(bundle):
    (bundle / "vision-int8" / "vlquant.json").unlink()
    with pytest.raises(BrokenCheckpoint, match="vision-int8/vlquant.json is missing; remove .*--precision int8` again"):
        inspect(bundle, verify=True)


def test_chat_says_which(bundle, capsys):
    lines, request = [], "What?"
    for vision in (None, "fp32", "torch"):
        chat(request, model=bundle, vision=vision, generation=Generation(max_new_tokens=1), report=lines.append)
    assert [line.rpartition(": ")[2] for line in lines] == ["onnx int8", "onnx fp32", "torch fp32"]
    assert default_vision(without(bundle, "fp32")) == "onnx"


def test_check_takes_the_tower_that_chat_takes(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    events, few = [], CheckOptions(limit=3, max_new_tokens=2)
    found = {vision: check(bundle, reference=SOURCE, options=replace(few, vision=vision), report=events.append) for vision in ("onnx", "fp32", "torch")}
    assert [each.vision for each in found.values()] == ["onnx int8", "onnx fp32", "torch (vision not checked)"]
    assert "vision tower vision-int8 (int8)" in [event.message for event in events]
    int8, fp32, torch = (each.verdict.parts.tile for each in found.values())
    assert 0.99 < int8.cosine < 0.999999 < fp32.cosine and torch is None and found["torch"].blame.vision is None
    assert (int8.precision, fp32.precision) == ("int8", "fp32") and not int8.is_broken and not fp32.is_broken
    (bundle / "vision-int8" / "model.onnx").write_bytes((bundle / "vision-int8" / "model.onnx").read_bytes()[:-1] + b"\0")
    with pytest.raises(BrokenCheckpoint, match="vision-int8/model.onnx changed"):
        check(bundle, reference=SOURCE, options=few)


def test_inspect_shows_and_verifies_all(bundle, capsys):
    inspect(bundle, verify=True)
    printed = capsys.readouterr().out
    assert "vision tower (vision-int8)" in printed and "vision tower (vision-fp16)" in printed and "every file is as it was written" in printed
    data = (bundle / "vision-int8" / "model.data").read_bytes()
    (bundle / "vision-int8" / "model.data").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BrokenCheckpoint, match="vision-int8/model.data has changed or gone; run vlquant export-vision --precision int8 again"):
        inspect(bundle, verify=True)
