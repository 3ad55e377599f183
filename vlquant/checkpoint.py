"""Safetensors folders read tensor by tensor with plain offset reads (no mmap, so peak memory is what it seems).

Knows files, names, shapes and bytes; knows nothing of InternVL.
"""

import json
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlquant.errors import BrokenCheckpoint

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LFS_MAGIC = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    offset: int
    """Bytes from the start of the file."""
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


Rows = Callable[[Tensor], Tensor]
"""From row numbers int64 [count] to rows [count, ...]; raises IndexError for numbers that no row has."""


class StoredRows:
    """Reads rows of a tensor one by one from its file, which stays open as long as this is there."""

    def __init__(self, stored: StoredTensor):
        self._stored = stored
        self._file = os.open(stored.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)
        self._turn = threading.Lock()

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows [len(rows), ...] by number. Raises BrokenCheckpoint if their bytes are absent, IndexError if there is none such."""
        stored = self._stored
        wide = stored.nbytes // max(stored.shape[0], 1)
        numbers = rows.tolist()  # Indexing eight rows wakes torch's threads, which then spin for milliseconds beside the kernels.
        if numbers and not 0 <= min(numbers) <= max(numbers) < stored.shape[0]:
            raise IndexError(f"rows {min(numbers)} to {max(numbers)} of a tensor that has {stored.shape[0]}")
        found = {row: bytearray(self._read(stored.offset + row * wide, wide)) for row in sorted(set(numbers))}
        if any(len(each) != wide for each in found.values()):
            raise _truncated(stored.path)
        tensors = {row: torch.frombuffer(each, dtype=stored.dtype).reshape(stored.shape[1:]) for row, each in found.items()}
        return torch.stack([tensors[row] for row in numbers]) if tensors else torch.empty(0, *stored.shape[1:], dtype=stored.dtype)

    def _read(self, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file, size, offset)
        with self._turn:  # Windows has no read that leaves the file's position alone.
            os.lseek(self._file, offset, os.SEEK_SET)
            return os.read(self._file, size)


class Checkpoint:
    """All tensors of a folder by name; nothing but the headers is in memory."""

    adapters: Mapping[str, object] = {}
    """LoRA adapters that are merged while reading, by the name of their weight."""

    def __init__(self, folder: Path, tensors: dict[str, StoredTensor]):
        self.folder, self._tensors = folder, tensors

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises BrokenCheckpoint if there is none of that name."""
        return self.find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of one tensor. Raises BrokenCheckpoint if there is none of that name."""
        return self.find(name).dtype

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype. Raises BrokenCheckpoint if it is absent or its bytes are."""
        stored = self.find(name)
        if stored.nbytes == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        buffer = bytearray(stored.nbytes)
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.offset)
            view, filled = memoryview(buffer), 0
            while filled < stored.nbytes:
                # One read() returns at most 2 GiB on Linux.
                count = file.readinto(view[filled:])
                if not count:
                    raise _truncated(stored.path)
                filled += count
        return torch.frombuffer(buffer, dtype=stored.dtype).reshape(stored.shape)

    def open_rows(self, name: str) -> Rows:
        """A way to read some rows of a tensor, now and later: an embedding need not be in memory for its few words.

        Its file stays open, so that what takes its place meanwhile is not read for it. Raises BrokenCheckpoint as `read`.
        """
        return StoredRows(self.find(name))

    def find(self, name: str) -> StoredTensor:
        """Where one tensor lies. Raises BrokenCheckpoint if there is none of that name."""
        if name not in self._tensors:
            raise BrokenCheckpoint(f"{self.folder}: tensor {name} is missing; download the checkpoint again")
        return self._tensors[name]


