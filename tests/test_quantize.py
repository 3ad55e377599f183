"""`quantize` on small checkpoints: what is written, what is refused, and what other programs make of it."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlquant import bnb, gptq, packing
from vlquant import quantized_layers as quantizing
from vlquant.bundle import changed_files, read_manifest
from vlquant.calib_data.samples import CalibrationScenes
from vlquant.calibrate import ANSWER, PICTURE, calibration_inputs
from vlquant.decoder import LINEARS
from vlquant.errors import BrokenCheckpoint, InvalidRecipe, InvalidRequest, OutputRefused
from vlquant.events import silent
from vlquant.model import open_model
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.tokenizer import load_tokenizer

from tests.golden_folder import golden_folder

GOLDEN = golden_folder()
INTERNLM2 = GOLDEN / "internlm2_internvl2_5"
QWEN2 = GOLDEN / "qwen2_internvl2_5_vit6b"
RECIPES = {
    "gptq-4": Recipe(group_size=32, samples=3),
    "gptq-8": Recipe(bits=8, group_size=-1, samples=3),
    "gptq-3": Recipe(bits=3, group_size=32, samples=3),
    "rtn-4": Recipe(method="rtn", group_size=32),
    "rtn-8": Recipe(method="rtn", bits=8, group_size=-1),
    "bnb-4": Recipe(method="bnb"),
    "bnb-8": Recipe(method="bnb", bits=8),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Bundles of the two families by (source folder, recipe label), each made once."""
    made = {}

    def bundle(source, label):
        if (source, label) not in made:
            output = tmp_path_factory.mktemp("bundles") / f"{source.name}-{label}"
            made[source, label] = quantize(source, recipe=RECIPES[label], output=output)
        return made[source, label]

    return bundle


def stored_weight(tensors, recipe):
    """The float weight that the tensors of one linear stand for."""
    if recipe.packed_as_gptq:
        return packing.dequantize_gptq(tensors, bits=recipe.bits)
    return bnb.dequantize_nf4(tensors) if recipe.bits == 4 else bnb.dequantize_int8(tensors)


@pytest.mark.parametrize("label", RECIPES)
@pytest.mark.parametrize("source", [INTERNLM2, QWEN2], ids=lambda folder: folder.name)
def test_only_language_linears_change(bundles, source, label):
    folder = bundles(source, label)
    original, written = open_model(source), open_model(folder)
    limit = {"gptq-4": 0.25, "gptq-3": 0.5, "gptq-8": 0.02, "rtn-4": 0.1, "rtn-8": 0.02, "bnb-4": 0.12, "bnb-8": 0.01}[label]
    stored = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    assert not any("vision_tower" in name and ("qweight" in name or "absmax" in name or "SCB" in name) for name in stored)
    for name, tensor in original.vision_tensors().items():
        assert torch.equal(written.tensor(f"model.{name}"), tensor)
    for name in ("model.language_model.embed_tokens.weight", "model.language_model.norm.weight", "lm_head.weight"):
        assert torch.equal(written.tensor(name), original.tensor(name))
    for index in range(original.config.decoder.layers):
        floats, packed = original.decoder_layer(index), written.decoder_layer(index)
        for linear in LINEARS:
            parts = {name.removeprefix(f"{linear}."): tensor for name, tensor in packed.items() if name.startswith(linear)}
            weight = floats[f"{linear}.weight"].float()
            assert (stored_weight(parts, RECIPES[label]) - weight).norm() < limit * weight.norm()
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            assert torch.equal(packed[name], floats[name])


