"""What is known to be wrong with calibration data and memory before anything is computed."""

import json

import pytest
import torch

from vlquant import reference_answers
from vlquant.calibration_sets import choose_conversations
from vlquant.errors import InvalidRequest, VlquantError
from vlquant.quantize import quantize
from vlquant.recipe import Recipe

from tests.test_calibration_sets import CLOCK, DOG, SETTINGS, picture, spoken, write_jsonl

HALF = "Hi \ud83d"
BAD_TEXTS = {
    "half a character in a question": ({"conversations": spoken(HALF, DOG)}, "no UTF-8"),
    "half a character in an earlier answer": ({"conversations": spoken(CLOCK, HALF, CLOCK, DOG)}, "no UTF-8"),
    "half a character in the answer": ({"conversations": spoken(CLOCK, HALF)}, "no UTF-8"),
    "half a character for the system": ({"conversations": [{"from": "system", "value": HALF}, *spoken(CLOCK, DOG)]}, "no UTF-8"),
    "context token": ({"image": "a.png", "conversations": spoken("<image> <IMG_CONTEXT>", DOG)}, "take <IMG_CONTEXT> out"),
    "endless question": ({"conversations": spoken("word " * 40_000)}, "the model, which is to answer it, takes at most"),
}


@pytest.fixture
def packable(named_case):
    return named_case("internlm2_internvl2_5")


@pytest.mark.parametrize(("row", "words"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_texts_are_refused_before_a_run_begins(row, words, packable, tmp_path, monkeypatch):
    """The sentence names file and line, and nothing has been written."""
    monkeypatch.setattr("vlquant.quantize.resuming", lambda *_, **__: pytest.fail("the run began"))
    picture().save(tmp_path / "a.png")
    path = write_jsonl(tmp_path / "a.jsonl", {"conversations": spoken(CLOCK, DOG)}, row)
    with pytest.raises(InvalidRequest, match=words) as caught:
        quantize(packable.folder, recipe=Recipe(calibration=path, samples=2, **SETTINGS), output=tmp_path / "out")
    assert str(caught.value).startswith(f"{path}, line 2: ") and ";" in str(caught.value)


def test_answers_out_of_reach_are_counted(packable, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", *({"conversations": spoken(text, DOG)} for text in (CLOCK, "word " * 5000)))
    events = []
    quantize(packable.folder, recipe=Recipe(calibration=path, samples=2, **SETTINGS), output=tmp_path / "out", report=events.append)
    said = [event.message for event in events if event.stage == "calibration texts" and event.message]
    assert said == ["1 of 2 conversations are too long for their answer to be seen; give more --tokens than 512"]


@pytest.fixture
def unanswered(tmp_path):
    picture().save(tmp_path / "a.png")
    path = write_jsonl(tmp_path / "a.jsonl", *({"image": "a.png", "conversations": spoken(CLOCK)} for _ in range(3)))
    return choose_conversations(Recipe(calibration=path, samples=3, **SETTINGS), lambda event: None)


def answered(unanswered, packable, kept, device="cpu"):
    shared = {"most_tokens": 512, "device": device, "report": lambda event: None}
    return reference_answers.with_answers(unanswered, packable.model, kept, **shared)


def test_an_answer_at_the_maximum_is_known_to_be_cut(unanswered, packable, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_answers, "LONGEST_ANSWER", 1)
    found = answered(unanswered, packable, tmp_path / "answers.json")[0]
    assert found.generated and found.cut
    again = answered(unanswered, packable, tmp_path / "answers.json")[0]
    assert (again.answer, again.cut) == (found.answer, True)


def test_a_gpu_that_is_too_small_writes_no_answers(unanswered, packable, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**12))
    with pytest.raises(VlquantError, match="memory of cuda:0 are free; give a .jsonl file with answers"):
        answered(unanswered, packable, tmp_path / "answers.json", device="cuda:0")


def test_a_gpu_that_runs_out_of_memory_keeps_what_was_written(unanswered, packable, tmp_path, monkeypatch):
    def exhausted(folder, device, **_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reference_answers, "load", exhausted)
    kept = tmp_path / "answers.json"
    kept.write_text(json.dumps([["A clock.", False]]))
    with pytest.raises(VlquantError, match="too little free memory .*; use --device cpu"):
        answered(unanswered, packable, kept)
    assert kept.exists()
