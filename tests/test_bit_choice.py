"""`--average-bits`: linears that need it most get 8 bits, within the budget, in a form other programs read."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlquant.bit_choice import within_budget
from vlquant.bundle import StageNoise, read_manifest
from vlquant.errors import InvalidRecipe
from vlquant.hf_layout import STAGES
from vlquant.model import open_model
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime import Generation, load

from tests.golden_folder import golden_folder

SOURCE = golden_folder() / "internlm2_internvl2_5"
MIXED = Recipe(average_bits=5, group_size=32, samples=3)


def noise(layer, weights, vision, answer=0.0):
    return StageNoise(
        layer=layer, linears=("x",), weights=weights, bits=4,
        noise={4: {"vision": vision, "answer": answer}, 8: {"vision": 0.0, "answer": 0.0}},
    )  # fmt: skip


def test_the_noisiest_stages_per_weight_get_8_bits_while_the_budget_lasts():
    measured = [noise(0, 100, 0.1), noise(1, 100, 0.3), noise(2, 300, 0.4), noise(3, 100, 0.0, answer=0.4)]
    # A quarter of the 600 weights may have 8 bits: one stage of 100, and not the one of 300.
    assert [each.bits for each in within_budget(measured, Recipe(average_bits=5))] == [4, 4, 4, 8]
    assert [each.bits for each in within_budget(measured, Recipe(average_bits=5.4))] == [4, 8, 4, 8]
    of_pictures = Recipe(average_bits=5, vision_share=0.9, answer_share=0.05)
    assert [each.bits for each in within_budget(measured, of_pictures)] == [4, 8, 4, 4]
    for average in (4.1, 4.6, 6.0, 7.9):
        chosen = within_budget(measured, Recipe(average_bits=average))
        assert sum(each.bits * each.weights for each in chosen) / 600 <= average


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A bundle with 5 bits on average."""
    return quantize(SOURCE, recipe=MIXED, output=tmp_path_factory.mktemp("mixed") / "bundle")


def test_the_choice_is_what_is_stored(mixed):
    chosen = read_manifest(mixed).bit_choice
    model = open_model(mixed)
    assert sum(each.bits * each.weights for each in chosen) / sum(each.weights for each in chosen) <= 5
    assert {each.bits for each in chosen} == {4, 8}
    assert [(each.layer, each.linears) for each in chosen] == [(index, stage) for index in range(model.config.decoder.layers) for stage in STAGES]
    for each in chosen:
        tensors = model.decoder_layer(each.layer)
        for name in each.linears:
            stored_bits = 32 * tensors[f"{name}.qweight"].shape[0] / len(tensors[f"{name}.g_idx"])
            assert stored_bits == each.bits


def test_readers_find_the_bits_of_single_and_fused_linears(mixed):
    """As vLLM and GPTQModel look them up: the first pattern that matches the module's name decides."""
    config = json.loads((mixed / "config.json").read_text())["quantization_config"]
    assert config["bits"] == 4 and config == json.loads((mixed / "quantize_config.json").read_text())

    def bits(module):
        for pattern, settings in config["dynamic"].items():
            assert pattern.startswith("+:")
            if re.match(pattern.removeprefix("+:"), module):
                return settings["bits"]
        return config["bits"]

    fused = {STAGES[0]: "self_attn.qkv_proj", STAGES[2]: "mlp.gate_up_proj"}
    for each in read_manifest(mixed).bit_choice:
        names = [*each.linears, *([fused[each.linears]] if each.linears in fused else [])]
        for prefix in ("model.language_model.layers", "language_model.model.layers", "model.layers"):
            assert [bits(f"{prefix}.{each.layer}.{name}") for name in names] == [each.bits] * len(names)
    assert bits("model.vision_tower.encoder.layers.0.attention.q_proj") == 4


