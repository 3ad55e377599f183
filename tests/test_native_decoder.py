"""Whole compiled steps of all layers against the decoder in torch."""

import itertools

import pytest
import torch

from vlquant.decoder import LINEARS, Decoder, DecoderLayer, KeyValueCache, norm_names
from vlquant.decoder_config import DecoderConfig, Rope
from vlquant.runtime.native import Kernels, NativeLinear, packed_matrix, round_rows
from vlquant.runtime.native_decoder import NativeDecoder, NativeLayer

CONFIGS = {
    "biases": DecoderConfig(64, 2, 4, 2, 16, 128, 100, 1e-6, Rope(1e4), 4096, query_key_value_bias=True),
    "norms of heads": DecoderConfig(128, 3, 4, 4, 32, 256, 100, 1e-6, Rope(1e4), 4096, query_key_norm=True),
    "seven heads to a key": DecoderConfig(896, 2, 14, 2, 64, 4864, 100, 1e-6, Rope(1e6), 4096),
    "Phi's width": DecoderConfig(192, 2, 2, 1, 96, 64, 100, 1e-5, Rope(1e6), 4096),
    "wide heads, dynamic rope": DecoderConfig(256, 2, 2, 1, 128, 96, 100, 1e-5, Rope(1e6, dynamic_factor=2.0), 64),
}


def decoders(config: DecoderConfig, kernels: Kernels, bits: tuple[int, ...] = (8,)) -> tuple[NativeDecoder, Decoder]:
    """A compiled decoder, and torch with the same compiled products between its operations.

    With codes of 4 bits differences in the last place grow where they round an input to another byte.
    """
    generator = torch.Generator().manual_seed(0)
    width, narrow = config.heads * config.head_dim, config.key_value_heads * config.head_dim
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes = zip(LINEARS, ((width, hidden), (narrow, hidden), (narrow, hidden), (hidden, width), (wide, hidden), (wide, hidden), (hidden, wide)), strict=True)
    shapes, native, layers = dict(shapes), [], []
    for _ in range(config.layers):
        linears = {}
        for own, (name, (rows, columns)) in zip(itertools.cycle(bits), shapes.items()):
            codes = torch.randint(0, 2**own, (rows, columns), dtype=torch.uint8, generator=generator)
            scales = ((torch.rand(columns // 32, rows, generator=generator) + 0.5) * 4 / 2**own / columns**0.5).half()
            bias = torch.randn(rows, generator=generator) / 10 if config.query_key_value_bias and name[10] in "qkv" else None
            linears[name] = packed_matrix(codes, scales, bias, bits=own)
        norms = {
            name: torch.rand(config.head_dim if "attn." in name else hidden, generator=generator) + 0.5
            for name in norm_names(config)
        }
        native.append(NativeLayer(linears, norms))
        layers.append(DecoderLayer(config, {name: NativeLinear(kernels, each) for name, each in linears.items()}, norms))
    embedding = torch.randn(config.vocab_size, hidden, generator=generator)
    head = NativeLinear(kernels, round_rows(torch.randn(config.vocab_size, hidden, generator=generator) / hidden**0.5))
    shared = {"norm": torch.ones(hidden), "head": head}
    return (
        NativeDecoder(config, kernels, embedding=lambda ids: embedding[ids], layers=native, **shared),
        Decoder(config, embedding=embedding, layers=layers, **shared),
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length, pads", [(5, [0]), (300, [0]), (37, [0, 5, 20])])
@pytest.mark.parametrize("bits, allowed", [((8,), 2e-4), ((4,), 2e-2), ((4, 8), 2e-2)])
def test_steps_equal_the_decoder_in_torch(kernels, name, length, pads, bits, allowed):
    config = CONFIGS[name]
    native, wanted = decoders(config, kernels, bits)
    generator, batch = torch.Generator().manual_seed(1), len(pads)
    mask = torch.arange(length + 3)[None] >= torch.tensor(pads)[:, None]
    pieces = [torch.randn(batch, count, config.hidden_size, generator=generator) for count in (length, 1, 2)]
    caches = native.new_cache(batch=batch, capacity=length + 3), KeyValueCache(config, batch=batch, capacity=length + 3)
    end = 0
    for piece in pieces:
        end += piece.shape[1]
        found, right = (
            each(piece, attention_mask=mask[:, :end], cache=cache, all_positions=True)
            for each, cache in zip((native, wanted), caches, strict=True)
        )
        seen = mask[:, end - piece.shape[1] : end]
        apart = (found - right)[seen].norm() / right[seen].norm()
        assert apart < allowed, apart


@pytest.mark.parametrize("largest", [30, 88, 110, 300, 3e4])
def test_gates_of_any_size(kernels, largest):
    # Far below zero silu is 0: an exponential that overflows would give the gate itself.
    native, wanted = decoders(DecoderConfig(64, 1, 4, 2, 16, 128, 100, 1e-6, Rope(1e4), 4096), kernels)
    x = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1))
    gate, gates = wanted.layers[0].linears["mlp.gate_proj"], []
    wanted.layers[0].linears["mlp.gate_proj"] = lambda rows: gates.append(gate(rows)) or gates[-1].clone()
    wanted(x)
    gate.matrix.scales.mul_(largest / float(gates.pop().abs().max()))
    found, right = native(x, all_positions=True), wanted(x, all_positions=True)
    assert -1.01 * largest < gates[0].min() < -0.7 * largest and 0.7 * largest < gates[0].max()
    assert (found - right).norm() < 2e-4 * right.norm()


def test_the_last_position_alone_has_the_same_logits(kernels):
    native, _ = decoders(CONFIGS["biases"], kernels)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(native(x)[:, 0], native(x, all_positions=True)[:, -1])


def test_threads_change_nothing(kernels):
    native, _ = decoders(CONFIGS["biases"], kernels)
    x, before = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_cache_of_8_bits_is_close_and_not_the_same(kernels):
    native, _ = decoders(CONFIGS["seven heads to a key"], kernels)
    x = torch.randn(2, 40, 896, generator=torch.Generator().manual_seed(0))
    found = {}
    for bits in (32, 8):
        cache = native.new_cache(batch=2, capacity=60, bits=bits)
        found[bits] = torch.cat([native(part, cache=cache, all_positions=True) for part in x.split([30, 1, 9], 1)], 1)
    apart = (found[8] - found[32]).norm() / found[32].norm()
    assert 0 < apart < 0.1
    small, large = (native.new_cache(batch=1, capacity=64, bits=bits).keys.nbytes for bits in (8, 32))
    assert 4 * small == large


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_positions_that_are_no_numbers_stay_visible(kernels, bits, number):
    native, _ = decoders(CONFIGS["biases"], kernels)
    x = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0))
    x[0, 12] = number
    finite = native(x, cache=native.new_cache(batch=1, capacity=32, bits=bits), all_positions=True)[0].isfinite()
    assert not finite[12:].any() and finite[:8].all()


