"""A model that answers: vision tower, decoder and tokenizer stitched together. The one way from a request to an answer."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vlquant.decoder import Decoder
from vlquant.rope import rope_depends_on_length
from vlquant.errors import InvalidRequest
from vlquant.model import Model
from vlquant.request import EncodedRequest, Request, encode_answer
from vlquant.runtime.answer import Answer, AnswerText, History, PieceStream, Usage
from vlquant.runtime.conversation_cache import ConversationCache
from vlquant.runtime.features import TileFeatures
from vlquant.runtime.generate import Decoding, Ending, Generation
from vlquant.runtime.loading import load_decoder
from vlquant.runtime.messages import Prompt, is_conversation
from vlquant.runtime.native_decoder import NativeDecoder
from vlquant.runtime.reader import Features, Reader, open_reader, require_device
from vlquant.tokenizer import Tokenizer


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

    path: folder or published name, None: the bundle here; vision: "onnx" (the exported tower, that for the
    device if there are several), "fp32", "fp16", "int8" or "torch";
    max_tiles: per picture, for requests that do not say; prompt: conversations as the "original" or as the "hf" processor
    writes them; tokenizer: "slow" or "fast" where they differ. Raises VlquantError for what cannot be loaded.
    """
    reader = open_reader(path, device, vision=vision, max_tiles=max_tiles, prompt=prompt, tokenizer=tokenizer)
    decoder = load_decoder(reader.model, require_device(device))
    return Pipeline(reader.model, reader.tokenizer, decoder=decoder, features=reader.tile_features, max_tiles=max_tiles)


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
    reused_tokens: int = 0


class Pipeline(Reader):
    """Answers requests one by one, as a stream or in batches. For one thread at a time."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, *, decoder: Decoder | NativeDecoder, features: TileFeatures, max_tiles: int | None = None
    ):
        super().__init__(model, tokenizer, features=features, max_tiles=max_tiles)
        self.decoder = decoder
        self._memory = ConversationCache()

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
        batch.reused_tokens = decoding.reused_tokens
        return [self.answer(batch, row, ids, generation) for row, ids in enumerate(decoding.rows)]

    def __call__(self, prompts: object, generation: Generation = Generation()) -> Answer | list[Answer]:
        """Answer LMDeploy-style prompts: a text, (text, picture), OpenAI-style messages, or a list of any of these."""
        if isinstance(prompts, list) and not is_conversation(prompts):
            return self.batch(prompts, generation)
        return self.batch([prompts], generation)[0]

    @torch.inference_mode()
    def answer_logits(
        self,
        requests: Sequence[Prompt],
        answers: Sequence[str | Sequence[int]],
        *,
        features: Sequence[Features] | None = None,
        cache_bits: int = 32,
    ) -> list[Tensor]:
        """Logits float32 [answer tokens, vocab] of given answers (teacher forcing): row i is before token i is known.

        answers: ids as in `Answer.ids`, or texts, to which the stop token is added.
        """
        if not requests:
            return []
        batch = self.prepare(requests, features)
        forced = [
            encode_answer(answer, each.prompt, each.ids, config=self.config, tokenizer=self.tokenizer)
            if isinstance(answer, str)
            else list(answer)
            for each, answer in zip(batch.encoded, answers, strict=True)
        ]
        longest = max(map(len, forced))
        device, (rows, length) = batch.embeddings.device, batch.attention_mask.shape
        cache = self.decoder.new_cache(batch=rows, capacity=length + longest, bits=cache_bits)
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
        device, length = self.decoder.device, max(len(each.ids) for each in encoded)
        padding = [length - len(each.ids) for each in encoded]
        ids = [[self.tokenizer.pad_id] * pad + list(each.ids) for pad, each in zip(padding, encoded, strict=True)]
        ids = torch.tensor(ids, device=device)
        embeddings = self.decoder.embed(ids).float()
        for row, visual in enumerate(features):
            self.place(visual, ids[row], embeddings[row])
        mask = torch.arange(length, device=device) >= torch.tensor(padding, device=device)[:, None]
        return Batch(encoded, histories, embeddings, mask, vision_seconds)

    def decoding(self, batch: Batch, generation: Generation) -> Decoding:
        """Generation of a batch, no further than the model's positions reach."""
        room = self.position_limit - batch.attention_mask.shape[1]
        within = replace(generation, max_new_tokens=max(1, min(generation.max_new_tokens, room)))
        reached = self.text(generation).stopped if generation.stop else Ending.reached
        ending = Ending(self.stop_id, self.tokenizer.pad_id, reached)
        if not any(batch.histories):
            self._memory.forget()
        return Decoding(
            self.decoder, batch.embeddings, batch.attention_mask, generation=within, ending=ending, memory=self._memory
        )

    def text(self, generation: Generation) -> AnswerText:
        """How ids of an answer become text."""
        decode = partial(self.tokenizer.decode, skip_special=not self.config.family.shows_special_tokens)
        return AnswerText(decode, (self.stop_token, *generation.stop), self.tokenizer.unsettled)

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
            reused_tokens=batch.reused_tokens,
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
        self._batch.reused_tokens = decoding.reused_tokens
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