def test_manifest_tells_everything(bundles):
    folder = bundles(INTERNLM2, "gptq-4")
    manifest = read_manifest(folder)
    assert manifest.source.name == INTERNLM2.name and "model.safetensors" in manifest.source.files
    assert Recipe.from_dict(manifest.recipe) == RECIPES["gptq-4"]
    assert manifest.source_config["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]
    assert manifest.calibration.samples == 3 and manifest.calibration.tokens > 300
    assert len(manifest.modules) == 7 * 3 and not manifest.fallbacks
    assert all(module.error < module.nearest_error for module in manifest.modules)
    assert changed_files(folder, manifest) == []
    assert set(manifest.files) | {"vlquant.json"} == {path.name for path in folder.iterdir()}
    text = (folder / "vlquant.json").read_text()
    assert str(INTERNLM2.parent) not in text and "auto_map" not in text


def test_calibration_sees_pictures_and_answers(tmp_path):
    model = open_model(INTERNLM2)
    inputs = calibration_inputs(model, tmp_path, CalibrationScenes(2), most_tokens=2048, device="cpu", report=silent)
    classes = inputs.classes[0]
    assert (classes == PICTURE).sum() % 256 == 0
    stop = open_model(INTERNLM2).tensor("model.language_model.embed_tokens.weight")[898]  # <|im_end|>
    assert classes[-1] == ANSWER and torch.equal(inputs.hidden(0)[0, -1], stop)
    per_class = [
        sum(float(inputs.token_weights[kind]) * int((each == kind).sum()) for each in inputs.classes)
        for kind in range(3)
    ]
    assert per_class == pytest.approx([0.45, 0.15, 0.40], rel=1e-4)


def test_calibration_conversations_have_at_most_so_many_tokens(tmp_path):
    lengths = {}
    for most in (300, 1500, 4000):
        (tmp_path / str(most)).mkdir()
        limits = {"most_tokens": most, "device": "cpu", "report": silent}
        inputs = calibration_inputs(open_model(INTERNLM2), tmp_path / str(most), CalibrationScenes(22), **limits)
        lengths[most] = [len(classes) for classes in inputs.classes]
    # Three pictures keep a tile of 256 tokens each.
    assert max(lengths[300]) <= 3 * 256 + 128 and max(lengths[1500]) <= 1500 and max(lengths[4000]) <= 4000
    assert sum(lengths[300]) < sum(lengths[1500]) < sum(lengths[4000])


def test_equal_input_gives_equal_bytes(bundles, tmp_path):
    first = bundles(INTERNLM2, "gptq-4")
    second = quantize(INTERNLM2, recipe=RECIPES["gptq-4"], output=tmp_path / "elsewhere")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()] == []


def test_finished_bundle_is_kept_and_another_is_refused(tmp_path):
    output, events = tmp_path / "out", []
    quantize(INTERNLM2, recipe=RECIPES["bnb-8"], output=output)
    written = (output / "vlquant.json").stat().st_mtime_ns
    assert quantize(INTERNLM2, recipe=RECIPES["bnb-8"], output=output, report=events.append) == output
    assert (output / "vlquant.json").stat().st_mtime_ns == written and "already" in events[-1].message
    with pytest.raises(OutputRefused, match="--overwrite"):
        quantize(INTERNLM2, recipe=RECIPES["bnb-4"], output=output)
    quantize(INTERNLM2, recipe=RECIPES["bnb-4"], output=output, overwrite=True)
    assert read_manifest(output).recipe == {"method": "bnb", "bits": 4, "head_bits": 8}
    (output / "model.safetensors").write_bytes(b"")
    with pytest.raises(OutputRefused, match="incomplete"):
        quantize(INTERNLM2, recipe=RECIPES["bnb-4"], output=output)


def test_default_name_lies_in_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(quantize(INTERNLM2.resolve(), recipe=RECIPES["bnb-8"])) == "internlm2_internvl2_5-bnb-8bit"
    assert (tmp_path / "internlm2_internvl2_5-bnb-8bit" / "vlquant.json").is_file()


