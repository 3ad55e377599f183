"""Layers beside plain rounding and features tile by tile, on small checkpoints with one part changed."""

import json

import pytest
import torch

from vlquant.bundle import read_manifest
from vlquant.decoder import LINEARS
from vlquant.forced import forced_states
from vlquant.hidden_states import HiddenStates, write_states
from vlquant.model import open_model
from vlquant.part_distances import LARGEST_ERROR, LayerNoises, PlainRounding, relative_squares, worst_tile
from vlquant.part_limits import judge_layers
from vlquant.quantize import quantize
from vlquant.recipe import Recipe

from tests import planted
from tests.golden_folder import golden_folder

SOURCE = golden_folder() / "qwen2_internvl2_5"  # Its queries, keys and values have biases.
PICTURES = 16
RECIPES = {
    "gptq-4": Recipe(bits=4, group_size=32, samples=16),
    "gptq-3": Recipe(bits=3, group_size=32, samples=16),
    "gptq-8": Recipe(bits=8, group_size=-1, samples=16),
    "gptq-5": Recipe(bits=4, average_bits=5, group_size=32, samples=16),
    "rtn-4": Recipe(method="rtn", bits=4, group_size=32),
    "nf4": Recipe(method="bnb", bits=4),
    "int8": Recipe(method="bnb", bits=8),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return {name: quantize(SOURCE, recipe=recipe, output=folder / name) for name, recipe in RECIPES.items()}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    width = open_model(SOURCE).config.decoder.hidden_size
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(24 + place, width, generator=generator) for place in range(PICTURES)]
    path = tmp_path_factory.mktemp("prompts") / "prompts.f32"
    return HiddenStates(path, write_states(path, rows), width)


