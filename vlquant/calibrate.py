"""What the language model sees while it is calibrated: conversations about pictures as embeddings, each token with its class.

Knows no quantized format.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vlquant.calib_data.conversations import Conversation, ConversationSet, named
from vlquant.config import ModelConfig
from vlquant.events import Event, Report
from vlquant.fitting import fitting_request, kept_tokens
from vlquant.hidden_states import HiddenStates, write_states
from vlquant.model import Model
from vlquant.prompt import IMAGE_PLACEHOLDER
from vlquant.publishing import replace_text
from vlquant.recipe import Recipe
from vlquant.request import (
    EncodedRequest,
    Request,
    encode_answer,
    encode_prompt,
    encode_request,
)
from vlquant.tokenizer import Tokenizer, load_tokenizer
from vlquant.vision import vision_features

PICTURE, PROMPT, ANSWER = range(3)
CLASSES = ("vision", "prompt", "answer")
"""How the manifest names them."""
TILES_AT_ONCE = 8
JUDGES_OF_CLASS = 512
"""Most tokens of a class by which roundings are compared."""
COMPARED_TOKENS = 6_144
"""So many deciding tokens, those of the first conversations, also run through the float model, and all judging ones."""
CLASSES_FILE = "classes.json"
HOLD_OUT_EVERY = 16
"""One conversation of so many judges GPTQ's result against plain rounding, unseen by it."""
FEWEST_TO_HOLD_OUT = 4
"""Of fewer conversations none can be spared: all of them decide and judge."""


@dataclass(frozen=True)
class CalibrationInputs:
    """Conversations on their way through the layers: what each token is, and the hidden states of all in one file."""

    folder: Path
    """Holds the files of hidden states, one per layer."""
    classes: tuple[Tensor, ...]
    """int64 [length] of every conversation: PICTURE, PROMPT or ANSWER."""
    width: int
    """Of a hidden state."""
    shares: tuple[float, float, float] = Recipe().class_shares
    """Weight of all tokens of each class together: by their numbers, pictures would drown the text."""
    layer: int = 0
    """The layer whose inputs these are."""
    half: str = ""
    """"-middle": after its attention, before its MLP."""
    stream: str = "states"
    """"states" of the model as far as it is quantized; "floats" of the float model."""

    @cached_property
    def token_weights(self) -> Tensor:
        """Weight of a token of each class."""
        counts = torch.bincount(torch.cat(self.classes), minlength=len(CLASSES)).clamp(min=1)
        return torch.tensor(self.shares) / counts

    @cached_property
    def held_out(self) -> frozenset[int]:
        """Conversations that only judge what the others decide: one drawn from every sixteen, so that no set escapes by its turn."""
        if len(self.classes) < FEWEST_TO_HOLD_OUT:
            return frozenset()
        blocks = range(0, max(1, len(self.classes) - HOLD_OUT_EVERY + 1), HOLD_OUT_EVERY)
        sizes = [min(HOLD_OUT_EVERY, len(self.classes) - start) for start in blocks]
        return frozenset(start + random.Random(start).randrange(size) for start, size in zip(blocks, sizes, strict=True))

    @cached_property
    def judging(self) -> "Judges":
        """The tokens whose inputs judge roundings."""
        return choose_judges(self.classes, [not self.held_out or index in self.held_out for index in range(len(self.classes))])

    @cached_property
    def compared(self) -> tuple[int, ...]:
        """Conversations that also run through the float model: those that judge, and the first that decide."""
        chosen, tokens = set(self.held_out), 0
        for index, classes in enumerate(self.classes):
            if index not in self.held_out and tokens < COMPARED_TOKENS:
                chosen.add(index)
                tokens += len(classes)
        return tuple(sorted(chosen))

    def in_float_model(self) -> "CalibrationInputs":
        """The compared conversations in the float model; before the first layer they are the same."""
        floats = replace(self, stream="floats", classes=tuple(self.classes[index] for index in self.compared))
        if self.layer == 0:
            write_states(floats.path, (self.hidden(index) for index in self.compared))
        return floats

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every conversation."""
        return tuple(map(len, self.classes))

    @property
    def tokens(self) -> int:
        return sum(map(len, self.classes))

    def hidden(self, index: int) -> Tensor:
        """Hidden states float32 [1, length, width] of one conversation, read from the file."""
        return HiddenStates(self.path, self.lengths, self.width)[index][None]

    def tapped(self, index: int, width: int) -> Tensor:
        """What the last linear of this half sees in one conversation, float32 [length, width], as it was written down."""
        return HiddenStates(self.taps, self.lengths, width)[index]

    def following(self, states: Iterable[Tensor]) -> "CalibrationInputs":
        """Write what half a layer makes of each conversation [1, length, width], in order: the other half's inputs, or the next layer's."""
        after = replace(self, layer=self.layer + 1, half="") if self.half else replace(self, half="-middle")
        write_states(after.path, states)
        return after

    def forget_earlier(self) -> None:
        """Remove the inputs of layers that are finished."""
        for path in self.folder.glob(f"{self.stream}-*.f32"):
            if path != self.path:
                path.unlink()

    @property
    def taps(self) -> Path:
        """The file of what the last linear of this half sees, as long as it is of use."""
        return self.folder / "taps.f32"

    @property
    def path(self) -> Path:
        """The file of these hidden states, one conversation after the other."""
        return self.folder / f"{self.stream}-{self.layer:05}{self.half}.f32"


@dataclass(frozen=True)
class Judges:
    """Tokens that judge for all of their class."""

    positions: tuple[Tensor, ...]
    """int64 [tokens] in every conversation."""
    stands_for: Tensor
    """How many tokens one of each class stands for."""


def choose_judges(classes: Sequence[Tensor], judges: Sequence[bool]) -> Judges:
    """At most JUDGES_OF_CLASS tokens of each class, evenly spread over the conversations that judge."""
    conversation = torch.cat([torch.full_like(each, index) for index, each in enumerate(classes)])
    may_judge, together = torch.tensor(judges)[conversation], torch.cat(tuple(classes))
    chosen, stands_for = torch.zeros(len(together), dtype=torch.bool), torch.ones(len(CLASSES))
    for each in range(len(CLASSES)):
        found = torch.nonzero(may_judge & (together == each)).flatten()
        step = max(1, -(-len(found) // JUDGES_OF_CLASS))
        chosen[found[::step]] = True
        stands_for[each] = len(found) / max(1, len(found[::step]))
    positions = tuple(torch.nonzero(part).flatten() for part in chosen.split([len(each) for each in classes]))
    return Judges(positions, stands_for)


def calibration_inputs(
    model: Model, folder: Path, conversations: ConversationSet, *, most_tokens: int, device: str, report: Report
) -> CalibrationInputs:
    """Encode answered conversations as the model was trained to see them, pictures through its own vision tower.

    folder: for the files of hidden states; if it has been filled before, by an interrupted run, nothing is encoded again.
    most_tokens: of a conversation. Raises InvalidRequest naming a conversation that cannot be encoded.
    """
    known, width = folder / CLASSES_FILE, model.config.decoder.hidden_size
    if known.exists():
        return CalibrationInputs(folder, tuple(torch.tensor(each) for each in json.loads(known.read_text())), width)
    classes: list[Tensor] = []
    states = embedded(model, conversations, classes, most_tokens=most_tokens, device=device, report=report)
    write_states(CalibrationInputs(folder, (), width).path, states)
    replace_text(known, json.dumps([each.tolist() for each in classes]))
    return CalibrationInputs(folder, tuple(classes), width)


def embedded(
    model: Model, conversations: ConversationSet, classes: list[Tensor], *, most_tokens: int, device: str, report: Report
) -> Iterator[Tensor]:
    """Inputs [1, length, hidden] of the first layer for every conversation; what its tokens are is added to `classes`."""
    weights, tokenizer = VisionWeights(model, device), load_tokenizer(model.folder)
    for index in range(len(conversations)):
        ids, own, pixels = encode_conversation(conversations[index], model.config, tokenizer, most_tokens=most_tokens)
        hidden = model.embedding_rows(ids).float()
        if pixels is not None:
            batches = pixels.split(TILES_AT_ONCE)
            features = [vision_features(batch.to(device), weights, model.config.vision) for batch in batches]
            hidden[own == PICTURE] = torch.cat(features).flatten(0, 1).cpu()
        classes.append(own)
        yield hidden[None]
        report(Event("calibration", index + 1, len(conversations)))


class VisionWeights:
    """The vision tower's tensors in float32, each read when it is used: a tower of 6 billion weights need not fit."""

    def __init__(self, model: Model, device: str):
        self.model, self.device = model, device

    def __getitem__(self, name: str) -> Tensor:
        return self.model.tensor(f"model.{name}").to(self.device, torch.float32)

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:
        return self[name] if self.model.has(f"model.{name}") else default


