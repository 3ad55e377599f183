"""Packed matmuls equal the float ones they stand for, and a decoder of packed linears equals one of expanded weights."""

import pytest
import torch
import torch.nn.functional as F

from vlquant.bnb import dequantize_int8, dequantize_nf4, quantize_int8, quantize_nf4
from vlquant.errors import UnsupportedCheckpoint
from vlquant.packing import _pack_rows, dequantize_gptq, pack_gptq
from vlquant.runtime import linear
from vlquant.runtime.linear import StoredLinear, Workspace, make_linear

SHAPES = [(64, 128), (192, 256), (96, 384), (32, 64)]


def gptq_tensors(shape, *, bits, group_size):
    generator = torch.Generator().manual_seed(3)
    out_features, in_features = shape
    groups = 1 if group_size == -1 else in_features // group_size
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    scales = torch.randn(groups, out_features, generator=generator).mul(0.01).half()
    return pack_gptq(codes, scales, bits=bits, group_size=group_size)


def weight_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.05


def inputs(in_features):
    return torch.randn(2, 3, in_features, generator=torch.Generator().manual_seed(4))


def packed_and_expanded(kind, shape):
    """Tensors of one linear, and the float weight they stand for."""
    if kind.startswith("gptq"):
        bits, group_size = int(kind[4]), int(kind.split("g", 2)[2])
        tensors = gptq_tensors(shape, bits=bits, group_size=group_size)
        return tensors, dequantize_gptq(tensors, bits=bits)
    if kind == "nf4":
        tensors = quantize_nf4(weight_of(shape))
        return tensors, dequantize_nf4(tensors)
    tensors = quantize_int8(weight_of(shape))
    return tensors, dequantize_int8(tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["gptq4g64", "gptq4g32", "gptq4g-1", "gptq8g64", "gptq8g-1", "nf4", "int8"])
@pytest.mark.parametrize("blocks", ["one block", "several blocks"])
def test_packed_linear_equals_float_matmul(kind, shape, blocks, monkeypatch):
    if blocks == "several blocks":
        monkeypatch.setattr(linear, "BLOCK_ELEMENTS", 64)
    tensors, weight = packed_and_expanded(kind, shape)
    bias = torch.linspace(-1, 1, shape[0])
    packed = make_linear({**tensors, "bias": bias.half()}, workspace=Workspace())
    x = inputs(shape[1])
    torch.testing.assert_close(packed(x), F.linear(x, weight, bias.half().float()), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gptq4g64", "gptq8g64", "nf4"])
def test_expanded_rows_are_exactly_the_dequantized_ones(kind):
    tensors, weight = packed_and_expanded(kind, (192, 256))
    packed = make_linear(tensors, workspace=Workspace())
    assert torch.equal(packed.expand(0, 192), weight)
    assert torch.equal(packed.expand(64, 128), weight[64:128])


def test_four_bits_stay_four_bits():
    tensors, _ = packed_and_expanded("gptq4g64", (192, 256))
    packed = make_linear(tensors, workspace=Workspace())
    assert packed.codes.nbytes == 192 * 256 // 2
    tensors, _ = packed_and_expanded("nf4", (192, 256))
    assert make_linear(tensors, workspace=Workspace()).codes.nbytes == 192 * 256 // 2


def test_nf4_with_an_incomplete_last_block():
    weight = weight_of((7, 10))
    tensors = quantize_nf4(weight)
    packed = make_linear(tensors, workspace=Workspace())
    x = inputs(10)
    torch.testing.assert_close(packed(x), F.linear(x, dequantize_nf4(tensors)), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float_weights_keep_their_stored_precision(dtype):
    weight, x = weight_of((192, 256)).to(dtype), inputs(256)
    stored = make_linear({"weight": weight}, workspace=Workspace())
    assert stored.weight.dtype == dtype
    torch.testing.assert_close(stored(x), F.linear(x, weight.float()))


def test_linears_sharing_a_workspace_do_not_disturb_each_other():
    workspace = Workspace()
    (small, small_weight), (large, large_weight) = (packed_and_expanded("gptq4g64", s) for s in ((64, 128), (192, 128)))
    first, second = make_linear(small, workspace=workspace), make_linear(large, workspace=workspace)
    x = inputs(128)
    results = first(x), second(x), first(x)
    torch.testing.assert_close(results[0], F.linear(x, small_weight), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(results[1], F.linear(x, large_weight), atol=2e-6, rtol=1e-5)
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_what_others_write_is_read(bits, version):
    """Groups in another order than their columns, zeros anywhere: each weight is scale * (code - zero)."""
    generator = torch.Generator().manual_seed(8)
    codes = torch.randint(0, 2**bits, (64, 128), dtype=torch.uint8, generator=generator)
    scales = torch.randn(4, 64, generator=generator).mul(0.01).half()
    zeros = torch.randint(0, 2**bits, (4, 64), generator=generator)
    group = (torch.arange(128) // 32)[torch.randperm(128, generator=generator)]
    stored = ((zeros - 1) % 2**bits if version == 1 else zeros).to(torch.uint8)
    tensors = pack_gptq(codes, scales, bits=bits, group_size=32)
    tensors |= {"g_idx": group.to(torch.int32), "qzeros": _pack_rows(stored.T, bits).T.contiguous()}
    weight = torch.stack([scales[g].float() * (codes[:, column] - zeros[g]) for column, g in enumerate(group)], dim=1)
    x = inputs(128)
    found = make_linear(tensors, workspace=Workspace(), gptq_version=version)(x)
    torch.testing.assert_close(found, F.linear(x, weight), atol=2e-5, rtol=1e-5)


def test_groups_of_different_sizes_are_refused():
    tensors = gptq_tensors((64, 128), bits=4, group_size=32)
    tensors["g_idx"][0] = 3
    with pytest.raises(UnsupportedCheckpoint, match="quantize again"):
        make_linear(tensors, workspace=Workspace())


def test_no_bias_leaves_zero_at_zero():
    packed = StoredLinear(weight_of((8, 4)).half(), workspace=Workspace())
    assert torch.equal(packed(torch.zeros(1, 4)), torch.zeros(1, 8))


def test_inference_mode_may_come_and_go():
    tensors, weight = packed_and_expanded("nf4", (192, 256))
    packed, x = make_linear(tensors, workspace=Workspace()), inputs(256)
    with torch.inference_mode():
        first = packed(x)
    torch.testing.assert_close(packed(x), first.clone())
