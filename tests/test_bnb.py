"""NF4 and LLM.int8 tensors against bitsandbytes' own dequantization."""

import bitsandbytes.functional as functional
import pytest
import torch

from vlquant import bnb



@pytest.fixture(params=[(96, 256), (64, 72), (160, 1024)], ids=str)
def weight(request):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(request.param, generator=generator) * 0.03


def test_nf4_equals_the_library(weight):
    tensors = bnb.quantize_nf4(weight)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(bnb.dequantize_nf4(tensors), functional.dequantize_4bit(packed, state))
    assert ((bnb.dequantize_nf4(tensors) - weight).norm() / weight.norm()) < 0.11


def test_nf4_tensors_are_named_and_shaped_as_transformers_stores_them(weight):
    tensors = bnb.quantize_nf4(weight.to(torch.bfloat16))
    blocks = -(-weight.numel() // 64)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items() if name != bnb.STATE}
    assert shapes == {
        "weight": (torch.uint8, (weight.numel() // 2, 1)),
        "weight.absmax": (torch.uint8, (blocks,)),
        "weight.quant_map": (torch.float32, (16,)),
        "weight.nested_absmax": (torch.float32, (-(-blocks // 256),)),
        "weight.nested_quant_map": (torch.float32, (256,)),
    }
    state = bnb.nf4_state(tensors)
    assert state["dtype"] == "bfloat16" and state["shape"] == list(weight.shape) and state["blocksize"] == 64


def test_nf4_high_half_of_a_byte_comes_first():
    weight = torch.full((32, 64), -1.0)
    weight[0, 0] = 1.0
    assert bnb.quantize_nf4(weight)["weight"][0, 0] == 0xF0  # code 15 is +1, code 0 is -1


def test_int8_equals_the_library(weight):
    tensors = bnb.quantize_int8(weight)
    codes, row_maxima, _ = functional.int8_vectorwise_quant(weight.half())
    assert torch.equal(tensors["weight"], codes) and torch.equal(tensors["SCB"], row_maxima)
    library = functional.int8_vectorwise_dequant(codes, row_maxima)
    torch.testing.assert_close(bnb.dequantize_int8(tensors), library, rtol=1e-6, atol=0)
    assert tensors["weight_format"].dtype == torch.uint8 and int(tensors["weight_format"]) == 0
    assert ((bnb.dequantize_int8(tensors) - weight).norm() / weight.norm()) < 0.01
