"""One transformer decoder for every supported language model; its matmuls are passed in.

Knows no checkpoint, kernel or text: the same layer serves calibration (float linears), checking
and running (packed linears).
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlquant.decoder_config import DecoderConfig
from vlquant.errors import InvalidRequest
from vlquant.rope import rotary_tables, rotate

Linear = Callable[[Tensor], Tensor]

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = ("input_layernorm", "post_attention_layernorm")

CACHE_DTYPES = {"cpu": torch.float32, "cuda": torch.float16}
"""How keys and values are stored: on a GPU in half the memory. Nothing is multiplied in float16."""


class FloatLinear:
    """`x @ weight.T + bias` with an ordinary float weight [out_features, in_features]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each vector of `x` [..., features] to unit root mean square, in float32, times `weight`."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def positions_of(attention_mask: Tensor, length: int) -> Tensor:
    """Positions [batch, length] of the last columns of a mask [batch, total]: they count the unmasked, padded ones are 1."""
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(~attention_mask.bool(), 1)[:, -length:]


def visible_keys(attention_mask: Tensor, queries: int) -> Tensor:
    """Which keys each of the last `queries` positions may see, bool [batch, queries, keys].

    attention_mask: bool [batch, keys], False where a row is padded. A padded position sees only
    itself, so that its softmax stays finite; nothing reads its result.
    """
    keys = attention_mask.shape[1]
    key_index = torch.arange(keys, device=attention_mask.device)
    query_index = key_index[keys - queries :]
    causal = key_index[None] <= query_index[:, None]  # [queries, keys]
    itself = key_index[None] == query_index[:, None]
    return causal[None] & attention_mask[:, None, :].bool() | itself[None]


def attend(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """Grouped-query attention without repeating keys.

    queries: [batch, heads, length, head_dim]; keys, values: [batch, key_value_heads, total, head_dim];
    visible: bool [batch or 1, length, total], or None for plain causal attention. Returns like `queries`.
    """
    batch, heads, length, head_dim = queries.shape
    groups = heads // keys.shape[1]
    if visible is None and length > 1:
        if queries.is_cuda:
            # There the kernels that need no matrix of scores know no groups; of one layer at a time the copies are small.
            keys, values = (each.repeat_interleave(groups, dim=1) if groups > 1 else each for each in (keys, values))
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=groups > 1)
    # The query heads of a group become further query positions of their one key head.
    folded = queries.reshape(batch, keys.shape[1], groups * length, head_dim)
    mask = None if visible is None else visible[:, None].repeat(1, 1, groups, 1)
    mixed = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    return mixed.reshape(batch, heads, length, head_dim)


def is_right_room(room: int, wanted: int) -> bool:
    """Whether a buffer of so many positions is worth keeping: much too large would cost memory as long as the process lasts."""
    return wanted <= room <= 2 * wanted


