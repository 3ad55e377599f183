"""A model that answers: vision tower, decoder and tokenizer stitched together. The one way from a request to an answer."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vlquant.bundle import MANIFEST, find_bundle
from vlquant.config import with_prompt_form
from vlquant.decoder import Decoder, DecoderConfig, KeyValueCache, rope_depends_on_length
from vlquant.errors import InvalidRequest
from vlquant.model import Model, open_model, resolve_model
from vlquant.request import EncodedRequest, Request, encode_answer, encode_request
from vlquant.runtime.answer import Answer, AnswerText, History, PieceStream, Usage
from vlquant.runtime.features import TileFeatures
from vlquant.runtime.generate import Decoding, Ending, Generation
from vlquant.runtime.linear import load_decoder
from vlquant.runtime.messages import Prompt, as_request, is_conversation
from vlquant.runtime.video import with_frames
from vlquant.runtime.vision_session import MissingVision, OnnxVision, TorchVision
from vlquant.tokenizer import Tokenizer, load_tokenizer

VISIONS = ("onnx", "torch")

Features = Tensor | None
"""Visual tokens of one request, float32 [tokens, hidden_size]; None without pictures."""


def load(
    path: str | Path | None = None,
    device: str = "cpu",
    *,
    vision: str = "onnx",
    max_tiles: int | None = None,
    prompt: str = "original",
    tokenizer: str | None = None,
) -> "Pipeline":
    """Load a bundle (packed weights) or an unquantized checkpoint (float weights).

    path: folder or published name, None: the bundle here; vision: "onnx" (the exported tower) or "torch";
    max_tiles: per picture, for requests that do not say; prompt: conversations as the "original" or as the "hf" processor
    writes them; tokenizer: "slow" or "fast" where they differ. Raises VlquantError for what cannot be loaded.
    """
    place = require_device(device)
    if vision not in VISIONS:
        raise InvalidRequest(f"vision {vision!r} is unknown; use {' or '.join(VISIONS)}")
    folder = find_bundle() if path is None else resolve_model(path)
    if folder is None:
        raise InvalidRequest("there is no bundle here; name one, or make one with vlquant quantize")
    if (folder / MANIFEST).is_file():
        find_bundle(folder)  # Whether it is whole.
    model = open_model(folder)
    features = TileFeatures(open_vision(model, vision, device))
    model.config = with_prompt_form(model.config, prompt)
    words = load_tokenizer(folder, tokenizer)
    return Pipeline(model, words, decoder=load_decoder(model, place), features=features, max_tiles=max_tiles)


def open_vision(model: Model, vision: str, device: str) -> Callable[[Tensor], Tensor]:
    """The vision tower of a model, "onnx" or "torch"."""
    if vision == "torch":
        return TorchVision(model, device)
    exported = model.folder / "vision"
    return OnnxVision(exported, device) if (exported / "model.onnx").is_file() else MissingVision(model.folder)


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
    return device


def position_limit(config: DecoderConfig) -> int:
    """Positions a decoder can take: dynamic rope stretches what it was trained for by its factor."""
    return int(config.max_positions * (config.rope.dynamic_factor or 1))


@dataclass
class Batch:
    """Requests embedded and ready for the decoder, and when what happened to them."""

    encoded: list[EncodedRequest]
    histories: list[History]
    embeddings: Tensor
    """float32 [batch, length, hidden_size], padded on the left."""
    attention_mask: Tensor
    """bool [batch, length]."""
    vision_seconds: float
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None


class Pipeline:
    """Answers requests one by one, as a stream or in batches. For one thread at a time."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, *, decoder: Decoder, features: TileFeatures, max_tiles: int | None = None
    ):
        self.model, self.config, self.tokenizer = model, model.config, tokenizer
        self.decoder, self.max_tiles = decoder, max_tiles
        self.position_limit = position_limit(model.config.decoder)
        """Longest conversation in tokens. The original knows no limit and answers badly beyond it."""
        self._tile_features = features
        self._stop_token = model.config.chat.conversation.stop_token
        self.stop_id = tokenizer.token_id(self._stop_token)
        self._image_id = tokenizer.token_id(model.config.chat.image_token)

    def ask(
        self,
        question: Prompt,
        images: Sequence = (),
        *,
        video: object = None,
        history: History | None = None,
        generation: Generation = Generation(),
    ) -> Answer:
        """Answer one question about pictures (path, PIL image, bytes, data URL), a video (path, frames) or nothing.

        question: a text, or a Request or OpenAI-style messages, which hold everything themselves.
        history: of the answer before, with the pictures of all turns in `images`. Raises InvalidRequest.
        """
        return self.batch([_request(question, images, video, history)], generation)[0]

    def stream(
        self,
        question: Prompt,
        images: Sequence = (),
        *,
        video: object = None,
        history: History | None = None,
        generation: Generation = Generation(),
    ) -> "Stream":
        """Like `ask`, yielding the text in pieces as it is generated; the whole is in the stream's `answer` afterwards."""
        return Stream(self, self.prepare([_request(question, images, video, history)]), generation)

    def batch(
        self,
        requests: Sequence[Prompt],
        generation: Generation = Generation(),
        *,
        features: Sequence[Features] | None = None,
    ) -> list[Answer]:
        """Answer requests side by side, left padded as the original's batch_chat.

        features: what `features` returned for these requests, to spare the vision tower. Raises InvalidRequest.
        """
        if not requests:
            return []
        batch = self.prepare(requests, features)
        decoding = self.decoding(batch, generation)
        for _ in decoding:
            batch.first_token = batch.first_token or time.perf_counter()
        return [self.answer(batch, row, ids, generation) for row, ids in enumerate(decoding.rows)]

    def __call__(self, prompts: object, generation: Generation = Generation()) -> Answer | list[Answer]:
        """Answer LMDeploy-style prompts: a text, (text, picture), OpenAI-style messages, or a list of any of these."""
        if isinstance(prompts, list) and not is_conversation(prompts):
            return self.batch(prompts, generation)
        return self.batch([prompts], generation)[0]

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
        tiles = self._tile_features([tile for each in encoded for tile in each.tiles])
        return [part.flatten(0, 1) if len(part) else None for part in tiles.split(counts)]

    @torch.inference_mode()
    def answer_logits(
        self,
        requests: Sequence[Prompt],
        answers: Sequence[str | Sequence[int]],
        *,
        features: Sequence[Features] | None = None,
    ) -> list[Tensor]:
        """Logits float32 [answer tokens, vocab] of given answers (teacher forcing): row i is before token i is known.

        answers: ids as in `Answer.ids`, or texts, to which the stop token is added.
        """
        batch = self.prepare(requests, features)
        forced = [
            encode_answer(answer, each.prompt, each.ids, config=self.config, tokenizer=self.tokenizer)
            if isinstance(answer, str)
            else list(answer)
            for each, answer in zip(batch.encoded, answers, strict=True)
        ]
        longest = max(map(len, forced))
        device, (rows, length) = batch.embeddings.device, batch.attention_mask.shape
        cache = KeyValueCache(self.decoder.config, batch=rows, capacity=length + longest, device=device)
        logits = [self.decoder(batch.embeddings, attention_mask=batch.attention_mask, cache=cache)]
        padded = [ids[:-1] + [self.tokenizer.pad_id] * (longest - len(ids)) for ids in forced]
        known = [[True] * (len(ids) - 1) + [False] * (longest - len(ids)) for ids in forced]
        mask = torch.cat((batch.attention_mask, torch.tensor(known, dtype=torch.bool, device=device)), dim=1)
        # Only token by token is it then what generating would see.
        stepwise = rope_depends_on_length(self.config.decoder, mask.shape[1])
        for part in torch.tensor(padded, device=device).split(1 if stepwise else max(1, longest - 1), dim=1):
            embeddings = self.decoder.embed(part.long()).float()
            seen = mask[:, : cache.length + part.shape[1]]
            if part.numel():
                logits.append(self.decoder(embeddings, attention_mask=seen, cache=cache, all_positions=True))
        together = torch.cat(logits, dim=1)
        return [row[: len(ids)] for row, ids in zip(together, forced, strict=True)]

    @torch.inference_mode()
    def prepare(
        self, requests: Sequence[Prompt], features: Sequence[Features] | None = None
    ) -> Batch:
        """Embed the prompts, left padded, with features in the places of context tokens."""
        requests = [self.request(each) for each in requests]
        encoded = [self.encode(each) for each in requests]
        histories = [tuple(each.history or ()) if isinstance(each, Request) else () for each in requests]
        started = time.perf_counter()
        features = self.features(encoded) if features is None else features
        vision_seconds = time.perf_counter() - started
        device, length = self.decoder.embedding.device, max(len(each.ids) for each in encoded)
        padding = [length - len(each.ids) for each in encoded]
        ids = [[self.tokenizer.pad_id] * pad + list(each.ids) for pad, each in zip(padding, encoded, strict=True)]
        ids = torch.tensor(ids, device=device)
        embeddings = self.decoder.embed(ids).float()
        for row, visual in enumerate(features):
            places = (ids[row] == self._image_id).nonzero()[:, 0]
            given = 0 if visual is None else len(visual)
            # Without pictures it is text like any other, as in the original.
            if visual is not None and len(places) != given:
                raise InvalidRequest(
                    f"the conversation has {len(places)} places for visual tokens and its pictures give {given}; "
                    "write <image> once for each picture, and leave <IMG_CONTEXT> to vlquant"
                )
            if given:
                embeddings[row, places] = visual.to(device)
        mask = torch.arange(length, device=device) >= torch.tensor(padding, device=device)[:, None]
        return Batch(encoded, histories, embeddings, mask, vision_seconds)

    def decoding(self, batch: Batch, generation: Generation) -> Decoding:
        """Generation of a batch, no further than the model's positions reach."""
        room = self.position_limit - batch.attention_mask.shape[1]
        within = replace(generation, max_new_tokens=max(1, min(generation.max_new_tokens, room)))
        reached = self.text(generation).stopped if generation.stop else Ending.reached
        ending = Ending(self.stop_id, self.tokenizer.pad_id, reached)
        return Decoding(self.decoder, batch.embeddings, batch.attention_mask, generation=within, ending=ending)

    def text(self, generation: Generation) -> AnswerText:
        """How ids of an answer become text."""
        decode = partial(self.tokenizer.decode, skip_special=not self.config.family.shows_special_tokens)
        return AnswerText(decode, (self._stop_token, *generation.stop), self.tokenizer.unsettled)

    def answer(self, batch: Batch, row: int, ids: list[int], generation: Generation) -> Answer:
        """The finished answer of one row."""
        now, encoded, text = time.perf_counter(), batch.encoded[row], self.text(generation)
        stopped = ids[-1:] == [self.stop_id] or text.stopped(ids)
        first, words = batch.first_token or now, text.whole(ids)
        usage = Usage(
            prompt_tokens=len(encoded.ids),
            answer_tokens=len(ids),
            ended_by="stop" if stopped else "length" if len(ids) == generation.max_new_tokens else "context",
            vision_seconds=batch.vision_seconds,
            prompt_seconds=first - batch.started,
            answer_seconds=now - first,
        )
        history = (*map(tuple, batch.histories[row]), (encoded.question, words))
        return Answer(words, tuple(ids), history, tuple(map(tuple, encoded.tile_map)), usage)


class Stream:
    """An answer as text pieces; iterate once, then read `answer`."""

    def __init__(self, pipeline: Pipeline, batch: Batch, generation: Generation):
        self._pipeline, self._batch, self._generation = pipeline, batch, generation
        self.answer: Answer | None = None
        """The whole, once the last piece has been taken."""

    def __iter__(self) -> Iterator[str]:
        decoding = self._pipeline.decoding(self._batch, self._generation)
        pieces = PieceStream(self._pipeline.text(self._generation))
        for _ in decoding:
            self._batch.first_token = self._batch.first_token or time.perf_counter()
            if piece := pieces.more(decoding.rows[0]):
                yield piece
        self.answer = self._pipeline.answer(self._batch, 0, decoding.rows[0], self._generation)
        if piece := pieces.rest(decoding.rows[0]):
            yield piece


def _request(question: Prompt, images: Sequence, video: object, history: History | None) -> Prompt:
    if not isinstance(question, str):
        if images is not None and len(images) or video is not None or history:
            raise InvalidRequest("a Request or messages hold pictures, video and history themselves; put them there")
        return question
    images = () if images is None else tuple(images) if isinstance(images, (list, tuple)) else (images,)
    return Request(question=question, images=images, video=video, history=history)
