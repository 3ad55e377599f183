"""On a GPU: the kernels against torch at the family's true shapes, captured decoding, answers. tests/gpu/RESULTS.md has what was run."""

import pytest
import torch

from vlquant.bnb import dequantize_nf4, quantize_nf4
from vlquant.calib_data import demo_model
from vlquant.calib_data.samples import draw_sample, sample_request
from vlquant.decoder import KeyValueCache, attend
from vlquant.decoder_config import DecoderConfig, Rope
from vlquant.distributions import compare_logits, summarize_tokens
from vlquant.packing import dequantize_gptq
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime import Generation, load
from vlquant.runtime.cuda_attention import open_attention
from vlquant.runtime.cuda_linear import make_cuda_linear, with_int8_activations
from vlquant.runtime.decode_step import STEPS_BEFORE_CAPTURE, open_step
from vlquant.runtime.linear import Workspace
from vlquant.runtime.loading import load_decoder

from tests.gptq_forms import FAMILY_SHAPES, random_tensors
from tests.test_cuda_attention import GROUPS
from tests.test_int8_activations import MOST_DIVERGENCE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = torch.device("cuda")
TOKENS = [(1, 2e-6), (3, 2e-6), (8, 2e-6), (100, 2e-3)]
"""Numbers of tokens, and how far from exact in units of the largest result: a GEMM in half precision from 9 on."""


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))


def assert_near(found, expected, relative):
    assert float((found.double() - expected).abs().max()) <= relative * float(expected.abs().max())


def exact_product(x, tensors, bits, rows=4096):
    """float64, some rows of the weight at a time, so that it fits a small card."""
    parts = []
    for start in range(0, tensors["scales"].shape[1], rows):
        some = {name: tensors[name][:, start : start + rows] for name in ("qweight", "scales")}
        zeros = tensors["qzeros"][:, start * bits // 32 : (start + rows) * bits // 32]
        weight = dequantize_gptq({**some, "qzeros": zeros, "g_idx": tensors["g_idx"]}, bits=bits, dtype=torch.float64)
        parts.append(x.double() @ weight.T)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("shape", FAMILY_SHAPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_linears_of_every_member(bits, shape):
    tensors = {name: each.to(GPU) for name, each in random_tensors(shape, bits).items()}
    linear = make_cuda_linear(tensors, workspace=Workspace(GPU))
    for tokens, relative in TOKENS:
        x = inputs(tokens, shape[1]).to(GPU)
        assert_near(linear(x), exact_product(x, tensors, bits), relative)
    x = inputs(2, shape[1]).to(GPU)
    assert_near(with_int8_activations(linear)(x), exact_product(x, tensors, bits), 2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_of_sixteen_bits(dtype):
    stored = inputs(92553, 512).to(dtype)
    linear = make_cuda_linear({"weight": stored}, workspace=Workspace(GPU))
    for tokens, relative in TOKENS:
        x = inputs(tokens, 512).to(GPU)
        assert_near(linear(x), x.double() @ stored.to(GPU).double().T, relative)


def test_nf4_by_bitsandbytes():
    tensors = quantize_nf4(inputs(256, 512))
    linear, weight = make_cuda_linear(tensors, workspace=Workspace(GPU)), dequantize_nf4(tensors).to(GPU).double()
    for tokens, _ in TOKENS:
        x = inputs(tokens, 512).to(GPU)
        assert_near(linear(x), x.double() @ weight.T, 1e-2)


@pytest.mark.parametrize(("group", "head_dim"), GROUPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_attention_over_a_long_context(group, head_dim, dtype):
    config = DecoderConfig(64, 1, 2 * group, 2, head_dim, 64, 10, 1e-6, Rope(1e4), 100)
    queries = inputs(2, config.heads, 1, head_dim).to(GPU)
    keys, values = (inputs(2, 2, 8192, head_dim).to(GPU, dtype) for _ in range(2))
    first, stored = (torch.tensor(each, dtype=torch.int32, device=GPU) for each in ([0, 1000], [8000]))
    found = open_attention(config, GPU, dtype)(queries, keys, values, first, stored)
    for row, start in enumerate((0, 1000)):
        seen = [each[row : row + 1, :, start:8000].double() for each in (keys, values)]
        assert_near(found[row : row + 1], attend(queries[row : row + 1].double(), *seen, None), 1e-5)


@torch.inference_mode()
def test_a_captured_step_equals_the_decoder(named_case):
    """Steps before capture, the capturing one, and replays."""
    decoder = load_decoder(named_case("internlm2_internvl2_5").model, GPU)
    prompt, mask = (inputs(2, 9, decoder.config.hidden_size) * 0.1).to(GPU), torch.ones(2, 9, dtype=torch.bool, device=GPU)
    mask[1, :3] = False
    caches = [KeyValueCache(decoder.config, batch=2, capacity=40, device=GPU) for _ in range(2)]
    for cache in caches:
        decoder(prompt, attention_mask=mask, cache=cache)
    captured = open_step(decoder, caches[0], mask)
    for step in range(STEPS_BEFORE_CAPTURE + 5):
        ids = torch.tensor([step, 2 * step + 1], device=GPU)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        expected = decoder(decoder.embed(ids[:, None]).float(), attention_mask=mask, cache=caches[1])[:, -1]
        torch.testing.assert_close(captured(ids).clone(), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return quantize(demo_model(), recipe=Recipe(method="rtn", bits=4), output=tmp_path_factory.mktemp("gpu") / "bundle")


def demo_requests(count):
    return [sample_request(each, each.questions[0]) for each in (draw_sample("development", index, seed=3) for index in range(count))]


def test_answers_are_those_of_the_cpu(bundle):
    generation, requests = Generation(max_new_tokens=24), demo_requests(12)
    pipes = [load(bundle, device, vision="torch") for device in ("cpu", "cuda")]
    alone, there = ([pipe.ask(request, generation=generation).text for request in requests] for pipe in pipes)
    together = [answer.text for answer in pipes[1].batch(requests, generation)]
    same = sum(one == other for one, other in zip(alone, there, strict=True))
    # Prompts go through a GEMM in half precision: where two tokens are as likely, either may win.
    assert same >= 11 and sum(one == other for one, other in zip(alone, together, strict=True)) >= 11


def test_the_price_of_rounded_activations(bundle):
    """The same limit as the CPU's test of the arithmetic, now by the dp4a kernels."""
    pipe, requests = load(bundle, "cuda", vision="torch"), demo_requests(8)
    # As many ids as the kernels take side by side; the prompt's many go another way.
    answers = [each.ids for each in pipe.batch(requests, Generation(max_new_tokens=8))]

    def one_by_one():
        return [pipe.answer_logits([request], [ids])[0] for request, ids in zip(requests, answers, strict=True)]

    exact = one_by_one()
    pipe.decoder.layers = [
        layer.with_linears({name: with_int8_activations(each) for name, each in layer.linears.items()}) for layer in pipe.decoder.layers
    ]
    found = summarize_tokens(compare_logits(*each) for each in zip(exact, one_by_one(), answers, strict=True))
    assert found.mean_divergence < MOST_DIVERGENCE
