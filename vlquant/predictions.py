"""Answers of a model in VLMEvalKit's form: a set's TSV without its pictures, with a column `prediction`."""

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from vlquant.errors import InvalidRequest
from vlquant.publishing import write_whole

COLUMN = "prediction"
PICTURE_COLUMNS = ("image", "image_path")
FORM = "give a TSV file with the columns index, question and prediction, as VLMEvalKit writes it"


def read_predictions(path: Path, questions: Mapping[str, str]) -> dict[str, str]:
    """The predictions of a TSV file by index, one for each of `questions` (texts by index).

    Raises InvalidRequest naming file, line and reason if there is none for a question, or the file has another question there.
    """
    found: dict[str, str] = {}
    for line, row in rows_of(path):
        index = row["index"]
        if index not in questions:
            continue
        if index in found:
            raise InvalidRequest(f"{path}, line {line}: there is a prediction for index {index!r} already; leave one of them")
        if row["question"].split() != questions[index].split():
            raise InvalidRequest(
                f"{path}, line {line}: the question of index {index!r} is {row['question'][:80]!r} here and "
                f"{questions[index][:80]!r} in the set; give predictions for the same set"
            )
        found[index] = row[COLUMN]
    missing = [index for index in questions if index not in found]
    if missing:
        raise InvalidRequest(
            f"{path} has no prediction for {len(missing)} of {len(questions)} questions, the first is index {missing[0]!r}; "
            "give predictions for the whole set, or ask fewer with --limit"
        )
    return found


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line it ends at, cells by column) of every row; raises InvalidRequest for another form."""
    # Answers can be long; the limit is the csv module's own and cannot be given to a reader.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows = csv.DictReader(io.StringIO(text_of(path), newline=""), delimiter="\t", strict=True)
    try:
        require_columns(path, rows.fieldnames or ())
        for row in rows:
            if row[COLUMN] is None:
                raise InvalidRequest(f"{path}, line {rows.line_num}: the row ends before its prediction; give the whole file")
            if None in row:
                raise InvalidRequest(f"{path}, line {rows.line_num}: there are more cells than columns; quote cells that hold tabs")
            yield rows.line_num, row
    except csv.Error as error:
        raise InvalidRequest(f"{path}, after line {rows.line_num}: this is no row of a TSV file ({error}); {FORM}") from error


def text_of(path: Path) -> str:
    """What a file says; raises InvalidRequest if it is no text."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror}); {FORM}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is no text ({error}); {FORM}") from error


def require_columns(path: Path, columns: Iterable[str]) -> None:
    """Raise InvalidRequest unless the columns are those of predictions."""
    missing = [name for name in ("index", "question", COLUMN) if name not in columns]
    if missing:
        raise InvalidRequest(f"{path} has no column {missing[0]!r}; {FORM}")


def write_predictions(path: Path, rows: Iterable[tuple[Mapping[str, str], str]]) -> None:
    """Write (cells of a question by column, prediction) as a TSV file, whole or not at all.

    Pictures are left out: VLMEvalKit scores such a file without them. Raises OutputRefused.
    """
    written = [{**{name: cells[name] for name in cells if name not in PICTURE_COLUMNS}, COLUMN: said} for cells, said in rows]
    columns = dict.fromkeys(name for row in written for name in row if name != COLUMN)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, COLUMN], restval="", delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(written)
    write_whole(path, text.getvalue())
