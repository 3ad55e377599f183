"""What other programs computed with our bundles, as tests/record_interop.py recorded it: close enough, and of today's format."""

import json
from dataclasses import replace

import pytest

from vlquant.calib_data import demo_model
from vlquant.decoder import LINEARS
from vlquant.layout import layer_prefix, tensor_shapes
from vlquant.model import open_model
from vlquant.quantize import quantize
from vlquant.quantized_layers import rounded_layers
from vlquant.recipe import Recipe

from tests.record_interop import FLOAT, RECIPES, RECORDED

RECORD = json.loads(RECORDED.read_text())
CASES, CONFIGS = RECORD["cases"], RECORD["quantization_configs"]
MODELS = ("demo", "qwen2")
BOUND = 1e-2
"""max|difference of logits| / max|logit|."""
HALF_PRECISION = 2
"""A bundle in bfloat16 is at most so many times as far from float32 as the same reader's unquantized model is."""
LMDEPLOY = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
"""All that it can read."""


def name_of(case):
    return " ".join(case[key] for key in ("model", "bundle", "reader", "precision", "prompt"))


@pytest.fixture(scope="module", params=RECIPES)
def bundle(request, tmp_path_factory):
    """The demo model as every kind of bundle; GPTQ's arithmetic, which decides no setting, left out for its time."""
    recipe = RECIPES[request.param]
    folder = tmp_path_factory.mktemp("interop") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlquant.quantize.gptq_layers", only_rounded)
        few = {"samples": 1} if recipe.method == "gptq" else {}
        return quantize(demo_model(), recipe=replace(recipe, **few), output=folder)


def only_rounded(model, inputs, *, recipe, chosen, device):
    return rounded_layers(model, Recipe(method="rtn", bits=recipe.bits, group_size=recipe.group_size))


def test_every_kind_of_bundle_was_read_by_everyone_who_can():
    seen = {tuple(case[key] for key in ("model", "bundle", "reader", "prompt")) for case in CASES if case["bundle"] != FLOAT}
    wanted = set()
    for model in MODELS:
        for kind, recipe in RECIPES.items():
            whole = "transformers + optimum" if recipe.packed_as_gptq else "transformers + bitsandbytes"
            wanted |= {(model, kind, whole, "picture"), (model, kind, whole, "text")}
            wanted |= {(model, kind, "GPTQModel", "text")} if recipe.packed_as_gptq else set()
    assert seen == wanted
    assert RECORD["versions"]["gptqmodel"] == "7.3.6"


def test_gptqmodel_reads_linears_of_4_and_8_bits_side_by_side():
    precise = next(case for case in RECORD["mixed"] if case["precision"] == "float16")
    assert set(precise["linears_by_bits"]) == {"4", "8"} and min(precise["linears_by_bits"].values()) > 1
    assert precise["relative_difference"] <= BOUND and precise["clear_agreeing"] == precise["clear"]


@pytest.mark.parametrize("compared", [case for case in CASES if case["precision"] != "bfloat16"], ids=name_of)
def test_readers_compute_our_logits(compared):
    assert compared["relative_difference"] <= BOUND
    assert compared["clear_agreeing"] == compared["clear"] and compared["positions"] > 40


@pytest.mark.parametrize("compared", [case for case in CASES if case["precision"] == "bfloat16"], ids=name_of)
def test_what_bfloat16_adds_is_its_own(compared):
    plain = next(each for each in CASES if each["bundle"] == FLOAT and all(each[key] == compared[key] for key in ("model", "prompt")))
    # bitsandbytes rounds the inputs of int8 linears to 8 bits.
    assert compared["bundle"] == "int8" or compared["relative_difference"] <= HALF_PRECISION * plain["relative_difference"]
    assert compared["clear_agreeing"] == compared["clear"]


def test_the_record_is_of_what_is_written_today(bundle):
    config = json.loads((bundle / "config.json").read_text())
    assert config["quantization_config"] == CONFIGS[bundle.name], "run tests/record_interop.py again"
    if RECIPES[bundle.name].packed_as_gptq:
        assert json.loads((bundle / "quantize_config.json").read_text()) == config["quantization_config"]


def test_exactly_the_linears_of_the_language_model_are_quantized_for_every_reader(bundle):
    """By the rules of vLLM and transformers; LMDeploy and vLLM without the lists look at the tensors."""
    config, model = CONFIGS[bundle.name], open_model(bundle)
    shapes = {name.removesuffix(".weight"): shape for name, shape in tensor_shapes(model.config).items()}
    modules = {name for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name}
    linears = {layer_prefix(index) + name for index in range(model.config.decoder.layers) for name in LINEARS}
    assert linears < modules
    if RECIPES[bundle.name].packed_as_gptq:
        names = [name for stage in config["modules_in_block_to_quantize"] for name in stage]
        assert {module for module in modules if any(name in module for name in names)} == linears  # vLLM
        assert {module for module in modules if module.startswith(config["block_name_to_quantize"])} == linears  # optimum
        stored = ".qweight"
    else:
        skipped = config["llm_int8_skip_modules"]
        assert {module for module in modules if not set(module.split(".")) & set(skipped)} == linears  # vLLM
        assert {module for module in modules if not module.startswith(tuple(skipped)) and not module.endswith(tuple(skipped))} == linears
        stored = ".weight.absmax" if config["load_in_4bit"] else ".SCB"
    assert {name.removesuffix(stored) for name in model.checkpoint if name.endswith(stored)} == linears


def test_the_default_is_within_lmdeploys_limits():
    assert RECIPES["gptq-4"] == Recipe()
    assert {key: CONFIGS["gptq-4"][key] for key in LMDEPLOY} == LMDEPLOY


def test_both_names_of_a_field_say_the_same():
    """GPTQModel's newer names beside those that transformers, vLLM and LMDeploy read."""
    for config in (CONFIGS[kind] for kind, recipe in RECIPES.items() if recipe.packed_as_gptq):
        assert config["method"] == config["quant_method"] and config["format"] == config["checkpoint_format"] == "gptq"
        assert config["lm_head"] is False and config["pack_dtype"] == "int32"
