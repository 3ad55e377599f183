"""A bundle of every family in transformers' own class: opened from its own files, without remote code, with our logits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlquant import members
from vlquant.bnb import dequantize_int8
from vlquant.decoder import LINEARS
from vlquant.hf_layout import write_json
from vlquant.layout import layer_prefix
from vlquant.model import open_model
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.request import Request
from vlquant.runtime import load
from vlquant.synthesize import synthesize

from tests.golden_folder import golden_folder
from tests.narrow_members import narrow

GOLDENS = ("internlm2_internvl2_5", "internlm2_chat_ntk", "phi3_chat", "phi3_longrope", "llama_internlm2chat_vit6b", "qwen2_hermes2")
SYNTHETIC = ("InternVL3_5-1B", "InternVL2-40B")  # Qwen3 and Yi
PICTURE = golden_folder() / "images" / "frame_0.png"
QUESTION = Request("What is it?", images=[PICTURE], max_tiles=1)


@pytest.fixture(params=[*GOLDENS, *SYNTHETIC])
def bundle(request, tmp_path, monkeypatch):
    """An 8-bit bundle."""
    source = golden_folder() / request.param
    if request.param in SYNTHETIC:
        monkeypatch.setitem(members.MEMBERS, request.param, narrow(request.param))
        source = synthesize(request.param, tmp_path / "source")
    return quantize(source, recipe=Recipe(method="bnb", bits=8), output=tmp_path / "bundle")


def float_copy(bundle, folder):
    """The bundle's files with its packed weights as float ones."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("*.safetensors*", "vlquant.json"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    write_json(folder / "config.json", config)
    tensors = {name: each for path in bundle.glob("*.safetensors") for name, each in load_file(path).items()}
    for index in range(open_model(bundle).config.decoder.layers):
        for linear in LINEARS:
            name = layer_prefix(index) + linear
            parts = {kind: tensors.pop(f"{name}.{kind}") for kind in ("weight", "SCB", "weight_format")}
            tensors[f"{name}.weight"] = dequantize_int8(parts)
    save_file({name: each.float().contiguous() for name, each in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.interop
@torch.inference_mode()
def test_transformers_gives_our_logits(bundle, tmp_path, torch_kernels):
    transformers = pytest.importorskip("transformers", reason="opens what we write")
    folder = float_copy(bundle, tmp_path / "float")
    kind = transformers.InternVLForConditionalGeneration
    theirs, loading = kind.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    pipe = load(bundle, vision="torch")
    batch = pipe.prepare([QUESTION])
    ours = pipe.decoder(batch.embeddings, attention_mask=batch.attention_mask, all_positions=True)
    (encoded,) = batch.encoded
    ids = torch.tensor([encoded.ids])
    logits = theirs.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=encoded.pixel_values()).logits
    assert (logits - ours).abs().max() <= 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert tokenizer(encoded.prompt).input_ids == encoded.ids