@pytest.mark.parametrize(
    ("source", "recipe", "words"),
    [
        (INTERNLM2, Recipe(), "group size 128 does not divide the 64 inputs"),
        (GOLDEN / "qwen2_hermes2", Recipe(group_size=32), "k_proj has 16 x 64 weights"),
    ],
)
def test_recipe_that_does_not_fit_is_refused_before_reading(source, recipe, words, tmp_path):
    with pytest.raises(InvalidRecipe, match=words):
        quantize(source, recipe=recipe, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bundle_is_not_quantized_again(bundles, tmp_path):
    with pytest.raises(InvalidRecipe, match="already quantized"):
        quantize(bundles(INTERNLM2, "bnb-8"), recipe=RECIPES["bnb-8"], output=tmp_path / "out")


@pytest.mark.parametrize("label", ["bnb-4", "gptq-4"])
def test_what_others_quantized_is_no_source(bundles, tmp_path, label):
    """Without our manifest a bundle is just somebody's quantized checkpoint."""
    foreign = shutil.copytree(bundles(INTERNLM2, label), tmp_path / "foreign", ignore=shutil.ignore_patterns("vlquant.json"))
    with pytest.raises(InvalidRecipe, match="already quantized"):
        quantize(foreign, recipe=RECIPES["bnb-8"], output=tmp_path / "out")


def test_data_that_counts_for_nothing_is_refused(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}\n')
    recipe = Recipe(group_size=32, calibration=(str(tmp_path / "texts.jsonl"),), vision_share=1.0, answer_share=0.0)
    with pytest.raises(InvalidRequest, match="prompt and answer tokens only"):
        quantize(INTERNLM2, recipe=recipe, output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"]


def test_gptq_falls_back_loudly(tmp_path, monkeypatch):
    def not_finite(*inputs, **where):
        seen, floats = record(*inputs, **where)
        broken = seen.hessian * torch.nan
        return dataclasses.replace(seen, hessian=broken), floats

    events, record = [], quantizing.record_inputs
    monkeypatch.setattr(quantizing, "record_inputs", not_finite)
    output = quantize(INTERNLM2, recipe=RECIPES["gptq-4"], output=tmp_path / "out", report=events.append)
    manifest = read_manifest(output)
    assert len(manifest.fallbacks) == len(manifest.modules) and "warning" in events[-1].message
    weight = open_model(INTERNLM2).decoder_layer(0)["mlp.up_proj.weight"]
    stored = {name.rpartition(".")[2]: tensor for name, tensor in open_model(output).decoder_layer(0).items() if "up_proj" in name}
    codes, scales, _ = packing.unpack_gptq(stored, 4)
    assert torch.equal(codes, gptq.nearest_codes(weight, gptq.expand_scales(scales, 32), 4))


def with_factor(folder, output, name, factor):
    """A copy of a checkpoint in which one tensor is multiplied."""
    shutil.copytree(folder, output)
    tensors = load_file(output / "model.safetensors")
    tensors[name] = tensors[name] * factor
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return output


def test_activations_that_float16_cannot_hold_are_named(tmp_path):
    """Everything is computed in float32, so the bundle answers; who computes in float16 is warned, with the layer."""
    large = with_factor(INTERNLM2, tmp_path / "large", "language_model.model.layers.1.feed_forward.w3.weight", 1e6)
    events = []
    manifest = read_manifest(quantize(large, recipe=RECIPES["gptq-4"], output=tmp_path / "out", report=events.append))
    assert manifest.float16_safe is False
    assert manifest.ranges[0].largest < 2e4 < manifest.ranges[1].largest and manifest.ranges[1].where.startswith("mlp.")
    assert "first in layer 1" in events[-1].message and "float32" in events[-1].message
    assert all(record.error is not None and record.method == "gptq" for record in manifest.modules)
    harmless = read_manifest(quantize(INTERNLM2, recipe=RECIPES["gptq-4"], output=tmp_path / "harmless"))
    assert harmless.float16_safe is True and len(harmless.ranges) == len(manifest.ranges)


@pytest.mark.parametrize("recipe", ["gptq-4", "rtn-4", "bnb-4"])
def test_weights_that_are_not_finite_are_refused_by_name(recipe, tmp_path):
    broken = with_factor(INTERNLM2, tmp_path / "broken", "language_model.model.layers.1.attention.wo.weight", float("nan"))
    with pytest.raises(BrokenCheckpoint, match="layers.1.self_attn.o_proj.weight .* not finite"):
        quantize(broken, recipe=RECIPES[recipe], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def prompts_of(folder):
    """Our prompt and ids for one picture of two tiles, several pictures, and a conversation without any."""
    from PIL import Image

    from vlquant.request import Request, encode_request

    model, tokenizer = open_model(folder), load_tokenizer(folder)
    picture = Image.open(GOLDEN / "images" / "wide_1280x720.png")
    requests = {
        "one": Request("Total?", images=(picture,)),
        "two": Request("Which is larger?", images=(picture, picture)),
        "history": Request("And now?", history=(("Hello", "Hi, I am here."),)),
        "system": Request("Hello", system_message="Be brief."),
        "frames": Request("What happens?", video=[picture] * 3),
    }
    return {name: encode_request(request, model.config, tokenizer) for name, request in requests.items()}, picture


MESSAGES = {
    "one": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Total?"}]}],
    "two": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is larger?"}]}],
    "history": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi, I am here."}]},
        {"role": "user", "content": "And now?"},
    ],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    "frames": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}],
}


