"""Tiles to visual tokens, each different tile once. Knows a vision session and PIL tiles; no text, no decoder."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from vlquant.tiling import normalize


class TileFeatures:
    """Runs a vision session, and remembers the last call's tiles: a conversation shows the same pictures every turn."""

    def __init__(self, session: Callable[[Tensor], Tensor]):
        self.session = session
        self._last: dict[bytes, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, tiles: Sequence[Image.Image]) -> Tensor:
        """Visual tokens float32 [tiles, tokens_per_tile, hidden_size]; [0, 0, 0] without tiles."""
        if not tiles:
            return torch.empty(0, 0, 0)
        keys = [hashlib.sha256(tile.tobytes()).digest() for tile in tiles]
        unknown = {key: tile for key, tile in zip(keys, tiles, strict=True) if key not in self._last}
        new = self.session(normalize(list(unknown.values()))) if unknown else []
        known = self._last | dict(zip(unknown, new, strict=True))
        self._last = {key: known[key] for key in keys}
        return torch.stack([known[key] for key in keys])
