"""Linears of a GPU: the kernels' own source on the CPU, and what is chosen by card, number of tokens and format."""

import pytest
import torch

from vlquant.bnb import dequantize_int8, dequantize_nf4, quantize_int8, quantize_nf4
from vlquant.errors import InvalidRequest, UnsupportedCheckpoint
from vlquant.runtime import cuda_linear
from vlquant.runtime.cuda_driver import Card, kernel_source
from vlquant.runtime.cuda_linear import INT8_FILES, LINEAR_FILES, CudaLinear, gemm_dtype, kernel_weight, make_cuda_linear, multiply, with_int8_activations
from vlquant.runtime.linear import PackedGptqLinear, Workspace, make_linear

from tests import kernel_twin
from tests.gptq_forms import FORMS, FAMILY_INPUTS, GptqForm
from tests.kernels_on_cpu import CARD, CpuKernels, cpu_kernels, kernel_names, needs_compiler

pytestmark = needs_compiler


def kernels(**options) -> CpuKernels:
    return cpu_kernels(LINEAR_FILES, **options)


def linear_of(tensors, *, version=1, **options) -> CudaLinear:
    weight = kernel_weight(tensors, version)
    options = {"kernels": kernels(), "card": CARD} | options
    return CudaLinear(weight, bias=tensors.get("bias"), workspace=Workspace(), **options)


def inputs(in_features: int, tokens: int) -> torch.Tensor:
    return torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens))


def assert_near(found, expected, relative):
    """Errors in units of the largest result: single results may be near zero."""
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_few_tokens_are_exact(form, tokens):
    bias = torch.linspace(-1, 1, form.shape[0])
    linear, x = linear_of({**form.tensors(), "bias": bias.half()}, version=form.version), inputs(form.shape[1], tokens)
    assert_near(linear(x), x.double() @ form.weight().T + bias.half().double(), 1e-6)


@pytest.mark.parametrize("in_features", FAMILY_INPUTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_every_member(bits, in_features):
    form = GptqForm(bits, 128, (32, in_features))
    x = inputs(in_features, 1)
    assert_near(linear_of(form.tensors())(x), x.double() @ form.weight().T, 2e-6)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_every_number_of_tokens_has_a_kernel(tokens):
    form, launched = GptqForm(4, 64), kernels().launched
    launched.clear()
    x = inputs(form.shape[1], tokens)
    together = linear_of(form.tensors())(x)
    compiled_for = {1: 1, 2: 2, 3: 4, 4: 4}.get(tokens, 8)
    assert launched == [f"gemv_4bit_{compiled_for}"]
    alone = torch.cat([linear_of(form.tensors())(row[None]) for row in x])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("out_features", [1, 3, 4, 5, 13])
def test_rows_that_do_not_fill_a_block(out_features):
    weight, x = inputs(96, out_features).half(), inputs(96, 2)
    assert_near(linear_of({"weight": weight})(x), x.double() @ weight.double().T, 1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_expanded_rows_are_those_of_the_cpu(form, monkeypatch):
    """To the bit in float32 where both scale a code once; the kernel adds an offset as the CPU does."""
    monkeypatch.setattr(cuda_linear, "GEMM_DTYPES", (((0, 0), torch.float32),))
    linear = linear_of(form.tensors(), version=form.version)
    expected = PackedGptqLinear(form.tensors(), workspace=Workspace(), gptq_version=form.version)
    assert torch.equal(linear.expand(0, form.shape[0]), expected.expand(0, form.shape[0]))
    assert torch.equal(linear.expand(4, 7), expected.expand(4, 7))


@pytest.mark.parametrize("form", FORMS[::3], ids=str)
def test_expanded_rows_are_rounded_once(form):
    linear, exact = linear_of(form.tensors(), version=form.version), form.weight()
    exact = exact if linear.weight.order is None else exact[:, linear.weight.order]
    found = linear.expand(0, form.shape[0])
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), exact.float().half().float(), atol=1e-6, rtol=2**-10)


@pytest.mark.parametrize("form", FORMS[::3], ids=str)
@pytest.mark.parametrize("expanded", [1, 2**26], ids=["row by row", "whole"])
def test_many_tokens_in_half_precision(form, expanded, monkeypatch):
    monkeypatch.setattr(cuda_linear, "EXPANDED", expanded)
    linear, x = linear_of(form.tensors(), version=form.version), inputs(form.shape[1], 30)
    assert_near(linear(x[None])[0], x.double() @ form.weight().T, 1e-3)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5, 1e12])
def test_half_precision_neither_overflows_nor_vanishes(size):
    weight, x = inputs(256, 12) * 0.1, inputs(256, 20) * size
    x[3] = 0
    found = multiply(x, lambda start, stop: weight[start:stop].half(), 12, torch.float16)
    assert_near(found, x.double() @ weight.half().double().T, 1e-3)
    assert bool((found[3] == 0).all())


