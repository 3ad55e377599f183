"""`vlquant trace`: every intermediate of the original's chat() and batch_chat() in one file; and what differs in two of them."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from vlquant.checkpoint import read_json
from vlquant.errors import BrokenCheckpoint, InvalidRequest, OutputRefused
from vlquant.events import Event, Report, silent
from vlquant.prompt import IMAGE_PLACEHOLDER, build_prompt, expand_images
from vlquant.request import EncodedRequest, open_image, require_text
from vlquant.runtime.generate import Generation
from vlquant.runtime.pipeline import Batch, Pipeline, load
from vlquant.tiling import MOST_TILES, tile_picture
from vlquant.trace_difference import KEYS


Count = Annotated[int, Field(ge=0)]
Steps = Annotated[int, Field(ge=1, le=32768)]


class Strict(BaseModel):
    """Part of a request file: immutable, and no unknown key is passed over."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ImageFile(Strict):
    """A picture, cut as the model cards' load_image(file, max_num) does."""

    file: str
    """Absolute, or relative to the request file."""
    max_num: int = Field(12, ge=1, le=MOST_TILES)
    min_num: int = Field(1, ge=1, le=MOST_TILES)


class ChatCall(Strict):
    """One chat(tokenizer, pixel_values, question, ...)."""

    call: Literal["chat"]
    key: str
    question: str
    history: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = None
    images: list[ImageFile] | None = None
    """All pictures' tiles one after the other are pixel_values; null or none: no pixel_values."""
    num_patches_list: list[Count] | None = None
    max_new_tokens: Steps = 20
    system_message: str | None = None


class BatchCall(Strict):
    """One batch_chat(tokenizer, pixel_values, questions, num_patches_list, ...)."""

    call: Literal["batch_chat"]
    key: str
    questions: list[str] = Field(min_length=1)
    images: list[ImageFile] | None = None
    num_patches_list: list[Count]
    """One per question."""
    max_new_tokens: Steps = 20
    system_message: str | None = None


class Calls(Strict):
    """A request file."""

    calls: list[Annotated[ChatCall | BatchCall, Field(discriminator="call")]] = Field(min_length=1)


@dataclass(frozen=True)
class TracedCall:
    """What one call gave."""

    tensors: dict[str, Tensor]
    prompts: list[str]
    responses: list[str]


