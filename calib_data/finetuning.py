"""Conversations in InternVL's fine-tuning format: one JSON object per line, or a meta file naming such files. Knows no model."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vlquant.calib_data.conversations import Conversation, named
from vlquant.errors import InvalidRequest
from vlquant.prompt import IMAGE_PLACEHOLDER, picture_placeholders
from vlquant.request import DATA_URL_START, Picture, Request

VIDEO_PLACEHOLDER = "<video>"
ROLES = ("human", "gpt")
FORM = '{"image": "receipt.jpg", "conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}'
META_FORM = '{"name": {"root": "pictures", "annotation": "train.jsonl"}}'
NOT_JSON = (ValueError, RecursionError)


@dataclass(frozen=True)
class Line:
    """Where one conversation is."""

    path: Path
    root: Path
    """Its pictures are relative to this."""
    number: int
    """Counted from 1."""
    offset: int
    """In bytes."""


class FinetuningSet:
    """The conversations of a JSONL file, or of all that a meta file names; each line is read when it is asked for."""

    def __init__(self, path: Path):
        annotations = meta_annotations(path) if path.suffix.lower() == ".json" else [(path, path.parent)]
        self.lines = [line for annotation, root in annotations for line in lines_of(annotation, root)]
        if not self.lines:
            raise InvalidRequest(f"{path} holds no conversations; give lines of {FORM}")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Conversation:
        line = self.lines[index]
        key = f"{line.path}, line {line.number}"
        with opened(line.path) as file, named(key):
            file.seek(line.offset)
            try:
                row = json.loads(file.readline())
            except NOT_JSON as error:
                raise InvalidRequest(f"this is no JSON ({error}); give one object per line: {FORM}") from error
            request, answer = read_row(row, line.root)
        return Conversation(key, request, answer)


def meta_annotations(path: Path) -> list[tuple[Path, Path]]:
    """(annotation file, folder of its pictures) of every set that a meta file names."""
    try:
        sets = json.loads(path.read_bytes())
    except (OSError, *NOT_JSON) as error:
        raise InvalidRequest(f"{path} cannot be read as JSON ({error}); give {META_FORM}, or a .jsonl file") from error
    entries = list(sets.values()) if isinstance(sets, Mapping) else [None]
    if not all(isinstance(each, Mapping) and isinstance(each.get("annotation"), str) for each in entries):
        raise InvalidRequest(f"{path} names no annotation files; give {META_FORM}, or conversations one per line as .jsonl")
    found = [(beside(path, each["annotation"]), beside(path, str(each.get("root") or "."))) for each in entries]
    with named(str(path)):
        for annotation, _ in found:
            opened(annotation).close()
    return found


def beside(path: Path, name: str) -> Path:
    """What a meta file means by a relative name: something in its own folder, or else, as in training, in the current one."""
    beside_it, here = path.parent / name, Path(name)
    return here if os.path.exists(here) and not os.path.exists(beside_it) else beside_it


def lines_of(path: Path, root: Path) -> Iterator[Line]:
    """Every line of a file that is not blank."""
    offset = 0
    with opened(path) as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield Line(path, root, number, offset)
            offset += len(text)


def opened(path: Path) -> BinaryIO:
    """A JSONL file to read from; raises InvalidRequest if there is none."""
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have.
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"{path} cannot be read ({reason}); give a JSONL file, lines of {FORM}") from error


def read_row(row: object, root: Path) -> tuple[Request, str | None]:
    """The last question of a row with what comes before it, and its answer, if it has one; of a video, the first question.

    Raises InvalidRequest for another form, and if the placeholders are not as many as the pictures.
    """
    if not isinstance(row, Mapping) or not isinstance(row.get("conversations"), list):
        raise InvalidRequest(f"it holds no conversations; write it as {FORM}")
    system, turns = read_turns(row["conversations"])
    pictures = row.get("image") or []
    pictures = [locate(each, root) for each in (pictures if isinstance(pictures, list) else [pictures])]
    video = row.get("video") if not pictures else None
    if video:
        turns = turns[:1]  # Frames go in front of the question that opens the conversation, as many as there is room for.
        turns = [(question.replace(f"{VIDEO_PLACEHOLDER}\n", "").replace(VIDEO_PLACEHOLDER, ""), answer) for question, answer in turns]
    if pictures or video:
        require_spoken_about(system, turns)
    turns = place_pictures(turns, len(pictures))
    *history, (question, answer) = turns
    request = Request(
        question, tuple(pictures), video=locate(video, root) if video else None,
        history=tuple(history) or None, system_message=system,
    )  # fmt: skip
    return request, answer


def read_turns(messages: list) -> tuple[str | None, list[tuple[str, str | None]]]:
    """The system message, if any, and turns (question, answer), of which only the last answer may be None."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("value"), str):
            raise InvalidRequest(f'entry {index + 1} of its conversations is no {{"from": ..., "value": text}}; write it as {FORM}')
    has_system = bool(messages) and messages[0].get("from") == "system"
    spoken = messages[has_system:]
    for index, message in enumerate(spoken):
        if message.get("from") != ROLES[index % 2]:
            raise InvalidRequest(
                f"entry {index + 1 + has_system} of its conversations is from {message.get('from')!r} out of turn; "
                "give system (optional), then human and gpt in turn"
            )
    if not spoken:
        raise InvalidRequest(f"its conversations are empty; write it as {FORM}")
    texts = [message["value"] for message in spoken] + [None] * (len(spoken) % 2)
    return messages[0]["value"] if has_system else None, list(zip(texts[::2], texts[1::2], strict=True))


def require_spoken_about(system: str | None, turns: list[tuple[str, str | None]]) -> None:
    """Raise InvalidRequest if a placeholder stands where nobody asks: there it would take a picture from its question."""
    elsewhere = {"the system message": system or "", "an earlier answer": "".join(answer for _, answer in turns[:-1])}
    for where, text in elsewhere.items():
        if IMAGE_PLACEHOLDER in text:
            raise InvalidRequest(
                f"{where} holds {IMAGE_PLACEHOLDER}, which would take a picture from the question about it; "
                "leave it to the questions"
            )


def place_pictures(turns: list[tuple[str, str | None]], pictures: int) -> list[tuple[str, str | None]]:
    """The turns with a placeholder for every picture: without any, all go in front of the first question."""
    held = sum(question.count(IMAGE_PLACEHOLDER) for question, _ in turns)
    if held == 0 and pictures:
        (question, answer), *rest = turns
        return [(picture_placeholders(pictures) + question, answer), *rest]
    if held != pictures:
        raise InvalidRequest(
            f"it has {pictures} pictures and {held} {IMAGE_PLACEHOLDER} placeholders; write one {IMAGE_PLACEHOLDER} per picture"
        )
    return turns


def locate(name: object, root: Path) -> Picture:
    """A picture or video as it can be opened: a path below `root` unless it is absolute or no path at all."""
    if not isinstance(name, str):
        raise InvalidRequest(f"a picture or video is given as {type(name).__name__}; give its file name")
    return name if name.startswith((DATA_URL_START, "http://", "https://")) else root / name
