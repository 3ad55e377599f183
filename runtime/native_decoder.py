"""A decoder whose layers run compiled, from embeddings to logits: called like `vlquant.decoder.Decoder`."""

from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from vlquant.decoder import LINEARS, Linear, is_right_room, positions_of, rms_norm
from vlquant.decoder_config import DecoderConfig
from vlquant.rope import rotary_tables
from vlquant.runtime.native import INSTRUCTIONS, PANEL, Kernels, MatrixFields, NativeLinear, PackedMatrix

CHUNK = 256
"""Positions of a prompt that go through all layers together: more would not make products faster, and take memory."""
HEAD_DIM_MULTIPLE = 16
"""Widths of heads that the kernels know."""


class LayerFields(Structure):
    """`Layer` of runtime/native/model.h."""

    _fields_ = [(name, MatrixFields) for name in ("query", "key", "value", "output", "gate", "up", "down")] + [
        (name, c_void_p) for name in ("input_norm", "post_norm", "query_norm", "key_norm")
    ]


class StackFields(Structure):
    """`Stack` of runtime/native/model.h."""

    _fields_ = [
        ("layers", POINTER(LayerFields)),
        *((name, c_int64) for name in ("layer_count", "hidden_size", "heads", "key_value_heads", "head_dim", "intermediate_size")),
        ("norm_eps", c_float), ("norm", c_void_p), ("head", MatrixFields),
    ]  # fmt: skip


