"""GPTQ checkpoints that other programs made: other names, fused linears, the second version of the format."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlquant.errors import UnsupportedCheckpoint
from vlquant.family import hf_stored_name, join_fused, stored_name
from vlquant.model import open_model
from vlquant.packing import pack_gptq, symmetric_zero, unpack_gptq
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime import load

from tests.golden_folder import golden_folder

SOURCES = {name: golden_folder() / name for name in ("internlm2_internvl2_5", "qwen2_internvl2_5_vit6b", "phi3_chat")}
RECIPE = Recipe(method="rtn", group_size=32)


@pytest.fixture(scope="module", params=SOURCES)
def bundle(request, tmp_path_factory):
    """A checkpoint and our bundle of it."""
    source = SOURCES[request.param]
    return source, quantize(source, recipe=RECIPE, output=tmp_path_factory.mktemp("ours") / "bundle")


def rewritten(source, bundle, folder, tensors, **settings):
    """A checkpoint in the source's layout that holds these tensors, as another program might have saved it."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    written = json.loads((bundle / "config.json").read_text())["quantization_config"]
    config["quantization_config"] = {key: value for key, value in (written | settings).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def all_tensors(bundle):
    return {name: tensor for path in sorted(bundle.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def logits(folder):
    return load(folder, vision="torch").answer_logits(["Read the first line."], ["Total 12"])[0]


def in_original_layout(bundle, family, config):
    """Our tensors under the original's names, linears fused where the family fuses them."""
    tensors, stored = all_tensors(bundle), {}
    for name, tensor in tensors.items():
        place, fusion = stored_name(name, family)
        if fusion is None:
            stored[place] = tensor
        elif place not in stored:
            stored |= fused(tensors, name, place, fusion, config)
    return stored


def fused(tensors, name, place, fusion, config):
    """One fused tensor, or all that GPTQ stores for one."""
    from vlquant.family import fusion_groups, split_layer

    layer, kind = split_layer(name)[1], name.rpartition(".")[2]
    parts, groups = [part.format(layer) for part in fusion.parts], fusion_groups(fusion, config)
    if kind in ("weight", "bias"):
        return {place: join_fused([tensors[f"{part}.{kind}"] for part in parts], groups=groups)}
    unpacked = [unpack_gptq({each: tensors[f"{part}.{each}"] for each in ("qweight", "qzeros", "scales")}, 4) for part in parts]
    codes = join_fused([codes for codes, _, _ in unpacked], groups=groups)
    scales = join_fused([scales.T.contiguous() for _, scales, _ in unpacked], groups=groups).T.contiguous()
    packed = pack_gptq(codes, scales, bits=4, group_size=32)
    return {f"{place.rpartition('.')[0]}.{each}": tensor for each, tensor in packed.items()}


@pytest.mark.parametrize("style", ["transformers 5", "original"])
def test_other_names_and_fused_linears_give_the_same_logits(bundle, style, tmp_path):
    source, ours = bundle
    model = open_model(source)
    if style == "original":
        tensors = in_original_layout(ours, model.config.family, model.config)
        assert any(".wqkv.qweight" in name or ".q_proj.qweight" in name or ".qkv_proj.qweight" in name for name in tensors)
    else:
        tensors = {hf_stored_name(name): tensor for name, tensor in all_tensors(ours).items()}
    foreign = rewritten(source, ours, tmp_path / "foreign", tensors)
    assert torch.equal(logits(foreign), logits(ours))


def test_the_second_version_of_the_format_is_told_by_its_settings(bundle, tmp_path):
    source, ours = bundle
    tensors = all_tensors(ours)
    for name in tensors:
        if name.endswith(".qzeros"):
            tensors[name] = torch.full_like(tensors[name], 0x88888888 - 2**32)
    tensors = {hf_stored_name(name): tensor for name, tensor in tensors.items()}
    foreign = rewritten(source, ours, tmp_path / "foreign", tensors, checkpoint_format="gptq_v2", format=None)
    assert torch.equal(logits(foreign), logits(ours)) and symmetric_zero(4) == 8


@pytest.mark.parametrize(("settings", "words"), [({"quant_method": "awq"}, "quantized with awq"), ({"checkpoint_format": "marlin"}, "the format marlin")])
def test_other_formats_are_named_in_the_refusal(bundle, settings, words, tmp_path):
    source, ours = bundle
    foreign = rewritten(source, ours, tmp_path / "foreign", all_tensors(ours), **settings)
    with pytest.raises(UnsupportedCheckpoint, match=words):
        open_model(foreign)
