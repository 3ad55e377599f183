"""Attention of one new token per row on a GPU, over a cache whose length only the device knows. Knows tensors only."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlquant.decoder_config import DecoderConfig
from vlquant.runtime.cuda_driver import MAX_WARPS, WARP, Card, Kernels, card_of, kernels_of

ATTENTION_FILES = ("numbers", "attention")
SLICE = 8
"""Features that a lane takes at a time, as in attention.cu."""
BLOCKS_PER_PROCESSOR = 4
"""Enough to hide the latency of memory; more would only be more sums to join."""
CACHE_TYPES = {torch.float32: "float", torch.float16: "half_bits"}


@dataclass(frozen=True)
class DecodeAttention:
    """Attention of one position, every key read once for all query heads that share it."""

    kernels: Kernels
    card: Card

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, first: Tensor, stored: Tensor) -> Tensor:
        """Mix the values of positions first .. stored - 1 of each row.

        queries: float32 [batch, heads, 1, head_dim]; keys, values: [batch, key_value_heads, capacity, head_dim];
        first: int32 [batch]; stored: int32 [1]. Returns like `queries`. Results do not depend on `capacity`.
        """
        batch, heads, _, head_dim = queries.shape
        key_heads, capacity = keys.shape[1:3]
        splits = splits_of(batch * key_heads, self.card.processors)
        mixed = torch.empty(batch, heads, splits, head_dim, device=queries.device)
        maxima, totals = torch.empty(2, batch, heads, splits, device=queries.device)
        out = torch.empty(batch, heads, 1, head_dim, device=queries.device)
        grid, block = (splits, key_heads, batch), (WARP, MAX_WARPS, 1)
        scale = 1 / math.sqrt(head_dim)
        pointers = queries.contiguous(), keys, values, first, stored, mixed, maxima, totals
        self.kernels.launch("attend_splits", grid, block, *pointers, capacity, scale)
        self.kernels.launch("join_splits", (heads, batch, 1), (head_dim, 1, 1), mixed, maxima, totals, out, splits)
        return out


def open_attention(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> DecodeAttention | None:
    """The attention of a decoder with a cache of `dtype`; None where heads have no multiple of 8 features, or above 256."""
    if config.head_dim % SLICE or config.head_dim > WARP * SLICE:  # One warp reads a key.
        return None
    return DecodeAttention(kernels_of(device, ATTENTION_FILES, attention_defines(config, dtype)), card_of(device))


def attention_defines(config: DecoderConfig, dtype: torch.dtype) -> tuple[str, ...]:
    """What attention.cu is compiled with."""
    group = config.heads // config.key_value_heads
    return f"HEAD_DIM={config.head_dim}", f"GROUP={group}", f"CACHE={CACHE_TYPES[dtype]}"


def splits_of(rows: int, processors: int) -> int:
    """How many blocks share the positions of one key head, so that all `rows` together fill the card."""
    return max(1, min(64, -(-processors * BLOCKS_PER_PROCESSOR // rows)))
