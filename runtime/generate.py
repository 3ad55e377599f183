"""From embeddings to token ids, one step at a time. Knows a decoder and ids; no text, pictures or files."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from numbers import Integral, Real
from types import NoneType

import torch
from torch import Tensor

from vlquant.decoder import Decoder
from vlquant.errors import InvalidRequest
from vlquant.runtime.conversation_cache import ConversationCache, OpenCache
from vlquant.runtime.decode_step import open_step
from vlquant.runtime.native_decoder import NativeDecoder
from vlquant.runtime.prefill import prefill
from vlquant.runtime.sampling import choose, keep_top_k, keep_top_p, penalize_repetition

COLDEST = 1e-6
"""Lowest temperature above 0: logits divided by much less than that are no numbers any more."""


@dataclass(frozen=True)
class Generation:
    """How an answer is generated. Raises InvalidRequest for values no answer could be generated with."""

    max_new_tokens: int = 512
    """Tokens after which an unfinished answer ends."""
    temperature: float = 0.0
    """0 takes the likeliest token every time; above it, tokens are drawn."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this much probability together."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already in the answer become less likely."""
    seed: int | None = None
    """Seed of the draws of every answer, whatever stands beside it in a batch; None: a new one each time."""
    cache_bits: int = 32
    """Of the keys and values that are kept: 32, or 8, which takes a quarter of the memory and costs a little accuracy."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, beside the template's own stop token; they are not part of it."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        for field, kind, valid, range_ in (
            ("max_new_tokens", Integral, lambda count: count >= 1, "1 or more"),
            ("temperature", Real, lambda value: value == 0 or COLDEST <= value < inf, f"0 (greedy) or {COLDEST:g} and more"),
            ("top_p", Real, lambda mass: 0 < mass <= 1, "above 0 and at most 1"),
            ("top_k", Integral, lambda count: count >= 0, "0 (all) or more"),
            ("repetition_penalty", Real, lambda value: 0 < value < inf, "above 0; 1 changes nothing"),
            ("cache_bits", Integral, lambda bits: bits in (8, 32), "8 or 32"),
            ("seed", (Integral, NoneType), lambda seed: seed is None or 0 <= seed < 2**63, "0 to 2**63 - 1"),
            ("stop", tuple, lambda stop: all(isinstance(text, str) and text for text in stop), "non-empty texts"),
        ):
            value = getattr(self, field)
            if not isinstance(value, kind) or not valid(value):
                raise InvalidRequest(f"{field} is {value!r}, but has to be {range_}")


@dataclass(frozen=True)
class Ending:
    """What ends a row, and what fills it from then on."""

    stop_id: int
    """The template's stop token; the last id of a row that it ends."""
    pad_id: int
    """Fills rows that ended before the others."""
    reached: Callable[[list[int]], bool] = lambda ids: False
    """Asked after every token: do the ids of a row end it for another reason?"""


class Decoding:
    """Generates ids for a batch when iterated: one int64 [batch] per step, until all rows have ended.

    embeddings: float32 [batch, length, hidden_size], padded on the left; attention_mask: bool [batch, length].
    A consumer may stop early. The cache is allocated once, for the prompt and `max_new_tokens`.
    memory: of a batch of one, where keys and values of the turns before are found and its own are kept.
    """

    def __init__(
        self, decoder: Decoder | NativeDecoder, embeddings: Tensor, attention_mask: Tensor, *, generation: Generation,
        ending: Ending, memory: ConversationCache | None = None,
    ):  # fmt: skip
        self._decoder, self._generation, self._ending = decoder, generation, ending
        self._embeddings, self._attention_mask = embeddings, attention_mask
        self._memory = memory or ConversationCache()
        self.reused_tokens = 0
        """Of the prompt: known from the turn before."""
        self.rows: list[list[int]] = [[] for _ in range(len(embeddings))]
        """Ids of each row so far, without padding."""

    def __iter__(self) -> Iterator[Tensor]:
        batch, length, _ = self._embeddings.shape
        capacity = length + self._generation.max_new_tokens
        if batch > 1:
            cache = self._decoder.new_cache(batch=batch, capacity=capacity, bits=self._generation.cache_bits)
            yield from self._steps(OpenCache(cache, 0))
            return
        bits = self._generation.cache_bits
        with self._memory.opened(self._decoder, self._embeddings[0], capacity, bits) as opened:
            self.reused_tokens = opened.reused
            yield from self._steps(opened)

    @torch.inference_mode()
    def _steps(self, opened: OpenCache) -> Iterator[Tensor]:
        generation, embeddings, cache = self._generation, self._embeddings[:, opened.reused :], opened.cache
        batch, length = self._attention_mask.shape
        capacity = length + generation.max_new_tokens
        mask = torch.ones(batch, capacity, dtype=torch.bool, device=embeddings.device)
        mask[:, :length] = self._attention_mask
        generators = _generators(generation, batch, embeddings.device)
        unfinished = set(range(batch))
        logits = prefill(self._decoder, embeddings, mask[:, :length], cache)
        opened.rows.append(embeddings[0])
        on_device = open_step(self._decoder, cache, mask[:, :length])
        for seen in range(length + 1, capacity + 1):
            ids = choose(shape_logits(logits, self.rows, generation), generators)
            for row in set(range(batch)) - unfinished:
                ids[row] = self._ending.pad_id
            for row in sorted(unfinished):
                self.rows[row].append(int(ids[row]))
            unfinished = {row for row in unfinished if not self._ended(self.rows[row])}
            yield ids
            if not unfinished or seen == capacity:
                return
            embeddings = self._decoder.embed(ids[:, None]).float()
            if on_device is not None:
                logits = on_device(ids)
            else:
                logits = self._decoder(embeddings, attention_mask=mask[:, :seen], cache=cache)[:, -1]
            opened.rows.append(embeddings[0])

    def _ended(self, ids: list[int]) -> bool:
        return ids[-1] == self._ending.stop_id or self._ending.reached(ids)


def shape_logits(logits: Tensor, rows: list[list[int]], generation: Generation) -> Tensor:
    """Logits [batch, vocab] to choose from, given the ids `rows` produced so far; in transformers' order.

    The penalty counts the answer only: the original hands `generate` embeddings, so prompt ids are unknown to it there.
    """
    logits = penalize_repetition(logits, rows, generation.repetition_penalty)
    if generation.temperature == 0:
        return logits
    return keep_top_p(keep_top_k(logits / generation.temperature, generation.top_k), generation.top_p)


def _generators(generation: Generation, batch: int, device: torch.device) -> list[torch.Generator] | None:
    if generation.temperature == 0:
        return None
    generators = [torch.Generator(device) for _ in range(batch)]
    for each in generators:
        each.seed() if generation.seed is None else each.manual_seed(generation.seed)
    return generators
