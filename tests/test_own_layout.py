"""Bundles of models that the -hf layout cannot express, and of fine-tuned ones: the whole way, with what is said about them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from vlquant.bundle import read_manifest
from vlquant.export.vision import export_vision
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime import Generation, load
from vlquant.tiling import cut_tiles

BNB = Recipe(method="bnb", bits=8)
RECIPES = {"qwen2_internvl2_5_vit6b": Recipe(group_size=32, samples=2), "qwen2_hermes2": BNB}
VARIANTS = [("v1", -1), ("v2", -2), ("v1", -3)]


def variant(case, folder, pixel_shuffle, select_layer):
    """A copy of a checkpoint with another pixel shuffle and vision layer."""
    shutil.copytree(case.folder, folder, ignore=shutil.ignore_patterns("golden*"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ps_version": pixel_shuffle, "select_layer": select_layer}))
    return folder


@pytest.mark.parametrize(("pixel_shuffle", "select_layer"), VARIANTS)
@pytest.mark.parametrize("name", RECIPES)
def test_old_vision_towers_go_the_whole_way(named_case, tmp_path, name, pixel_shuffle, select_layer):
    case, said = named_case(name), []
    source = variant(case, tmp_path / "source", pixel_shuffle, select_layer)
    bundle = quantize(source, recipe=RECIPES[name], output=tmp_path / "bundle", report=lambda event: said.append(event.message))
    export_vision(bundle)
    assert [line for line in said if "only vlquant will read" in line]
    assert json.loads((bundle / "config.json").read_text())["model_type"] == "internvl_chat"
    assert not (bundle / "processor_config.json").exists()
    (key,) = [key for key in case.tensors if key.startswith(f"features_variant/{pixel_shuffle}/select{select_layer}/")]
    file, limit = key.split("/")[-2:]
    tiles = cut_tiles(case.image(file), max_tiles=int(limit[1:]), image_size=112, use_thumbnail=True)
    original = load(source, vision="torch")
    answers = []
    for vision in ("onnx", "torch"):
        pipe = load(bundle, vision=vision)
        assert (pipe.config.vision, pipe.config.chat) == (original.config.vision, original.config.chat)
        assert (pipe.tile_features(tiles) - case.tensors[key]).abs().max() <= 1e-4
        answers.append(pipe.ask("What?", [case.image(file)], generation=Generation(max_new_tokens=8)).text)
    assert answers[0] == answers[1]


def test_merged_adapters_are_mentioned(copied, tmp_path):
    torch.manual_seed(0)
    from safetensors.torch import save_file

    tensors = load_file(copied / "model.safetensors")
    stored = {f"language_model.base_model.model.{name.removeprefix('language_model.')}" if name.startswith("language_model.") else name: each
              for name, each in tensors.items()}  # fmt: skip
    module = "language_model.base_model.model.model.layers.0.attention.wo"
    weight = stored.pop(f"{module}.weight")
    stored |= {f"{module}.base_layer.weight": weight, f"{module}.lora_A.default.weight": torch.randn(4, weight.shape[1]),
               f"{module}.lora_B.default.weight": torch.randn(weight.shape[0], 4)}  # fmt: skip
    save_file(stored, copied / "model.safetensors")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"use_llm_lora": 4}))
    said = []
    bundle = quantize(copied, recipe=BNB, output=tmp_path / "bundle", report=lambda event: said.append(event.message))
    assert [line for line in said if "1 LoRA adapters" in line and "merged" in line]
    assert read_manifest(bundle).modules
