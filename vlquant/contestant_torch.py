"""A bundle's vision tower in torch, float32, in `vlquant bench`."""

import time

import torch

from vlquant.model import open_model
from vlquant.runtime.vision_session import TorchVision


def open_contestant(settings: dict) -> "Contestant":
    """The loaded tower."""
    return Contestant(settings)


class Contestant:
    """Times are in seconds."""

    def __init__(self, settings: dict):
        started = time.perf_counter()
        model = open_model(settings["bundle"])
        self.tower, self.side = TorchVision(model), model.config.vision.image_size
        self.load_seconds = time.perf_counter() - started

    def facts(self) -> dict:
        """What loading took, and what runs."""
        return {"load_seconds": self.load_seconds, "precision": "vision float32"}

    @torch.inference_mode()
    def vision(self, folder: str) -> float:
        """One tile; in float32, whichever exported tower it is compared with."""
        pixels = torch.randn(1, 3, self.side, self.side)
        started = time.perf_counter()
        self.tower(pixels)
        return time.perf_counter() - started
