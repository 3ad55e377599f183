"""Hidden states of many conversations in one file, so that no more than one of them is in memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy
import torch
from torch import Tensor

from vlquant.publishing import flush_entry


@dataclass(frozen=True)
class HiddenStates:
    """A file of float32 rows [length, width], one conversation after the other."""

    path: Path
    lengths: tuple[int, ...]
    """Rows of every conversation."""
    width: int

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.lengths, initial=0))

    def __getitem__(self, index: int) -> Tensor:
        """The rows [length, width] of one conversation, read from the file."""
        if index >= len(self.lengths):
            raise IndexError(index)
        count, offset = self.lengths[index] * self.width, self._starts[index] * self.width * 4
        values = numpy.fromfile(self.path, dtype=numpy.float32, count=count, offset=offset)
        return torch.from_numpy(values).reshape(self.lengths[index], self.width)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self.lengths)))


def write_states(path: Path, states: Iterable[Tensor]) -> tuple[int, ...]:
    """Write rows [..., length, width] of conversations, in order, so that they survive; returns their lengths."""
    partial, lengths = path.with_suffix(".partial"), []
    with open(partial, "wb") as file:
        for rows in states:
            lengths.append(rows.shape[-2])
            file.write(rows.cpu().contiguous().numpy().data)
    flush_entry(partial)
    partial.rename(path)
    return tuple(lengths)
