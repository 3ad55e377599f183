"""What is calibrated on: the built-in set, photographs, and the user's own files, good and bad."""

import base64
import csv
import io
import json
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from vlquant import reference_answers
from vlquant.bundle import Calibration, read_manifest
from vlquant.calib_data import photographs
from vlquant.calib_data.conversations import Conversation, in_turn
from vlquant.calib_data.finetuning import FinetuningSet
from vlquant.calib_data.samples import CalibrationScenes, samples
from vlquant.calib_data.tsv import TsvFile, prompt_of
from vlquant.calibrate import ANSWER, PICTURE, encode_conversation
from vlquant.calibration_sets import choose_conversations
from vlquant.check import check
from vlquant.check_options import CheckOptions
from vlquant.errors import InvalidRequest, MissingDependency, OutputRefused, VlquantError
from vlquant.events import silent
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.request import Request

MCQ = "\nAnswer with the option's letter from the given choices directly."
SETTINGS = {"group_size": 32, "tokens": 512}
CLOCK, DOG = "Which clock?", "A dog."


def picture(shade: int = 0, side: int = 40) -> Image.Image:
    return Image.new("RGB", (side, side), (shade, 100, 50))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def in_base64(shade: int) -> str:
    return base64.b64encode(png(picture(shade))).decode()


