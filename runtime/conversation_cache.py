"""Keys and values of the conversation answered last, so that its next turn reads only what is new."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlquant.decoder import Decoder, KeyValueCache
from vlquant.rope import rope_depends_on_length
from vlquant.runtime.native_decoder import NativeCache, NativeDecoder

Cache = KeyValueCache | NativeCache


@dataclass
class OpenCache:
    """A cache in use, and what is in it."""

    cache: Cache
    reused: int
    """Positions that were known before."""
    rows: list[Tensor] = field(default_factory=list)
    """Embeddings [positions, hidden_size] of all positions in the cache, in pieces."""


class ConversationCache:
    """Remembers one conversation.

    Positions are the same when their embeddings are: ids, pictures and everything before them are in these.
    """

    def __init__(self) -> None:
        self._last: OpenCache | None = None
        self._decoder: Decoder | NativeDecoder | None = None

    def forget(self) -> None:
        """Begin anew: answers that have no turn before them depend on nothing that was asked earlier."""
        self._last = None

    @contextmanager
    def opened(self, decoder: Decoder | NativeDecoder, embeddings: Tensor, capacity: int, bits: int) -> Iterator[OpenCache]:
        """A decoder's cache of `bits` for `capacity` positions of a conversation that begins with `embeddings` [length, hidden_size].

        It goes on from the last one as far as the two are the same. Whoever runs the decoder adds the embeddings to `rows`.
        """
        last, self._last = self._last, None  # Nobody else may get it while it is in use.
        opened = None
        if last is not None and self._decoder is decoder and _reusable(last.cache, decoder, capacity, bits):
            opened = _continued(last, embeddings, capacity)
        del last  # What is not gone on with is not to lie beside what follows.
        self._decoder = decoder
        opened = opened or OpenCache(decoder.new_cache(batch=1, capacity=capacity, bits=bits), 0)
        try:
            yield opened
        finally:
            self._last = opened


def _reusable(cache: Cache, decoder: Decoder | NativeDecoder, capacity: int, bits: int) -> bool:
    """Whether keys in a cache are what they would be in another conversation that begins in the same way."""
    # Some ropes turn keys by how long the conversation was when they came.
    lengths = cache.length, capacity
    return cache.bits == bits and not any(rope_depends_on_length(decoder.config, length) for length in lengths)


def _continued(last: OpenCache, embeddings: Tensor, capacity: int) -> OpenCache | None:
    """The last cache with what it has in common with a conversation; None if that is nothing."""
    known = torch.cat(last.rows)[: last.cache.length] if last.rows else embeddings[:0]
    # The last position is read again in any case: its logits are wanted.
    common = min(len(known), len(embeddings) - 1)
    same = (known[:common] == embeddings[:common]).all(-1)
    reused = common if bool(same.all()) else int(same.long().argmin())
    if not reused:
        return None
    last.cache.keep(reused, capacity)
    return OpenCache(last.cache, reused, [known[:reused].clone()])