def open_checkpoint(folder: str | Path, *, whole: bool = True) -> Checkpoint:
    """Read the headers of `model.safetensors`, or of all shards its index names.

    whole: False where names and shapes are all that will be asked for: then nothing but the headers need be there.
    Raises BrokenCheckpoint for absent or truncated files, Git LFS pointers, and an index that promises tensors its
    shards do not hold.
    """
    folder = Path(folder)
    if (folder / SINGLE_FILE).exists():
        return Checkpoint(folder, read_header(folder / SINGLE_FILE, whole=whole))
    if (folder / INDEX_FILE).exists():
        return Checkpoint(folder, _read_shards(folder, whole=whole))
    if not folder.is_dir():
        raise BrokenCheckpoint(f"{folder} is not a folder; give the folder that holds config.json and the weights")
    found = "only pickled weights, which are never loaded" if list(folder.glob("*.bin")) else "no weights"
    raise BrokenCheckpoint(f"{folder} has {found}; it needs {SINGLE_FILE}, or shards with {INDEX_FILE}")


def _read_shards(folder: Path, *, whole: bool) -> dict[str, StoredTensor]:
    index = read_json(folder / INDEX_FILE)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BrokenCheckpoint(f"{folder / INDEX_FILE} has no weight_map; download it again")
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / Path(shard).name).exists()]
    if absent:
        raise BrokenCheckpoint(f"{folder} lacks {_some(absent)}, named in {INDEX_FILE}; download the missing shards")
    headers = {shard: read_header(folder / Path(shard).name, whole=whole) for shard in shards}
    lost = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if lost:
        raise BrokenCheckpoint(
            f"{folder}: {_some(lost)} named in {INDEX_FILE} but absent from the shards; download the checkpoint again"
        )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def read_header(path: Path, *, whole: bool = True) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises BrokenCheckpoint if it cannot be whole; without `whole`, its header."""
    try:
        length, text, size = _read_header_text(path)
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _stored_tensor(path, 8 + length, entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenCheckpoint(f"{path} has no readable safetensors header ({error}); download it again") from None
    end = max((stored.offset + stored.nbytes for stored in tensors.values()), default=8 + length)
    if end > size and whole:
        raise _truncated(path)
    if end < size and whole:
        raise BrokenCheckpoint(f"{path} is {size - end} bytes longer than its header says; download it again")
    return tensors


def _read_header_text(path: Path) -> tuple[int, bytes, int]:
    """Length and text of a safetensors header, and the size of its file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(LFS_MAGIC))
        if start == LFS_MAGIC:
            raise _lfs_pointer(path)
        length = int.from_bytes(start[:8], "little")
        if len(start) >= 8 and (length > MAX_HEADER_BYTES or start[8:9] not in (b"{", b"")):
            raise BrokenCheckpoint(f"{path} is no safetensors file, or is damaged where it begins; download it again")
        if len(start) < 8 or length > size - 8:
            raise _truncated(path)
        file.seek(8)
        return length, file.read(length), size


def _stored_tensor(path: Path, data_start: int, entry: dict) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']}")
    dtype = DTYPES[entry["dtype"]]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {list(shape)} does not fill its {end - begin} bytes")
    return StoredTensor(path=path, offset=data_start + begin, nbytes=end - begin, dtype=dtype, shape=shape)


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises BrokenCheckpoint if it is absent, an LFS pointer or no JSON object."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BrokenCheckpoint(
            f"{path} cannot be read ({os.strerror(error.errno or 0)}); give the folder of an InternVL checkpoint"
        ) from None
    if content.startswith(LFS_MAGIC):
        raise _lfs_pointer(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise BrokenCheckpoint(f"{path} holds no JSON object; download it again")
    return value


def unreadable(path: Path, error: OSError) -> BrokenCheckpoint:
    """The error for a file of weights that the system does not let us read: a folder of its name, missing rights."""
    move = "change its rights" if isinstance(error, PermissionError) else "put the file itself there, or download it again"
    return BrokenCheckpoint(f"{path} cannot be read ({error.strerror or error}); {move}")


def _truncated(path: Path) -> BrokenCheckpoint:
    return BrokenCheckpoint(f"{path} is truncated; download it again")


def _lfs_pointer(path: Path) -> BrokenCheckpoint:
    return BrokenCheckpoint(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def _some(names: list[str]) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
