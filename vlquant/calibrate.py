"""What the language model sees while it is calibrated: conversations about pictures as embeddings, each token with its class.

Knows no quantized format.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy
import torch
from torch import Tensor

from vlquant.calib_data import samples as sets
from vlquant.calib_data.scenes import Question
from vlquant.config import ModelConfig
from vlquant.events import Event, Report
from vlquant.model import Model
from vlquant.publishing import flush_entry, replace_text
from vlquant.recipe import Recipe
from vlquant.request import Request, encode_answer, encode_request
from vlquant.tokenizer import Tokenizer, load_tokenizer
from vlquant.vision import vision_features

PICTURE, PROMPT, ANSWER = range(3)
CLASSES = ("vision", "prompt", "answer")
"""How the manifest names them."""
TILES_AT_ONCE = 8
JUDGES_OF_CLASS = 1024
"""Most tokens of a class by which roundings are compared."""
CLASSES_FILE = "classes.json"
HOLD_OUT_EVERY = 16
"""One conversation of so many judges GPTQ's result against plain rounding, unseen by it."""
TEXT_TOKENS = 128
"""Room left for question, answer and system message."""


@dataclass(frozen=True)
class CalibrationInputs:
    """Conversations on their way through the layers: what each token is, and the hidden states of all in one file."""

    folder: Path
    """Holds the files of hidden states, one per layer."""
    classes: tuple[Tensor, ...]
    """int64 [length] of every conversation: PICTURE, PROMPT or ANSWER."""
    width: int
    """Of a hidden state."""
    shares: tuple[float, float, float]
    """Weight of all tokens of each class together: by their numbers, pictures would drown the text."""
    layer: int = 0
    """The layer whose inputs these are."""
    half: str = ""
    """"-middle": after its attention, before its MLP."""

    @cached_property
    def token_weights(self) -> Tensor:
        """Weight of a token of each class."""
        counts = torch.bincount(torch.cat(self.classes), minlength=len(CLASSES)).clamp(min=1)
        return torch.tensor(self.shares) / counts

    @cached_property
    def judging(self) -> tuple[Tensor, ...]:
        """Positions int64 [tokens] in every conversation whose inputs judge roundings: so many of each class, evenly spread."""
        judges = [self.holds_out(index) or len(self.classes) < HOLD_OUT_EVERY for index in range(len(self.classes))]
        return positions_of_judges(self.classes, judges)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.classes))

    def holds_out(self, index: int) -> bool:
        """Whether a conversation only judges what the others decide; of few, all do both."""
        return len(self.classes) >= HOLD_OUT_EVERY and index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1

    def hidden(self, index: int) -> Tensor:
        """Hidden states float32 [1, length, width] of one conversation, read from the file."""
        start = sum(map(len, self.classes[:index]))
        values = numpy.fromfile(
            self.path, dtype=numpy.float32, count=len(self.classes[index]) * self.width, offset=start * self.width * 4
        )
        return torch.from_numpy(values).reshape(1, -1, self.width)

    def following(self, states: Iterable[Tensor]) -> "CalibrationInputs":
        """Write what half a layer makes of each conversation [1, length, width], in order: the other half's inputs, or the next layer's."""
        after = replace(self, layer=self.layer + 1, half="") if self.half else replace(self, half="-middle")
        write_states(after.path, states)
        return after

    def forget_earlier(self) -> None:
        """Remove the inputs of layers that are finished."""
        for path in self.folder.glob("states-*.f32"):
            if path != self.path:
                path.unlink()

    @property
    def path(self) -> Path:
        """The file of these hidden states, one conversation after the other."""
        return states_path(self.folder, self.layer, self.half)


