"""Conversations to calibrate on, wherever they come from, and what identifies them. Reads no file format."""

import hashlib
import json
import random
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from vlquant.errors import InvalidRequest
from vlquant.request import Request, open_image

NAME_DIGITS = 16
"""Enough to tell a million pictures apart."""


@dataclass(frozen=True)
class Conversation:
    """A question with everything before it, and its answer."""

    key: str
    """Where it comes from, for a sentence: "train.jsonl, line 3"."""
    request: Request
    answer: str | None
    """None: nobody has written one."""
    generated: bool = False
    """Whether it came without the answer, and a model has written that since."""
    cut: bool = False
    """Whether that model was interrupted: its answer has no end."""


class ConversationSet(Protocol):
    """Conversations that are read when they are asked for, so that any number of pictures fits into memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


Pick = tuple[ConversationSet, int]
"""One conversation of a set, not yet read."""


def shuffled(conversations: ConversationSet, count: int, *, seed: int) -> list[Pick]:
    """`count` conversations of a set, or all if there are fewer, in an order that the seed decides."""
    size = len(conversations)
    return [(conversations, index) for index in random.Random(seed).sample(range(size), min(count, size))]


def in_turn(sets: Sequence[Sequence[Pick]], count: int) -> list[Pick]:
    """The first `count` picks when sets take turns; one that has run out is passed over."""
    rounds = max(map(len, sets))
    return [picks[turn] for turn in range(rounds) for picks in sets if turn < len(picks)][:count]


@contextmanager
def named(key: str):
    """Errors about what a conversation holds say which one it is, once."""
    try:
        yield
    except InvalidRequest as error:
        if key in str(error):
            raise
        raise InvalidRequest(f"{key}: {error}") from error


def pictures_of(conversation: Conversation) -> list[Image.Image]:
    """All pictures and frames of a conversation as RGB; raises InvalidRequest naming it if one cannot be read."""
    request = conversation.request
    with named(conversation.key):
        return [open_image(picture) for picture in (*request.images, *(request.video or ()))]


def pixel_hash(image: Image.Image) -> str:
    """sha256 of a picture's size and pixels, whatever file it was in."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def picture_name(image: Image.Image) -> str:
    """16 hex digits by which a picture is known again."""
    return pixel_hash(image)[:NAME_DIGITS]


def conversation_hash(conversation: Conversation, pictures: Sequence[str]) -> str:
    """sha256 of what the model is shown: texts and the pictures' hashes, not where they lie."""
    request = conversation.request
    texts = [request.system_message, list(request.history or ()), request.question, conversation.answer]
    return hashlib.sha256(json.dumps([*texts, request.video is not None, *pictures]).encode()).hexdigest()
