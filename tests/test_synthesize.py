"""Synthesized checkpoints are read, tokenized and answered by as published ones; every member has a shape and a tokenizer."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vlquant import members
from vlquant.bench_shape import bundle_of_shape
from vlquant.config import parse_config
from vlquant.errors import InvalidRequest, OutputRefused
from vlquant.members import KNOWN_MODELS, MEMBERS, member_config
from vlquant.model import open_model
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime import Generation, load
from vlquant.sentencepiece_model import read_sentencepiece_model, serialize
from vlquant.synthesize import random_tensor, stored_shapes, synthesize
from vlquant.synthetic_tokenizer import LAYOUTS, write_synthetic_tokenizer
from vlquant.tokenizer import load_tokenizer, write_fast_tokenizer

from tests.narrow_members import narrow

ONE_OF_EACH = ("InternVL2-2B", "InternVL2-4B", "InternVL2-1B", "InternVL2-40B", "InternVL2-Llama3-76B", "InternVL2_5-1B", "InternVL3_5-1B")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_family_is_written_and_answers(name, tmp_path, monkeypatch):
    monkeypatch.setitem(members.MEMBERS, name, narrow(name))
    folder = synthesize(name, tmp_path / "model")
    model, tokenizer = open_model(folder), load_tokenizer(folder)
    config = model.config
    assert config.family.architecture == MEMBERS[name].architecture and config.decoder.vocab_size == MEMBERS[name].vocab_size
    assert tokenizer.vocabulary_size <= config.decoder.vocab_size
    text = "What is 7 + 5?\nGrüße!"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("Hello <IMG_CONTEXT>")
    assert ids.count(tokenizer.token_id("<IMG_CONTEXT>")) == 1
    answer = load(folder, vision="torch").ask("Hello", generation=Generation(max_new_tokens=3))
    assert 1 <= len(answer.ids) <= 3


@pytest.mark.parametrize("name", ["InternVL2-4B", "InternVL3_5-1B", "InternVL2-40B"])
def test_families_without_goldens_here_are_quantized_too(name, tmp_path, monkeypatch):
    """Fused, head-normed and tied ones: the bundle answers about a picture and spells as its source does."""
    monkeypatch.setitem(members.MEMBERS, name, narrow(name))
    source = synthesize(name, tmp_path / "model")
    bundle = quantize(source, recipe=Recipe(group_size=32, samples=2), output=tmp_path / "bundle")
    pipe, tokenizer = load(bundle, vision="torch", max_tiles=1), load_tokenizer(source)
    text = "Hello <|im_end|>  world"
    assert pipe.tokenizer.encode(text) == tokenizer.encode(text) and type(pipe.tokenizer) is type(tokenizer)
    assert pipe.config.decoder == open_model(source).config.decoder
    answer = pipe.ask("What is it?", [Image.new("RGB", (60, 60), "red")], generation=Generation(max_new_tokens=2))
    assert answer.tiles == (1,) and 1 <= len(answer.ids) <= 2


@pytest.mark.parametrize("key", [key for key, layout in LAYOUTS.items() if not layout.pieces], ids=str)
def test_byte_level_vocabularies_have_no_holes(key, tmp_path):
    """Of a hole tokenizers 0.22 prints the number, on the standard output that is for results."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    write_synthetic_tokenizer(source, *key)
    write_fast_tokenizer(source, target)
    ids = set(json.loads((target / "tokenizer.json").read_text())["model"]["vocab"].values())
    assert ids == set(range(len(ids))) and len(ids) > 100_000


def test_every_member_has_a_shape_and_a_tokenizer():
    for name, member in MEMBERS.items():
        config = parse_config(member_config(member), name)
        assert (member.architecture, member.vocab_size) in LAYOUTS
        assert config.chat.tokens_per_tile == 256 and config.decoder.heads % config.decoder.key_value_heads == 0
    assert set(MEMBERS) < set(KNOWN_MODELS)


@pytest.mark.parametrize(("name", "billions"), [("InternVL2_5-1B", 0.94), ("InternVL2_5-8B", 8.1), ("InternVL2-4B", 4.1), ("InternVL2-40B", 40.1)])
def test_shapes_add_up_to_the_published_sizes(name, billions):
    """Parameters as the model cards count them."""
    config = parse_config(member_config(MEMBERS[name]), name)
    count = sum(torch.Size(shape).numel() for _, shape in stored_shapes(config))
    assert count / 1e9 == pytest.approx(billions, rel=0.02)


def test_weights_depend_on_name_and_seed_alone():
    first = random_tensor("language_model.model.norm_x.proj", (3, 5), 0)
    assert torch.equal(first, random_tensor("language_model.model.norm_x.proj", (3, 5), 0))
    assert not torch.equal(first, random_tensor("language_model.model.norm_x.proj", (3, 5), 1))
    wide = random_tensor("a.weight", (64, 4096), 0).float()
    assert wide.std() == pytest.approx(4096**-0.5, rel=0.05) and torch.equal(random_tensor("x.norm1.weight", (4,), 0), torch.ones(4))


def test_layers_can_be_left_out(tmp_path, monkeypatch):
    small = narrow("InternVL2-1B")
    monkeypatch.setitem(members.MEMBERS, "InternVL2-1B", replace(small, tower=replace(small.tower, layers=3)))
    folder = synthesize("InternVL2-1B", tmp_path / "model", layers=1, vision_layers=2)
    config = open_model(folder).config
    assert (config.decoder.layers, config.vision.layers) == (1, 2)


@pytest.mark.parametrize(
    ("name", "layers", "said"),
    [
        ("InternVL9-1B", {}, "InternVL2-1B"),
        ("InternVL2-1B", {"layers": 0}, "--layers is 0, .* at least one layer; give 1 to 24"),
        ("InternVL2-1B", {"vision_layers": -1}, "--vision-layers is -1, .* at least one layer; give 1 to 24"),
        ("InternVL2-1B", {"layers": 25}, "--layers is 25, and the language model of InternVL2-1B has 24; give 1 to 24"),
        ("InternVL2-40B", {"vision_layers": 46}, "--vision-layers is 46, and the vision tower of InternVL2-40B has 45; give 1 to 45"),
    ],
)
def test_what_cannot_be_made(name, layers, said, tmp_path):
    """Neither here nor for a bench."""
    for make in (synthesize, bundle_of_shape):
        with pytest.raises(InvalidRequest, match=said):
            make(name, tmp_path / "x", **layers)
    assert not list(tmp_path.iterdir())


def test_folders_are_not_overwritten(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OutputRefused, match="not an empty folder"):
        synthesize("InternVL2-1B", tmp_path)


def test_a_written_sentencepiece_model_reads_back(tmp_path):
    from vlquant.synthetic_tokenizer import sentencepiece_model

    model = sentencepiece_model(400)
    (tmp_path / "m.model").write_bytes(serialize(model))
    assert read_sentencepiece_model(tmp_path / "m.model") == model
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert pieces.get_piece_size() == 400 and pieces.decode(pieces.encode("Hello wörld")) == "Hello wörld"
