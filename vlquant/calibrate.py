"""What the language model sees while it is calibrated: conversations about pictures as embeddings, each token with its class.

Also the statistics GPTQ wants from them. Knows no quantized format.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy
import torch
from torch import Tensor

from vlquant.calib_data.conversations import Conversation, ConversationSet, named
from vlquant.config import ModelConfig
from vlquant.decoder import DecoderConfig, DecoderLayer, FloatLinear, Linear, rms_norm, rotary_tables
from vlquant.events import Event, Report
from vlquant.model import Model
from vlquant.publishing import flush_entry, replace_text
from vlquant.request import Request, encode_answer, encode_request, require_text
from vlquant.tokenizer import Tokenizer, load_tokenizer
from vlquant.vision import vision_features

PICTURE, PROMPT, ANSWER = range(3)
CLASS_SHARES = (0.45, 0.15, 0.40)
"""Weight of picture, prompt and answer tokens in the Hessian: by their numbers, pictures would drown the text."""
LARGEST_NORM = 10.0
"""A token counts at most as if its squared norm were this many times the median: first tokens are giants."""
TILES_AT_ONCE = 8
ROWS_AT_ONCE = 2048
"""Inputs that wait to be added up together: longer products are faster ones."""
CLASSES_FILE = "classes.json"
HOLD_OUT_EVERY = 16
"""One conversation of so many judges GPTQ's result against plain rounding, unseen by it."""
TEXT_TOKENS = 128
"""Room left at least for question, answer and system message."""
TEMPLATE_TOKENS = 64
"""What system message and roles take of it, about."""
LONGEST_ANSWER = 256
"""Tokens of an answer that is still to be written."""


@dataclass(frozen=True)
class CalibrationInputs:
    """Conversations on their way through the layers: what each token is, and the hidden states of all in one file."""

    folder: Path
    """Holds the files of hidden states, one per layer."""
    classes: tuple[Tensor, ...]
    """int64 [length] of every conversation: PICTURE, PROMPT or ANSWER."""
    width: int
    """Of a hidden state."""
    layer: int = 0
    """The layer whose inputs these are."""
    half: str = ""
    """"-middle": after its attention, before its MLP."""
    token_weights: Tensor = field(init=False)
    """Weight of a token of each class."""

    def __post_init__(self) -> None:
        counts = torch.bincount(torch.cat(self.classes), minlength=len(CLASS_SHARES)).clamp(min=1)
        object.__setattr__(self, "token_weights", torch.tensor(CLASS_SHARES) / counts)

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

    def through_attention(self, layer: DecoderLayer, device: str) -> "CalibrationInputs":
        """Inputs of the layer's second half."""
        following = replace(self, half="-middle")
        write_states(following.path, (run_attention(layer, self.hidden(index), device) for index in range(len(self.classes))))
        return following

    def through_mlp(self, layer: DecoderLayer, device: str) -> "CalibrationInputs":
        """Inputs of the next layer."""
        following = replace(self, layer=self.layer + 1, half="")
        write_states(following.path, (run_mlp(layer, self.hidden(index), device) for index in range(len(self.classes))))
        return following

    def forget_earlier(self) -> None:
        """Remove the inputs of layers that are finished."""
        for path in self.folder.glob("states-*.f32"):
            if path != self.path:
                path.unlink()

    @property
    def path(self) -> Path:
        """The file of these hidden states, one conversation after the other."""
        return states_path(self.folder, self.layer, self.half)


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
    write_states(states_path(folder, 0), states)
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

    most_tokens: pictures are cut into fewer tiles, and frames left out, to stay below; at least one tile remains of each,
    and what comes after the last of them is cut off where it becomes too long.
    """
    with named(conversation.key):
        require_text(conversation.answer)
        request = fitting_request(conversation, config, tokenizer, most_tokens=most_tokens)
        encoded = encode_request(request, config, tokenizer)
        answer = encode_answer(conversation.answer, encoded.prompt, encoded.ids, config=config, tokenizer=tokenizer)
    ids = torch.tensor(encoded.ids + answer)
    in_prompt = torch.arange(len(ids)) < len(encoded.ids)
    classes = torch.where(in_prompt, PROMPT, ANSWER)
    end = 0
    if encoded.tiles:  # Without, the token is a text like any other.
        in_picture = in_prompt & (ids == tokenizer.token_id(config.chat.image_token))
        classes[in_picture] = PICTURE
        end = int(in_picture.nonzero().max()) + 1
    length = max(most_tokens, end + TEXT_TOKENS)
    return ids[:length], classes[:length], encoded.pixel_values()


def fitting_request(conversation: Conversation, config: ModelConfig, tokenizer: Tokenizer, *, most_tokens: int) -> Request:
    """What is asked, with as many tiles as `most_tokens` leave room for."""
    request, chat = conversation.request, config.chat
    texts = [*(text for turn in request.history or () for text in turn), request.question, conversation.answer or ""]
    text_tokens = sum(len(tokenizer.encode(text)) for text in texts) + LONGEST_ANSWER * (conversation.answer is None)
    room = most_tokens - max(TEXT_TOKENS, text_tokens + TEMPLATE_TOKENS)
    tiles = max(1, room // chat.tokens_per_tile)
    if request.video is not None:
        return replace(request, video=list(request.video)[:: -(-len(request.video) // tiles)])
    each = max(1, tiles // max(1, len(request.images)))
    # The thumbnail comes on top of more than one.
    return replace(request, max_tiles=min(chat.max_tiles, each if each == 1 or not chat.use_thumbnail else each - 1))


def record_hessian(
    inputs: CalibrationInputs, layer: DecoderLayer, stage: Sequence[str], *, device: str
) -> tuple[Tensor, Tensor]:
    """The weighted sum of x xT [in, in] over the inputs of the linears in `stage`, which share them; and that of those held out.

    inputs: of the half of the layer that the stage belongs to, which is computed up to these linears and no further.
    """
    run = run_mlp if inputs.half else run_attention
    recorders = [InputRecorder(layer.linears[stage[0]], inputs.token_weights.to(device)) for _ in range(2)]
    for index, classes in enumerate(inputs.classes):
        recorder = recorders[inputs.holds_out(index)]
        recorder.classes = classes.to(device)
        with suppress(Recorded):
            run(DecoderLayer(layer.config, {**layer.linears, stage[0]: recorder}, layer.norms), inputs.hidden(index), device)
    decided, judged = recorders
    return decided.total(), judged.total() if judged.seen else decided.hessian


def run_attention(layer: DecoderLayer, hidden: Tensor, device: str) -> Tensor:
    """Hidden states [1, length, hidden] of one conversation after a layer's attention."""
    hidden = hidden.to(device)
    rotary = rotary_tables(torch.arange(hidden.shape[1], device=device)[None], layer.config)
    normed = rms_norm(hidden, layer.norms["input_layernorm"], layer.config.norm_eps)
    return hidden + layer.attention(normed, rotary)


