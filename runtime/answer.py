"""What comes back from a model: generated ids to text, at once or piece by piece. Runs no model."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from vlquant.tiling import Box

REPLACEMENT = "\ufffd"
"""What decoding yields for bytes that are not (yet) a character."""

JOINABLE_END = re.compile(r" (n|n'|'|'v|'r)$")
"""What a tokenizer's clean-up may still join to the word before it: " n't", " 's", " 've" and the like."""

History = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Usage:
    """What an answer took. In a batch the seconds are those of the whole batch."""

    prompt_tokens: int
    """Visual tokens included."""
    answer_tokens: int
    """The stop token included."""
    ended_by: str
    """"stop" (stop token or stop text), "length" (max_new_tokens) or "context" (no position left)."""
    vision_seconds: float
    prompt_seconds: float
    """From the features to the first token."""
    answer_seconds: float
    """From the first token to the last."""
    reused_tokens: int = 0
    """Of the prompt, known from the turn before and not computed again."""


@dataclass(frozen=True)
class Answer:
    """One answer, and what to hand back for the next turn."""

    text: str
    ids: tuple[int, ...]
    """Generated ids, with the stop token if it ended the answer."""
    history: History
    """All turns so far, (question with its <image> placeholders, answer)."""
    tile_map: tuple[tuple[Box, ...], ...]
    """For each picture or frame what each tile shows of it: (left, top, right, bottom) in its pixels."""
    usage: Usage

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles per picture or frame."""
        return tuple(map(len, self.tile_map))


class AnswerText:
    """The text of growing ids.

    decode: ids so far -> text, special tokens left out; stops: texts that end the answer and are not part of it;
    unsettled: ids so far -> how many of the last ones may come to mean another text.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stops: tuple[str, ...] = (),
        unsettled: Callable[[list[int]], int] = lambda ids: 0,
    ):
        self._decode, self._stops, self._unsettled = decode, stops, unsettled

    def whole(self, ids: list[int]) -> str:
        """The answer that finished `ids` stand for, up to the first stop text, without space around it."""
        text = self._decode(ids)
        ends = [text.find(stop) for stop in self._stops if stop in text]
        return text[: min(ends, default=len(text))].strip()

    def stopped(self, ids: list[int]) -> bool:
        """Whether the text holds a stop text."""
        text = self._decode(ids)
        return any(stop in text for stop in self._stops)

    def settled(self, ids: list[int]) -> str:
        """The beginning of the answer that no further id can change.

        Left out at the end: bytes that may become a character, space that may be the last, the start of a stop text or contraction.
        """
        text = self._decode(ids[: len(ids) - self._unsettled(ids)]).rstrip(REPLACEMENT)
        ends = [text.find(stop) for stop in self._stops if stop in text]
        text = text[: min(ends, default=len(text))]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        return JOINABLE_END.sub("", text[: len(text) - held]).strip()


class PieceStream:
    """Cuts growing ids into text pieces whose concatenation is the whole answer."""

    def __init__(self, text: AnswerText):
        self._text, self._sent = text, 0

    def more(self, ids: list[int]) -> str:
        """What became certain since the last call, possibly nothing."""
        return self._advance(self._text.settled(ids))

    def rest(self, ids: list[int]) -> str:
        """What is left once `ids` are complete."""
        return self._advance(self._text.whole(ids))

    def _advance(self, text: str) -> str:
        # A tokenizer may re-read a run of invalid bytes; what has been sent stays, and the rest follows it.
        piece = text[self._sent :]
        self._sent += len(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
