"""Predictions written, read back, and refused where they do not belong to the questions."""

import pytest

from vlquant.errors import InvalidRequest, OutputRefused
from vlquant.predictions import read_predictions, write_predictions

ROWS = [
    ({"index": "0", "image": "AAAA", "question": 'Which "one"?', "A": "this", "answer": "A"}, "A\tor\n\"B\""),
    ({"index": "x_1", "question": "何？", "answer": "None", "category": "text", "prediction": "old"}, ""),
    ({"index": "2", "question": "Two\nlines?", "image_path": "2.png"}, "NA"),
]
QUESTIONS = {cells["index"]: cells["question"] for cells, _ in ROWS}


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "DocVQA_VAL.tsv"
    write_predictions(path, ROWS)
    return path


def test_what_is_written_is_read(written):
    assert read_predictions(written, QUESTIONS) == {"0": 'A\tor\n"B"', "x_1": "", "2": "NA"}
    assert written.read_text().splitlines()[0] == "index\tquestion\tA\tanswer\tcategory\tprediction"
    assert "AAAA" not in written.read_text() and "2.png" not in written.read_text()


def test_more_predictions_than_questions_are_no_harm(written):
    assert read_predictions(written, {"2": "Two lines?"}) == {"2": "NA"}  # Spreadsheets change line breaks.


REFUSED = {
    "a row cut off": ("index\tquestion\tprediction\n2\tTwo lines?\tB\n0\tWhich", "the row ends before its prediction"),
    "another set": ("index\tquestion\tprediction\n0\tWhen?\tB\n", "line 2: the question of index '0' is 'When[?]' here"),
    "some missing": ('index\tquestion\tprediction\n2\t"Two\nlines?"\tB\n', "no prediction for 2 of 3 questions, the first is index '0'"),
    "one twice": ("index\tquestion\tprediction\nx_1\t何？\tB\nx_1\t何？\tC\n", "line 3: there is a prediction for index 'x_1' already"),
    "columns": ("index\tquestion\n0\tx\n", "has no column 'prediction'; give a TSV"),
    "nothing": ("", "has no column 'index'"),
    "cells": ("index\tquestion\tprediction\n0\tx\ty\tz\n", "line 2: there are more cells than columns"),
    "quotes": ('index\tquestion\tprediction\n0\tx\t"y\n', "after line 1: this is no row of a TSV file"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, text, message):
    path = tmp_path / "predictions.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidRequest, match=message) as refusal:
        read_predictions(path, QUESTIONS)
    assert str(path) in str(refusal.value) and not str(refusal.value).endswith(".")


def test_a_spreadsheet_and_no_file(tmp_path):
    (tmp_path / "predictions.xlsx").write_bytes(b"PK\x03\x04\xff\xfe\x80")
    for name in ("predictions.xlsx", "none.tsv"):
        with pytest.raises(InvalidRequest, match="give a TSV file with the columns"):
            read_predictions(tmp_path / name, QUESTIONS)


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputRefused, match="cannot be written"):
        write_predictions(tmp_path / "file" / "predictions.tsv", ROWS)
