"""Rotary position embedding. Knows positions and queries or keys; no weights."""

import math

import numpy as np
import torch
from torch import Tensor

from vlquant.decoder_config import DecoderConfig, LongRope


def rotary_tables(positions: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [batch, 1, length, head_dim] (float32) of `positions` [batch, length].

    Dynamic NTK enlarges the base as soon as a position lies beyond `max_positions` and again
    whenever the sequence grows; long rope takes its long factors as soon as one lies beyond `short_reach`.
    Cached keys keep their old rotation, as in the original InternLM2 and Phi-3.
    """
    base, width = config.rope.theta, config.head_dim
    reach = int(positions.max()) + 1
    factor, long = config.rope.dynamic_factor, config.rope.long
    if factor and reach > config.max_positions:
        stretch = factor * reach / config.max_positions - (factor - 1)
        base = base * stretch ** (width / (width - 2))
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    periods = base**exponents  # [head_dim / 2], in positions per radian
    if long:
        factors = long.long_factors if reach > long.short_reach else long.short_factors
        periods = periods * torch.tensor(factors, device=positions.device)
    angles = positions[..., None].float() / periods  # [batch, length, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    scale = long_rope_scale(long, config.max_positions) if long else 1.0
    cosines, sines = cosines_and_sines(angles)
    return cosines * scale, sines * scale


def cosines_and_sines(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Of float32 angles in radians."""
    if angles.device.type != "cpu":
        return angles.cos(), angles.sin()
    # torch shares 256 of them between threads, which then spin for milliseconds beside the compiled kernels.
    return torch.from_numpy(np.cos(angles.numpy())), torch.from_numpy(np.sin(angles.numpy()))


def long_rope_scale(long: LongRope, max_positions: int) -> float:
    """What long rope multiplies cosines and sines with, in both regimes."""
    stretch = max_positions / long.short_reach
    return math.sqrt(1 + math.log(stretch) / math.log(long.short_reach)) if stretch > 1 else 1.0


def rope_depends_on_length(config: DecoderConfig, length: int) -> bool:
    """Whether positions of a sequence of `length` are rotated otherwise than in a shorter one."""
    dynamic, long = config.rope.dynamic_factor, config.rope.long
    return bool(dynamic and length > config.max_positions or long and length > long.short_reach)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rope to `x` [batch, heads, length, head_dim], pairing feature i with i + head_dim / 2."""
    cosines, sines = rotary
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cosines + turned * sines).to(x.dtype)
