"""Does a GPU have memory enough? One layer of random weights is quantized before anything else, and a limit is kept."""

import tempfile
from pathlib import Path

import torch

from vlquant.calibrate import CLASSES, JUDGES_OF_CLASS, CalibrationInputs
from vlquant.config import ModelConfig
from vlquant.decoder import LINEARS
from vlquant.errors import InvalidRequest
from vlquant.hf_layout import STAGES
from vlquant.hidden_states import write_states
from vlquant.layout import layer_prefix, layer_shapes
from vlquant.quantized_layers import quantize_layer
from vlquant.recipe import Recipe
from vlquant.runtime.reader import require_device


def limit_memory(device: str, vram: float) -> None:
    """Let this process have at most `vram` GB (10**9 bytes) of a GPU's memory; raises InvalidRequest where that means nothing."""
    place = require_device(device)
    if place.type != "cuda":
        raise InvalidRequest(f"--vram limits a GPU's memory, and the device is {device}; add --device cuda")
    total = torch.cuda.get_device_properties(place).total_memory
    if not 0 < vram * 1e9 <= total:
        raise InvalidRequest(f"--vram {vram:g} is no part of the {total / 1e9:.1f} GB of {device}; name fewer GB")
    torch.cuda.set_per_process_memory_fraction(vram * 1e9 / total, place.index or 0)


def rehearse(config: ModelConfig, recipe: Recipe, *, device: str) -> None:
    """Quantize a layer of the model's shape by GPTQ on `device`, on one conversation with as many judges as there may be.

    Raises InvalidRequest if memory runs out.
    """
    shapes = {name.removeprefix(layer_prefix(0)): shape for name, shape in layer_shapes(config.decoder, 0).items()}
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    tokens = max(recipe.tokens, len(CLASSES) * JUDGES_OF_CLASS)
    classes = torch.arange(tokens) % len(CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        inputs = CalibrationInputs(Path(folder), (classes,), config.decoder.hidden_size, recipe.class_shares)
        write_states(inputs.path, [torch.randn(1, tokens, inputs.width)])
        bits = dict.fromkeys(STAGES, recipe.bits)
        streams = inputs, inputs.in_float_model() if recipe.compensation else None
        try:
            quantize_layer(tensors, streams, config=config.decoder, recipe=recipe, bits=bits, device=device)
        except torch.OutOfMemoryError:
            widest = max(shapes[f"{name}.weight"] for name in LINEARS)
            raise InvalidRequest(
                f"{device} has too little free memory to quantize a layer whose largest linear has {widest[0]} x {widest[1]} "
                "weights; use --device cpu, fewer --tokens, --compensation 0 or --method rtn"
            ) from None