def positions_of_judges(classes: Sequence[Tensor], judges: Sequence[bool]) -> tuple[Tensor, ...]:
    """In every conversation that judges, positions evenly spread over all of them, at most JUDGES_OF_CLASS of each class."""
    conversation = torch.cat([torch.full_like(each, index) for index, each in enumerate(classes)])
    position = torch.cat([torch.arange(len(each)) for each in classes])
    may_judge = torch.tensor(judges)[conversation]
    chosen = torch.zeros(len(position), dtype=torch.bool)
    for each in range(len(CLASSES)):
        found = torch.nonzero(may_judge & (torch.cat(tuple(classes)) == each)).flatten()
        chosen[found[:: max(1, -(-len(found) // JUDGES_OF_CLASS))]] = True
    return tuple(position[chosen & (conversation == index)] for index in range(len(classes)))


def states_path(folder: Path, layer: int, half: str = "") -> Path:
    """Where the inputs of a layer, or of its second half, lie."""
    return folder / f"states-{layer:05}{half}.f32"


def write_states(path: Path, states: Iterable[Tensor]) -> None:
    """Write hidden states of conversations, in order, so that they survive; no more than one is in memory."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        for hidden in states:
            file.write(hidden.cpu().contiguous().numpy().data)
    flush_entry(partial)
    partial.rename(path)


def calibration_inputs(
    model: Model, folder: Path, *, recipe: Recipe, device: str, report: Report, layer: int = 0
) -> CalibrationInputs:
    """Encode the recipe's calibration set as the model was trained to see it, pictures through its own vision tower.

    folder: for the files of hidden states; if it holds those of an interrupted run, whose next `layer` is given, they are
    taken. Raises BrokenCheckpoint if the checkpoint cannot be read.
    """
    known = folder / CLASSES_FILE
    if known.exists():
        classes = [torch.tensor(each) for each in json.loads(known.read_text())]
        return CalibrationInputs(folder, tuple(classes), model.config.decoder.hidden_size, recipe.class_shares, layer)
    classes: list[Tensor] = []
    write_states(states_path(folder, 0), embedded(model, recipe, classes, device=device, report=report))
    replace_text(known, json.dumps([each.tolist() for each in classes]))
    return CalibrationInputs(folder, tuple(classes), model.config.decoder.hidden_size, recipe.class_shares)


def embedded(model: Model, recipe: Recipe, classes: list[Tensor], *, device: str, report: Report) -> Iterator[Tensor]:
    """Inputs [1, length, hidden] of the first layer for every sample; what its tokens are is added to `classes`."""
    weights, tokenizer = VisionWeights(model, device), load_tokenizer(model.folder)
    for index, sample in enumerate(sets.samples("calibration", recipe.samples, seed=recipe.seed)):
        ids, own, pixels = encode_sample(sample, index, model.config, tokenizer, most_tokens=recipe.tokens)
        hidden = model.embedding_rows(ids).float()
        if pixels is not None:
            batches = pixels.split(TILES_AT_ONCE)
            features = [vision_features(batch.to(device), weights, model.config.vision) for batch in batches]
            hidden[own == PICTURE] = torch.cat(features).flatten(0, 1).cpu()
        classes.append(own)
        yield hidden[None]
        report(Event("calibration", index + 1, recipe.samples))


class VisionWeights:
    """The vision tower's tensors in float32, each read when it is used: a tower of 6 billion weights need not fit."""

    def __init__(self, model: Model, device: str):
        self.model, self.device = model, device

    def __getitem__(self, name: str) -> Tensor:
        return self.model.tensor(f"model.{name}").to(self.device, torch.float32)

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:
        return self[name] if self.model.has(f"model.{name}") else default


def encode_sample(
    sample: sets.Sample, index: int, config: ModelConfig, tokenizer: Tokenizer, *, most_tokens: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One question of a sample with its answer and stop token: ids [length], classes [length], pixels [tiles, 3, side, side].

    most_tokens: pictures are cut into fewer tiles, and frames left out, to stay below; at least one tile remains of each.
    """
    question = sample.questions[index % len(sample.questions)]
    encoded = encode_request(fitting_request(sample, question, config, most_tokens), config, tokenizer)
    answer = encode_answer(question.answer, encoded.prompt, encoded.ids, config=config, tokenizer=tokenizer)
    ids = torch.tensor(encoded.ids + answer)
    classes = torch.where(torch.arange(len(ids)) < len(encoded.ids), PROMPT, ANSWER)
    classes[ids == tokenizer.token_id(config.chat.image_token)] = PICTURE
    return ids, classes, encoded.pixel_values()


def fitting_request(sample: sets.Sample, question: Question, config: ModelConfig, most_tokens: int) -> Request:
    """The question with as many tiles as `most_tokens` leave room for."""
    request, chat = sets.sample_request(sample, question), config.chat
    tiles = max(1, (most_tokens - TEXT_TOKENS) // chat.tokens_per_tile)
    if sample.video:
        return replace(request, video=list(request.video)[:: -(-len(request.video) // tiles)])
    each = max(1, tiles // max(1, len(request.images)))
    # The thumbnail comes on top of more than one.
    return replace(request, max_tiles=min(chat.max_tiles, each if each == 1 or not chat.use_thumbnail else each - 1))
