"""config.json to settings: published forms old and new, and what is refused."""

import copy
import json

import pytest

from vlquant.config import parse_config, read_config
from vlquant.decoder_config import LongRope, Rope
from vlquant.errors import BrokenCheckpoint, UnsupportedCheckpoint
from vlquant.family import FAMILIES


@pytest.fixture
def source(small_case):
    return json.loads((small_case.folder / "config.json").read_text())


def test_shapes_come_from_the_file(case):
    config = read_config(case.folder)
    language, vision = config.source["llm_config"], config.source["vision_config"]
    assert config.decoder.layers == language["num_hidden_layers"]
    assert config.decoder.key_value_heads == language["num_key_value_heads"]
    assert config.decoder.head_dim * config.decoder.heads == language["hidden_size"]
    assert config.decoder.rope.theta == language["rope_theta"]
    assert config.vision.norm == vision["norm_type"] and config.vision.query_key_norm == vision["qk_normalization"]
    assert config.family.architecture == language["architectures"][0]


def test_no_remote_code_survives(case):
    assert "auto_map" not in json.dumps(read_config(case.folder).source)


def test_rope_scaling_old_and_new(source):
    language = source["llm_config"]
    assert parse_config(source, "x").decoder.rope == Rope(theta=10_000.0, dynamic_factor=2.0)
    language["rope_scaling"] = {"type": "dynamic", "rope_type": "dynamic", "factor": 3.0}
    assert parse_config(source, "x").decoder.rope.dynamic_factor == 3.0
    del language["rope_scaling"], language["rope_theta"]
    language["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}
    assert parse_config(source, "x").decoder.rope == Rope(theta=5e5, dynamic_factor=2.0)
    language["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert parse_config(source, "x").decoder.rope == Rope(theta=1e6)
    language["rope_scaling"] = {"type": "linear", "factor": 2.0}
    with pytest.raises(UnsupportedCheckpoint, match="linear"):
        parse_config(source, "x")


def test_long_rope_old_and_new(source):
    language = source["llm_config"] | {"architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 48}
    language["rope_scaling"] = {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [2, 3.0]}
    source["llm_config"] = language
    expected = Rope(theta=10_000.0, long=LongRope((1.0, 1.5), (2.0, 3.0), 48))
    assert parse_config(source, "x").decoder.rope == expected
    del language["rope_scaling"], language["rope_theta"], language["original_max_position_embeddings"]
    language["rope_parameters"] = {
        "rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0],
        "rope_theta": 10_000.0, "original_max_position_embeddings": 48,
    }  # fmt: skip
    assert parse_config(source, "x").decoder.rope == expected
    del language["rope_parameters"]["long_factor"]
    with pytest.raises(BrokenCheckpoint, match="factors"):
        parse_config(source, "x")


def test_qwen3_norms_its_heads(source):
    source["llm_config"] |= {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "tie_word_embeddings": True}
    decoder = parse_config(source, "x").decoder
    assert decoder.query_key_norm and decoder.head_dim == 32 and decoder.tied_head and not decoder.query_key_value_bias


def test_qwen2_ignores_rope_scaling_as_the_reference_does(source):
    source["llm_config"]["architectures"] = ["Qwen2ForCausalLM"]
    assert parse_config(source, "x").decoder.rope == Rope(theta=10_000.0)


def test_biases_follow_the_family(source):
    source["llm_config"]["bias"] = True
    decoder = parse_config(source, "x").decoder
    assert decoder.query_key_value_bias and decoder.output_bias
    source["llm_config"]["architectures"] = ["Qwen2ForCausalLM"]
    decoder = parse_config(source, "x").decoder
    assert decoder.query_key_value_bias and not decoder.output_bias


def test_tiling_limits(source):
    source |= {"max_dynamic_patch": 6, "min_dynamic_patch": 2, "use_thumbnail": False}
    chat = parse_config(source, "x").chat
    assert (chat.min_tiles, chat.max_tiles, chat.use_thumbnail) == (2, 6, False)
    del source["max_dynamic_patch"], source["min_dynamic_patch"], source["use_thumbnail"]
    chat = parse_config(source, "x").chat
    assert (chat.min_tiles, chat.max_tiles, chat.use_thumbnail) == (1, 6, False)  # As InternVLChatConfig.
    del source["dynamic_image_size"]
    assert parse_config(source, "x").chat.max_tiles == 1
    source["dynamic_image_size"] = False
    assert parse_config(source, "x").chat.max_tiles == 1


def test_tile_size_is_the_forced_one_else_the_towers(source):
    source["force_image_size"] = 168
    assert parse_config(source, "x").chat.tokens_per_tile == 36
    source["force_image_size"] = None
    assert parse_config(source, "x").chat.image_size == source["vision_config"]["image_size"]


def test_the_system_message_may_be_overridden(source):
    assert parse_config(source, "x").chat.system_message is None
    source["system_message"] = "Be brief."
    assert parse_config(source, "x").chat.system_message == "Be brief."


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_type": "llava"}, UnsupportedCheckpoint, ("llava", "internvl_chat")),
        ({"llm_config": None}, BrokenCheckpoint, ("llm_config",)),
        ({"vision_config": 3}, BrokenCheckpoint, ("vision_config",)),
        ({"template": "chatty"}, UnsupportedCheckpoint, ("chatty", "internvl2_5")),
        ({"template": None}, UnsupportedCheckpoint, ("internvl2_5",)),
        ({"llm_config.architectures": ["GptOssForCausalLM"]}, UnsupportedCheckpoint, ("GptOssForCausalLM", *FAMILIES)),
        ({"llm_config.architectures": None}, UnsupportedCheckpoint, tuple(FAMILIES)),
        ({"llm_config.hidden_size": None}, BrokenCheckpoint, ("hidden_size", "llm_config")),
        ({"llm_config.hidden_act": "relu"}, UnsupportedCheckpoint, ("relu", "silu")),
        ({"vision_config.patch_size": "14"}, BrokenCheckpoint, ("patch_size", "vision_config")),
    ],
    ids=str,
)
def test_refusals_name_the_thing(source, change, error, words):
    changed = copy.deepcopy(source)
    for path, value in change.items():
        *sections, key = path.split(".")
        (changed[sections[0]] if sections else changed)[key] = value
    with pytest.raises(error) as raised:
        parse_config(changed, "here/config.json")
    assert all(word in str(raised.value) for word in ("here/config.json", *words) if word != "here/config.json"), raised.value


def test_folders_that_are_none(tmp_path):
    with pytest.raises(BrokenCheckpoint, match="not a folder"):
        read_config(tmp_path / "absent")
    with pytest.raises(BrokenCheckpoint, match="no config.json"):
        read_config(tmp_path)


def test_a_bundle_carries_its_source_config(source, tmp_path):
    (tmp_path / "vlquant.json").write_text(json.dumps({"format_version": 1, "source_config": source}))
    (tmp_path / "config.json").write_text("{}")  # the -hf one, for other readers
    assert read_config(tmp_path).decoder == parse_config(source, "x").decoder


def test_silence_means_what_the_original_classes_take(source):
    language = source["llm_config"]
    for key in ("bias", "rms_norm_eps", "original_max_position_embeddings", "head_dim"):
        language.pop(key, None)
    internlm2 = parse_config(source, "x").decoder
    assert internlm2.query_key_value_bias and internlm2.output_bias and internlm2.norm_eps == 1e-6
    language["architectures"] = ["Phi3ForCausalLM"]
    factors = [1.0] * (internlm2.head_dim // 2)
    language["rope_scaling"] = {"type": "su", "short_factor": factors, "long_factor": factors}
    phi3 = parse_config(source, "x").decoder
    assert phi3.norm_eps == 1e-5 and phi3.rope.long.short_reach == 4096
    language |= {"architectures": ["Qwen3ForCausalLM"], "rope_scaling": None}
    assert parse_config(source, "x").decoder.head_dim == 128


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("llm_config", "rope_scaling", "dynamic"), ("llm_config", "rms_norm_eps", None), ("llm_config", "num_attention_heads", 0),
        ("llm_config", "num_hidden_layers", 0), ("llm_config", "num_hidden_layers", 1.5), ("vision_config", "norm_type", "foo"),
        ("vision_config", "layer_norm_eps", None), ("vision_config", "num_attention_heads", 7), ("vision_config", "num_hidden_layers", 0),
        (None, "system_message", 5), (None, "select_layer", None), (None, "select_layer", 100), (None, "select_layer", -100),
        (None, "select_layer", "x"), (None, "downsample_ratio", None), (None, "downsample_ratio", 0), (None, "force_image_size", "x"),
        (None, "force_image_size", 100), (None, "max_dynamic_patch", "x"), (None, "min_dynamic_patch", "x"), (None, "use_thumbnail", "no"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind_are_one_sentence(source, section, key, value):
    (source if section is None else source[section])[key] = value
    with pytest.raises(BrokenCheckpoint) as caught:
        parse_config(source, "config.json")
    assert "\n" not in str(caught.value) and "download the original file again" in str(caught.value)


@pytest.mark.parametrize("value", [5, [["a"]], [], None])
def test_architectures_that_are_none(source, value):
    source["llm_config"]["architectures"] = value
    with pytest.raises(UnsupportedCheckpoint, match="InternLM2ForCausalLM"):
        parse_config(source, "config.json")
