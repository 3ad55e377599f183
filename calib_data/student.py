"""The model while it is being trained: parameters, optimizers and their checkpoint."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlquant.calib_data.batches import CELL_CLASSES
from vlquant.config import ModelConfig
from vlquant.decoder import Decoder, FloatLinear, float_layer
from vlquant.decoder_config import DecoderConfig
from vlquant.errors import MissingDependency
from vlquant.family import LANGUAGE_MODEL
from vlquant.layout import EMBEDDING, HEAD, layer_prefix, tensor_shapes
from vlquant.model import open_model
from vlquant.vision import vision_features

GRADIENT_LIMIT = 1.0
MOMENTUM = 0.98
"""Batches are small and noisy, and Muon's steps have the same size whatever the noise: average over many of them."""
MATRIX_TO_VECTOR_RATE = 0.4
"""AdamW's learning rate as a part of Muon's."""


class Student:
    """Float parameters under canonical names, and two optimizers: Muon for matrices, AdamW for the rest."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], cell_head: Tensor, image_token: int):
        """Raises MissingDependency for a torch without Muon, such as that of pins/pascal.txt."""
        if not hasattr(torch.optim, "Muon"):
            raise MissingDependency(
                f"torch {torch.__version__} has no optimizer Muon, which the demo model is trained with; "
                "use the versions of vlquant/pins/cpu.txt"
            )
        self.config, self.weights, self.cell_head, self.image_token = config, weights, cell_head, image_token
        self.vision_weights = {name.removeprefix("model."): each for name, each in weights.items()}
        self.decoder = student_decoder(config.decoder, weights)
        matrices = {name: each for name, each in weights.items() if is_hidden_matrix(name, each)}
        vectors = {name: each for name, each in weights.items() if name not in matrices} | {"cell_head": cell_head}
        self.optimizers = {
            "matrices": torch.optim.Muon(matrices.values(), lr=0.0, momentum=MOMENTUM, weight_decay=0.01),
            "vectors": torch.optim.AdamW(vectors.values(), lr=0.0, betas=(0.95, 0.99), weight_decay=0.0),
        }

    def features(self, pixel_values: Tensor) -> Tensor:
        return vision_features(pixel_values, self.vision_weights, self.config.vision)

    def cell_logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.cell_head)

    def learners(self, phase: str) -> list[Tensor]:
        """What a phase trains: "see" the vision tower, "read" the language model, "answer" both.

        The others must have no gradient at all: from a zero one Muon, which scales every update to full size,
        would make full steps along its fading momentum.
        """
        seeing = [each for name, each in self.weights.items() if not is_language(name)] + [self.cell_head]
        speaking = [each for name, each in self.weights.items() if is_language(name)]
        return {"see": seeing, "read": speaking, "answer": seeing + speaking}[phase]

    def set_rate(self, rate: float) -> None:
        """Set both learning rates from the matrices' one."""
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * (1.0 if name == "matrices" else MATRIX_TO_VECTOR_RATE)

    def step(self, loss: Tensor, learners: Sequence[Tensor]) -> None:
        """Back-propagate `loss`, average the gradients of all processes and update `learners`, nothing else."""
        loss.backward()
        average_gradients(learners)
        torch.nn.utils.clip_grad_norm_(learners, GRADIENT_LIMIT)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each gradient by its mean over all processes; a parameter unused by one counts as zero there."""
    for each in parameters:
        if each.grad is None:
            each.grad = torch.zeros_like(each)
    flat = torch.cat([each.grad.flatten() for each in parameters])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for each, part in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
        each.grad.copy_(part.view_as(each))


def is_language(name: str) -> bool:
    return name.startswith(LANGUAGE_MODEL) or name == HEAD


def is_hidden_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not any(part in name for part in ("embed", "lm_head"))


def student_decoder(config: DecoderConfig, weights: dict[str, Tensor]) -> Decoder:
    layers = []
    for index in range(config.layers):
        own = layer_prefix(index)
        tensors = {name.removeprefix(own): each for name, each in weights.items() if name.startswith(own)}
        layers.append(float_layer(tensors, config))
    return Decoder(
        config,
        embedding=weights[EMBEDDING],
        layers=layers,
        norm=weights[LANGUAGE_MODEL + "norm.weight"],
        head=FloatLinear(weights[HEAD]),
    )


def create_student(config: ModelConfig, seed: int, image_token: int) -> Student:
    """A student with fresh weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: nn.Parameter(initial(name, shape, generator)) for name, shape in tensor_shapes(config).items()}
    cell_head = nn.Parameter(torch.randn(sum(CELL_CLASSES.values()), config.decoder.hidden_size, generator=generator) * 0.02)
    return Student(config, weights, cell_head, image_token)


def initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ones for scales, zeros for biases and for matrices that end a residual branch, else scaled noise."""
    if "norm" in name and name.endswith("weight") or "lambda" in name:
        return torch.ones(shape)
    if name.endswith("bias") or any(end in name for end in ("o_proj", "down_proj", "projection_layer", "fc2")):
        return torch.zeros(shape)
    if "embed" in name and "projection" not in name or name == "lm_head.weight":
        return torch.randn(shape, generator=generator) * 0.02
    fan_in = torch.Size(shape[1:]).numel()
    return torch.randn(shape, generator=generator) * fan_in**-0.5


def save_checkpoint(student: Student, folder: Path, progress: dict) -> None:
    """Write weights, optimizer state and progress into one file, whole or not at all.

    Pictures follow from the step, and nothing else in training is random: the step is the random state.
    """
    tensors = {f"weights.{name}": each.detach() for name, each in student.weights.items()}
    tensors["cell_head"] = student.cell_head.detach()
    for kind, optimizer in student.optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{kind}.{index}.{name}": each for name, each in state.items()}
    partial = folder / "training.partial"
    save_file(tensors, partial, metadata={"progress": json.dumps(progress)})
    os.replace(partial, folder / "training.safetensors")


def load_checkpoint(student: Student, folder: Path) -> dict:
    """Restore what `save_checkpoint` wrote; an empty dict when there is nothing to continue from."""
    path = folder / "training.safetensors"
    if not path.exists():
        return {}
    tensors = load_file(path)
    with torch.no_grad():
        for name, weight in student.weights.items():
            weight.copy_(tensors[f"weights.{name}"])
        student.cell_head.copy_(tensors["cell_head"])
    for kind, optimizer in student.optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        prefix = f"optimizer.{kind}."
        for name, each in tensors.items():
            if name.startswith(prefix):
                index, field = name.removeprefix(prefix).split(".", 1)
                state.setdefault(int(index), {})[field] = each
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["progress"])


def load_published(student: Student, folder: Path) -> None:
    """Take the weights of a checkpoint in the published layout; optimizers and cell head begin afresh."""
    model = open_model(folder)
    with torch.no_grad():
        for name, weight in student.weights.items():
            weight.copy_(model.tensor(name))
