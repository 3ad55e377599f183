"""The kernel's own source on the CPU mixes values as torch does, for every shape of head in the family."""

import pytest
import torch

from vlquant.decoder import attend
from vlquant.decoder_config import DecoderConfig, Rope
from vlquant.members import MEMBERS
from vlquant.runtime import cuda_attention
from vlquant.runtime.cuda_attention import ATTENTION_FILES, DecodeAttention, attention_defines, open_attention, splits_of
from vlquant.runtime.decode_step import attend_stored

from tests.kernels_on_cpu import CARD, cpu_kernels, needs_compiler

HEADS = {
    (member.heads, member.key_value_heads, member.more.get("head_dim", member.hidden_size // member.heads))
    for member in MEMBERS.values()
}
GROUPS = sorted({(heads // key_heads, head_dim) for heads, key_heads, head_dim in HEADS})
"""Query heads per key head, and features of a head: what the kernels are compiled for."""
LARGE = DecoderConfig(64, 1, 8, 2, 256, 64, 10, 1e-6, Rope(1e4), 100)


def shape(group: int, head_dim: int) -> DecoderConfig:
    return DecoderConfig(64, 1, 2 * group, 2, head_dim, 64, 10, 1e-6, Rope(1e4), 100)


def compiled(config: DecoderConfig, dtype: torch.dtype, **options) -> DecodeAttention:
    return DecodeAttention(cpu_kernels(ATTENTION_FILES, attention_defines(config, dtype), **options), CARD)


def inputs(config: DecoderConfig, dtype: torch.dtype, *, batch: int = 2, capacity: int = 50):
    generator = torch.Generator().manual_seed(capacity)
    queries = torch.randn(batch, config.heads, 1, config.head_dim, generator=generator)
    keys, values = torch.randn(2, batch, config.key_value_heads, capacity, config.head_dim, generator=generator).to(dtype)
    return queries, keys.contiguous(), values.contiguous()


def expected(queries, keys, values, first, stored):
    """Each row by itself, over exactly what it sees."""
    rows = [
        attend(queries[row : row + 1], keys[row : row + 1, :, start:stored].float(), values[row : row + 1, :, start:stored].float(), None)
        for row, start in enumerate(first)
    ]
    return torch.cat(rows)


def on_device(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@needs_compiler
@pytest.mark.parametrize(("group", "head_dim"), GROUPS)
def test_heads_of_every_member(group, head_dim):
    config = shape(group, head_dim)
    given = inputs(config, torch.float16)
    found = compiled(config, torch.float16)(*given, on_device([0, 13]), on_device([41]))
    torch.testing.assert_close(found, expected(*given, [0, 13], 41), atol=2e-6, rtol=1e-5)


@needs_compiler
def test_the_widest_head(monkeypatch):
    monkeypatch.setattr(cuda_attention, "kernels_of", lambda device, files, defines: cpu_kernels(files, defines))
    monkeypatch.setattr(cuda_attention, "card_of", lambda device: CARD)
    widest = shape(1, 256)
    given = inputs(widest, torch.float32)
    found = open_attention(widest, torch.device("cpu"), torch.float32)(*given, on_device([0, 13]), on_device([41]))
    torch.testing.assert_close(found, expected(*given, [0, 13], 41), atol=2e-6, rtol=1e-5)
    for head_dim in (264, 320, 60):  # Wider than a warp, or no whole slices: torch's attention.
        assert open_attention(shape(1, head_dim), torch.device("cpu"), torch.float32) is None


@needs_compiler
@pytest.mark.parametrize("stored", [1, 2, 7, 28, 50])
@pytest.mark.parametrize("first", [[0, 0], [0, 1]], ids=str)
def test_any_length(stored, first):
    config, first = shape(4, 64), [min(start, stored - 1) for start in first]
    given = inputs(config, torch.float32)
    found = compiled(config, torch.float32)(*given, on_device(first), on_device([stored]))
    torch.testing.assert_close(found, expected(*given, first, stored), atol=2e-6, rtol=1e-5)


@needs_compiler
def test_wide_heads():
    given = inputs(LARGE, torch.float32)
    found = compiled(LARGE, torch.float32)(*given, on_device([0, 3]), on_device([50]))
    torch.testing.assert_close(found, expected(*given, [0, 3], 50), atol=2e-6, rtol=1e-5)


@needs_compiler
def test_large_scores_stay_finite():
    config = shape(2, 64)
    queries, keys, values = inputs(config, torch.float32)
    given = queries * 300, keys, values
    found = compiled(config, torch.float32)(*given, on_device([0, 0]), on_device([50]))
    torch.testing.assert_close(found, expected(*given, [0, 0], 50), atol=1e-4, rtol=1e-4)


@needs_compiler
def test_what_lies_beyond_is_not_read():
    config = shape(4, 64)
    queries, keys, values = inputs(config, torch.float16)
    before = compiled(config, torch.float16)(queries, keys, values, on_device([2, 5]), on_device([30]))
    for each in (keys, values):
        each[:, :, 30:] = float("nan")
        each[0, :, :2] = each[1, :, :5] = float("nan")
    after = compiled(config, torch.float16)(queries, keys, values, on_device([2, 5]), on_device([30]))
    assert torch.equal(before, after) and bool(after.isfinite().all())


@needs_compiler
def test_the_order_of_threads_does_not_matter():
    """A missing barrier would show."""
    config = shape(4, 128)
    given = *inputs(config, torch.float16), on_device([0, 9]), on_device([47])
    assert torch.equal(compiled(config, torch.float16)(*given), compiled(config, torch.float16, backwards=True)(*given))


def test_torch_over_the_whole_buffer_is_the_same():
    config = shape(7, 64)
    given = inputs(config, torch.float16)
    for each in given[1:]:
        each[:, :, 41:] = float("nan")  # as unwritten memory may be
    found = attend_stored(*given, on_device([0, 13]), on_device([41]))
    torch.testing.assert_close(found, expected(*given, [0, 13], 41), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("rows", "processors", "splits"), [(8, 28, 14), (2, 28, 56), (1, 132, 64), (256, 28, 1)])
def test_a_card_is_filled_and_not_drowned(rows, processors, splits):
    assert splits_of(rows, processors) == splits