class CacheFields(Structure):
    """`Cache` of runtime/native/model.h."""

    _fields_ = [(name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")] + [
        (name, c_int64) for name in ("batch", "capacity")
    ]


class StepFields(Structure):
    """`Step` of runtime/native/model.h."""

    _fields_ = [(name, c_void_p) for name in ("hidden", "logits", "cosines", "sines", "starts")] + [
        (name, c_int64) for name in ("length", "past")
    ]


class NativeCache:
    """Keys and values of a whole decoder in the order its kernels read; `capacity` positions for `batch` rows.

    bits: 32, or 8 with one scale for each key and value of a head.
    """

    def __init__(self, config: DecoderConfig, *, batch: int, capacity: int, bits: int = 32):
        self.batch, self.capacity, self.length, self.bits = batch, whole_panels(capacity), 0, bits
        shape, dtype = (config.layers, batch, config.key_value_heads, self.capacity), torch.float32 if bits == 32 else torch.int8
        self.keys, self.values = (torch.empty(*shape, config.head_dim, dtype=dtype) for _ in range(2))
        self.scales = tuple(torch.empty(shape) for _ in range(2)) if bits == 8 else ()

    def keep(self, length: int, capacity: int) -> None:
        """Forget all but the first `length` positions and have room for `capacity`; keys, then values may lie there twice."""
        self.length, wanted = length, whole_panels(capacity)
        if is_right_room(self.capacity, wanted):
            return
        self.capacity = wanted
        self.keys = resized(self.keys, length, self.capacity)
        self.values = resized(self.values, length, self.capacity)
        self.scales = tuple(resized(each, length, self.capacity) for each in self.scales)

    def fields(self) -> CacheFields:
        """What the kernels take."""
        scales = [each.data_ptr() for each in self.scales] or [None, None]
        return CacheFields(self.keys.data_ptr(), self.values.data_ptr(), *scales, self.batch, self.capacity)


def whole_panels(positions: int) -> int:
    """So many positions and what fills the last panel: keys lie in blocks of them."""
    return -(-positions // PANEL) * PANEL


def resized(kept: Tensor, length: int, capacity: int) -> Tensor:
    """A buffer [layers, batch, heads, capacity, ...] with the first positions of another."""
    buffer, stop = kept.new_empty(*kept.shape[:3], capacity, *kept.shape[4:]), whole_panels(length)
    buffer[:, :, :, :stop] = kept[:, :, :, :stop]
    return buffer


@dataclass(frozen=True)
class NativeLayer:
    """Packed linears by their names in `LINEARS`, and norms as `norm_names` has them."""

    linears: Mapping[str, PackedMatrix]
    norms: Mapping[str, Tensor]

    def fields(self) -> LayerFields:
        """What the kernels take."""
        norms = {name: each.data_ptr() for name, each in self.norms.items()}
        places = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        return LayerFields(*(self.linears[name].fields() for name in LINEARS), *map(norms.get, places))


class NativeDecoder:
    """Embedding, layers, final norm and head on the CPU.

    embedding: from ids [count] to rows [count, hidden_size]; head: from normalised hidden states to logits.
    """

    def __init__(
        self, config: DecoderConfig, kernels: Kernels, *, embedding: Callable[[Tensor], Tensor], layers: Sequence[NativeLayer],
        norm: Tensor, head: Linear,
    ):  # fmt: skip
        self.config, self.kernels, self.norm, self.head = config, kernels, norm.float().contiguous(), head
        self.device = torch.device("cpu")
        self.name = f"kernels for {INSTRUCTIONS[kernels.instructions]}"
        """What runs, in words."""
        self._embedding, self._layers = embedding, layers
        self._layer_fields = (LayerFields * len(layers))(*(each.fields() for each in layers))
        shape = (config.hidden_size, config.heads, config.key_value_heads, config.head_dim, config.intermediate_size)
        self._packed_head = head.matrix if isinstance(head, NativeLinear) else None
        end = config.norm_eps, self.norm.data_ptr(), self._packed_head.fields() if self._packed_head else MatrixFields()
        self._stack = StackFields(self._layer_fields, len(layers), *shape, *end)
        self._no_layers = StackFields(self._layer_fields, 0, *shape, *end)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [batch, length, hidden_size] of `ids` [batch, length]."""
        return self._embedding(ids.flatten()).unflatten(0, ids.shape)

    def new_cache(self, *, batch: int, capacity: int, bits: int = 32) -> NativeCache:
        """An empty cache for conversations of `capacity` positions, its numbers in 32 or 8 bits."""
        return NativeCache(self.config, batch=batch, capacity=capacity, bits=bits)

    def __call__(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: NativeCache | None = None,
        all_positions: bool = False,
    ) -> Tensor:
        """Logits as `Decoder` gives them; rows of `attention_mask` may be padded on the left, and on the right at the end."""
        batch, length, _ = embeddings.shape
        cache = self.new_cache(batch=batch, capacity=length) if cache is None else cache
        total = cache.length + length
        if batch != cache.batch or total > cache.capacity:
            raise ValueError(f"{batch} rows of {total} positions do not go into a cache for {cache.batch} of {cache.capacity}")
        mask = torch.ones(batch, total, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        rotary = [each[:, 0] for each in rotary_tables(positions_of(mask, length), self.config)]  # [batch, length, head_dim]
        starts = mask.long().argmax(-1)
        if length == 1 and self._packed_head:
            return self.run_layers(embeddings, *rotary, starts, cache, with_logits=True)
        hidden = [
            self.run_layers(rows, cosines, sines, starts, cache)
            for rows, cosines, sines in zip(embeddings.split(CHUNK, 1), *(each.split(CHUNK, 1) for each in rotary), strict=True)
        ]
        wanted = torch.cat(hidden, dim=1) if all_positions else hidden[-1][:, -1:]
        return self.logits(wanted)

    def run_layers(
        self, embeddings: Tensor, cosines: Tensor, sines: Tensor, starts: Tensor, cache: NativeCache, *, with_logits: bool = False
    ) -> Tensor:
        """Hidden states [batch, length, hidden_size] after the last layer, or their logits; the new positions are in the cache then."""
        hidden = embeddings.float().clone(memory_format=torch.contiguous_format)
        logits = self._room_for_logits(hidden) if with_logits else None
        tensors = hidden, logits, cosines.contiguous(), sines.contiguous(), starts
        step = StepFields(*(None if each is None else each.data_ptr() for each in tensors), hidden.shape[1], cache.length)
        self.kernels.run_stack(self._stack, cache.fields(), step)
        cache.length += hidden.shape[1]
        return hidden if logits is None else logits[..., : self._packed_head.rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [batch, length, vocab] of hidden states."""
        if self._packed_head is None:
            return self.head(rms_norm(hidden, self.norm, self.config.norm_eps)).float()
        hidden = hidden.float().contiguous()
        logits, rows = self._room_for_logits(hidden), hidden.shape[:-1].numel()
        step = StepFields(hidden.data_ptr(), logits.data_ptr(), None, None, None, 1, 0)
        self.kernels.run_stack(self._no_layers, CacheFields(batch=rows), step)
        return logits[..., : self._packed_head.rows]

    def _room_for_logits(self, hidden: Tensor) -> Tensor:
        return torch.empty(*hidden.shape[:-1], PANEL * len(self._packed_head.codes))
