"""A decoder of random weights that answers in no time, and what it says without a cache."""

import torch

from vlquant.decoder import Decoder, FloatLinear, float_layer
from vlquant.decoder_config import DecoderConfig, Rope

CONFIG = DecoderConfig(
    hidden_size=32,
    layers=2,
    heads=4,
    key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=60,
    norm_eps=1e-6,
    rope=Rope(10_000.0),
    max_positions=128,
)
PAD = 0


def small_decoder() -> Decoder:
    """Two layers, 60 tokens."""
    torch.manual_seed(11)
    sizes = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
    shapes = {f"self_attn.{name}": (rows, 32) for name, rows in sizes.items()}
    shapes |= {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
    layers = []
    for _ in range(CONFIG.layers):
        tensors = {f"{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
        tensors |= {f"{name}.weight": torch.ones(32) for name in ("input_layernorm", "post_attention_layernorm")}
        layers.append(float_layer(tensors, CONFIG))
    head = FloatLinear(torch.randn(60, 32))
    return Decoder(CONFIG, embedding=torch.randn(60, 32), layers=layers, norm=torch.ones(32), head=head)


def greedy_without_cache(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """The likeliest ids after a prompt, all read again for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(decoder(decoder.embed(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]
