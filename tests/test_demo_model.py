"""The bundled model: InternVL2_5-8B's layout, small, trained, and really looking at its pictures."""

import json
from statistics import fmean

import pytest

from vlquant.calib_data import demo_model
from vlquant.controls import controls
from vlquant.model import open_model
from vlquant.runtime.pipeline import load

FLOOR = 0.68
"""Average over kinds; the README beside the model has 0.767 on the check set."""
BLANKING_COSTS = 0.5
"""What blanked pictures must cost the kinds that have pictures, on average."""


@pytest.fixture(scope="module")
def measured():
    return {each.kind: each for each in controls(load(demo_model(), vision="torch"), split="development", scenes=66)}


def test_one_small_file_of_published_names():
    files = {path.name: path.stat().st_size for path in demo_model().iterdir()}
    assert files["model.safetensors"] <= 15_000_000
    assert not [name for name in files if name.endswith((".py", ".bin"))]
    names = set(open_model(demo_model()).checkpoint.names)
    assert "language_model.model.layers.0.attention.wqkv.weight" in names
    assert {"language_model.output.weight", "mlp1.1.weight", "vision_model.encoder.layers.0.attn.qkv.bias"} <= names


def test_its_config_is_the_8bs_in_small():
    config = json.loads((demo_model() / "config.json").read_text())
    assert config["architectures"] == ["InternVLChatModel"] and config["template"] == "internvl2_5"
    language = config["llm_config"]
    assert language["architectures"] == ["InternLM2ForCausalLM"]
    assert language["num_key_value_heads"] < language["num_attention_heads"]


def test_it_answers_unseen_questions(measured):
    """A few hundred questions: a floor well below the scores that calib_data/vlquant-demo/README.md reports."""
    assert fmean(each.score for each in measured.values()) >= FLOOR


def test_it_looks_at_its_pictures(measured):
    """Averages only: a set of 66 scenes is too small to hold every kind to its bound."""
    seeing = [each for each in measured.values() if each.kind != "text_only"]
    assert fmean(each.score - each.blanked for each in seeing) >= BLANKING_COSTS
