"""transformers' InternVLForConditionalGeneration in `vlquant bench`: a bundle's shape, random float32 weights.

The weights are made in memory, so loading and memory are not measured.
"""

import time

import torch
from transformers import DynamicCache, InternVLConfig, InternVLForConditionalGeneration

from vlquant.config import read_config
from vlquant.bench_options import row_lengths
from vlquant.hf_layout import model_config
from vlquant.tokenizer import load_tokenizer


def open_contestant(settings: dict) -> "Contestant":
    """The model."""
    return Contestant(settings)


class Contestant:
    """Times are in seconds."""

    def __init__(self, settings: dict):
        self.config = read_config(settings["bundle"])
        fields = model_config(self.config, load_tokenizer(settings["bundle"]), quantization={}, dtype="float32")
        del fields["quantization_config"]
        self.model = InternVLForConditionalGeneration(InternVLConfig(**fields)).float().eval()
        self._decoding: tuple | None = None

    def facts(self) -> dict:
        """What runs."""
        return {"precision": "float32", "attention": self.model.config._attn_implementation}

    @torch.inference_mode()
    def vision(self, folder: str) -> float:
        """One tile; in float32, whichever exported tower it is compared with."""
        pixels = self.pixels()
        started = time.perf_counter()
        self.model.model.get_image_features(pixel_values=pixels)
        return time.perf_counter() - started

    @torch.inference_mode()
    def prefill(self, length: int) -> float:
        """A prompt's logits for its next token."""
        ids = self.ids(1, length)
        started = time.perf_counter()
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        return time.perf_counter() - started

    @torch.inference_mode()
    def decode(self, context: int, batch: int, tokens: int) -> float:
        """So many greedy tokens of every row after a context, which is computed the first time."""
        wanted = context, batch
        if self._decoding is None or self._decoding[0] != wanted:
            self._decoding = None
            starts = context - torch.tensor(row_lengths(context, batch))
            mask = (torch.arange(context) >= starts[:, None]).long()
            cache = DynamicCache()
            self.model(input_ids=self.ids(batch, context), attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._decoding = (wanted, cache, mask)
        _, cache, mask = self._decoding
        if beyond := cache.get_seq_length() - context:
            cache.crop(-beyond)
        ids, more = torch.zeros(batch, 1, dtype=torch.long), torch.ones(batch, 1, dtype=torch.long)
        started = time.perf_counter()
        for _ in range(tokens):
            mask = torch.cat((mask, more), dim=1)
            known = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
            ids = self.model(input_ids=ids, **known).logits[:, -1:].argmax(-1)
        return time.perf_counter() - started

    @torch.inference_mode()
    def picture(self, tokens: int) -> float:
        """The first token of `tokens` of which one tile's are the first; reading picture and text is not in it."""
        ids, pixels = self.ids(1, tokens), self.pixels()
        ids[:, : self.config.chat.tokens_per_tile] = self.model.config.image_token_id
        started = time.perf_counter()
        self.model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        return time.perf_counter() - started

    def ids(self, batch: int, length: int) -> torch.Tensor:
        """Any that mean no picture."""
        ids = torch.randint(self.config.decoder.vocab_size, (batch, length))
        return ids.masked_fill(ids == self.model.config.image_token_id, 0)

    def pixels(self) -> torch.Tensor:
        """One tile."""
        side = self.config.vision.image_size
        return torch.randn(1, 3, side, side)
