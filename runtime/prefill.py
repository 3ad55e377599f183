"""A prompt into the cache: on a GPU in parts so that activations of a long one stay small, in torch on a CPU row by row.

Knows a decoder, no ids or text.
"""

import torch
from torch import Tensor

from vlquant.decoder import Decoder, KeyValueCache
from vlquant.rope import rope_depends_on_length
from vlquant.runtime.conversation_cache import Cache
from vlquant.runtime.native_decoder import NativeDecoder

TOKENS_AT_A_TIME = {"cpu": None, "cuda": 1024}
"""By device; None: all at once, or row by row. A part expands every weight again, which costs a few percent of its arithmetic at 1024."""

ROWS_ALONE = 256
"""Tokens of the shortest row of a batch from which on each goes in alone: every one of them expands every weight again."""


def prefill(
    decoder: Decoder | NativeDecoder, embeddings: Tensor, attention_mask: Tensor, cache: Cache, *, at_a_time: int | None = None
) -> Tensor:
    """Logits float32 [batch, vocab] after a prompt, which is in the cache then.

    embeddings: [batch, length, hidden_size]; attention_mask: bool [batch, cached + length], False where a row is padded left;
    at_a_time: tokens per part of all rows, None: as the device has it. A prompt that long rope or dynamic NTK treats otherwise than a
    shorter one goes in whole, as the original has it.
    """
    length = embeddings.shape[1]
    if at_a_time is None and cache_takes_rows(decoder, attention_mask, cache):
        return prefill_rows(decoder, embeddings, attention_mask, cache)
    part = at_a_time or TOKENS_AT_A_TIME[embeddings.device.type] or length
    known = cache.length
    if rope_depends_on_length(decoder.config, known + length):
        part = length
    for start in range(0, length, part):
        stop = min(start + part, length)
        logits = decoder(embeddings[:, start:stop], attention_mask=attention_mask[:, : known + stop], cache=cache)
    return logits[:, -1]


def cache_takes_rows(decoder: Decoder | NativeDecoder, attention_mask: Tensor, cache: Cache) -> bool:
    """Whether rows of different lengths go in one by one: in torch on a CPU, unless one changes how the others are turned."""
    plain = isinstance(cache, KeyValueCache) and not cache.length and not attention_mask.is_cuda
    lengths = attention_mask.sum(dim=1)
    apart = ROWS_ALONE <= lengths.min() < lengths.max()
    return bool(plain and apart) and not rope_depends_on_length(decoder.config, attention_mask.shape[1])


def prefill_rows(decoder: Decoder, embeddings: Tensor, attention_mask: Tensor, cache: KeyValueCache) -> Tensor:
    """As `prefill`. Padding takes no time then, and attention without a mask a fifth of it."""
    length, found = embeddings.shape[1], []
    for index, start in enumerate((~attention_mask.bool()).sum(dim=1).tolist()):
        found.append(decoder(embeddings[index : index + 1, start:], cache=cache.row(index, start))[:, -1])
        for layer in cache.layers:  # What is masked is multiplied by 0, which of any memory need not give 0.
            layer.keys[index, :, :start], layer.values[index, :, :start] = 0, 0
    for layer in cache.layers:
        layer.length = length
    return torch.cat(found)