def encode_conversation(
    conversation: Conversation, config: ModelConfig, tokenizer: Tokenizer, *, most_tokens: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A conversation with its answer and stop token: ids [length], classes [length], pixels [tiles, 3, side, side].

    most_tokens: pictures are cut into fewer tiles, and frames and the earliest turns left out, to stay below; at least one
    tile remains of each picture, and what comes after the last of them is cut off where it becomes too long.
    """
    with named(conversation.key):
        request = fitting_request(conversation, config, tokenizer, most_tokens=most_tokens)
        encoded = encode_request(request, config, tokenizer)
        answer = encode_answer(conversation.answer, encoded.prompt, encoded.ids, config=config, tokenizer=tokenizer)
    if conversation.cut:
        answer = answer[:-1]  # The model was not done: it would learn to stop in the middle.
    ids = torch.tensor(encoded.ids + answer)
    in_prompt = torch.arange(len(ids)) < len(encoded.ids)
    classes = torch.where(in_prompt, PROMPT, ANSWER)
    for places in earlier_answers(request, encoded, config, tokenizer):
        classes[places] = ANSWER
    pictures = bool(encoded.tiles)
    if pictures:
        classes[in_prompt & (ids == tokenizer.token_id(config.chat.image_token))] = PICTURE
    length = kept_tokens(encoded.ids, config, tokenizer, pictures=pictures, most_tokens=most_tokens)
    return ids[:length], classes[:length], encoded.pixel_values()


def earlier_answers(
    request: Request, encoded: EncodedRequest, config: ModelConfig, tokenizer: Tokenizer
) -> Iterator[slice]:
    """Where in the ids of a conversation the answers of its history stand, stop tokens included."""
    history, shared = list(request.history or ()), {"config": config, "tokenizer": tokenizer}
    for turn, (question, answer) in enumerate(history):
        before = replace(request, history=history[:turn])
        pictures = sum(text.count(IMAGE_PLACEHOLDER) for text, _ in history[: turn + 1])
        prompt, ids = encode_prompt(before, question, encoded.tiles_per_image[:pictures], **shared)
        own = encode_answer(answer, prompt, ids, **shared)
        # Not so where a template writes history in another way than it has the model answer.
        if encoded.ids[: len(ids) + len(own)] == [*ids, *own]:
            yield slice(len(ids), len(ids) + len(own))
