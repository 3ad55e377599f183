"""How a model reads a request: prompt, ids, tiles and visual tokens. Runs the vision tower; knows no decoder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vlquant.bundle import MANIFEST, find_bundle
from vlquant.config import with_prompt_form
from vlquant.decoder_config import DecoderConfig
from vlquant.errors import InvalidRequest
from vlquant.model import Model, open_model, resolve_model
from vlquant.request import EncodedRequest, Request, encode_request, require_max_tiles
from vlquant.runtime.cuda_driver import require_code_for
from vlquant.runtime.features import TileFeatures
from vlquant.runtime.messages import Prompt, as_request
from vlquant.runtime.video import with_frames
from vlquant.runtime.vision_session import MissingVision, OnnxVision, TorchVision, pick_tower, require_vision
from vlquant.tokenizer import Tokenizer, load_tokenizer

Features = Tensor | None
"""Visual tokens of one request, float32 [tokens, hidden_size]; None without pictures."""


def open_reader(
    path: str | Path | None = None,
    device: str = "cpu",
    *,
    vision: str = "onnx",
    max_tiles: int | None = None,
    prompt: str = "original",
    tokenizer: str | None = None,
) -> "Reader":
    """Open a bundle or checkpoint without its decoder; the arguments are those of `load`, and so is what it raises."""
    require_device(device)
    require_vision(vision)
    folder = find_bundle() if path is None else resolve_model(path)
    if folder is None:
        raise InvalidRequest("there is no bundle here; name one, or make one with vlquant quantize")
    if (folder / MANIFEST).is_file():
        find_bundle(folder)  # Whether it is whole.
    model = open_model(folder)
    if max_tiles is not None:
        require_max_tiles(max_tiles, model.config)
    features = TileFeatures(open_vision(model, vision, device))
    model.config = with_prompt_form(model.config, prompt)
    return Reader(model, load_tokenizer(folder, tokenizer), features=features, max_tiles=max_tiles)


def open_vision(model: Model, vision: str, device: str) -> Callable[[Tensor], Tensor]:
    """The vision tower of a model, one of VISIONS. Raises as `pick_tower` and `OnnxVision`."""
    if vision == "torch":
        return TorchVision(model, device)
    folder = pick_tower(model.folder, vision, device)
    return MissingVision(model.folder) if folder is None else OnnxVision(folder, device)


def require_device(name: str) -> torch.device:
    """The torch device called `name`; raises InvalidRequest if this machine has none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequest(f"device {name!r} is unknown; use cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(
            f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices here; check the driver, or use cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"device {name!r} is not supported; use cpu, cuda or cuda:1")
    if device.type == "cuda":
        require_code_for(device)
    return device


def position_limit(config: DecoderConfig) -> int:
    """Positions a decoder can take: dynamic rope stretches what it was trained for by its factor."""
    return int(config.max_positions * (config.rope.dynamic_factor or 1))


class Reader:
    """Turns requests into what the decoder of a model is shown."""

    def __init__(self, model: Model, tokenizer: Tokenizer, *, features: TileFeatures, max_tiles: int | None = None):
        self.model, self.config, self.tokenizer, self.max_tiles = model, model.config, tokenizer, max_tiles
        self.position_limit = position_limit(model.config.decoder)
        """Longest conversation in tokens. The original knows no limit and answers badly beyond it."""
        self.tile_features = features
        self._embedding_rows = model.embedding_rows  # Opens its file now: another may lie there when the first question comes.
        self.stop_token = model.config.chat.conversation.stop_token
        self.stop_id = tokenizer.token_id(self.stop_token)
        self.image_id = tokenizer.token_id(model.config.chat.image_token)

    def request(self, prompt: Prompt) -> Request | EncodedRequest:
        """What a prompt of any form asks. Raises InvalidRequest for what is none."""
        return prompt if isinstance(prompt, EncodedRequest) else as_request(prompt, self.config.chat.conversation)

    def encode(self, prompt: Prompt) -> EncodedRequest:
        """Prompt, ids and tiles of a request. Raises InvalidRequest if it does not fit the model's context."""
        encoded = request = self.request(prompt)
        if isinstance(request, Request):
            request = with_frames(request)
            if request.max_tiles is None and self.max_tiles is not None:
                request = replace(request, max_tiles=self.max_tiles)
            encoded = encode_request(request, self.config, self.tokenizer)
        if len(encoded.ids) > self.position_limit:
            pictures = f" ({len(encoded.tiles)} tiles of {self.config.chat.tokens_per_tile} tokens among them)"
            ways_out = "lower --max-tiles, or give fewer pictures, frames or turns"
            raise InvalidRequest(
                f"the conversation has {len(encoded.ids)} tokens{pictures if encoded.tiles else ''}, and this model takes at "
                f"most {self.position_limit}; {ways_out if encoded.tiles else 'shorten the text, or give fewer turns'}"
            )
        return encoded

    def features(self, encoded: Sequence[EncodedRequest]) -> list[Features]:
        """Visual tokens of each request, all tiles in one go, equal tiles once."""
        counts = [len(each.tiles) for each in encoded]
        tiles = self.tile_features([tile for each in encoded for tile in each.tiles])
        return [part.flatten(0, 1) if len(part) else None for part in tiles.split(counts)]

    def embed(self, encoded: EncodedRequest, visual: Features) -> Tensor:
        """What the decoder is shown of one request, float32 [length, hidden_size], read from the checkpoint's embedding."""
        ids = torch.tensor(encoded.ids)
        embeddings = self._embedding_rows(ids).float()
        self.place(visual, ids, embeddings)
        return embeddings

    def place(self, visual: Features, ids: Tensor, embeddings: Tensor) -> None:
        """Put visual tokens into the places of context tokens in `embeddings` [length, hidden_size].

        Raises InvalidRequest if these are not as many.
        """
        places = (ids == self.image_id).nonzero()[:, 0]
        # Without pictures it is text like any other, as in the original.
        if visual is None:
            return
        if len(places) != len(visual):
            raise InvalidRequest(
                f"the conversation has {len(places)} places for visual tokens and its pictures give {len(visual)}; "
                "write <image> once for each picture, and leave <IMG_CONTEXT> to vlquant"
            )
        embeddings[places] = visual.to(embeddings)
