"""The compiled kernels: their order of codes, and products against torch."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vlquant.bnb import quantize_int8
from vlquant.packing import dequantize_gptq, pack_gptq
from vlquant.runtime import native
from vlquant.runtime.native import (
    NativeLinear,
    factor_of,
    native_kernels,
    pack_codes,
    pack_half_bytes,
    pack_linear,
    pack_scales,
    packed_matrix,
    round_rows,
)


def test_they_are_built_here():
    # Every other test here would pass by being empty.
    assert native_kernels() is not None, "there are no compiled kernels here: with a C compiler on an x86-64 with AVX2, pip install again"


def random_codes(rows: int, columns: int, bits: int, groups: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    return codes, (torch.randn(groups, rows, generator=generator) / 100).half()


def weight_of(codes, scales, bits: int):
    return (codes.float() - 2 ** (bits - 1)) * scales.float().T.repeat_interleave(codes.shape[1] // len(scales), 1)


def as_read(x, bits: int):
    """Inputs as the kernels round them beside codes of so many bits: to 8 or 16, one scale for 32."""
    parts, largest = x.unflatten(-1, (-1, 32)), {4: 127, 8: 255 * 127 + 127}[bits]
    most = parts.abs().amax(-1, keepdim=True)
    return ((parts * torch.where(most > 0, largest / most, 0)).round() * (most / largest)).flatten(-2)


NEAR = {4: 2e-4, 8: 1e-5}
"""What results may differ by, by bits of the codes: a compiler may round an input that lies between two bytes either way."""


def test_codes_lie_by_panels_blocks_and_quads():
    codes = torch.arange(16 * 64).view(16, 64) % 251
    packed = pack_codes(codes.to(torch.uint8))
    assert packed.shape == (1, 2, 512)
    assert packed[0, 1, 64 * 3 + 4 * 5 + 2] == codes[5, 32 + 4 * 3 + 2]
    halves = pack_half_bytes((codes % 16).to(torch.uint8))
    assert halves.shape == (1, 2, 256)
    assert halves[0, 1, 64 * 3 + 4 * 5 + 2] == codes[5, 32 + 12 + 2] % 16 + 16 * (codes[5, 32 + 16 + 12 + 2] % 16)


def test_scales_lie_by_panels_and_rows_are_padded():
    scales = torch.arange(3 * 20).view(3, 20).half()
    packed = pack_scales(scales)
    assert packed.shape == (2, 3, 16)
    assert packed[1, 2, 3] == scales[2, 19] and packed[1, 2, 4] == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows, columns, group_size", [(896, 896, 128), (100, 64, 32), (33, 4864, 4864), (16, 32, 32), (260, 192, 64)])
def test_products_equal_torch_on_the_same_rounded_inputs(kernels, bits, rows, columns, group_size):
    codes, scales = random_codes(rows, columns, bits, columns // group_size)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    linear = NativeLinear(kernels, packed_matrix(codes, scales, bias, bits=bits))
    for count in (1, 2, 3, 6, 7, 13, 97, 200):
        x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count))
        wanted = as_read(x, bits) @ weight_of(codes, scales, bits).T + bias
        assert (linear(x) - wanted).abs().max() <= NEAR[bits] * wanted.abs().max()


def test_the_widest_codes_do_not_saturate(kernels):
    codes, scales = torch.full((16, 32), 255, dtype=torch.uint8), torch.ones(1, 16).half()
    x = torch.ones(1, 32)
    assert NativeLinear(kernels, packed_matrix(codes, scales, None, bits=8))(x)[0, 0] == pytest.approx(32 * 127)
    assert NativeLinear(kernels, packed_matrix(0 * codes, scales, None, bits=8))(-x)[0, 0] == pytest.approx(32 * 128)


def test_inputs_of_any_size(kernels):
    codes, scales = random_codes(32, 256, 8, 8)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-30], [1.0], [1e30]])
    x[:, 7] *= 1e3  # What massive activations look like.
    wanted = x.double() @ weight_of(codes, scales, 8).double().T
    found = NativeLinear(kernels, packed_matrix(codes, scales, None, bits=8))(x)
    assert ((found - wanted).abs().amax(1) <= 3e-4 * wanted.abs().amax(1)).all()


def test_numbers_that_are_none_stay_visible(kernels):
    codes, scales = random_codes(16, 64, 4, 2)
    linear = NativeLinear(kernels, packed_matrix(codes, scales, None, bits=4))
    for number in (float("nan"), float("inf")):
        x = torch.zeros(2, 64)
        x[0, 3] = number
        assert not linear(x)[0].isfinite().any() and not linear(x)[1].any()


def test_zeros_stay_zeros(kernels):
    codes, scales = random_codes(16, 64, 4, 2)
    assert not NativeLinear(kernels, packed_matrix(codes, scales, None, bits=4))(torch.zeros(3, 64)).any()


def test_any_shape_before_the_last(kernels):
    codes, scales = random_codes(40, 64, 4, 1)
    linear, x = NativeLinear(kernels, packed_matrix(codes, scales, None, bits=4)), torch.randn(2, 3, 64)
    assert linear(x).shape == (2, 3, 40)
    assert torch.equal(linear(x)[1, 2], linear(x[1, 2][None])[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gptq_linear_is_what_its_tensors_say(kernels, bits):
    codes, scales = random_codes(96, 128, bits, 4)
    tensors = pack_gptq(codes, scales, bits=bits, group_size=32)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    wanted = as_read(x, bits) @ dequantize_gptq(tensors, bits=bits).T
    assert torch.allclose(NativeLinear(kernels, pack_linear(tensors))(x), wanted, atol=NEAR[bits] * wanted.abs().max())


def test_an_int8_linear_is_what_its_tensors_say(kernels):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    tensors = quantize_int8(weight)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    wanted = as_read(x, 8) @ (tensors["weight"].float() * tensors["SCB"].float()[:, None] / 127).T
    # Scales are kept as halves, which have 11 bits.
    assert torch.allclose(NativeLinear(kernels, pack_linear(tensors))(x), wanted, atol=1e-3 * wanted.abs().max())


def test_other_forms_are_left_to_torch():
    codes, scales = random_codes(64, 96, 4, 3)
    tensors = pack_gptq(codes, scales, bits=4, group_size=32)
    assert pack_linear(tensors) is not None
    assert pack_linear({**tensors, "g_idx": tensors["g_idx"].flip(0)}) is None  # columns in another order
    assert pack_linear({**tensors, "qzeros": tensors["qzeros"] + 1}) is None  # zeros other than the middle
    assert pack_linear(pack_gptq(codes % 8, scales, bits=3, group_size=32)) is None
    assert pack_linear({"weight": torch.zeros(4, 32)}) is None
    assert packed_matrix(codes[:, :48], scales, None, bits=4) is None


def test_a_head_in_8_bits_is_within_half_a_code():
    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 100)[:, None]
    matrix = round_rows(weight)
    codes = matrix.codes.view(-1, 2, 8, 16, 4).permute(0, 3, 1, 2, 4).reshape(-1, 64)[:100].float() - 128
    scales = matrix.scales.float().reshape(-1)[:100, None]
    assert ((codes * scales - weight).abs() <= 0.51 * scales).all()
    assert not round_rows(torch.zeros(16, 32)).scales.any()


def test_a_head_is_rounded_alike_however_many_rows_at_once(monkeypatch):
    weight = torch.randn(70, 64)
    weight[3] = 0
    whole = round_rows(weight)
    monkeypatch.setattr(native, "ROWS_AT_ONCE", 16)
    parts = round_rows(weight)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-5, 1e-8])
def test_rows_of_any_size(kernels, size):
    # Halves have all their digits down to 6e-5 only, where scales of such rows are not.
    weight = torch.randn(20, 128, generator=torch.Generator().manual_seed(0)) * size
    weight[3] *= 100
    weight[5] = 0
    x = torch.eye(128)
    head = NativeLinear(kernels, round_rows(weight))(x).T
    assert ((head - weight).abs() <= 0.51 / 126 * weight.abs().amax(1, keepdim=True)).all()
    tensors = quantize_int8(weight)
    stored = tensors["weight"].float() * tensors["SCB"].float()[:, None] / 127
    found = NativeLinear(kernels, pack_linear(tensors))(x).T
    assert ((found - stored).abs() <= 1e-3 * stored.abs().amax(1, keepdim=True)).all()
    with_bias = NativeLinear(kernels, pack_linear({**tensors, "bias": torch.ones(20)}))(x).T
    assert torch.allclose(with_bias, found + 1)


def test_scales_are_moved_only_where_halves_do_not_reach():
    for scales, factor in (([1, 6.2e-5], 1), ([1, 0], 1), ([0, 0], 1), ([1, 6e-5], 0.5), ([2e-8, 3], 2**-12), ([1e-12, 3], 2**-13), ([7e4, 1], 1)):
        assert factor_of(torch.tensor([scales])) == factor, scales
    assert factor_of(torch.tensor([[6e-8]]).half()) == 1  # a half already


def test_python_threads_take_turns(kernels):
    codes, scales = random_codes(64, 256, 4, 2)
    linear = NativeLinear(kernels, packed_matrix(codes, scales, None, bits=4))
    inputs = [torch.randn(n, 256, generator=torch.Generator().manual_seed(n)) for n in range(1, 41)]
    wanted = [linear(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(linear, inputs), wanted))
