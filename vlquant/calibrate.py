"""What the language model sees while it is calibrated: conversations about pictures as embeddings, each token with its class.

Also the statistics GPTQ wants from them. Knows no quantized format and writes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlquant.calib_data import samples as sets
from vlquant.config import ModelConfig
from vlquant.decoder import DecoderConfig, DecoderLayer, FloatLinear, Linear, rotary_tables
from vlquant.events import Event, Report
from vlquant.layout import EMBEDDING
from vlquant.model import Model
from vlquant.recipe import Recipe
from vlquant.request import encode_answer, encode_request
from vlquant.tokenizer import Tokenizer
from vlquant.vision import vision_features

PICTURE, PROMPT, ANSWER = range(3)
CLASS_SHARES = (0.45, 0.15, 0.40)
"""Weight of picture, prompt and answer tokens in the Hessian: by their numbers, pictures would drown the text."""
LARGEST_NORM = 10.0
"""A token counts at most as if its squared norm were this many times the median: first tokens are giants."""
TILES_AT_ONCE = 8


@dataclass
class Conversation:
    """One conversation on its way through the layers."""

    hidden: Tensor
    """float32 [1, length, hidden]: the input of the next layer."""
    classes: Tensor
    """int64 [length]: PICTURE, PROMPT or ANSWER."""


@dataclass(frozen=True)
class CalibrationInputs:
    """All conversations, and the weight of a token of each class."""

    conversations: list[Conversation]
    token_weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        classes = torch.cat([conversation.classes for conversation in self.conversations])
        counts = torch.bincount(classes, minlength=len(CLASS_SHARES)).clamp(min=1)
        object.__setattr__(self, "token_weights", torch.tensor(CLASS_SHARES) / counts)

    @property
    def tokens(self) -> int:
        return sum(conversation.classes.numel() for conversation in self.conversations)


def calibration_inputs(
    model: Model, tokenizer: Tokenizer, *, recipe: Recipe, device: str, report: Report
) -> CalibrationInputs:
    """Encode the recipe's calibration set as the model was trained to see it, pictures through its own vision tower.

    Raises BrokenCheckpoint if the checkpoint cannot be read.
    """
    weights = VisionWeights(model, device)
    embedding = model.tensor(EMBEDDING)
    conversations = []
    for index, sample in enumerate(sets.samples("calibration", recipe.samples, seed=recipe.seed)):
        ids, classes, pixels = encode_sample(sample, index, model.config, tokenizer)
        hidden = embedding[ids].float()
        if pixels is not None:
            batches = pixels.split(TILES_AT_ONCE)
            features = [vision_features(batch.to(device), weights, model.config.vision) for batch in batches]
            hidden[classes == PICTURE] = torch.cat(features).flatten(0, 1).cpu()
        conversations.append(Conversation(hidden[None], classes))
        report(Event("calibration", index + 1, recipe.samples))
    return CalibrationInputs(conversations)


class VisionWeights:
    """The vision tower's tensors in float32, each read when it is used: a tower of 6 billion weights need not fit."""

    def __init__(self, model: Model, device: str):
        self.model, self.device = model, device

    def __getitem__(self, name: str) -> Tensor:
        return self.model.tensor(f"model.{name}").to(self.device, torch.float32)

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:
        return self[name] if self.model.has(f"model.{name}") else default


def encode_sample(
    sample: sets.Sample, index: int, config: ModelConfig, tokenizer: Tokenizer
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One question of a sample with its answer and stop token: ids [length], classes [length], pixels [tiles, 3, side, side]."""
    question = sample.questions[index % len(sample.questions)]
    encoded = encode_request(sets.sample_request(sample, question), config, tokenizer)
    answer = encode_answer(question.answer, encoded.prompt, encoded.ids, config=config, tokenizer=tokenizer)
    ids = torch.tensor(encoded.ids + answer)
    classes = torch.where(torch.arange(len(ids)) < len(encoded.ids), PROMPT, ANSWER)
    classes[ids == tokenizer.token_id(config.chat.image_token)] = PICTURE
    return ids, classes, encoded.pixel_values()


def record_hessian(
    inputs: CalibrationInputs, layer: DecoderLayer, stage: Sequence[str], *, device: str
) -> Tensor:
    """The weighted sum of x xT [in, in] over the inputs of the linears in `stage`, which share them.

    Linears from that stage on are not computed: nothing here needs their outputs.
    """
    names = list(layer.linears)
    recorder = InputRecorder(layer.linears[stage[0]], inputs.token_weights.to(device))
    later = {name: ZeroLinear(layer.linears[name]) for name in names[names.index(stage[0]) :]}
    watched = DecoderLayer(layer.config, {**layer.linears, **later, stage[0]: recorder}, layer.norms)
    for conversation in inputs.conversations:
        recorder.classes = conversation.classes.to(device)
        run_layer(watched, conversation, device)
    return recorder.hessian


def run_layer(layer: DecoderLayer, conversation: Conversation, device: str) -> Tensor:
    """Output [1, length, hidden] of a layer for one conversation."""
    hidden = conversation.hidden.to(device)
    positions = torch.arange(hidden.shape[1], device=device)[None]
    return layer(hidden, rotary_tables(positions, layer.config))


class ZeroLinear:
    """Stands for a linear whose output nobody needs."""

    def __init__(self, linear: FloatLinear):
        self.out_features = linear.weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.out_features)


class InputRecorder(ZeroLinear):
    """Adds up x xT over its inputs, each token weighted by its class and capped in norm."""

    def __init__(self, linear: FloatLinear, token_weights: Tensor):
        super().__init__(linear)
        in_features = linear.weight.shape[1]
        self.token_weights = token_weights
        self.classes = token_weights.new_empty(0, dtype=torch.long)
        self.hessian = linear.weight.new_zeros(in_features, in_features)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # [length, in]
        norms = rows.square().sum(1)
        cap = (LARGEST_NORM * norms.median() / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)
        weights = self.token_weights[self.classes] * cap
        self.hessian.addmm_(rows.T, rows * weights[:, None])
        return super().__call__(x)


def layer_of(tensors: Mapping[str, Tensor], linears: Mapping[str, Linear], config: DecoderConfig) -> DecoderLayer:
    """A decoder layer with the given linears and the norms among `tensors`."""
    norms = {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.endswith(".weight") and name.removesuffix(".weight") not in linears
    }
    return DecoderLayer(config, linears, norms)
