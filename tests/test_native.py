"""The compiled kernels: their order of codes, products against torch, and whole steps against the decoder in torch."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vlquant.bnb import quantize_int8
from vlquant.decoder import LINEARS, Decoder, DecoderConfig, DecoderLayer, KeyValueCache, Rope, norm_names
from vlquant.packing import dequantize_gptq, pack_gptq
from vlquant.runtime import native
from vlquant.runtime.native import (
    CHOICES,
    Kernels,
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
from vlquant.runtime.native_decoder import NativeDecoder, NativeLayer

FOUND = native_kernels()


@pytest.fixture(params=[name for name, number in CHOICES.items() if FOUND and number <= FOUND.instructions])
def kernels(request) -> Kernels:
    """The kernels for every set of instructions that this processor has."""
    return Kernels(FOUND.library._name, CHOICES[request.param])


def test_they_are_built_here():
    # Every other test here would pass by being empty.
    assert FOUND is not None, "there are no compiled kernels here: with a C compiler on an x86-64 with AVX2, pip install again"


def random_codes(rows: int, columns: int, bits: int, groups: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    return codes, (torch.randn(groups, rows, generator=generator) / 100).half()


def weight_of(codes, scales, bits: int):
    return (codes.float() - 2 ** (bits - 1)) * scales.float().T.repeat_interleave(codes.shape[1] // len(scales), 1)


def as_read(x):
    """Inputs as the kernels round them: 16 bits, one scale for 128."""
    parts = []
    for chunk in x.split(128, dim=-1):
        most = chunk.abs().amax(-1, keepdim=True)
        parts.append((chunk * torch.where(most > 0, 32512 / most, 0)).round() * (most / 32512))
    return torch.cat(parts, dim=-1)


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
        wanted = as_read(x) @ weight_of(codes, scales, bits).T + bias
        assert (linear(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_widest_codes_do_not_saturate(kernels):
    codes, scales = torch.full((16, 32), 255, dtype=torch.uint8), torch.ones(1, 16).half()
    x = torch.ones(1, 32)
    assert NativeLinear(kernels, packed_matrix(codes, scales, None, bits=8))(x)[0, 0] == pytest.approx(32 * 127)
    assert NativeLinear(kernels, packed_matrix(0 * codes, scales, None, bits=8))(-x)[0, 0] == pytest.approx(32 * 128)


def test_inputs_of_any_size(kernels):
    codes, scales = random_codes(32, 256, 4, 8)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-30], [1.0], [1e30]])
    x[:, 7] *= 1e3  # What massive activations look like.
    wanted = x.double() @ weight_of(codes, scales, 4).double().T
    found = NativeLinear(kernels, packed_matrix(codes, scales, None, bits=4))(x)
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
    wanted = as_read(x) @ dequantize_gptq(tensors, bits=bits).T
    assert torch.allclose(NativeLinear(kernels, pack_linear(tensors))(x), wanted, atol=1e-5 * wanted.abs().max())


def test_an_int8_linear_is_what_its_tensors_say(kernels):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    tensors = quantize_int8(weight)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    wanted = as_read(x) @ (tensors["weight"].float() * tensors["SCB"].float()[:, None] / 127).T
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


CONFIGS = {
    "biases": DecoderConfig(64, 2, 4, 2, 16, 128, 100, 1e-6, Rope(1e4), 4096, query_key_value_bias=True),
    "norms of heads": DecoderConfig(128, 3, 4, 4, 32, 256, 100, 1e-6, Rope(1e4), 4096, query_key_norm=True),
    "seven heads to a key": DecoderConfig(896, 2, 14, 2, 64, 4864, 100, 1e-6, Rope(1e6), 4096),
    "Phi's width": DecoderConfig(192, 2, 2, 1, 96, 64, 100, 1e-5, Rope(1e6), 4096),
    "wide heads, dynamic rope": DecoderConfig(256, 2, 2, 1, 128, 96, 100, 1e-5, Rope(1e6, dynamic_factor=2.0), 64),
}


def decoders(config: DecoderConfig, kernels: Kernels) -> tuple[NativeDecoder, Decoder]:
    """A compiled decoder, and torch with the same compiled products between its operations."""
    generator = torch.Generator().manual_seed(0)
    width, narrow = config.heads * config.head_dim, config.key_value_heads * config.head_dim
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes = zip(LINEARS, ((width, hidden), (narrow, hidden), (narrow, hidden), (hidden, width), (wide, hidden), (wide, hidden), (hidden, wide)), strict=True)
    shapes, native, layers = dict(shapes), [], []
    for _ in range(config.layers):
        linears = {}
        for name, (rows, columns) in shapes.items():
            codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
            scales = ((torch.rand(columns // 32, rows, generator=generator) + 0.5) / 4 / columns**0.5).half()
            bias = torch.randn(rows, generator=generator) / 10 if config.query_key_value_bias and name[10] in "qkv" else None
            linears[name] = packed_matrix(codes, scales, bias, bits=4)
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
def test_steps_equal_the_decoder_in_torch(kernels, name, length, pads):
    config = CONFIGS[name]
    native, wanted = decoders(config, kernels)
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
        assert apart < 2e-4, apart


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


def test_python_threads_take_turns(kernels):
    codes, scales = random_codes(64, 256, 4, 2)
    linear = NativeLinear(kernels, packed_matrix(codes, scales, None, bits=4))
    inputs = [torch.randn(n, 256, generator=torch.Generator().manual_seed(n)) for n in range(1, 41)]
    wanted = [linear(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(linear, inputs), wanted))


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


def test_neighbours_and_pieces_change_no_bit(kernels):
    # Every sum is formed in the same order whoever stands beside it: a check asks in batches, a chat alone.
    native, _ = decoders(CONFIGS["norms of heads"], kernels)
    x = torch.randn(3, 50, 128, generator=torch.Generator().manual_seed(0))
    together = native(x, all_positions=True)
    cache = native.new_cache(batch=1, capacity=50)
    pieces = torch.cat([native(part, cache=cache, all_positions=True) for part in x[1:2].split([20, 1, 22, 7], 1)], 1)
    assert torch.equal(pieces[0], together[1])
