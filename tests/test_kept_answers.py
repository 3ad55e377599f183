"""Answers outlive the run that gave them, whatever stopped it."""

import pytest
from PIL import Image

from vlquant.kept_answers import KeptAnswer, KeptAnswers, cache_folder, kept_answers, question_key
from vlquant.request import EncodedRequest

ANSWER, CUT = KeptAnswer((5, 6, 2), "红色 “red”\n", False), KeptAnswer((5,), "", True)
RED, BLUE = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_answers_are_found_by_the_next_run(cache):
    assert cache_folder() == cache / "vlquant"
    kept_answers({"files": {"a": "1"}}).add({"one": ANSWER, "two": CUT})
    again = kept_answers({"files": {"a": "1"}})
    assert (again.get("one"), again.get("two"), again.get("three")) == (ANSWER, CUT, None)
    assert kept_answers({"files": {"a": "2"}}).get("one") is None


def test_a_line_that_was_cut_off_harms_no_other(tmp_path):
    path = tmp_path / "answers.jsonl"
    KeptAnswers(path).add({"one": ANSWER, "two": ANSWER})
    path.write_bytes(path.read_bytes()[:-9])
    second = KeptAnswers(path)
    assert (second.get("one"), second.get("two")) == (ANSWER, None)
    second.add({"three": CUT})
    assert [KeptAnswers(path).get(key) for key in ("one", "two", "three")] == [ANSWER, None, CUT]


def test_without_a_place_answers_are_kept_in_memory(cache):
    (cache / "vlquant").write_text("in the way")
    kept = kept_answers({})
    kept.add({"one": ANSWER})
    assert kept.path is None and kept.get("one") == ANSWER


def test_a_question_is_what_the_model_is_shown():
    def encoded(ids, tiles, boxes):
        return EncodedRequest("the text is in the ids", ids, tiles, boxes, "")

    box = (0, 0, 1, 1)
    asked = [
        encoded([1, 2], [RED, BLUE], [[box, box]]),
        encoded([1, 3], [RED, BLUE], [[box, box]]),
        encoded([1, 2], [BLUE, RED], [[box, box]]),
        encoded([1, 2], [RED, BLUE], [[box], [box]]),
    ]
    assert len({question_key(each) for each in asked}) == 4
    assert question_key(asked[0]) == question_key(encoded([1, 2], [RED.copy(), BLUE.copy()], [[box, box]]))


def test_a_full_disk_costs_only_the_next_run(tmp_path, monkeypatch):
    kept = KeptAnswers(tmp_path / "gone" / "answers.jsonl")
    kept.add({"one": ANSWER})
    assert kept.get("one") == ANSWER and kept.path is None