def distances(bundle, prompts, folder):
    """How far each layer of a bundle is, from two questions about each picture."""
    answers = {place: [5, 6, 7] for place in range(PICTURES)}
    rounded = PlainRounding(open_model(SOURCE), read_manifest(bundle), "cpu")
    asked = {place: ("set", str(place // 2)) for place in answers}
    noises = LayerNoises(open_model(bundle), rounded, asked, prompts.lengths)
    forced_states(rounded.reference, prompts, answers, folder=folder, device="cpu", step=noises.hear)
    assert all(len(each.added) == len(each.rounding) == PICTURES // 2 for each in noises.found)
    return judge_layers(noises.found)


@pytest.mark.parametrize("name", RECIPES)
def test_a_good_bundle_is_no_further_than_plain_rounding(bundles, prompts, tmp_path, name):
    found = distances(bundles[name], prompts, tmp_path)
    assert [each.layer for each in found] == list(range(open_model(SOURCE).config.decoder.layers))
    if name.startswith("gptq"):
        assert all(0 < each.roundings < 1.3 for each in found)
    else:
        assert all(each.roundings == 1 for each in found)  # It is plain rounding.


def test_stages_of_8_bits_are_rounded_to_8(bundles):
    manifest, model = read_manifest(bundles["gptq-5"]), open_model(bundles["gptq-5"])
    wide = next(each for each in manifest.bit_choice if each.bits == 8)
    tensors, own = PlainRounding(open_model(SOURCE), manifest, "cpu").decoder_layer(wide.layer), model.decoder_layer(wide.layer)
    assert {each.bits for each in manifest.bit_choice} == {4, 8}
    assert all(tensors[f"{name}.qweight"].shape == own[f"{name}.qweight"].shape for name in LINEARS)


def test_a_float_copy_is_at_no_distance(bundles, prompts, tmp_path):
    copy = planted.float_bundle(bundles["gptq-4"], SOURCE, tmp_path / "float")
    assert all(each.roundings < 0.02 for each in distances(copy, prompts, tmp_path))  # Biases stay in float16.


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["gptq-4", "rtn-4"])
@pytest.mark.parametrize("damage", ["scales", "2 bits", "overflow"])
def test_a_damaged_layer_stands_out(bundles, prompts, tmp_path, name, layer, damage):
    broken = planted.copied(bundles[name], tmp_path / "broken")
    if damage == "2 bits":
        planted.two_bit_layer(broken, SOURCE, layer)
    else:
        planted.scale_layer(broken, layer, 1.3 if damage == "scales" else float("inf"))
    assert [each.layer for each in distances(broken, prompts, tmp_path) if each.is_broken] == [layer]


def test_what_the_tensors_claim_does_not_count(bundles, prompts, tmp_path):
    """A bundle of 3 bits whose manifest says 4 is held against rounding to 4."""
    claimed = planted.copied(bundles["gptq-3"], tmp_path / "claimed")
    manifest = json.loads((claimed / "vlquant.json").read_text())
    manifest["recipe"]["bits"] = 4
    (claimed / "vlquant.json").write_text(json.dumps(manifest))
    before, after = distances(bundles["gptq-3"], prompts, tmp_path), distances(claimed, prompts, tmp_path)
    assert all(1.7 * each.roundings < other.roundings for each, other in zip(before, after, strict=True))


def test_errors_are_relative_to_each_token():
    wanted, found = torch.tensor([[3.0, 4.0], [30.0, 40.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 5.0], [30.0, 50.0], [1.0, 0.0], [torch.nan, 0.0]])
    assert relative_squares(wanted, found)[:2].tolist() == pytest.approx([1 / 25, 1 / 25])
    assert relative_squares(wanted, found)[2] < 1e-13 and relative_squares(wanted, found)[3] == LARGEST_ERROR


def stored(path, rows) -> HiddenStates:
    return HiddenStates(path, write_states(path, rows), rows[0].shape[1])


@pytest.fixture
def features(tmp_path):
    """Two questions of two tiles of two tokens each, behind a token of text; and the same with noise in the last tile."""
    rows = [torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    other = [each.clone() for each in rows]
    other[1][3:] += 0.1 * torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    return stored(tmp_path / "a.f32", rows), stored(tmp_path / "b.f32", other)


def tile_of(features, precision="fp32"):
    places = [torch.tensor([False, True, True, True, True])] * 2
    return worst_tile(["first", "second"], places, features, tokens_per_tile=2, precision=precision)


def test_the_worst_tile_is_named(features):
    found = tile_of(features)
    assert (found.key, found.tile) == ("second", 2)
    right, other = (each[1][3:].flatten().double() for each in features)
    assert found.cosine == pytest.approx(float(right @ other / right.norm() / other.norm()), abs=1e-8)
    assert found.signal_to_noise == pytest.approx(20 * float((right.norm() / (right - other).norm()).log10()), abs=0.01)
    largest = max(float(each[1:].abs().max()) for each in features[0])  # Of all tiles, none of text.
    assert found.difference == pytest.approx(float((right - other).abs().max()) / largest, rel=1e-6)
    assert found.is_broken and not tile_of(features, "int8").is_broken


def test_a_tile_is_worse_that_takes_more_of_what_is_allowed(features, tmp_path):
    rows = [each.clone() for each in features[1]]
    rows[0][1, 0] += 0.2  # One feature alone: hardly a turn.
    spiked = features[0], stored(tmp_path / "c.f32", rows)
    allowed = {precision: tile_of(spiked, precision).key for precision in ("fp32", "int8")}
    assert allowed["fp32"] == "second"  # Of 1e-6 of a cosine each takes more than of 1e-4 of a difference.
    rows[0][1, 0] += 2
    assert tile_of((features[0], stored(tmp_path / "d.f32", rows)), "int8").key == "first"


def test_a_question_without_pictures_has_no_tiles(features):
    nowhere = [torch.zeros(5, dtype=torch.bool)] * 2
    assert worst_tile(["first", "second"], nowhere, features, tokens_per_tile=2, precision="fp32") is None


def test_the_same_features_have_no_worst_tile(features):
    assert tile_of((features[0], features[0])) is None


def test_features_that_are_not_finite_are_the_worst(features, tmp_path):
    rows = [each.clone() for each in features[1]]
    rows[0][1, 0] = torch.nan
    found = tile_of((features[0], stored(tmp_path / "c.f32", rows)), "int8")
    assert found.key == "first" and found.is_broken and (found.cosine, found.difference) == (0.0, LARGEST_ERROR)