@pytest.mark.interop
@pytest.mark.parametrize("source", [INTERNLM2, QWEN2], ids=lambda folder: folder.name)
def test_transformers_reads_configuration_and_tokenizer(bundles, source):
    transformers = pytest.importorskip("transformers")
    folder = bundles(source, "gptq-4")
    config = transformers.AutoConfig.from_pretrained(folder)
    ours = open_model(folder).config
    assert type(config).__name__ == "InternVLConfig" and config.architectures == ["InternVLForConditionalGeneration"]
    assert config.text_config.model_type == ours.family.text_model_type
    assert config.text_config.num_key_value_heads == ours.decoder.key_value_heads
    assert not config.tie_word_embeddings and config.quantization_config["bits"] == 4
    assert config.vision_config.attention_bias == ours.vision.query_key_value_bias
    text = config.text_config  # Version 5 has one entry where 4 has two.
    rope = getattr(text, "rope_parameters", None) or {"rope_theta": text.rope_theta, **(text.rope_scaling or {})}
    assert rope["rope_theta"] == ours.decoder.rope.theta
    assert rope.get("factor") == ours.decoder.rope.dynamic_factor
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.context_image_token_id == config.image_token_id
    text = "Total: 12,50 €\n<img><IMG_CONTEXT></img> 你好<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == load_tokenizer(source).encode(text) == load_tokenizer(folder).encode(text)


@pytest.mark.interop
@pytest.mark.parametrize("source", [INTERNLM2, QWEN2], ids=lambda folder: folder.name)
def test_chat_template_and_processor_give_our_prompt(bundles, source):
    """The expansion of pictures is InternVLProcessor's, which itself needs torchvision to be constructed."""
    transformers = pytest.importorskip("transformers")
    folder = bundles(source, "gptq-4")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded, _ = prompts_of(folder)
    per_tile = json.loads((folder / "processor_config.json").read_text())["image_seq_length"]
    expand = picture_processor(transformers, tokenizer, per_tile)
    for name, messages in MESSAGES.items():
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text.count("<IMG_CONTEXT>") + text.count("<video>") == (name in ("one", "frames")) + 2 * (name == "two")
        ids = tokenizer(expand(text, encoded[name].tiles_per_image), add_special_tokens=False)["input_ids"]
        assert ids == encoded[name].ids, name


def picture_processor(transformers, tokenizer, per_tile):
    """A function that expands the placeholders of a text with InternVLProcessor's own replacements."""
    from types import SimpleNamespace

    processor = transformers.InternVLProcessor
    self = SimpleNamespace(
        image_seq_length=per_tile, start_image_token=tokenizer.start_image_token, video_token=tokenizer.video_token,
        end_image_token=tokenizer.end_image_token, image_token=tokenizer.context_image_token,
    )  # fmt: skip

    def expand_by_version_4(text, tiles_per_image):
        ends, nothing = [sum(tiles_per_image[: index + 1]) for index in range(len(tiles_per_image))], [None] * sum(tiles_per_image)
        frames = list(range(len(tiles_per_image) + 1))
        counts = {"image_num_patches": tiles_per_image, "video_num_patches": tiles_per_image}
        starts = {"image_num_patches_indices": ends, "video_num_patches_indices": frames, "video_patch_indices": [0, frames[-1]]}
        return processor._insert_media_placeholders(self, [text], nothing, nothing, **counts, **starts)[0][0]

    def expand(text, tiles_per_image):
        if hasattr(processor, "_insert_media_placeholders"):
            return expand_by_version_4(text, tiles_per_image)
        if tokenizer.video_token in text:
            frames = {"pixel_values_videos": [torch.zeros(len(tiles_per_image), 1)]}
            return text.replace(tokenizer.video_token, processor.replace_video_token(self, frames, 0))
        pieces = text.split(tokenizer.context_image_token)
        counts = {"num_patches": tiles_per_image}
        runs = [processor.replace_image_token(self, counts, index) for index in range(len(pieces) - 1)]
        return "".join(piece + run for piece, run in zip(pieces, [*runs, ""], strict=True))

    return expand


@pytest.mark.interop
def test_transformers_cuts_the_same_tiles(bundles):
    models = pytest.importorskip("transformers.models.got_ocr2")
    folder = bundles(INTERNLM2, "gptq-4")
    encoded, picture = prompts_of(folder)
    # The one that resizes with Pillow; version 4 called it by the plain name.
    kind = getattr(models, "GotOcr2ImageProcessorPil", None) or models.GotOcr2ImageProcessor
    processor = kind.from_pretrained(folder)
    pixels = processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, encoded["one"].pixel_values(), rtol=0, atol=1e-5)