@pytest.mark.parametrize("room, batch", [(16, 1), (40_000, 2)])
def test_what_does_not_fit_the_cache_is_refused(kernels, room, batch):
    native, _ = decoders(CONFIGS["biases"], kernels)
    cache = native.new_cache(batch=1, capacity=room)
    native(torch.zeros(1, 10, 64), cache=cache)
    with pytest.raises(ValueError, match="cache"):
        native(torch.zeros(batch, 7, 64), cache=cache)
    assert cache.length == 10


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("before, after, moved", [(40, 77, True), (40, 48, False), (77, 40, False), (99, 40, True)])
def test_a_kept_cache_goes_on_to_the_bit(kernels, bits, before, after, moved):
    native, _ = decoders(CONFIGS["biases"], kernels)
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    cache = native.new_cache(batch=1, capacity=before, bits=bits)
    wanted = native(x, cache=cache, all_positions=True)
    place = cache.keys.data_ptr()
    cache.keep(21, after)
    assert cache.length == 21 and cache.capacity >= after and (cache.keys.data_ptr() != place) == moved
    assert torch.equal(native(x[:, 21:], cache=cache, all_positions=True), wanted[:, 21:])


@pytest.mark.parametrize("bits", [(4,), (8,)])
def test_neighbours_and_pieces_change_no_bit(kernels, bits):
    # Every sum is formed in the same order whoever stands beside it: a check asks in batches, a chat alone.
    native, _ = decoders(CONFIGS["norms of heads"], kernels, bits)
    x = torch.randn(3, 50, 128, generator=torch.Generator().manual_seed(0))
    together = native(x, all_positions=True)
    cache = native.new_cache(batch=1, capacity=50)
    pieces = torch.cat([native(part, cache=cache, all_positions=True) for part in x[1:2].split([20, 1, 22, 7], 1)], 1)
    assert torch.equal(pieces[0], together[1])


@pytest.mark.parametrize("bits", [(4,), (8,)])
@pytest.mark.parametrize("cache_bits", [32, 8])
def test_padding_changes_no_bit(kernels, bits, cache_bits):
    native, _ = decoders(CONFIGS["norms of heads"], kernels, bits)
    x = torch.randn(1, 300, 128, generator=torch.Generator().manual_seed(0))
    for length, padding in ((50, 1), (50, 3), (50, 8), (50, 21), (300, 5), (300, 300)):  # 256 go through the layers together.
        own = x[:, :length]
        alone = native(own, cache=native.new_cache(batch=1, capacity=length, bits=cache_bits), all_positions=True)
        mask = torch.arange(length + padding)[None] >= padding
        cache = native.new_cache(batch=1, capacity=length + padding, bits=cache_bits)
        padded = native(torch.cat([own[:, :padding], own], 1), attention_mask=mask, cache=cache, all_positions=True)
        assert torch.equal(padded[:, padding:], alone), (length, padding)
