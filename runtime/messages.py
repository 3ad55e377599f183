"""LMDeploy-style prompts and OpenAI-style messages to requests. Opens no picture, runs nothing."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlquant.errors import InvalidRequest
from vlquant.prompt import IMAGE_PLACEHOLDER, Template, picture_placeholders
from vlquant.request import EncodedRequest, Request

FORMS = (
    "a prompt is a text, a pair (text, picture or list of pictures), a Request, "
    'or a list of messages {"role": ..., "content": ...}'
)
Prompt = str | tuple | list | Request | EncodedRequest
"""A text, (text, pictures), OpenAI-style messages, or a request."""
PICTURES, VIDEOS = ("image_url", "image"), ("video_url", "video")
"""Types of parts, OpenAI's own and transformers'."""


def is_conversation(prompt: object) -> bool:
    """Whether `prompt` is one list of OpenAI-style messages."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def as_request(prompt: object, template: Template | None = None) -> Request:
    """The request a prompt stands for; raises InvalidRequest naming the accepted forms.

    template: that of the model which will answer; None: one that numbers pictures, as all originals do.
    """
    if isinstance(prompt, Request):
        return prompt
    if isinstance(prompt, str):
        return Request(question=prompt)
    if is_conversation(prompt):
        return _from_messages(prompt, numbered=template is None or template.numbers_pictures)
    if isinstance(prompt, tuple) and len(prompt) == 2 and isinstance(prompt[0], str):
        question, images = prompt
        return Request(question=question, images=tuple(images) if isinstance(images, (list, tuple)) else (images,))
    raise InvalidRequest(f"{FORMS}; this one is a {type(prompt).__name__}")


def read_messages(file: str) -> list[dict]:
    """The messages in a JSON file, a list or {"messages": list}; "-" reads standard input. Raises InvalidRequest."""
    name = "standard input" if file == "-" else file
    try:
        contents = json.loads(sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} holds no messages ({error}); give a JSON file with a list of messages") from None
    messages = contents.get("messages") if isinstance(contents, dict) else contents
    if not isinstance(messages, list) or not is_conversation(messages):
        raise InvalidRequest(f'{name} holds no messages; give a list of {{"role": ..., "content": ...}}')
    return messages


def with_placeholders(text: str, pictures: int, *, numbered: bool = True) -> str:
    """`text` with a placeholder for every picture in front, unless it places them itself."""
    return text if IMAGE_PLACEHOLDER in text or not pictures else picture_placeholders(pictures, numbered=numbered) + text


@dataclass
class Content:
    """One message's parts."""

    pieces: list[str | None] = field(default_factory=list)
    """Texts in their order, None where a picture is."""
    pictures: list = field(default_factory=list)
    videos: list = field(default_factory=list)
    early_video: bool = True
    """Whether nothing stands in front of the video: its frames are put there."""

    @property
    def places_its_own(self) -> bool:
        """Whether the texts hold no placeholder, or exactly those of the message's pictures."""
        held = sum(piece.count(IMAGE_PLACEHOLDER) for piece in self.pieces if piece is not None)
        return held in (0, len(self.pictures))

    def text(self, *, numbered: bool) -> str:
        """The message as the prompt has it: numbered pictures go first, as the original is asked; others stay where they are."""
        if not numbered:
            return "".join(picture_placeholders(1) if piece is None else piece for piece in self.pieces)
        words = "\n".join(piece for piece in self.pieces if piece is not None)
        return with_placeholders(words, len(self.pictures))


def _from_messages(messages: Sequence[Mapping], *, numbered: bool) -> Request:
    """System message first if any, then user and assistant in turn, a user's message last."""
    system, turns, images, videos, placed = None, [], [], [], []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        content = _content(message.get("content")) if role else Content()
        if role != "user" and (content.pictures or content.videos):
            raise InvalidRequest(f"message {index + 1} of role {role!r} holds a picture or video; only the user's can")
        placed.append(content.places_its_own)
        if role == "system" and index == 0:
            system = content.text(numbered=numbered)
        elif role == "user" and (not turns or len(turns[-1]) == 2):
            if not (numbered or content.early_video):
                raise InvalidRequest(f"message {index + 1} has its video behind other parts; put it first")
            turns.append((content.text(numbered=numbered),))
            images += content.pictures
            videos += content.videos
        elif role == "assistant" and turns and len(turns[-1]) == 1:
            turns[-1] += (content.text(numbered=numbered),)
        else:
            raise InvalidRequest(
                f"message {index + 1} has role {role!r} out of turn; give system (optional), then user and assistant in turn"
            )
    if not turns or len(turns[-1]) == 2:
        raise InvalidRequest("the last message has to be the user's; add one")
    if images and not all(placed):
        raise InvalidRequest(
            f"message {placed.index(False) + 1} has {IMAGE_PLACEHOLDER} in its text but not as many pictures, so that another "
            "message's would be put there; take it out of the text, or place that message's pictures with it"
        )
    if videos and (len(turns) > 1 or images or len(videos) > 1):
        raise InvalidRequest("a video has to be alone in the only question; leave out pictures, other videos and earlier turns")
    return Request(
        question=turns[-1][0], images=tuple(images), video=videos[0] if videos else None,
        history=tuple(turns[:-1]) or None, system_message=system,
    )  # fmt: skip


def _content(content: object) -> Content:
    """The parts of one message's content, a text or a list."""
    if isinstance(content, str):
        return Content([content])
    found = Content()
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            found.pieces.append(part["text"])
        elif kind in PICTURES and kind in part:
            found.pieces.append(None)
            found.pictures.append(_address(part[kind]))
        elif kind in VIDEOS and kind in part:
            found.videos.append(_address(part[kind]))
            found.early_video = found.early_video and not found.pieces
        else:
            raise InvalidRequest(
                f'a message part of type {kind!r} is not understood; use {{"type": "text", "text": ...}}, '
                '{"type": "image_url", "image_url": {"url": ...}} or the same with video_url'
            )
    return found


def _address(part: object) -> object:
    """A picture or video: what is under "url", or the thing itself; file:// names a file here."""
    address = part.get("url") if isinstance(part, Mapping) else part
    if isinstance(address, str) and address:
        return address.removeprefix("file://")
    if address is None or isinstance(address, str | int | float | Mapping):
        raise InvalidRequest(f"a picture or video of a message is given as {address!r}; give a file, a data URL or a PIL image")
    return address
