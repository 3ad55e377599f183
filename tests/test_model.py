"""Tensors under canonical names, completeness, and names of models."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlquant.config import parse_config
from vlquant.decoder import LINEARS
from vlquant.errors import BrokenCheckpoint, UnsupportedCheckpoint
from vlquant.family import join_fused, original_tensors, split_fused
from vlquant.layout import POSITIONS, layer_prefix, tensor_shapes
from vlquant.model import fit_positions, is_quantized, open_model, resolve_model

QUERIES = "model.language_model.layers.0.self_attn.q_proj"


def test_canonical_names_lead_back_to_the_published_layout(case):
    """Splitting every fused tensor and fusing it again gives the file, name for name and bit for bit."""
    model = case.model
    canonical = {name: model.tensor(name) for name in tensor_shapes(case.config)}
    written, stored = original_tensors(canonical, case.config), case.stored
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())


def test_shapes_are_those_read(case):
    for name, shape in tensor_shapes(case.config).items():
        assert case.model.shape(name) == shape == tuple(case.model.tensor(name).shape)


def test_layers_hold_every_linear(case):
    layer = case.model.decoder_layer(case.config.decoder.layers - 1)
    assert {f"{name}.weight" for name in LINEARS} <= layer.keys()
    assert not any(name.startswith("model.") for name in case.model.vision_tensors())


@pytest.mark.parametrize("groups", [1, 2])
def test_fusing_is_the_inverse_of_splitting(groups):
    parts = [torch.randn(rows, 3) for rows in (8, 4, 4)]
    fused = join_fused(parts, groups=groups)
    assert all(map(torch.equal, split_fused(fused, rows=[8, 4, 4], groups=groups), parts))
    first_key = fused[8 // groups]
    assert torch.equal(first_key, parts[1][0])


def rewrite(folder, change):
    """Apply `change` to the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensors_are_named_as_stored(copied):
    rewrite(copied, lambda tensors: tensors.pop("language_model.model.layers.1.attention.wqkv.weight"))
    with pytest.raises(BrokenCheckpoint, match=r"layers.1.attention.wqkv.weight \(language_model.layers.1.self_attn.q_proj"):
        open_model(copied)


@pytest.mark.parametrize(
    "name",
    ["language_model.model.layers.0.attention.wqkv.weight", "mlp1.1.weight", "vision_model.embeddings.class_embedding", "language_model.output.weight"],
)
def test_misshaped_tensors_are_named(copied, name):
    rewrite(copied, lambda tensors: tensors.update({name: tensors[name][..., :-1].contiguous()}))
    with pytest.raises(BrokenCheckpoint) as error:
        open_model(copied)
    assert name in str(error.value) and "config.json" in str(error.value)


