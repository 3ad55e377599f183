"""What a check asks: a question with all that its answer is judged by, and sets of them. Reads nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from vlquant.metrics import Gold
from vlquant.request import Request


@dataclass(frozen=True)
class CheckQuestion:
    """One question of a set; its pictures are open, a video file is not decoded yet."""

    key: str
    """Names it, for a sentence or a file: "builtin check/0/3/chart, question 2", "set.tsv, line 3"."""
    picture: str
    """What questions share if they show a picture in common, or others between them do: they are not independent."""
    kind: str
    """Built-in kind, category of a TSV row, or the set's name."""
    index: str
    """Names it among the predictions for its set."""
    text: str
    """The question itself, without options, instructions and placeholders of pictures."""
    request: Request
    gold: Gold | None
    """None: no answer is known; the question tells how far distributions are apart, and no more."""
    metric: str
    """How an answer is scored, by a name of metrics.METRICS; empty if no answer is known."""
    cells: Mapping[str, str]
    """Its row of a VLMEvalKit file, by column, without pictures."""


class CheckSet(Protocol):
    """Questions that are read when they are asked for, so that any number of pictures fits into memory."""

    name: str

    @property
    def sha256(self) -> str:
        """Identity of its contents, wherever they lie."""

    def __len__(self) -> int:
        """Number of questions."""

    def groups(self) -> Iterator[list[CheckQuestion]]:
        """All questions, those of the same `picture` together: their pictures are read then, and once."""