def run_mlp(layer: DecoderLayer, hidden: Tensor, device: str) -> Tensor:
    """Output [1, length, hidden] of a layer, given what its attention passes on."""
    hidden = hidden.to(device)
    return hidden + layer.mlp(rms_norm(hidden, layer.norms["post_attention_layernorm"], layer.config.norm_eps))


class Recorded(Exception):
    """What a layer was run for has been seen."""


class InputRecorder:
    """Stands for a linear and adds up x xT over its inputs, each token weighted by its class and capped in norm."""

    def __init__(self, linear: FloatLinear, token_weights: Tensor):
        in_features = linear.weight.shape[1]
        self.token_weights = token_weights
        self.classes = token_weights.new_empty(0, dtype=torch.long)
        self.shape, self.hessian = (in_features, in_features), None
        self.blocks = torch.arange(in_features).split(max(512, in_features // 8))
        self.waiting: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # [length, in]
        norms = rows.square().sum(1)
        cap = (LARGEST_NORM * norms.median() / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)
        self.waiting.append(rows * (self.token_weights[self.classes] * cap).sqrt()[:, None])
        if sum(map(len, self.waiting)) >= ROWS_AT_ONCE:
            self.add_waiting()
        raise Recorded

    @property
    def seen(self) -> bool:
        """Whether there were any inputs."""
        return bool(self.waiting) or self.hessian is not None

    def add_waiting(self) -> None:
        """Add what waits to the upper triangle, block by block: the lower one is its mirror."""
        rows, self.waiting = torch.cat(self.waiting), []
        self.hessian = rows.new_zeros(self.shape) if self.hessian is None else self.hessian
        for block in self.blocks:
            first, last = int(block[0]), int(block[-1]) + 1
            self.hessian[first:last, first:].addmm_(rows[:, first:last].T, rows[:, first:])

    def total(self) -> Tensor:
        """The whole sum."""
        if self.waiting:
            self.add_waiting()
        for block in self.blocks:
            first, last = int(block[0]), int(block[-1]) + 1
            self.hessian[last:, first:last] = self.hessian[first:last, last:].T
        return self.hessian


def layer_of(tensors: Mapping[str, Tensor], linears: Mapping[str, Linear], config: DecoderConfig) -> DecoderLayer:
    """A decoder layer with the given linears and the norms among `tensors`."""
    norms = {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.endswith(".weight") and name.removesuffix(".weight") not in linears
    }
    return DecoderLayer(config, linears, norms)
