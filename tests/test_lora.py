"""LoRA adapters left in a checkpoint: merged as PEFT's merge_and_unload, or refused with the reason."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlquant.errors import UnsupportedCheckpoint
from vlquant.family import stored_name
from vlquant.layout import tensor_shapes
from vlquant.lora import SCALE
from vlquant.model import open_model

RANK = 4
ADAPTED = ("attention.wqkv", "attention.wo", "feed_forward.w2", "attn.qkv", "mlp.fc1")


@pytest.fixture
def wrapped(copied):
    """A checkpoint as InternVL's LoRA training saves it, and the tensors that merging gives."""
    torch.manual_seed(0)
    plain, stored, merged = load_file(copied / "model.safetensors"), {}, {}
    for name, tensor in plain.items():
        part, _, rest = name.partition(".")
        wrap = f"{part}.base_model.model.{rest}" if part in ("language_model", "vision_model") else name
        module = wrap.removesuffix(".weight")
        merged[name] = tensor
        if module == wrap or not module.endswith(ADAPTED):
            stored[wrap.replace("attn.qkv.bias", "attn.qkv.base_layer.bias").replace("fc1.bias", "fc1.base_layer.bias")] = tensor
            continue
        down, up = torch.randn(RANK, tensor.shape[1]) * 0.1, torch.randn(tensor.shape[0], RANK) * 0.1
        stored |= {f"{module}.base_layer.weight": tensor, f"{module}.lora_A.default.weight": down, f"{module}.lora_B.default.weight": up}
        merged[name] = (tensor.float() + SCALE * (up @ down)).to(tensor.dtype)
    save_file(stored, copied / "model.safetensors")
    note_ranks(copied, use_llm_lora=RANK, use_backbone_lora=RANK)
    return copied, merged


def note_ranks(folder, **ranks):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ranks))


def test_adapters_are_merged_while_reading(wrapped, small_case):
    folder, merged = wrapped
    model = open_model(folder)
    changed = 0
    for name in tensor_shapes(model.config):
        stored, fusion = stored_name(name, model.config.family)
        if fusion is None:
            assert torch.equal(model.tensor(name), merged[stored]), name
        changed += not torch.equal(model.tensor(name), small_case.model.tensor(name))
    layers, tower_layers = model.config.decoder.layers, model.config.vision.layers
    assert changed == 5 * layers + 4 * tower_layers  # q, k, v, o, down; q, k, v, fc1
    assert len(model.checkpoint.adapters) == 3 * layers + 2 * tower_layers


def test_a_checkpoint_without_adapters_is_left_alone(small_case):
    assert not small_case.model.checkpoint.adapters


def test_an_unknown_scale_is_refused(wrapped):
    folder, _ = wrapped
    note_ranks(folder, use_llm_lora=0)
    with pytest.raises(UnsupportedCheckpoint, match="use_llm_lora 0.*merge"):
        open_model(folder)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("lora_B.default.weight", "lora_magnitude_vector.default.weight", "no plain LoRA"), ("lora_B", "gone", "only one factor")],
)
def test_other_adapters_are_refused(wrapped, old, new, said):
    folder, _ = wrapped
    tensors = load_file(folder / "model.safetensors")
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match=said):
        open_model(folder)


def test_adapter_files_are_refused(copied):
    (copied / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedCheckpoint, match="adapter_config.json"):
        open_model(copied)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("language_model.model.layers.0.attention.wo.ia3_l.default", "ia3_l.default"),
        ("language_model.model.layers.0.attention.wo.oft_r.default", "oft_r.default"),
        ("language_model.prompt_encoder.default.embedding.weight", "prompt_encoder"),
        ("language_model.output.modules_to_save.default.weight", "modules_to_save"),
        ("language_model.base_model.model.model.layers.77.attention.wo.weight", "layers.77"),
        ("language_model.model.layers.0.attention.wo.lora_B.default.weight", "only one factor"),
    ],
)
def test_whatever_else_training_left_is_refused(copied, name, words):
    tensors = load_file(copied / "model.safetensors")
    save_file(tensors | {name: torch.zeros(4, 4)}, copied / "model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match=words):
        open_model(copied)


@pytest.mark.parametrize("target", ["self_attn.qkv_proj", "attention.wo"])
def test_adapters_of_another_model_or_shape_are_refused(copied, target):
    tensors = load_file(copied / "model.safetensors")
    module = f"language_model.base_model.model.model.layers.0.{target}"
    factors = {f"{module}.lora_A.default.weight": torch.zeros(RANK, 5), f"{module}.lora_B.default.weight": torch.zeros(7, RANK)}
    save_file(tensors | factors, copied / "model.safetensors")
    note_ranks(copied, use_llm_lora=RANK)
    with pytest.raises(UnsupportedCheckpoint, match="no plain LoRA of this model"):
        open_model(copied)


@pytest.mark.parametrize("name", ["adapter/adapter_config.json", "default/adapter_model.safetensors", "adapter_model.pt"])
def test_adapters_in_files_of_their_own_are_refused(copied, name):
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_bytes(b"{}")
    with pytest.raises(UnsupportedCheckpoint, match="adapter"):
        open_model(copied)
