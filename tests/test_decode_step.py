"""A step over tensors that stay where they are decodes as the decoder called directly."""

import pytest
import torch

from vlquant.config import parse_config
from vlquant.decoder import Decoder, FloatLinear, KeyValueCache
from vlquant.rope import rotary_tables
from vlquant.members import MEMBERS, member_config
from vlquant.runtime import cuda_linear
from vlquant.runtime.cuda_attention import ATTENTION_FILES, DecodeAttention, attention_defines
from vlquant.runtime.cuda_linear import LINEAR_FILES, CudaLinear, kernel_weight
from vlquant.runtime.decode_step import DecodeStep, attend_stored, open_step, rotary_at
from vlquant.runtime.linear import Workspace

from tests.kernels_on_cpu import CARD, cpu_kernels, needs_compiler

LENGTH, STEPS = 9, 4


def padded_prompt(decoder, batch: int = 2):
    """Embeddings and mask of a batch whose second row is three shorter."""
    embeddings = torch.randn(batch, LENGTH, decoder.config.hidden_size, generator=torch.Generator().manual_seed(6)) * 0.1
    mask = torch.ones(batch, LENGTH, dtype=torch.bool)
    mask[1:, :3] = False
    return embeddings, mask


def directly(decoder, embeddings, mask, ids):
    """Logits of the steps, each by a call of the decoder."""
    cache = KeyValueCache(decoder.config, batch=len(mask), capacity=LENGTH + STEPS)
    decoder(embeddings, attention_mask=mask, cache=cache)
    found = []
    for step, each in enumerate(ids):
        seen = torch.cat((mask, torch.ones(len(mask), step + 1, dtype=torch.bool)), dim=1)
        found.append(decoder(decoder.embed(each[:, None]).float(), attention_mask=seen, cache=cache)[:, -1])
    return torch.stack(found)


def by_steps(decoder, embeddings, mask, ids, *, attention=attend_stored, dtype=torch.float32):
    cache = KeyValueCache(decoder.config, batch=len(mask), capacity=LENGTH + STEPS + 3, dtype=dtype)
    decoder(embeddings, attention_mask=mask, cache=cache)
    step = DecodeStep(decoder, cache, mask, attention=attention)
    return torch.stack([step(each).clone() for each in ids])


def some_ids(decoder):
    return torch.randint(0, decoder.config.vocab_size, (STEPS, 2), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def test_steps_equal_the_decoder(case):
    embeddings, mask = padded_prompt(case.decoder)
    ids = some_ids(case.decoder)
    found = by_steps(case.decoder, embeddings, mask, ids)
    torch.testing.assert_close(found, directly(case.decoder, embeddings, mask, ids), atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_half_a_cache_is_near(small_case):
    embeddings, mask = padded_prompt(small_case.decoder)
    ids = some_ids(small_case.decoder)
    expected = directly(small_case.decoder, embeddings, mask, ids)
    found = by_steps(small_case.decoder, embeddings, mask, ids, dtype=torch.float16)
    torch.testing.assert_close(found, expected, atol=5e-3 * float(expected.abs().max()), rtol=0)


def with_linears(decoder, make):
    """The decoder with other linears in the places of its float ones."""
    layers = [layer.with_linears({name: make(each) for name, each in layer.linears.items()}) for layer in decoder.layers]
    return Decoder(decoder.config, embedding=decoder.embedding, layers=layers, norm=decoder.norm, head=make(decoder.head))


@needs_compiler
@torch.inference_mode()
def test_kernels_in_their_places_equal_the_decoder(small_case, monkeypatch):
    """Float16 linears and attention by the kernels' own source: what a GPU is asked to do for one token."""
    # The prompt goes through a GEMM; in float32 this is a test of the step alone.
    monkeypatch.setattr(cuda_linear, "GEMM_DTYPES", (((0, 0), torch.float32),))
    decoder, kernels, workspace = small_case.decoder, cpu_kernels(LINEAR_FILES), Workspace()

    def by_kernel(linear):
        weight = kernel_weight({"weight": linear.weight.half()})
        return CudaLinear(weight, bias=linear.bias, workspace=workspace, kernels=kernels, card=CARD)

    def by_torch(linear):
        return FloatLinear(linear.weight.half().float(), linear.bias)

    attention = DecodeAttention(cpu_kernels(ATTENTION_FILES, attention_defines(decoder.config, torch.float32)), CARD)
    embeddings, mask = padded_prompt(decoder)
    ids = some_ids(decoder)[:2]
    kernels.launched.clear()
    found = by_steps(with_linears(decoder, by_kernel), embeddings, mask, ids, attention=attention)
    steps_and_head_of_the_prompt = 2 * (7 * decoder.config.layers + 1) + 1
    assert kernels.launched == ["gemv_float16_2"] * steps_and_head_of_the_prompt
    expected = directly(with_linears(decoder, by_torch), embeddings, mask, ids)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MEMBERS)
def test_rope_of_a_position_only_the_device_knows(name):
    """Below and beyond what dynamic NTK and long rope were made for."""
    config = parse_config(member_config(MEMBERS[name]), name).decoder
    for reach in (1, 4095, 4096, 4097, 32768, 32769, 40961, 70000):
        positions = torch.tensor([[reach - 1], [reach // 2]])
        for found, expected in zip(rotary_at(positions, config), rotary_tables(positions, config), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_cpu_calls_the_decoder_itself(small_case):
    embeddings, mask = padded_prompt(small_case.decoder)
    cache = KeyValueCache(small_case.decoder.config, batch=2, capacity=LENGTH)
    assert open_step(small_case.decoder, cache, mask) is None
