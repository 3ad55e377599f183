"""One new token for every row, as a function of tensors that stay where they are: what a CUDA graph can replay.

Knows a decoder and its cache; no text, pictures or files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlquant.decoder import Decoder, KeyValueCache, LayerCache, attend
from vlquant.decoder_config import DecoderConfig
from vlquant.rope import long_rope_scale
from vlquant.runtime.cuda_attention import open_attention

STEPS_BEFORE_CAPTURE = 3
"""Steps that run one kernel at a time first. Capturing needs warm libraries, and a very short answer no graph."""

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def open_step(decoder: Decoder, cache: KeyValueCache, attention_mask: Tensor) -> "DecodeStep | None":
    """The step of a decoder on a GPU, once the cache holds the prompt that `attention_mask` [batch, prompt] is about.

    None on a CPU, where the decoder is as well called directly: there is nothing to launch.
    """
    device = attention_mask.device
    if device.type != "cuda":
        return None
    attention = open_attention(decoder.config, device, cache.layers[0].keys.dtype) or attend_stored
    return DecodeStep(decoder, cache, attention_mask, attention=attention)


def attend_stored(queries: Tensor, keys: Tensor, values: Tensor, first: Tensor, stored: Tensor) -> Tensor:
    """Attention of one position over the whole buffers, with what is not visible masked; as `DecodeAttention`, in torch."""
    place = torch.arange(keys.shape[2], device=keys.device)
    visible = (place >= first[:, None]) & (place < stored)  # [batch, capacity]
    # Memory that nothing was written to may hold anything, and 0 times infinity is no number.
    keys, values = (torch.where(visible[:, None, :, None], each, 0).to(queries.dtype) for each in (keys, values))
    return attend(queries, keys, values, visible[:, None])


@dataclass(frozen=True)
class Place:
    """Where a step stands, on the device."""

    first: Tensor
    """int32 [batch]: the first position of each row that is no padding."""
    stored: Tensor
    """int32 [1]: positions in the cache, that of the step included."""
    index: Tensor
    """int64 [1]: the position of the step, in all rows."""


class StoredLayer:
    """One layer's buffers, written at a position that a tensor holds; in the place of a LayerCache."""

    def __init__(self, cache: LayerCache, place: "Place", attention: Attention) -> None:
        self.keys, self.values = cache.keys, cache.values
        self._place, self._attention = place, attention

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, visible: None) -> Tensor:
        """As LayerCache.attend, for one position per row; which ones it sees is known here."""
        place = self._place
        self.keys.index_copy_(2, place.index, keys.to(self.keys.dtype))
        self.values.index_copy_(2, place.index, values.to(self.values.dtype))
        return self._attention(queries, self.keys, self.values, place.first, place.stored)


class DecodeStep:
    """Maps the ids of one step, int64 [batch], to logits float32 [batch, vocab] after them.

    The cache holds `prefilled` positions when the first step begins; attention_mask: bool [batch, prefilled], False where a
    row is padded on the left. Returned logits are overwritten by the next step.
    """

    def __init__(self, decoder: Decoder, cache: KeyValueCache, attention_mask: Tensor, *, attention: Attention) -> None:
        device = attention_mask.device
        self._decoder, self._cache = decoder, cache
        self._place = Place(
            first=(~attention_mask.bool()).sum(dim=1).to(torch.int32),
            stored=torch.tensor([cache.length], dtype=torch.int32, device=device),
            index=torch.tensor([cache.length - 1], device=device),
        )
        self._ids = torch.zeros(len(attention_mask), 1, dtype=torch.long, device=device)
        self._layers = [StoredLayer(each, self._place, attention) for each in cache.layers]
        self._logits: Tensor | None = None
        self._steps, self._graph = 0, None

    def __call__(self, ids: Tensor) -> Tensor:
        self._ids.copy_(ids[:, None])
        if self._graph is not None:
            self._graph.replay()
        elif self._ids.is_cuda and self._steps >= STEPS_BEFORE_CAPTURE:
            self._capture()
        else:
            self._logits = self.run()
        self._steps += 1
        for layer in self._cache.layers:
            layer.length += 1
        return self._logits

    def run(self) -> Tensor:
        """One step. Nothing in it waits for the device or depends on what a tensor holds."""
        place = self._place
        place.stored.add_(1)
        place.index.add_(1)
        positions = (place.index - place.first)[:, None]  # [batch, 1]
        rotary = rotary_at(positions, self._decoder.config)
        hidden = self._decoder.embed(self._ids).float()
        for layer, stored in zip(self._decoder.layers, self._layers, strict=True):
            hidden = layer(hidden, rotary, visible=None, cache=stored)
        return self._decoder.logits(hidden)[:, -1]

    def _capture(self) -> None:
        # Capturing records the step without doing it; the replay then does.
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # what other threads do there is their affair
            self._logits = self.run()
        self._graph.replay()


def rotary_at(positions: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """What `rotary_tables` returns, for one position per row [batch, 1], without asking the device how far they reach."""
    width, rope, device = config.head_dim, config.rope, positions.device
    reach = (positions.max() + 1).double()
    base = torch.full((), rope.theta, dtype=torch.float64, device=device)
    if rope.dynamic_factor:
        stretch = rope.dynamic_factor * reach / config.max_positions - (rope.dynamic_factor - 1)
        base = torch.where(reach > config.max_positions, base * stretch.clamp(min=1) ** (width / (width - 2)), base)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    periods = base.float() ** exponents  # [head_dim / 2], in positions per radian
    if rope.long:
        short, long = (_constant(factors, device) for factors in (rope.long.short_factors, rope.long.long_factors))
        periods = periods * torch.where(reach > rope.long.short_reach, long, short)
    angles = positions[..., None].float() / periods  # [batch, 1, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    scale = long_rope_scale(rope.long, config.max_positions) if rope.long else 1.0
    return angles.cos() * scale, angles.sin() * scale


_constants: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def _constant(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """A tensor made once: copying numbers from the host is what a graph cannot capture."""
    if (numbers, device) not in _constants:
        with torch.inference_mode(False):
            _constants[numbers, device] = torch.tensor(numbers, dtype=torch.float32, device=device)
    return _constants[numbers, device]
