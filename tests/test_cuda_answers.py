"""A whole bundle answers about a picture with every linear and all attention done by the CUDA kernels' own source, on the CPU."""

import torch

import vlquant.decoder as vlquant_decoder
from vlquant.calib_data import demo_model
from vlquant.calib_data.samples import draw_sample, sample_request
from vlquant.decoder import LINEARS, Decoder, DecoderLayer, norm_names
from vlquant.family import LANGUAGE_MODEL
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime import Generation, cuda_attention, cuda_linear, decode_step, generate, load
from vlquant.runtime.cuda_linear import make_cuda_linear
from vlquant.runtime.linear import Workspace

from tests.kernels_on_cpu import CARD, cpu_kernels, needs_compiler


def decoder_by_kernels(model) -> Decoder:
    """As loading makes it on a GPU."""
    config, workspace = model.config.decoder, Workspace()

    def linear(tensors, name):
        own = {key.removeprefix(name + "."): each for key, each in tensors.items() if key.startswith(name + ".")}
        return make_cuda_linear(own, workspace=workspace, gptq_version=model.gptq_version)

    layers = []
    for index in range(config.layers):
        tensors = model.decoder_layer(index)
        norms = {name: tensors[f"{name}.weight"].float() for name in norm_names(config)}
        layers.append(DecoderLayer(config, {name: linear(tensors, name) for name in LINEARS}, norms))
    embedding, head = (model.tensor(name) for name in (LANGUAGE_MODEL + "embed_tokens.weight", "lm_head.weight"))
    norm = model.tensor(LANGUAGE_MODEL + "norm.weight").float()
    return Decoder(config, embedding=embedding, layers=layers, norm=norm, head=linear({"head.weight": head}, "head"))


@needs_compiler
def test_an_answer_by_the_kernels(tmp_path, monkeypatch):
    launched = []

    def kernels_of(device, files, defines=()):
        kernels = cpu_kernels(files, defines)
        monkeypatch.setattr(kernels, "launched", launched)
        return kernels

    for module in (cuda_linear, cuda_attention):
        monkeypatch.setattr(module, "kernels_of", kernels_of)
        monkeypatch.setattr(module, "card_of", lambda device: CARD)
    pipe = load(quantize(demo_model(), recipe=Recipe(method="rtn", bits=4), output=tmp_path / "bundle"), vision="torch")
    sample, generation = draw_sample("development", 2, seed=3), Generation(max_new_tokens=4)
    request = sample_request(sample, sample.questions[0])
    expected = pipe.ask(request, generation=generation)

    def step_on_device(decoder, cache, mask):
        attention = cuda_attention.open_attention(decoder.config, mask.device, torch.float16)
        return decode_step.DecodeStep(decoder, cache, mask, attention=attention)

    pipe.decoder = decoder_by_kernels(pipe.model)
    monkeypatch.setattr(generate, "open_step", step_on_device)
    monkeypatch.setitem(vlquant_decoder.CACHE_DTYPES, "cpu", torch.float16)
    found = pipe.ask(request, generation=generation)
    assert (found.text, found.ids) == (expected.text, expected.ids) and len(found.ids) >= 2
    layers, steps = pipe.decoder.config.layers, len(found.ids) - 1
    assert launched.count("attend_splits") == launched.count("join_splits") == layers * steps
    assert launched.count("gemv_4bit_1") == 7 * layers * steps
    assert launched.count("dequantize_4bit_float16") == 7 * layers
