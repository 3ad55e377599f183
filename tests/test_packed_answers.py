"""Bundles answer from packed weights, through ONNX Runtime and torch alike."""


import pytest
import torch

from vlquant.bnb import dequantize_int8, dequantize_nf4
from vlquant.decoder import LINEARS, FloatLinear
from vlquant.export.vision import export_vision
from vlquant.model import float_decoder, open_model
from vlquant.packing import dequantize_gptq
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.request import Request
from vlquant.runtime import Generation, load
from vlquant.runtime.linear import PackedLinear
from vlquant.runtime.native_decoder import NativeDecoder

from tests.golden_folder import golden_folder

GOLDEN = golden_folder()
SOURCES = {"internlm2": GOLDEN / "internlm2_internvl2_5", "qwen2": GOLDEN / "qwen2_internvl2_5_vit6b"}
RECIPES = {
    "gptq4": Recipe(bits=4, group_size=32, samples=2),
    "gptq8": Recipe(bits=8, group_size=-1, samples=2),
    "nf4": Recipe(method="bnb", bits=4),
    "int8": Recipe(method="bnb", bits=8),
}
PICTURE = GOLDEN / "images" / "rgba_300x200.png"
QUESTION = Request("What is it?", images=[PICTURE], max_tiles=1)


def expanded(tensors, recipe):
    """The float weight of packed tensors."""
    if recipe.method == "gptq":
        return dequantize_gptq(tensors, bits=recipe.bits)
    return dequantize_nf4(tensors) if recipe.bits == 4 else dequantize_int8(tensors)


def expanded_decoder(folder, source, recipe):
    """The source's decoder with the float linears that the bundle's tensors stand for."""
    bundle, decoder = open_model(folder), float_decoder(open_model(source))
    for index, layer in enumerate(decoder.layers):
        tensors = bundle.decoder_layer(index)
        for name in LINEARS:
            parts = {key.removeprefix(name + "."): value for key, value in tensors.items() if key.startswith(name + ".")}
            bias = parts.get("bias")  # float16 in a GPTQ bundle
            layer.linears[name] = FloatLinear(expanded(parts, recipe), bias if bias is None else bias.float())
    return decoder


@pytest.fixture(scope="module", params=[(s, r) for s in SOURCES for r in RECIPES], ids="-".join)
def bundle(request, tmp_path_factory):
    source, recipe = SOURCES[request.param[0]], RECIPES[request.param[1]]
    return quantize(source, recipe=recipe, output=tmp_path_factory.mktemp("bundle") / "packed"), source, recipe


def test_packed_decoders_equal_expanded_ones(bundle, torch_kernels):
    folder, source, recipe = bundle
    pipe = load(folder, vision="torch")
    assert all(isinstance(linear, PackedLinear) for layer in pipe.decoder.layers for linear in layer.linears.values())
    answer = pipe.ask(QUESTION, generation=Generation(max_new_tokens=8))
    (packed,) = pipe.answer_logits([QUESTION], [answer.ids])
    pipe.decoder = expanded_decoder(folder, source, recipe)
    (wanted,) = pipe.answer_logits([QUESTION], [answer.ids])
    torch.testing.assert_close(packed, wanted, atol=2e-4, rtol=0)


def test_compiled_decoders_are_close_to_expanded_ones(bundle):
    folder, source, recipe = bundle
    pipe = load(folder, vision="torch")
    assert isinstance(pipe.decoder, NativeDecoder) == (recipe != RECIPES["nf4"])
    answer = pipe.ask(QUESTION, generation=Generation(max_new_tokens=8))
    (packed,) = pipe.answer_logits([QUESTION], [answer.ids])
    pipe.decoder = expanded_decoder(folder, source, recipe)
    (wanted,) = pipe.answer_logits([QUESTION], [answer.ids])
    # The head is in 8 bits, and so are inputs of 4-bit weights in a compiled decoder.
    allowed = 3e-2 if recipe == RECIPES["gptq4"] else 1e-2
    assert (packed - wanted).norm() <= allowed * wanted.norm()


def test_a_bundle_that_takes_the_place_of_another_is_not_read_for_it(tmp_path):
    source, output = SOURCES["qwen2"], tmp_path / "packed"
    quantize(source, recipe=Recipe(method="rtn", bits=4, group_size=32), output=output)
    pipe, again = (load(output, vision="torch") for _ in range(2))
    assert isinstance(pipe.decoder, NativeDecoder)
    answer = pipe.ask(QUESTION, generation=Generation(max_new_tokens=4))
    (before,), read = pipe.answer_logits([QUESTION], [answer.ids]), pipe.embed(pipe.encode(QUESTION), None)
    quantize(source, recipe=Recipe(method="rtn", bits=8, group_size=32), output=output, overwrite=True)
    for each in (pipe, again):  # After the first question and before it.
        assert torch.equal(each.answer_logits([QUESTION], [answer.ids])[0], before)
        assert torch.equal(each.embed(each.encode(QUESTION), None), read)


def test_both_vision_towers_give_one_answer(tmp_path):
    folder = quantize(SOURCES["internlm2"], recipe=RECIPES["gptq4"], output=tmp_path / "packed")
    export_vision(folder)
    generation = Generation(max_new_tokens=8)
    answers = [load(folder, vision=vision).ask(QUESTION, generation=generation) for vision in ("onnx", "torch")]
    assert answers[0].ids == answers[1].ids and answers[0].tiles == (1,)
