"""`vlquant synthesize`: random weights in the published layout and true shape of a published model, to measure speed and memory with."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlquant.config import ModelConfig, parse_config
from vlquant.errors import InvalidRequest
from vlquant.events import Event, Report, silent
from vlquant.family import split_kind, split_layer, stored_name
from vlquant.layout import tensor_shapes
from vlquant.members import MEMBERS, member_config, nearest_names, shortened
from vlquant.publishing import publishing, require_empty, require_space
from vlquant.shards import ShardWriter
from vlquant.synthetic_tokenizer import write_synthetic_tokenizer

CHUNK_ELEMENTS = 2**24
"""Random numbers drawn at a time."""
RESIDUAL_SCALE = 0.1
"""InternViT's scale of each residual branch; trained ones are of this order."""


def synthesize(
    name: str,
    output: str | Path,
    *,
    layers: int | None = None,
    vision_layers: int | None = None,
    seed: int = 0,
    report: Report = silent,
) -> Path:
    """Write a checkpoint of random bfloat16 weights in the shape of the published model `name`; returns its folder.

    layers, vision_layers: None for all. The same arguments give the same bytes. Raises InvalidRequest as `require_shape`,
    OutputRefused if `output` is not free.
    """
    require_shape(name, layers=layers, vision_layers=vision_layers)
    output = Path(output)
    require_empty(output)
    member = shortened(MEMBERS[name], layers=layers, vision_layers=vision_layers)
    source = member_config(member)
    config = parse_config(source, name)
    shapes = dict(stored_shapes(config))
    require_space(output, 2 * sum(torch.Size(shape).numel() for shape in shapes.values()))
    with publishing(output) as hidden:
        (hidden / "config.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        write_synthetic_tokenizer(hidden, member.architecture, member.vocab_size)
        writer = ShardWriter(hidden)
        for done, (stored, shape) in enumerate(shapes.items(), start=1):
            writer.add(stored, random_tensor(stored, shape, seed))
            report(Event("tensors", done, len(shapes)))
        writer.close()
    return output


def require_shape(name: str, *, layers: int | None, vision_layers: int | None) -> None:
    """Raise InvalidRequest for a name that is not known, and for no layers or more of them than the published model has."""
    if name not in MEMBERS:
        raise InvalidRequest(f"the shape of {name!r} is not known; the nearest known names are {nearest_names(name, MEMBERS)}")
    member = MEMBERS[name]
    parts = {"--layers": (layers, member.layers, "language model"), "--vision-layers": (vision_layers, member.tower.layers, "vision tower")}
    for option, (wanted, most, part) in parts.items():
        if wanted is not None and wanted < 1:
            raise InvalidRequest(f"{option} is {wanted}, and a {part} has at least one layer; give 1 to {most}, or leave it out for all")
        if wanted is not None and wanted > most:
            raise InvalidRequest(f"{option} is {wanted}, and the {part} of {name} has {most}; give 1 to {most}, or leave it out for all")


def stored_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor as the family stores it, fused ones once."""
    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        stored, fusion = stored_name(name, config.family)
        if fusion is None:
            yield stored, shape
        elif split_kind(split_layer(name)[0])[0] == fusion.parts[0]:
            layer, kind = split_layer(name)[1], split_kind(name)[1]
            rows = sum(shapes[part.format(layer) + kind][0] for part in fusion.parts)
            yield stored, (rows, *shape[1:])


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Values bfloat16 of a tensor, decided by its name and `seed` alone: matrices that keep the size of what they multiply."""
    if "norm" in name and name.endswith(".weight") or name == "mlp1.0.weight":
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if name.endswith((".ls1", ".ls2")):
        return torch.full(shape, RESIDUAL_SCALE, dtype=torch.bfloat16)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    spread = 0.02 if len(shape) == 3 or "embed" in name and "patch" not in name else torch.Size(shape[1:]).numel() ** -0.5
    for part in tensor.view(-1).split(CHUNK_ELEMENTS):
        part.copy_(torch.randn(part.shape, generator=generator) * spread)
    return tensor
