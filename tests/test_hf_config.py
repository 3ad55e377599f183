"""`-hf` checkpoints in every style they are stored in: the same settings and tensors as the original they come from."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from vlquant.config import read_config
from vlquant.errors import UnsupportedCheckpoint
from vlquant.family import hf_stored_name
from vlquant.hf_layout import model_config, processor_files, write_json
from vlquant.layout import tensor_shapes
from vlquant.model import float_decoder, open_model
from vlquant.runtime import Generation, load
from vlquant.tiling import cut_tiles, normalize
from vlquant.tokenizer import write_fast_tokenizer

QWEN2, INTERNLM2 = "qwen2_internvl2_5_vit6b", "internlm2_internvl2_5"
STYLES = {"as in memory": lambda name: name, "as transformers 4.52 and 5 write them": hf_stored_name}


def convert(case, folder, style):
    """The `-hf` form of an original checkpoint, written into `folder`."""
    config = model_config(case.config, case.tokenizer, quantization={}, dtype="float32")
    del config["quantization_config"]
    write_json(folder / "config.json", config)
    for name, contents in processor_files(case.config.chat).items():
        write_json(folder / name, contents)
    write_fast_tokenizer(case.folder, folder)
    tensors = {name: case.model.tensor(name).clone() for name in tensor_shapes(case.config)}
    save_file({STYLES[style](name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", [QWEN2, INTERNLM2])
def test_settings_and_tensors_are_the_originals(named_case, name, style, tmp_path):
    source = named_case(name)
    folder = convert(source, tmp_path, style)
    model, config = open_model(folder), read_config(folder)
    assert config.chat == source.config.chat and config.vision == source.config.vision
    assert config.decoder == replace(source.config.decoder, query_key_value_bias=config.decoder.query_key_value_bias)
    for name in tensor_shapes(source.config):
        assert torch.equal(model.tensor(name), source.model.tensor(name)), name
    bundle_source = read_config(folder).source
    assert bundle_source["model_type"] == "internvl_chat"  # What a bundle keeps is read by one reader.


def test_answers_are_the_originals(named_case, tmp_path):
    source = named_case(INTERNLM2)
    folder = convert(source, tmp_path, "as in memory")
    turn = next(each for each in source.conversations if each["key"] == "single_tile/turn1")
    picture = source.folder.parent / "images" / turn["images"][0]["file"]
    pipe = load(folder, vision="torch", max_tiles=turn["images"][0]["max_num"])
    steps = turn["generation_config"]["max_new_tokens"]
    assert pipe.ask(turn["question"], [picture], generation=Generation(max_new_tokens=steps)).text == turn["response"]


def test_newer_processors_nest_the_limits(named_case, tmp_path):
    folder = convert(named_case(QWEN2), tmp_path, "as in memory")
    (folder / "preprocessor_config.json").unlink()
    write_json(folder / "processor_config.json", {"image_processor": {"min_patches": 2, "max_patches": 6}})
    chat = read_config(folder).chat
    assert (chat.min_tiles, chat.max_tiles) == (2, 6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"text_config": {"model_type": "gpt_oss"}}, "gpt_oss"), ({"vision_feature_select_strategy": "full"}, "class token")],
)
def test_what_is_refused(named_case, tmp_path, changes, said):
    folder = convert(named_case(QWEN2), tmp_path, "as in memory")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | changes)
    with pytest.raises(UnsupportedCheckpoint, match=said):
        read_config(folder)


def test_what_transformers_saves_is_read(named_case, tmp_path):
    """Its own class with random weights: the same logits from the folder that save_pretrained writes."""
    transformers = pytest.importorskip("transformers", reason="writes the checkpoint that is read")
    source = named_case(QWEN2)
    fields = model_config(source.config, source.tokenizer, quantization={}, dtype="float32")
    del fields["quantization_config"], fields["model_type"]
    torch.manual_seed(0)
    theirs = transformers.InternVLForConditionalGeneration(transformers.InternVLConfig(**fields)).eval()
    theirs.save_pretrained(tmp_path)
    model = open_model(tmp_path)
    ours = float_decoder(model)
    ids = torch.randint(0, 600, (1, 9))
    with torch.inference_mode():
        expected = theirs(input_ids=ids).logits
        assert torch.allclose(ours(ours.embed(ids), all_positions=True), expected, atol=1e-4)


@torch.inference_mode()
def test_transformers_gives_the_recorded_logits_from_our_files(case, tmp_path):
    """A float copy of a bundle, opened by transformers' own class without remote code: every family, a picture in the prompt."""
    transformers = pytest.importorskip("transformers", reason="opens what we write")
    folder = convert(case, tmp_path, "as in memory")
    theirs = transformers.InternVLForConditionalGeneration.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()
    turn = next(each for each in case.conversations if each["key"] == "single_tile/turn1")
    (image,) = turn["images"]
    chat = case.config.chat
    tiles = cut_tiles(case.image(image["file"]), max_tiles=image["max_num"], image_size=chat.image_size, use_thumbnail=True)
    ids = case.tensors[turn["key"] + "/input_ids"].long()
    logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=normalize(tiles)).logits
    recorded = case.tensors[turn["key"] + "/prefill_logits"]
    assert (logits[:, turn["logit_positions"]] - recorded).abs().max() <= 1e-4