def trace(
    model: str | Path,
    request: str | Path,
    output: str | Path,
    *,
    vision: str = "torch",
    tokenizer: str | None = None,
    report: Report = silent,
) -> Path:
    """Run the calls of a request file greedily and write all they gave into a safetensors file; returns its path.

    Tensors, per call: KEY/input_ids and /attention_mask [batch, length], /features [tiles, tokens, hidden] where there are
    pictures, /prefill_logits float32 [batch, length, vocab], /generated_ids [batch, steps]. Metadata: KEY/prompt and
    /response, JSON lists for batches. Raises InvalidRequest for a file that is no request or pictures that do not fit it.
    """
    request, output = Path(request), Path(output)
    calls = read_calls(request)
    if output.is_dir():
        raise OutputRefused(f"{output} is a folder; name a file with -o")
    if not output.absolute().parent.is_dir():
        raise OutputRefused(f"folder {output.parent} does not exist; make it, or name another file")
    pipeline = load(model, vision=vision, tokenizer=tokenizer)
    pipeline.position_limit = sys.maxsize  # The original knows none.
    tensors, metadata = {}, {KEYS: json.dumps([call.key for call in calls])}
    for index, call in enumerate(calls):
        traced = run_call(pipeline, call, request.parent)
        tensors |= {f"{call.key}/{name}": tensor.contiguous() for name, tensor in traced.tensors.items()}
        for name, texts in (("prompt", traced.prompts), ("response", traced.responses)):
            metadata[f"{call.key}/{name}"] = texts[0] if call.call == "chat" else json.dumps(texts, ensure_ascii=False)
        report(Event("calls", index + 1, len(calls)))
    partial = output.with_name(output.name + ".partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return output


def read_calls(path: Path) -> list[ChatCall | BatchCall]:
    """The calls of a request file; raises InvalidRequest, naming what in it is wrong."""
    try:
        contents = read_json(path)
    except BrokenCheckpoint as error:
        raise InvalidRequest(f"{path} is no request ({str(error).rpartition(';')[0]}); see vlquant trace --help") from None
    try:
        calls = Calls.model_validate(contents).calls
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise InvalidRequest(f"{path} is no request at {where} ({first['msg']}); see vlquant trace --help") from None
    keys = [call.key for call in calls]
    for key in keys:
        require_text(key)
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise InvalidRequest(f"{path} has several calls with the key {twice[0]!r}; give each its own")
    return calls


@torch.inference_mode()
def run_call(pipeline: Pipeline, call: ChatCall | BatchCall, folder: Path) -> TracedCall:
    """Everything between the question and the answer of one call."""
    encoded = encode_call(pipeline, call, folder)
    features = place_features(pipeline, encoded)
    batch = pipeline.prepare(encoded, features)
    generation = Generation(max_new_tokens=call.max_new_tokens)
    logits = pipeline.decoder(batch.embeddings, attention_mask=batch.attention_mask, all_positions=True)
    decoding = pipeline.decoding(batch, generation)
    for _ in decoding:
        pass
    tensors = {
        "input_ids": padded_ids(batch, pipeline.tokenizer.pad_id),
        "attention_mask": batch.attention_mask.long(),
        "prefill_logits": logits,
        "generated_ids": generated_ids(pipeline, decoding.rows),
    }
    visual = [each for each in features if each is not None]
    if visual:
        tensors["features"] = torch.cat(visual).unflatten(0, (-1, pipeline.config.chat.tokens_per_tile))
    answers = [pipeline.answer(batch, row, ids, generation) for row, ids in enumerate(decoding.rows)]
    return TracedCall(tensors, [each.prompt for each in encoded], [answer.text for answer in answers])


def encode_call(pipeline: Pipeline, call: ChatCall | BatchCall, folder: Path) -> list[EncodedRequest]:
    """Prompts exactly as the original makes them: one row of tiles, which `num_patches_list` divides among placeholders.

    Raises InvalidRequest where the original's assertions fail.
    """
    tiles, boxes = cut_images(pipeline, call.images or [], folder)
    counts = call.num_patches_list
    if call.call == "chat":
        counts = ([len(tiles)] if tiles else []) if counts is None else counts
        rows = [(call.question, call.history, counts)]
    else:
        if len(counts) != len(call.questions):
            raise InvalidRequest(f"call {call.key!r} has {len(call.questions)} questions and {len(counts)} counts of tiles; give one each")
        rows = [(question, None, [count]) for question, count in zip(call.questions, counts, strict=True)]
    if tiles and sum(counts) != len(tiles):
        raise InvalidRequest(f"call {call.key!r}: num_patches_list sums to {sum(counts)}, and its pictures have {len(tiles)} tiles")
    encoded, start = [], 0
    for question, history, own in rows:
        if tiles and history is None and IMAGE_PLACEHOLDER not in question:
            question = f"{IMAGE_PLACEHOLDER}\n{question}"
        prompt, ids = literal_prompt(pipeline, question, history or [], own, system=call.system_message)
        stop = start + sum(own)
        encoded.append(EncodedRequest(prompt, ids, tiles[start:stop], cut(boxes[start:stop], own), question))
        start = stop
    return encoded


def literal_prompt(
    pipeline: Pipeline, question: str, history: Sequence, counts: Sequence[int], *, system: str | None
) -> tuple[str, list[int]]:
    """Text and ids as the original writes them, whether or not placeholders and pictures agree."""
    chat = pipeline.config.chat
    turns = [*map(tuple, history), (question, None)]
    prompt = build_prompt(chat.conversation, turns, system_message=chat.system_message if system is None else system)
    require_text(prompt)
    prompt = expand_images(prompt, counts, chat.tokens_per_tile, strict=False)
    return prompt, pipeline.tokenizer.encode(prompt)


def place_features(pipeline: Pipeline, encoded: Sequence[EncodedRequest]) -> list[Tensor | None]:
    """All visual tokens of a call, divided among its rows by the places that each has for them, as the original scatters them.

    Without pictures nothing is placed, and what says <IMG_CONTEXT> is embedded as any text. Raises InvalidRequest if the
    numbers differ, where the original stops as well.
    """
    visual = [each for each in pipeline.features(encoded) if each is not None]
    if not visual:
        return [None] * len(encoded)
    image_id, tokens = pipeline.tokenizer.token_id(pipeline.config.chat.image_token), torch.cat(visual)
    places = [each.ids.count(image_id) for each in encoded]
    if sum(places) != len(tokens):
        raise InvalidRequest(
            f"the call has {sum(places)} places for visual tokens and its pictures give {len(tokens)}; "
            f"write one {IMAGE_PLACEHOLDER} for each picture"
        )
    return [own if len(own) else None for own in tokens.split(places)]


def cut_images(pipeline: Pipeline, images: Sequence[ImageFile], folder: Path) -> tuple[list, list]:
    """Tiles of all pictures in one row, and what each shows of its picture."""
    chat, tiles, boxes = pipeline.config.chat, [], []
    for image in images:
        own, shown = tile_picture(
            open_image(folder / image.file),
            min_tiles=image.min_num,
            max_tiles=image.max_num,
            image_size=chat.image_size,
            use_thumbnail=chat.use_thumbnail,
        )
        tiles += own
        boxes += shown
    return tiles, boxes


def cut(row: list, counts: Sequence[int]) -> list[list]:
    """A row in pieces of the given lengths."""
    pieces, start = [], 0
    for count in counts:
        pieces.append(row[start : start + count])
        start += count
    return pieces


def padded_ids(batch: Batch, pad_id: int) -> Tensor:
    """Prompt ids int64 [batch, length], padded on the left."""
    length = batch.attention_mask.shape[1]
    return torch.tensor([[pad_id] * (length - len(each.ids)) + list(each.ids) for each in batch.encoded])


def generated_ids(pipeline: Pipeline, rows: Sequence[Sequence[int]]) -> Tensor:
    """Generated ids int64 [batch, steps]; finished rows hold what generate() fills them with.

    That is the language model's own pad id, without one the stop id; the tokenizer's has no part in it.
    """
    pad = pipeline.config.source["llm_config"].get("pad_token_id")
    pad = pipeline.stop_id if pad is None else pad
    steps = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (steps - len(row))] for row in rows])