class LayerCache:
    """Keys and values of one layer in buffers allocated once."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.length = keys, values, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [batch, heads, new, head_dim]; return all so far (views)."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
        """Store new keys and values, and attend over all so far; arguments as in `attend`."""
        keys, values = self.append(keys, values)
        return attend(queries, keys.to(queries.dtype), values.to(queries.dtype), visible)


class KeyValueCache:
    """The cache of a whole decoder: `capacity` positions for `batch` rows, allocated once."""

    bits = 32

    def __init__(self, config: DecoderConfig, *, batch: int, capacity: int, dtype=torch.float32, device="cpu"):
        shape = (batch, config.key_value_heads, capacity, config.head_dim)
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(config.layers)
        ]

    @property
    def length(self) -> int:
        """Positions stored so far."""
        return self.layers[0].length

    def row(self, index: int, start: int) -> "KeyValueCache":
        """What one row has from position `start` on, in the same memory, with nothing in it."""
        row = copy.copy(self)
        row.layers = [LayerCache(*(kept[index : index + 1, :, start:] for kept in (each.keys, each.values))) for each in self.layers]
        return row

    def keep(self, length: int, capacity: int) -> None:
        """Forget all but the first `length` positions and have room for `capacity`; a layer at a time may lie there twice."""
        for index, layer in enumerate(self.layers):
            batch, heads, own, width = layer.keys.shape
            if not is_right_room(own, capacity):
                keys, values = (each.new_empty(batch, heads, capacity, width) for each in (layer.keys, layer.values))
                self.layers[index] = LayerCache(keys, values)
                self.layers[index].append(layer.keys[:, :, :length], layer.values[:, :, :length])
            self.layers[index].length = length


class DecoderLayer:
    """Attention and gated MLP with pre-normalisation, as Llama, InternLM2, Phi-3, Qwen2 and Qwen3 share them.

    linears: one callable for each name of `LINEARS`; norms: weights named as in `NORMS`, and
    `self_attn.q_norm` / `self_attn.k_norm` where the config asks for them.
    """

    def __init__(self, config: DecoderConfig, linears: Mapping[str, Linear], norms: Mapping[str, Tensor]):
        self.config, self.linears, self.norms = config, linears, norms

    def with_linears(self, linears: Mapping[str, Linear]) -> "DecoderLayer":
        """The same layer with other linears in the places of these."""
        return DecoderLayer(self.config, {**self.linears, **linears}, self.norms)

    def __call__(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        visible: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Transform `hidden` [batch, length, hidden_size]; `visible` as in `attend`."""
        normed = rms_norm(hidden, self.norms["input_layernorm"], self.config.norm_eps)
        hidden = hidden + self.attention(normed, rotary, visible=visible, cache=cache)
        normed = rms_norm(hidden, self.norms["post_attention_layernorm"], self.config.norm_eps)
        return hidden + self.mlp(normed)

    def attention(self, x: Tensor, rotary, *, visible: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """Self-attention over normalised `x` [batch, length, hidden_size]."""
        queries, keys, values = (self._heads(name, x) for name in ("q_proj", "k_proj", "v_proj"))
        if self.config.query_key_norm:
            queries = rms_norm(queries, self.norms["self_attn.q_norm"], self.config.norm_eps)
            keys = rms_norm(keys, self.norms["self_attn.k_norm"], self.config.norm_eps)
        queries, keys = rotate(queries, rotary), rotate(keys, rotary)
        mixed = (cache.attend if cache is not None else attend)(queries, keys, values, visible)
        return self.linears["self_attn.o_proj"](mixed.transpose(1, 2).flatten(2))  # [batch, length, hidden]

    def mlp(self, x: Tensor) -> Tensor:
        """SwiGLU over normalised `x` [batch, length, hidden_size]."""
        gate = F.silu(self.linears["mlp.gate_proj"](x), inplace=True)  # The widest tensors of all: no copies.
        return self.linears["mlp.down_proj"](gate.mul_(self.linears["mlp.up_proj"](x)))

    def _heads(self, name: str, x: Tensor) -> Tensor:
        projected = self.linears[f"self_attn.{name}"](x)
        return projected.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # [batch, heads, length, head_dim]


class Decoder:
    """Embedding, layers, final norm and head.

    embedding: [vocab, hidden_size]; head: callable from hidden to logits.
    """

    name = "torch"
    """What runs, in words."""

    def __init__(
        self, config: DecoderConfig, *, embedding: Tensor, layers: Sequence[DecoderLayer], norm: Tensor, head: Linear
    ):  # fmt: skip
        self.config, self.embedding, self.layers = config, embedding, layers
        self.norm, self.head = norm, head

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.embedding.device

    def new_cache(self, *, batch: int, capacity: int, bits: int = 32) -> KeyValueCache:
        """An empty cache for conversations of `capacity` positions; raises InvalidRequest for other bits than 32."""
        if bits != 32:
            raise InvalidRequest("a key-value cache of 8 bits needs the compiled CPU kernels; leave --cache-bits at 32 here")
        dtype = CACHE_DTYPES[self.device.type]
        return KeyValueCache(self.config, batch=batch, capacity=capacity, dtype=dtype, device=self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [batch, length, hidden_size] of `ids` [batch, length]."""
        return F.embedding(ids, self.embedding)

    def __call__(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        all_positions: bool = False,
    ) -> Tensor:
        """Logits float32 [batch, 1, vocab] of the last position, or of all with `all_positions`.

        embeddings: [batch, length, hidden_size]; attention_mask: bool [batch, cached + length],
        False where a row is padded on the left. Positions count the unmasked, as the original does.
        """
        batch, length, _ = embeddings.shape
        total = length + (cache.length if cache else 0)
        if attention_mask is None:
            attention_mask = torch.ones(batch, total, dtype=torch.bool, device=embeddings.device)
        positions = positions_of(attention_mask, length)
        padded = not bool(attention_mask.all())
        plain = not padded and (length == 1 or total == length)
        visible = None if plain else visible_keys(attention_mask, length)
        hidden = self.run_layers(embeddings, positions, visible=visible, cache=cache)
        return self.logits(hidden if all_positions else hidden[:, -1:])

    def run_layers(
        self, hidden: Tensor, positions: Tensor, *, visible: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Hidden states [batch, length, hidden_size] after the last layer, before the final norm."""
        rotary = rotary_tables(positions, self.config)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, rotary, visible=visible, cache=cache.layers[index] if cache else None)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [batch, length, vocab] of hidden states."""
        return self.head(rms_norm(hidden, self.norm, self.config.norm_eps)).float()


def float_layer(tensors: Mapping[str, Tensor], config: DecoderConfig) -> DecoderLayer:
    """A layer from float tensors under their relative names ("self_attn.q_proj.weight", ...)."""
    linears = {name: FloatLinear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in LINEARS}
    return DecoderLayer(config, linears, {name: tensors[f"{name}.weight"] for name in norm_names(config)})


def norm_names(config: DecoderConfig) -> tuple[str, ...]:
    """The norms of one layer."""
    return NORMS + (("self_attn.q_norm", "self_attn.k_norm") if config.query_key_norm else ())