def test_fused_tensors_with_too_few_rows(copied):
    name = "language_model.model.layers.0.attention.wqkv.weight"
    rewrite(copied, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises(BrokenCheckpoint, match="95 rows, config.json asks for 96"):
        open_model(copied)


def test_a_tied_head_needs_no_tensor(copied):
    path = copied / "config.json"
    source = json.loads(path.read_text())
    rewrite(copied, lambda tensors: tensors.pop("language_model.output.weight"))
    with pytest.raises(BrokenCheckpoint, match="language_model.output.weight"):
        open_model(copied)
    source["llm_config"]["tie_word_embeddings"] = True
    path.write_text(json.dumps(source))
    model = open_model(copied)
    assert torch.equal(model.tensor("lm_head.weight"), model.tensor("model.language_model.embed_tokens.weight"))


def test_position_embeddings_are_resized_for_another_tile_size(copied):
    source = json.loads((copied / "config.json").read_text())
    source["force_image_size"] = 168
    (copied / "config.json").write_text(json.dumps(source))
    model = open_model(copied)
    positions = model.tensor(POSITIONS)
    assert positions.shape == (1, 1 + 12 * 12, 48) and positions.dtype == torch.bfloat16
    stored = model.checkpoint.read("vision_model.embeddings.position_embedding")
    assert torch.equal(positions[:, 0], stored[:, 0])
    assert torch.equal(fit_positions(stored, stored.shape[1]), stored)


QUANTIZED = {
    "gptq": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "nf4": (".weight", ".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4"),
    "int8": (".weight", ".SCB"),
}


@pytest.fixture(params=QUANTIZED)
def bundle(request, small_case, tmp_path):
    """A bundle with canonical names, decoder linears in one of the quantized forms (bytes without meaning)."""
    model, tensors = small_case.model, {}
    for name in tensor_shapes(small_case.config):
        linear = name.removesuffix(".weight")
        if name.startswith(layer_prefix(0)[:-2]) and linear.endswith(LINEARS):
            tensors |= {linear + kind: torch.zeros(2, dtype=torch.uint8) for kind in QUANTIZED[request.param]}
        else:
            tensors[name] = model.tensor(name)
    save_file(tensors, tmp_path / "model.safetensors")
    manifest = {"format_version": 1, "source_config": small_case.config.source}
    (tmp_path / "vlquant.json").write_text(json.dumps(manifest))
    return tmp_path, QUANTIZED[request.param]


def test_bundles_open(bundle):
    folder, kinds = bundle
    model = open_model(folder)
    assert is_quantized(model, QUERIES + ".weight") and not is_quantized(model, "lm_head.weight")
    layer = model.decoder_layer(0)
    assert {f"{name}{kind}" for name in LINEARS for kind in kinds} | {"input_layernorm.weight", "post_attention_layernorm.weight"} == set(layer)
    assert model.vision_tensors().keys() == {name.removeprefix("model.") for name in tensor_shapes(model.config) if "vision" in name or "multi" in name}


def test_half_a_quantized_linear_is_missing_the_other_half(bundle):
    folder, kinds = bundle
    rewrite(folder, lambda tensors: tensors.pop(QUERIES + kinds[1]))
    with pytest.raises(BrokenCheckpoint, match="q_proj.weight"):
        open_model(folder)


def test_unquantized_models_are_not_called_quantized(case):
    assert not any(is_quantized(case.model, name) for name in tensor_shapes(case.config))


def test_local_folders_win(copied, monkeypatch):
    monkeypatch.chdir(copied.parent)
    copied.rename(copied.parent / "InternVL2_5-8B")
    assert resolve_model("InternVL2_5-8B").is_dir()
    with pytest.raises(BrokenCheckpoint, match="is a file"):
        resolve_model("InternVL2_5-8B/config.json")


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c"])
def test_absent_folders(name):
    with pytest.raises(BrokenCheckpoint, match="does not exist"):
        resolve_model(name)


def test_unknown_names_get_the_nearest():
    with pytest.raises(UnsupportedCheckpoint, match="InternVL2_5-8B"):
        resolve_model("InternVL2.5-8B")


@pytest.mark.parametrize(("name", "hub_id"), [("InternVL3-8B", "OpenGVLab/InternVL3-8B"), ("someone/tuned", "someone/tuned")])
def test_known_names_and_hub_ids_are_downloaded_without_code(name, hub_id, monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def download(repository, *, allow_patterns):
        asked.update(repository=repository, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model(name) == tmp_path
    assert asked["repository"] == hub_id
    assert not any(pattern.endswith((".py", "*")) for pattern in asked["patterns"])


def test_a_failed_download_is_one_sentence(monkeypatch):
    import huggingface_hub

    def download(repository, *, allow_patterns):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(BrokenCheckpoint, match="InternVL3-8B .* cannot be downloaded .no route") as error:
        resolve_model("InternVL3-8B")
    assert "\n" not in str(error.value)


def test_the_kept_source_parses_again(small_case):
    assert parse_config(small_case.config.source, "again").decoder == small_case.config.decoder


@pytest.mark.parametrize("section", [None, "llm_config"])
def test_what_others_quantized_otherwise_is_named(copied, section):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    (config if section is None else config[section])["quantization_config"] = {"quant_method": "awq", "bits": 4}
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpoint, match="quantized with awq"):
        open_model(copied)
