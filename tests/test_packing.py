"""The GPTQ v1 format: bytes worked out by hand, and what GPTQModel makes of our tensors (recorded)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlquant import packing

RECORDED = Path(__file__).parent / "data" / "gptqmodel_dequantized.safetensors"


def test_four_bit_golden_words():
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, :8] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])  # output 0, inputs 0 .. 7
    codes[3, 8:16] = 15
    codes[31, 31] = 9
    packed = packing.pack_gptq(codes, torch.ones(1, 32, dtype=torch.float16), bits=4, group_size=32)
    assert packed["qweight"].shape == (4, 32)
    assert packed["qweight"][0, 0] == 0x87654321 - 2**32
    assert packed["qweight"][1, 3] == -1
    assert packed["qweight"][3, 31] == 0x90000000 - 2**32
    assert packed["qweight"].count_nonzero() == 3
    assert packed["qzeros"].shape == (1, 4)
    assert (packed["qzeros"] == 0x77777777).all()


def test_eight_bit_golden_words():
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    codes[2, 4:8] = torch.tensor([0x11, 0x22, 0x33, 0xF4])
    packed = packing.pack_gptq(codes, torch.ones(2, 32, dtype=torch.float16), bits=8, group_size=32)
    assert packed["qweight"].shape == (16, 32)
    assert packed["qweight"][1, 2] == 0xF4332211 - 2**32
    assert packed["qzeros"].shape == (2, 8)
    assert (packed["qzeros"] == 0x7F7F7F7F).all()
    assert packed["g_idx"].tolist() == [0] * 32 + [1] * 32


def test_dtypes_are_those_of_the_format():
    packed = packing.pack_gptq(
        torch.zeros(32, 64, dtype=torch.uint8), torch.ones(1, 32, dtype=torch.float16), bits=4, group_size=-1
    )
    assert {name: tensor.dtype for name, tensor in packed.items()} == {
        "qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32,
    }  # fmt: skip
    assert packed["g_idx"].tolist() == [0] * 64
    assert all(tensor.is_contiguous() for tensor in packed.values())


def test_three_bits_are_a_stream_as_in_autogptq():
    """Codes 10 and 21 of every 32 lie across the ends of words."""
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10], codes[1, 21], codes[2, 0], codes[3, 31] = 0b101, 0b011, 7, 7
    words = packing.pack_gptq(codes, torch.ones(1, 32, dtype=torch.float16), bits=3, group_size=32)["qweight"]
    assert words.shape == (3, 32)
    assert (words[:, 0].long() & 2**32 - 1).tolist() == [0b01 << 30, 1, 0]
    assert (words[:, 1].long() & 2**32 - 1).tolist() == [0, 1 << 31, 0b01]
    assert words[:, 2].tolist() == [7, 0, 0] and words[2, 3] == (7 << 29) - 2**32


@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (3, -1), (4, 32), (4, 128), (4, -1), (8, 64)])
def test_unpacking_returns_what_was_packed(bits, group_size):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (96, 256), dtype=torch.uint8, generator=generator)
    groups = 1 if group_size == -1 else 256 // group_size
    scales = torch.randn(groups, 96, generator=generator).to(torch.float16)
    packed = packing.pack_gptq(codes, scales, bits=bits, group_size=group_size)
    got_codes, got_scales, zeros = packing.unpack_gptq(packed, bits)
    assert torch.equal(got_codes, codes) and torch.equal(got_scales, scales)
    assert (zeros == 2 ** (bits - 1)).all()
    expected = (codes.float() - 2 ** (bits - 1)) * scales.T.float().repeat_interleave(256 // groups, 1)
    assert torch.equal(packing.dequantize_gptq(packed, bits=bits), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptqmodel_dequantizes_our_tensors_as_we_do(bits):
    recorded = load_file(RECORDED)
    names = ("qweight", "qzeros", "scales", "g_idx")
    packed = {name: recorded[f"bits{bits}.{name}"] for name in names}
    codes, scales, _ = packing.unpack_gptq(packed, bits)
    assert (scales < 0).any() and (scales > 0).any()
    assert codes.unique().numel() > 2**bits * 0.9
    again = packing.pack_gptq(codes, scales, bits=bits, group_size=64)
    assert all(torch.equal(again[name], packed[name]) for name in names)
    # Theirs is computed in float16, ours in float32: products of a float16 and an integer, rounded once.
    ours = packing.dequantize_gptq(packed, bits=bits).to(torch.float16)
    assert torch.equal(ours, recorded[f"bits{bits}.dequantized"])
