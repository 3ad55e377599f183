"""The fields of a sentencepiece `.model` that its Python class does not show, read from the protobuf bytes.

Twenty lines of wire format instead of generated classes that must fit the installed protobuf.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlquant.errors import BrokenCheckpoint

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """Vocabulary and normalization of a sentencepiece model."""

    pieces: tuple[Piece, ...]
    model_type: int
    """BPE is 2."""
    character_map: bytes
    """Precompiled normalization, empty for identity."""
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read a `.model` file. Raises BrokenCheckpoint if it is none."""
    try:
        fields = list(_fields(path.read_bytes()))
        trainer = dict(_fields(_last(fields, 2, b"")))
        normalizer = dict(_fields(_last(fields, 3, b"")))
        return SentencePieceModel(
            pieces=tuple(_piece(value) for number, value in fields if number == 1),
            model_type=trainer.get(3, 1),
            character_map=bytes(normalizer.get(2, b"")),
            add_dummy_prefix=bool(normalizer.get(3, True)),
            remove_extra_whitespaces=bool(normalizer.get(4, True)),
        )
    except (ValueError, IndexError, struct.error) as error:
        raise BrokenCheckpoint(f"{path} is not a sentencepiece model ({error}); download it again") from None


def serialize(model: SentencePieceModel) -> bytes:
    """The `.model` file of a model; what is not in SentencePieceModel has sentencepiece's defaults, bytes as fall-back."""
    pieces = b"".join(
        _message(1, _message(1, piece.text.encode()) + b"\x15" + struct.pack("<f", piece.score) + _number(3, piece.kind))
        for piece in model.pieces
    )
    trainer = _number(3, model.model_type) + _number(4, len(model.pieces)) + _number(35, True)
    normalizer = _message(1, b"identity") + _message(2, model.character_map)
    normalizer += _number(3, model.add_dummy_prefix) + _number(4, model.remove_extra_whitespaces)
    return pieces + _message(2, trainer) + _message(3, normalizer)


def _message(number: int, value: bytes) -> bytes:
    return _written_varint(number << 3 | 2) + _written_varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _written_varint(number << 3) + _written_varint(int(value))


def _written_varint(value: int) -> bytes:
    written = b""
    while value >= 0x80:
        written += bytes([value & 0x7F | 0x80])
        value >>= 7
    return written + bytes([value])


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(bytes(fields.get(1, b"")).decode("utf-8"), score, fields.get(3, NORMAL))


def _last(fields: list, number: int, default: bytes) -> bytes:
    return next((value for field, value in reversed(fields) if field == number), default)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) pairs of a protobuf message: integers for varints, bytes for all else."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            length, position = _varint(message, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if position + length > len(message):
            raise ValueError("truncated")
        yield number, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