@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_bitsandbytes_int8(tokens):
    tensors = quantize_int8(inputs(256, 12) * 0.05) | {"bias": torch.linspace(-1, 1, 12)}
    x = inputs(256, tokens)
    expected = x.double() @ dequantize_int8(tensors).double().T + tensors["bias"]
    assert_near(linear_of(tensors)(x), expected, 1e-6 if tokens <= 8 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_bitsandbytes_nf4(tokens, dtype, monkeypatch):
    """Through that library's own kernels, which it has for the CPU too."""
    monkeypatch.setattr(cuda_linear, "card_of", lambda device: CARD)
    tensors = quantize_nf4((inputs(256, 64) * 0.05).to(dtype)) | {"bias": torch.linspace(-1, 1, 64)}
    x = inputs(256, tokens)
    expected = x.double() @ dequantize_nf4(tensors).double().T + tensors["bias"]
    linear = make_cuda_linear(tensors, workspace=Workspace())
    assert_near(linear(x), expected, 1e-5 if tokens <= 8 else 1e-3)


@pytest.mark.parametrize("form", [form for form in FORMS if form.bits != 3], ids=str)
def test_rounded_activations_equal_the_twin(form):
    linear = linear_of(form.tensors(), version=form.version, int8_kernels=cpu_kernels(INT8_FILES))
    x = inputs(form.shape[1], 3)
    x[1, 32:64] = 0
    ordered = x if linear.weight.order is None else x[:, linear.weight.order]
    expected = torch.from_numpy(kernel_twin.gemv_int8(linear.weight, ordered.contiguous().numpy()))
    assert_near(linear(x), expected, 1e-6)
    assert_near(linear(x), x.double() @ form.weight().T, 2e-2)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_rounded_activations_that_are_no_numbers_stay_visible(number):
    form = GptqForm(4, 64)
    x = inputs(384, 2)
    x[0, 40] = number
    found = linear_of(form.tensors(), int8_kernels=cpu_kernels(INT8_FILES))(x)
    assert found[0].isnan().all() and found[1].isfinite().all()


def test_int8_columns_without_a_kernel_are_refused():
    with pytest.raises(UnsupportedCheckpoint, match="int8 weights of 12 columns have no CUDA kernel; use --device cpu"):
        linear_of(quantize_int8(inputs(12, 8)))


def test_the_order_of_threads_does_not_matter():
    """A missing barrier would show."""
    form, x = GptqForm(4, 128, (32, 4096)), inputs(4096, 2)
    assert torch.equal(linear_of(form.tensors())(x), linear_of(form.tensors(), kernels=kernels(backwards=True))(x))


def test_lanes_that_part_are_noticed():
    """The stand-in for a GPU is a judge only if it can say no: blocks of half a warp leave their other half waited for."""
    weight = kernel_weight(GptqForm(4, 64).tensors())
    x, y = inputs(384, 1), torch.empty(1, 32)
    arguments = weight.codes, weight.scales, None, x, None, y, 32, 384, weight.group_shift, 1
    with pytest.raises(AssertionError, match="in vain"):
        kernels().launch("gemv_4bit_1", (8, 1, 1), (16, 1, 1), *arguments)


def test_the_kernels_are_those_that_are_called():
    formats = ("4bit", "8bit", "bfloat16", "float16")
    expected = {f"gemv_{kind}_{tokens}" for kind in formats for tokens in (1, 2, 4, 8)}
    expected |= {f"dequantize_{kind}_{dtype}" for kind in formats[:2] for dtype in ("float16", "float32")}
    assert set(kernel_names(kernel_source(LINEAR_FILES))) == expected
    expected = {f"gemv_int8_{kind}_{tokens}" for kind in formats[:2] for tokens in (1, 2, 4, 8)} | {"round_activations"}
    assert set(kernel_names(kernel_source(INT8_FILES))) == expected


@pytest.mark.parametrize("capability", [(6, 0), (6, 1), (7, 5), (8, 6), (9, 0)])
def test_many_tokens_are_multiplied_as_the_card_likes_it(capability):
    assert gemm_dtype(capability) == torch.float16
    assert gemm_dtype((5, 2)) == torch.float32


def test_rounded_activations_have_to_be_asked_for(monkeypatch):
    monkeypatch.setattr(cuda_linear, "kernels_of", lambda device, files: cpu_kernels(files))
    exact = linear_of(GptqForm(4, 64).tensors() | {"bias": torch.ones(32)})
    assert exact.int8_kernels is None
    x, rounded = inputs(384, 2), with_int8_activations(exact)
    assert not torch.equal(rounded(x), exact(x))
    assert_near(rounded(x), exact(x), 2e-2)
    stored = linear_of({"weight": inputs(384, 4).half()})
    assert with_int8_activations(stored) is stored  # a head of 16 bits stays exact
    with pytest.raises(InvalidRequest, match="capability 6.1"):
        with_int8_activations(linear_of(GptqForm(4, 64).tensors(), card=Card((6, 0), 56)))


@pytest.mark.parametrize("group_size", [16, 96])
def test_groups_without_a_kernel_are_refused(group_size):
    tensors = GptqForm(4, 32).tensors()
    groups = 384 // group_size
    tensors |= {"g_idx": torch.arange(384, dtype=torch.int32) // group_size, "scales": torch.ones(groups, 32).half()}
    tensors["qzeros"] = torch.zeros(groups, 4, dtype=torch.int32)
    if group_size == 16:
        assert linear_of(tensors).weight.group_shift == 1
        return
    with pytest.raises(UnsupportedCheckpoint, match="groups of 96 columns have no CUDA kernel"):
        linear_of(tensors)


def test_groups_of_different_sizes_are_refused():
    tensors = GptqForm(4, 32).tensors()
    tensors["g_idx"][0] = 3
    with pytest.raises(UnsupportedCheckpoint, match="quantize again"):
        linear_of(tensors)


def test_a_gpu_gets_its_own_linears(monkeypatch):
    """What `make_linear` does for a workspace on a GPU, up to the tensors' place."""
    asked = []
    monkeypatch.setattr(cuda_linear, "card_of", lambda device: CARD)
    monkeypatch.setattr(cuda_linear, "kernels_of", lambda device, files: asked.append((device, files)) or kernels())
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *place, to=torch.Tensor.to: tensor if place == (torch.device("cuda"),) else to(tensor, *place))
    linear = make_linear(GptqForm(4, 64).tensors(), workspace=Workspace("cuda"))
    assert isinstance(linear, CudaLinear) and asked == [(torch.device("cuda"), LINEAR_FILES)]
