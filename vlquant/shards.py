"""Write safetensors files, one or many, without ever holding more than one of them. Knows no model."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

SHARD_BYTES = 2**29
"""Tensors are gathered up to this size before they are written as one file."""

DTYPE_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


class ShardWriter:
    """Writes the tensors given to `add` as model.safetensors, or as numbered shards with an index.

    The bytes depend only on the tensors and their order. Nothing is complete before `close`.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.waiting: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; writes a shard when enough has gathered."""
        if self.waiting and _bytes(self.waiting.values()) + tensor.nbytes > self.shard_bytes:
            self._flush()
        self.waiting[name] = tensor.detach().cpu()
        self.total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, and name the files as every reader expects them."""
        self._flush()
        names = {index: shard_name(index, len(self.shards)) for index in range(len(self.shards))}
        for index, name in names.items():
            self._part(index).rename(self.folder / name)
        if len(self.shards) > 1:
            where = {tensor: names[index] for index, tensors in enumerate(self.shards) for tensor in tensors}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(where.items()))}
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        if self.waiting:
            write_safetensors(self._part(len(self.shards)), self.waiting)
            self.shards.append(sorted(self.waiting))
            self.waiting = {}

    def _part(self, index: int) -> Path:
        return self.folder / f"part-{index:05}.safetensors"


def shard_name(index: int, count: int) -> str:
    """The usual name of shard `index` (from 0) of `count`."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None, alignment: int = 8
) -> None:
    """Write one safetensors file, streaming: no copy of the tensors is made.

    alignment: the file ends at a multiple of so many bytes, and with it begin all tensors of bytes that are such multiples.
    """
    ordered = in_order(tensors)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for name, tensor in ordered:
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8 if alignment == 8 else -(8 + len(text) + end) % alignment)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(bytes_of(tensor))


def in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """As they are written: the widest elements first, so that every tensor is aligned to its elements."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes as they are stored."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of what `write_safetensors` writes behind the header."""
    digest = hashlib.sha256()
    for _, tensor in in_order(tensors):
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def stored_hash(path: Path) -> str:
    """The same of a file that was written."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)
