"""The shape of a decoder, as data. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LongRope:
    """Phi-3's "su" rope: frequencies divided by one list of factors up to `short_reach` positions, by another beyond."""

    short_factors: tuple[float, ...]
    """One per pair of features of a head, as are the long ones."""
    long_factors: tuple[float, ...]
    short_reach: int
    """Positions the model was first trained for (original_max_position_embeddings)."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding."""

    theta: float
    dynamic_factor: float | None = None
    """Dynamic NTK factor, used beyond `max_positions`; None is plain rope."""
    long: LongRope | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; every value comes from the checkpoint's config.json."""

    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    rope: Rope
    max_positions: int
    query_key_value_bias: bool = False
    output_bias: bool = False
    query_key_norm: bool = False
    """RMSNorm over each query and key head (Qwen3)."""
    tied_head: bool = False
