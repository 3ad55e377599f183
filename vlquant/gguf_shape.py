"""A GGUF file in the shape of a decoder, random weights: Q4_0 linears, Q8_0 embedding and head. For measuring llama.cpp."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from vlquant.config import ModelConfig
from vlquant.decoder_config import DecoderConfig

BLOCK = 32
"""Columns that share a scale."""
QUANTIZED = {
    4: (gguf.GGMLQuantizationType.Q4_0, 2 + BLOCK // 2, 4.6),
    8: (gguf.GGMLQuantizationType.Q8_0, 2 + BLOCK, 73.9),
}
"""By bits: type, bytes of a block (a half-precision scale, then the codes), standard deviation of random codes."""


def write_gguf(path: Path, config: ModelConfig) -> None:
    """Write the file; the family's text_model_type is llama.cpp's name of the architecture."""
    decoder = config.decoder
    writer = gguf.GGUFWriter(str(path), config.family.text_model_type)
    writer.add_context_length(decoder.max_positions)
    writer.add_embedding_length(decoder.hidden_size)
    writer.add_block_count(decoder.layers)
    writer.add_feed_forward_length(decoder.intermediate_size)
    writer.add_head_count(decoder.heads)
    writer.add_head_count_kv(decoder.key_value_heads)
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_rope_dimension_count(decoder.head_dim)
    writer.add_rope_freq_base(decoder.rope.theta)
    writer.add_layer_norm_rms_eps(decoder.norm_eps)
    writer.add_vocab_size(decoder.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    tensors = dict(shapes(decoder))
    for name, (rows, columns, bits) in tensors.items():
        if bits == 32:
            writer.add_tensor_info(name, (rows,), np.dtype(np.float32), 4 * rows)
        else:
            kind, block_bytes, _ = QUANTIZED[bits]
            width = columns // BLOCK * block_bytes
            writer.add_tensor_info(name, (rows, width), np.dtype(np.uint8), rows * width, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for name, (rows, columns, bits) in tensors.items():
        writer.write_tensor_data(vector(name, rows) if bits == 32 else blocks(random, rows, columns, bits))
    writer.close()


def shapes(decoder: DecoderConfig) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Name, rows, columns and bits of every tensor; 32 bits: a vector."""
    hidden, heads, kv = decoder.hidden_size, decoder.heads * decoder.head_dim, decoder.key_value_heads * decoder.head_dim
    linears = {
        "attn_q": (heads, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, heads),
        "ffn_gate": (decoder.intermediate_size, hidden), "ffn_up": (decoder.intermediate_size, hidden),
        "ffn_down": (hidden, decoder.intermediate_size),
    }  # fmt: skip
    vectors = {"attn_norm.weight": hidden, "ffn_norm.weight": hidden}
    if decoder.query_key_value_bias:
        vectors |= {"attn_q.bias": heads, "attn_k.bias": kv, "attn_v.bias": kv}
    if decoder.query_key_norm:
        vectors |= {"attn_q_norm.weight": decoder.head_dim, "attn_k_norm.weight": decoder.head_dim}
    yield "token_embd.weight", (decoder.vocab_size, hidden, 8)
    for layer in range(decoder.layers):
        yield from ((f"blk.{layer}.{name}", (size, 1, 32)) for name, size in vectors.items())
        yield from ((f"blk.{layer}.{name}.weight", (*shape, 4)) for name, shape in linears.items())
    yield "output_norm.weight", (hidden, 1, 32)
    yield "output.weight", (decoder.vocab_size, hidden, 8)


def vector(name: str, size: int) -> np.ndarray:
    """Ones for a norm, zeros for a bias."""
    return np.full(size, 1 if name.endswith(".weight") else 0, dtype=np.float32)


def blocks(random: np.random.Generator, rows: int, columns: int, bits: int) -> np.ndarray:
    """Random codes uint8 [rows, bytes] with one scale, which keeps the size of what the matrix multiplies."""
    _, block_bytes, deviation = QUANTIZED[bits]
    made = random.integers(0, 256, (rows, columns // BLOCK, block_bytes), dtype=np.uint8)
    made[..., :2] = np.array([1 / (deviation * columns**0.5)], dtype=np.float16).view(np.uint8)
    return made.reshape(rows, -1)