def spoken(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def write_jsonl(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def write_tsv(path, *rows: dict) -> str:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture
def jsonl(tmp_path) -> str:
    """Five conversations in fine-tuning form, with their pictures."""
    (tmp_path / "pictures").mkdir()
    for shade in range(3):
        picture(shade).save(tmp_path / "pictures" / f"{shade}.png")
    return write_jsonl(
        tmp_path / "train.jsonl",
        {"id": 0, "image": "pictures/0.png", "conversations": spoken("<image>\n" + CLOCK, "The left one.")},
        {"id": 1, "image": str(tmp_path / "pictures" / "1.png"), "conversations": spoken(CLOCK, "This.", "Why?", "It is late.")},
        {"id": 2, "image": ["pictures/0.png", "pictures/2.png"], "conversations": spoken("Which is older?", "The second.")},
        "",
        {"id": 3, "conversations": [{"from": "system", "value": "Be brief."}, *spoken("What is 2 + 2?", "4")]},
        {"id": 4, "image": "pictures/2.png", "conversations": spoken(CLOCK)},
    )


@pytest.fixture
def packable(named_case):
    """A small checkpoint whose matrices GPTQ's format can hold."""
    return named_case("internlm2_internvl2_5")


def chosen(*sets: str, count: int = 8, seed: int = 0):
    return choose_conversations(Recipe(calibration=sets, samples=count, seed=seed), silent)


def by_line(conversations) -> dict[int, Conversation]:
    found = [conversations[index] for index in range(len(conversations))]
    return {int(each.key.rpartition(" ")[2]): each for each in found}


def test_fine_tuning_lines_become_conversations(jsonl, tmp_path):
    found = by_line(FinetuningSet(tmp_path / "train.jsonl"))
    assert list(found) == [1, 2, 3, 5, 6]
    one, turns, two, text, open_one = found.values()
    assert (one.request.question, one.answer) == ("<image>\n" + CLOCK, "The left one.")
    assert turns.request.history == (("<image>\n" + CLOCK, "This."),) and turns.answer == "It is late."
    assert two.request.question == "Image-1: <image>\nImage-2: <image>\nWhich is older?" and len(two.request.images) == 2
    assert text.request == Request("What is 2 + 2?", system_message="Be brief.") and text.answer == "4"
    assert open_one.answer is None


def test_a_meta_file_names_several_files(jsonl, tmp_path):
    (tmp_path / "sets").mkdir()
    write_jsonl(tmp_path / "sets" / "more.jsonl", {"image": "0.png", "conversations": spoken(CLOCK, "None.")})
    meta = {"a": {"root": "pictures", "annotation": "sets/more.jsonl"}, "b": {"root": "", "annotation": "train.jsonl"}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "M.JSON").write_text(json.dumps(meta))
    assert len(chosen(str(tmp_path / "meta.json"))) == len(chosen(str(tmp_path / "M.JSON"))) == 6


def test_a_set_counts_once(jsonl, tmp_path):
    for sets in (("builtin", "builtin"), (jsonl, f"{tmp_path}/./train.jsonl")):
        with pytest.raises(InvalidRequest, match="named twice; name each set once"):
            chosen(*sets)


def test_a_video_asks_about_its_frames(tmp_path, monkeypatch):
    row = {"video": "clip.mp4", "conversations": spoken("<video>\nWhat happens?", "It rains.", "And then?", "Sun.")}
    monkeypatch.setattr("vlquant.runtime.video.read_frames", lambda path, count: [picture(each) for each in range(count)])
    videos = chosen(write_jsonl(tmp_path / "videos.jsonl", row))
    assert videos[0].request.question == "What happens?" and videos[0].answer == "It rains."
    assert len(videos[0].request.video) == 8 and len(videos.pictures) == 8


def test_tsv_rows_become_conversations(tmp_path):
    (tmp_path / "images" / "Quiz").mkdir(parents=True)
    picture(7).save(tmp_path / "images" / "Quiz" / "7.png")
    path = write_tsv(
        tmp_path / "Quiz.tsv",
        {"index": 0, "image": "2", "question": "Whose\ttab?", "A": "Ann's", "B": "None", "C": "Bo's", "answer": "C"},
        {"index": 1, "image": str([in_base64(1), in_base64(2)]), "question": "Which?", "answer": "['left', 'the left one']"},
        {"index": 2, "image": in_base64(3), "question": "Where?", "hint": "Look up.", "answer": "[1, 2, 3, 4]"},
        {"index": 3, "image_path": "7.png", "question": "何？", "A": "一", "B": "二", "answer": "NA"},
    )
    choice, several, hinted, chinese = by_line(TsvFile(tmp_path / "Quiz.tsv")).values()
    assert choice.request.question == "Whose\ttab?\nA. Ann's\nC. Bo's" + MCQ and choice.answer == "C"
    assert choice.request.images == hinted.request.images == (png(picture(3)),)
    assert several.request.images == (png(picture(1)), png(picture(2))) and several.answer == "left"
    assert hinted.request.question == "Look up.\nWhere?" and hinted.answer == "[1, 2, 3, 4]"
    assert chinese.request.question.endswith("\n请直接回答选项字母。") and chinese.answer is None
    assert len(chosen(path).pictures) == 4
    assert prompt_of({"question": "Total?"}, "DocVQA_VAL") == "Total?\nAnswer the question using a single word or phrase."


def test_a_large_tsv_is_not_held_in_memory(tmp_path):
    long = "A" * 4_000_000  # Longer than the csv module takes by itself.
    path = write_tsv(tmp_path / "large.tsv", *({"index": n, "image": long, "question": "?"} for n in range(10)))
    tracemalloc.start()
    rows = TsvFile(tmp_path / "large.tsv")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 10 and kept < 1e6 and peak < 40e6, path


def test_sets_take_turns_and_the_seed_decides(jsonl):
    assert in_turn([["a", "b"], ["1", "2", "3", "4"]], 5) == ["a", "1", "b", "2", "3"]
    mixed = chosen("builtin", jsonl, count=6)
    assert [type(conversations) for conversations, _ in mixed.picks] == [CalibrationScenes, FinetuningSet] * 3
    assert mixed.sha256 == chosen("builtin", jsonl, count=6).sha256 != chosen("builtin", jsonl, count=6, seed=1).sha256
    assert Recipe(calibration=("builtin", jsonl)).to_dict()["calibration"] == "builtin + train.jsonl"


def test_few_conversations_are_all_used_and_it_is_said(jsonl):
    events = []
    assert len(choose_conversations(Recipe(calibration=jsonl, samples=9), events.append)) == 5
    assert [event.message for event in events if event.message] == [
        "the calibration data holds 5 conversations, fewer than the 9 asked for: all are used"
    ]


TALK = spoken(CLOCK, DOG)
BAD_FILES = {
    "no json": ("a.jsonl", '{"conversations": ', "line 1: this is no JSON"),
    "no object": ("a.jsonl", "[1]", "line 1: it holds no conversations"),
    "no picture": ("a.jsonl", json.dumps({"image": "gone.png", "conversations": TALK}), "line 1: picture .*gone.png does not exist"),
    "no picture file": ("a.jsonl", json.dumps({"image": "a.jsonl", "conversations": TALK}), "line 1: picture .* cannot be read"),
    "placeholders": ("a.jsonl", "\n" + json.dumps({"conversations": spoken("<image><image>", DOG)}), "line 2: it has 0 pictures and 2"),
    "out of turn": ("a.jsonl", json.dumps({"conversations": [*TALK, TALK[1]]}), "entry 3 .* out of turn"),
    "nobody spoke": ("a.jsonl", json.dumps({"conversations": []}), "conversations are empty"),
    "no text": ("a.jsonl", json.dumps({"conversations": [{"from": "human"}]}), "entry 1"),
    "answer's picture": (
        "a.jsonl",
        json.dumps({"image": "a.png", "conversations": spoken("<image>\nWhich?", "This <image>.", "Why?", DOG)}),
        "line 1: an earlier answer holds <image>",
    ),
    "long name": ("a.json", json.dumps({"x": {"annotation": "n" * 300}}), "cannot be read"),
    "network": ("a.jsonl", json.dumps({"image": "http://a/b.png", "conversations": TALK}), "not fetched from the network"),
    "empty": ("a.jsonl", "\n\n", "holds no conversations"),
    "a list": ("a.json", "[]", "names no annotation files"),
    "no meta": ("a.json", "{", "cannot be read as JSON"),
    "no annotation": ("a.json", json.dumps({"x": {"annotation": "gone.jsonl"}}), "gone.jsonl cannot be read"),
    "columns": ("a.tsv", "id\ttext\n1\tx\n", "line 1: the columns are id, text"),
    "no rows": ("a.tsv", "index\timage\tquestion\n", "holds no questions"),
    "no question": ("a.tsv", "index\timage\tquestion\n1\tAAAA\tNA\n", "line 2: the question is missing"),
    "cells": ("a.tsv", "index\timage\tquestion\n\n1\tAAAA\tx\ty\n", "line 3: 4 cells for 3 columns"),
    "quotes": ("a.tsv", 'index\timage\tquestion\n1\tAAAA\t"x\n', "line 2: this is no row"),
    "reference": ("a.tsv", "index\timage\tquestion\n1\t12\tx\n", "line 2: its image is '12'"),
    "base64": ("a.tsv", f"index\timage\tquestion\n1\t{'?' * 80}\tx\n", "line 2: its image is no base64"),
    "pixels": ("a.tsv", f"index\timage\tquestion\n1\t{'A' * 80}\tx\n", "line 2: the picture .* cannot be read"),
    "kind": ("a.txt", "", "this kind of file is not known; use builtin"),
}


@pytest.mark.parametrize(("name", "text", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_in_one_sentence(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidRequest, match=words) as caught:
        chosen(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value) and ";" in str(caught.value)


def test_no_such_set_and_no_pictures(tmp_path):
    with pytest.raises(InvalidRequest, match="no such set, file or folder; use builtin"):
        chosen(str(tmp_path / "nowhere"))
    with pytest.raises(InvalidRequest, match="no such set, file or folder; use builtin"):
        chosen("n" * 300)
    with pytest.raises(InvalidRequest, match="holds no pictures"):
        chosen(str(tmp_path))


def test_photographs_of_installed_libraries(tmp_path, monkeypatch):
    (tmp_path / "skimage" / "data").mkdir(parents=True)
    (tmp_path / "skimage" / "__init__.py").write_text("raise ImportError('not to be imported')")
    picture().save(tmp_path / "skimage" / "data" / "chelsea.png")
    monkeypatch.syspath_prepend(tmp_path)
    photos = chosen("photos")
    assert any("cat" in photos[index].answer for index in range(len(photos))) and not photos.unanswered


def test_without_photographs_it_is_said_how_to_get_them(monkeypatch):
    monkeypatch.setattr(photographs, "find_spec", lambda library: None)
    with pytest.raises(MissingDependency, match="pip install scikit-image scikit-learn"):
        chosen("photos")


def test_a_conversation_is_seen_to_its_end(small_case, jsonl):
    def encode(conversation, most_tokens=2048):
        return encode_conversation(conversation, small_case.config, small_case.tokenizer, most_tokens=most_tokens)

    conversations = FinetuningSet(Path(jsonl))
    per_tile = small_case.config.chat.tokens_per_tile
    stop = small_case.tokenizer.token_id(small_case.config.chat.conversation.stop_token)
    for index, tiles in enumerate((1, 1, 2, 0)):
        ids, classes, pixels = encode(conversations[index])
        assert (classes == PICTURE).sum() == tiles * per_tile == (0 if pixels is None else len(pixels)) * per_tile
        assert ids[-1] == stop and classes[-1] == ANSWER
    endless = Conversation("x", Request("<image>\nWhy?", images=(picture(side=900),)), "Because. <IMG_CONTEXT>" * 500)
    ids, classes, pixels = encode(endless, most_tokens=600)
    assert len(pixels) == 1 and len(ids) == 600 and (classes == PICTURE).sum() == per_tile


def test_a_bundle_of_own_data_tells_what_it_saw_and_no_path(packable, jsonl, tmp_path):
    recipe, output, events = Recipe(calibration=jsonl, samples=4, **SETTINGS), tmp_path / "out", []
    quantize(packable.folder, recipe=recipe, output=output)
    first = read_manifest(output).calibration
    assert (first.set, first.samples, first.generated) == ("train.jsonl", 4, chosen(jsonl, count=4).unanswered != ())
    assert 1 <= len(first.pictures) <= 3 and str(tmp_path) not in (output / "vlquant.json").read_text()
    quantize(packable.folder, recipe=recipe, output=output, report=events.append)
    assert events[-1].message.endswith("is already this model with this recipe")
    for shade in range(3):
        picture(shade + 9).save(tmp_path / "pictures" / f"{shade}.png")
    with pytest.raises(OutputRefused, match="--overwrite"):
        quantize(packable.folder, recipe=recipe, output=output)


def test_changed_data_does_not_go_on_with_an_interrupted_run(packable, jsonl, tmp_path):
    def stop_after_a_layer(event):
        if (event.stage, event.done) == ("layers", 1):
            raise KeyboardInterrupt

    recipe, output = Recipe(calibration=jsonl, samples=3, **SETTINGS), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(packable.folder, recipe=recipe, output=output, report=stop_after_a_layer)
    write_jsonl(tmp_path / "train.jsonl", {"conversations": spoken("What is 2 + 3?", "5")})
    with pytest.raises(OutputRefused, match="was started with calibration data .* --overwrite"):
        quantize(packable.folder, recipe=recipe, output=output)


def test_answers_are_written_by_the_reference_once(packable, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_answers, "TOGETHER", 2)
    monkeypatch.setattr(reference_answers, "LONGEST_ANSWER", 5)
    (tmp_path / "album" / "inner").mkdir(parents=True)
    for shade in range(3):
        picture(shade).save(tmp_path / "album" / ("inner" if shade else "") / f"{shade}.PNG")
    recipe = Recipe(calibration=f"{tmp_path / 'album'}/", samples=3, **SETTINGS)

    def stop_after_two(event):
        if (event.stage, event.done) == ("answers", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(packable.folder, recipe=recipe, output=tmp_path / "out", report=stop_after_two)
    assert len(json.loads((tmp_path / ".out.unfinished" / "answers.json").read_text())) == 2
    events = []
    quantize(packable.folder, recipe=recipe, output=tmp_path / "out", report=events.append)
    assert [event.done for event in events if event.stage == "answers" and event.total] == [3]
    calibration = read_manifest(tmp_path / "out").calibration
    assert (calibration.set, calibration.samples, calibration.generated, len(calibration.pictures)) == ("album", 3, 3, 3)
    quantize(packable.folder, recipe=recipe, output=tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_a_model_that_does_not_fit_into_memory_writes_no_answers(packable):
    reference_answers.require_memory(packable.model, None)
    with pytest.raises(VlquantError, match="give a .jsonl file with answers"):
        reference_answers.require_memory(packable.model, 1000)
    assert reference_answers.available_memory() is None or reference_answers.available_memory() > 1e6


def test_check_refuses_pictures_that_were_calibrated_on(packable, tmp_path):
    rows = []
    for sample in samples("check", 4):
        names = [f"{sample.key.replace('/', '-')}-{number}.png" for number in range(len(sample.images))]
        for name, image in zip(names, sample.images, strict=True):
            image.save(tmp_path / name)
        rows.append({"image": names, "conversations": spoken(sample.questions[0].text, sample.questions[0].answer)})
    path = write_jsonl(tmp_path / "leaked.jsonl", *rows)
    bundle = quantize(packable.folder, recipe=Recipe(calibration=path, samples=4, **SETTINGS), output=tmp_path / "out")
    with pytest.raises(InvalidRequest, match="calibrated on a picture of builtin check/0/0/.* another --set or --seed"):
        check(bundle, reference=packable.folder, options=CheckOptions(limit=4))


def test_manifests_without_pictures_still_read():
    assert Calibration.model_validate({"set": "builtin", "sha256": "0", "samples": 1, "tokens": 2}).pictures == ()