def test_mixed_bundles_answer_and_err_less_than_4_bits(tmp_path):
    recipes = {"4": Recipe(group_size=32, samples=3), "6": replace(MIXED, average_bits=6)}
    narrow, mixed = (quantize(SOURCE, recipe=recipe, output=tmp_path / name) for name, recipe in recipes.items())
    wanted, *others = (answer_logits(folder) for folder in (SOURCE, mixed, narrow))
    mixed_error, narrow_error = (float((each - wanted).norm()) for each in others)
    assert mixed_error < 0.8 * narrow_error
    assert len(load(mixed, vision="torch").ask("Hi", generation=Generation(max_new_tokens=3)).ids) == 3


def answer_logits(folder):
    return load(folder, vision="torch").answer_logits(["What is it?", "Read the first line."], ["a cat", "Total 12"])[0]


def test_a_stage_that_rounding_ruins_is_chosen(tmp_path):
    """The model stays what it is, but one column in sixteen of a matrix is made giant: the rest of its group drowns."""
    planted = shutil.copytree(SOURCE, tmp_path / "planted")
    tensors = load_file(planted / "model.safetensors")
    tensors["language_model.model.layers.1.feed_forward.w2.weight"][:, ::16] *= 60
    tensors["language_model.model.layers.1.feed_forward.w3.weight"][::16] /= 60
    save_file(tensors, planted / "model.safetensors", {"format": "pt"})
    chosen = read_manifest(quantize(planted, recipe=MIXED, output=tmp_path / "bundle")).bit_choice
    worst = max(chosen, key=lambda each: each.noise[4]["answer"])
    assert (worst.layer, worst.linears, worst.bits) == (1, STAGES[3], 8)


@pytest.mark.parametrize("fields", [{"average_bits": 4}, {"average_bits": 9.0}, {"average_bits": 5, "bits": 8}, {"average_bits": 5, "method": "rtn"}])
def test_impossible_averages_are_refused(fields):
    with pytest.raises(InvalidRecipe, match="--average-bits"):
        Recipe(**fields)


def test_rounding_noise_is_that_of_the_hidden_states(tmp_path):
    """Measured by hand for one stage of the second layer: everything before it float, all tokens of a class together."""
    from vlquant.activations import run_half
    from vlquant.bit_choice import measure_layer
    from vlquant.calibrate import CalibrationInputs
    from vlquant.hidden_states import write_states
    from vlquant.decoder import LINEARS, FloatLinear, float_layer
    from vlquant.gptq import dequantize, round_weight

    model, generator = open_model(SOURCE), torch.Generator().manual_seed(0)
    classes = (torch.tensor([1, 0, 0, 0, 2]), torch.tensor([1, 1, 2]))
    inputs = CalibrationInputs(tmp_path, classes, model.config.decoder.hidden_size, (0.45, 0.15, 0.4), layer=1)
    write_states(inputs.path, (torch.randn(1, len(each), inputs.width, generator=generator) for each in classes))
    (noise, *_), _ = measure_layer(model, inputs, recipe=MIXED, device="cpu")
    floats = {name: tensor.float() for name, tensor in model.decoder_layer(1).items()}
    linears = {name: FloatLinear(floats[f"{name}.weight"], floats.get(f"{name}.bias")) for name in LINEARS}
    rounded = {}
    for name in STAGES[0]:
        found = round_weight(linears[name].weight, bits=4, group_size=32)
        rounded[name] = FloatLinear(dequantize(found.codes, found.scales, bits=4), linears[name].bias)
    layers = [float_layer(floats, model.config.decoder).with_linears(each) for each in (linears, rounded)]
    wanted, given = (torch.cat([run_half(inputs, index, layer, "cpu")[0] for index in range(2)]) for layer in layers)
    of_vision = torch.cat(classes) == 0
    lost = (given - wanted)[of_vision].square().sum() / wanted[of_vision].square().sum()
    assert noise.linears == STAGES[0] and noise.noise[4]["vision"] == pytest.approx(float(lost), rel=1e-3)
