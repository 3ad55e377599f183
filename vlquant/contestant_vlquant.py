"""Ours in `vlquant bench`: a bundle as `vlquant chat` loads it. Times single steps; decides nothing about rounds."""

import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlquant.bench_options import row_lengths
from vlquant.request import Request
from vlquant.runtime.generate import Generation
from vlquant.runtime.pipeline import load
from vlquant.runtime.sampling import likeliest

QUESTION = "What is the total?"


def open_contestant(settings: dict) -> "Contestant":
    """The loaded bundle."""
    return Contestant(settings)


class Contestant:
    """A bundle that answers; times are in seconds."""

    def __init__(self, settings: dict):
        started = time.perf_counter()
        self.pipeline = load(settings["bundle"])
        self.load_seconds = time.perf_counter() - started
        self.decoder, self.threads = self.pipeline.decoder, settings["threads"]
        self.random = torch.Generator().manual_seed(0)
        self._towers: dict[str, object] = {}
        self._decoding: tuple | None = None

    def facts(self) -> dict:
        """What loading took, and what runs."""
        return {
            "load_seconds": self.load_seconds,
            "decoder": self.decoder.name,
            "vision": getattr(self.pipeline.tile_features.session, "name", "onnx"),
            "text_tokens": len(self.pipeline.encode(Request(QUESTION)).ids),
            "picture_tokens": len(self.pipeline.encode(self.picture_request()).ids),
        }

    @torch.inference_mode()
    def vision(self, folder: str) -> float:
        """One tile through the exported tower in a folder."""
        if folder not in self._towers:
            from vlquant.runtime.vision_session import OnnxVision

            self._towers = {folder: OnnxVision(folder, threads=self.threads)}
        tower, side = self._towers[folder], self.pipeline.config.vision.image_size
        pixels = torch.randn(1, 3, side, side, generator=self.random)
        started = time.perf_counter()
        tower(pixels)
        return time.perf_counter() - started

    @torch.inference_mode()
    def prefill(self, length: int) -> float:
        """A prompt's logits for its next token, in a new cache."""
        embeddings = self.embeddings(1, length)
        started = time.perf_counter()
        self.decoder(embeddings, cache=self.decoder.new_cache(batch=1, capacity=length))[:, -1].argmax(-1)
        return time.perf_counter() - started

    @torch.inference_mode()
    def decode(self, context: int, batch: int, tokens: int) -> float:
        """So many greedy tokens of every row after a context, which is computed the first time."""
        wanted = context, batch, tokens
        if self._decoding is None or self._decoding[0] != wanted:
            self._decoding = None
            self._decoding = (wanted, *self.filled(context, batch, tokens))
        _, cache, mask = self._decoding
        shorten(cache, context)
        ids = torch.zeros(batch, dtype=torch.long)
        started = time.perf_counter()
        for step in range(1, tokens + 1):
            embeddings = self.decoder.embed(ids[:, None]).float()
            ids = likeliest(self.decoder(embeddings, attention_mask=mask[:, : context + step], cache=cache)[:, -1])
        return time.perf_counter() - started

    def filled(self, context: int, batch: int, tokens: int) -> tuple[object, Tensor]:
        """A cache after `context` positions, rows padded on the left, and the mask of these and `tokens` more."""
        starts = context - torch.tensor(row_lengths(context, batch))
        mask = torch.arange(context + tokens) >= starts[:, None]
        cache = self.decoder.new_cache(batch=batch, capacity=context + tokens)
        self.decoder(self.embeddings(batch, context), attention_mask=mask[:, :context], cache=cache)
        return cache, mask

    def text(self, tokens: int) -> float:
        """The first token of a question without pictures; it takes `tokens` tokens."""
        return self.answer_seconds(Request(QUESTION))

    def picture(self, tokens: int) -> float:
        """The first token of a question about a picture of one tile never seen before; it takes `tokens` tokens."""
        return self.answer_seconds(self.picture_request())

    def answer_seconds(self, request: Request) -> float:
        """From a request to its first token."""
        started = time.perf_counter()
        self.pipeline.ask(request, generation=Generation(max_new_tokens=1))
        return time.perf_counter() - started

    def picture_request(self) -> Request:
        """A question about noise."""
        side = self.pipeline.config.vision.image_size
        pixels = torch.randint(256, (side, side, 3), generator=self.random, dtype=torch.uint8)
        return Request(QUESTION, images=(Image.fromarray(np.asarray(pixels)),), max_tiles=1)

    def embeddings(self, batch: int, length: int) -> Tensor:
        """Any: float32 [batch, length, hidden_size]."""
        return 0.02 * torch.randn(batch, length, self.pipeline.config.decoder.hidden_size, generator=self.random)


def shorten(cache: object, length: int) -> None:
    """Forget what a cache holds beyond `length` positions."""
    if hasattr(cache, "layers"):
        for layer in cache.layers:
            layer.length = length
    else:
        cache.length = length
