"""Questions in a VLMEvalKit TSV file, hundreds of megabytes of base64 among them. Knows no model and no metric.

Only texts are kept in memory; a row's pictures are read from the file when they are asked for.
"""

import ast
import base64
import binascii
import csv
import hashlib
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vlquant.calib_data.conversations import Conversation, named
from vlquant.errors import InvalidRequest
from vlquant.known_sets import QUESTION, known_set
from vlquant.request import Picture, Request, is_file

MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>")
    + ("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)
"""What pandas reads as a missing value, and VLMEvalKit with it: an option "None" is not offered."""
LONGEST_REFERENCE = 64
"""An `image` of so few characters is the index of the row that has the picture."""
PICTURE_COLUMNS = ("image", "image_path")


@dataclass(frozen=True)
class Row:
    """One question of the file."""

    line: int
    """Where it begins in the file, counted from 1."""
    offset: int
    """The same in bytes."""
    cells: dict[str, str]
    """Its texts by column, without missing values and pictures."""
    shows: str | None
    """Index of the row that has its pictures, or None."""
    own_pictures: tuple[str | Path, ...]
    """What its own pictures are known by: the sha256 of their base64, or their files."""


class TsvFile:
    """The rows of a TSV file; each is a conversation."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = []
        self._own_pictures: dict[str, Row] = {}
        """Rows that hold pictures themselves, by index."""
        # One picture is a cell of megabytes; the limit is the csv module's own and cannot be given to a reader.
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        with self._opened() as file:
            self.columns, rows = self._header(file)
            for line, offset, cells in rows:
                self._add(line, offset, cells)
        if not self.rows:
            raise InvalidRequest(f"{path} holds no questions; give a TSV file with at least one row")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        row = self.rows[index]
        key = f"{self.path}, line {row.line}"
        with named(key):
            request = Request(prompt_of(row.cells, self.path.stem), images=tuple(self.pictures(row)))
        answer = row.cells.get("answer")
        return Conversation(key, request, None if answer is None else listed(answer)[0])

    def pictures(self, row: Row) -> list[Picture]:
        """A row's pictures, or those of the row it refers to: bytes, or paths. Raises InvalidRequest if there are none."""
        row = self._owner(row)
        with self._opened() as file:
            file.seek(row.offset)
            _, _, cells = next(self._cells(file, row.line - 1, row.offset))
        own = present(dict(zip(self.columns, cells, strict=False)))
        if "image" in own:
            return [picture_bytes(text) for text in listed(own["image"])]
        return [self._place(name) for name in listed(own["image_path"])] if "image_path" in own else []

    def shown(self, row: Row) -> tuple[str | Path, ...]:
        """What a row's pictures are known by, which is not read again; raises InvalidRequest as `pictures` does."""
        return self._owner(row).own_pictures

    def _owner(self, row: Row) -> Row:
        """The row that holds a row's pictures."""
        if row.shows is None:
            return row
        if row.shows not in self._own_pictures:
            raise InvalidRequest(f"its image is {row.shows!r}, which is no row with a picture; give base64 or such a row's index")
        return self._own_pictures[row.shows]

    def _known_by(self, own: dict[str, str]) -> tuple[str | Path, ...]:
        """What the pictures that a row holds itself are known by."""
        if "image" in own:
            return tuple(hashlib.sha256(text.encode()).hexdigest() for text in listed(own["image"]))
        return tuple(map(self._place, listed(own["image_path"]))) if "image_path" in own else ()

    def _place(self, name: str) -> Path:
        """A picture's file: beside the TSV, or where VLMEvalKit puts the pictures it takes out of one."""
        taken_out = self.path.parent / "images" / self.path.stem / name
        return taken_out if is_file(taken_out) else self.path.parent / name

    def _opened(self) -> BinaryIO:
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise InvalidRequest(f"{self.path} cannot be read ({error.strerror}); give a TSV file") from error

    def _header(self, file: BinaryIO) -> tuple[list[str], Iterator[tuple[int, int, list[str]]]]:
        """Column names and the rows after them; raises InvalidRequest if these are not the columns of questions."""
        rows = self._cells(file, 0, 0)
        _, _, columns = next(rows, (1, 0, []))
        columns = [name.removeprefix("\ufeff") for name in columns]
        if "question" not in columns or not set(PICTURE_COLUMNS) & set(columns):
            raise InvalidRequest(
                f"{self.path}, line 1: the columns are {', '.join(columns)[:200] or 'missing'}; "
                "name them index, image (base64) or image_path, question, answer, and A, B, C ... for options"
            )
        return columns, rows

    def _add(self, line: int, offset: int, cells: list[str]) -> None:
        """Note one row, its pictures left where they are."""
        if len(cells) > len(self.columns):
            raise InvalidRequest(
                f"{self.path}, line {line}: {len(cells)} cells for {len(self.columns)} columns; quote cells that hold tabs"
            )
        own = present(dict(zip(self.columns, cells, strict=False)))
        picture, index = own.get("image"), own.get("index", "")
        texts = {name: text for name, text in own.items() if name not in PICTURE_COLUMNS}
        if "question" not in texts:
            raise InvalidRequest(f"{self.path}, line {line}: the question is missing; fill it in, or take the row out")
        shows = picture if picture is not None and len(picture) <= LONGEST_REFERENCE else None
        self.rows.append(Row(line, offset, texts, shows, self._known_by(own) if shows is None else ()))
        if self.rows[-1].own_pictures:
            self._own_pictures[index] = self.rows[-1]

    def _cells(self, file: BinaryIO, lines: int, offset: int) -> Iterator[tuple[int, int, list[str]]]:
        """(line, offset in bytes, cells) of every row that is not empty, from where the file stands, `lines` behind it."""
        position = {"line": lines, "offset": offset}

        def decoded() -> Iterator[str]:
            for raw in file:
                position["line"] += 1
                position["offset"] += len(raw)
                yield raw.decode("utf-8")

        rows, start = csv.reader(decoded(), delimiter="\t", strict=True), dict(position)
        try:
            for cells in rows:
                if cells:
                    yield start["line"] + 1, start["offset"], cells
                start = dict(position)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InvalidRequest(
                f"{self.path}, line {start['line'] + 1}: this is no row of a TSV file ({error}); write it as pandas does"
            ) from error


def present(cells: dict[str, str]) -> dict[str, str]:
    """The cells that pandas would not call missing."""
    return {name: text for name, text in cells.items() if text not in MISSING}


def listed(text: str) -> list[str]:
    """The entries of a list of texts, or the text as the only one: a box such as [1, 2, 3, 4] is one answer."""
    try:
        entries = ast.literal_eval(text) if text.startswith("[") else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [text]
    several = isinstance(entries, list) and entries and all(isinstance(entry, str) for entry in entries)
    return entries if several else [text]


def picture_bytes(text: str) -> bytes:
    """The bytes of a base64 picture; raises InvalidRequest if it is none."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (ValueError, binascii.Error) as error:
        raise InvalidRequest(f"its image is no base64 ({error}); give a base64 picture or another row's index") from None


def options_of(cells: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """The options (letter, text) of a row."""
    return tuple((letter, cells[letter]) for letter in string.ascii_uppercase if letter in cells)


def prompt_of(cells: dict[str, str], set_name: str) -> str:
    """The question as VLMEvalKit asks InternVL: after its hint, with options, with what kind of answer is wanted."""
    known, options = known_set(set_name), options_of(cells)
    lines = [f"{letter}. {text}" for letter, text in options]
    question = "\n".join([*filter(None, [cells.get("hint")]), cells["question"], *lines])
    chinese = any("\u4e00" <= character <= "\u9fff" for character in question)
    if options:
        return question + ("\n请直接回答选项字母。" if chinese else "\nAnswer with the option's letter from the given choices directly.")
    if known.metric == "choice":
        return question + ("\n请直接回答问题。" if chinese else "\nAnswer the question directly.")
    is_region = "<ref>" in known.prompt and "<ref>" in question
    return question if is_region else known.prompt.replace(QUESTION, question)
