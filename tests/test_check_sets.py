"""Check sets: what is asked of a file or built-in set, in which groups, and how its answers are judged."""

import base64
import csv
import io
import json
import os
import tracemalloc
from collections import Counter

import pytest
from PIL import Image

from vlquant.calib_data.check_sets import SCENES, open_check_set
from vlquant.calib_data.picture_groups import groups_of, taken
from vlquant.calib_data.samples import set_hash
from vlquant.errors import InvalidRequest
from vlquant.metrics import METRICS, Gold

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (24, 16), (shade, 90, 200))


def in_base64(shade: int) -> str:
    buffer = io.BytesIO()
    picture(shade).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def shade_of(question) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in question.request.images]


def write_tsv(path, *rows: dict) -> str:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_jsonl(path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talk(question: str, answer: str | None, image: str | list = "1.png") -> dict:
    turns = [{"from": "human", "value": question}] + [{"from": "gpt", "value": answer}] * (answer is not None)
    return {"image": image, "conversations": turns}


def questions(name: str, **settings) -> list:
    return [question for group in open_check_set(name, **settings).groups() for question in group]


def only(path, **cells):
    """The one question of a TSV file with these cells."""
    return questions(write_tsv(path, {"index": 0, "image": in_base64(1), "question": "Which?", **cells}))[0]


def test_builtin():
    chosen = open_check_set("builtin", limit=40)
    groups = list(chosen.groups())
    asked = [question for group in groups for question in group]
    assert len(chosen) == len(asked) and 0 <= len(asked) - 40 < len(groups[-1])
    assert chosen.sha256 == set_hash("check", len(groups)) != open_check_set("builtin-development", limit=40).sha256
    assert all(len({question.picture for question in group}) == 1 for group in groups)
    assert asked[1].key == f"builtin check/0/0/{asked[1].kind}, question 2"
    assert {question.kind: question.metric for question in asked}["locate"] == "box"
    assert all(METRICS[each.metric](each.gold.answers[0], each.gold).value == 1 for each in asked)
    assert len({question.index for question in asked}) == len(asked)


def test_builtin_without_a_limit():
    assert open_check_set("builtin").scenes == SCENES and 2000 < len(open_check_set("builtin"))
    with pytest.raises(InvalidRequest, match="has a metric for each of its kinds; leave --metric out"):
        open_check_set("builtin", metric="exact")


def test_tsv_rows_become_questions(tmp_path):
    path = write_tsv(
        tmp_path / "Quiz_MMBench.tsv",
        {"index": 7, "image": in_base64(1), "question": "Whose?", "A": "Ann's", "B": "None", "C": "Bo's", "answer": "C", "category": "people"},
        {"index": 8, "image": in_base64(2), "question": "Why?", "A": "so", "B": "not", "answer": "NA"},
        {"index": 1000007, "image": "7", "question": "Whose?", "A": "Bo's", "C": "Ann's", "answer": "A", "category": "people"},
    )
    (first, turned), (unanswered,) = open_check_set(path).groups()
    assert (first.key, first.index, first.kind, first.text) == ("Quiz_MMBench.tsv, line 2", "7", "people", "Whose?")
    assert first.request.question == "Whose?\nA. Ann's\nC. Bo's" + LETTER and first.metric == "choice"
    assert first.gold == Gold(("C",), (("A", "Ann's"), ("C", "Bo's")))  # "None" is missing, as pandas reads it.
    assert turned.index == "1000007" and turned.picture == first.picture != unanswered.picture
    assert turned.request.images[0] is first.request.images[0] and shade_of(first) == [1]
    assert unanswered.gold is None and unanswered.metric == "" and unanswered.kind == "Quiz_MMBench"
    assert first.cells == {"index": "7", "question": "Whose?", "A": "Ann's", "C": "Bo's", "answer": "C", "category": "people"}


@pytest.mark.parametrize(
    ("name", "cells", "metric", "prompt"),
    [
        ("DocVQA_VAL", {"answer": "['a', 'b']"}, "anls", "Which?" + WORD),
        ("ChartQA_TEST", {"answer": "7"}, "relaxed", "Which?" + WORD),
        ("TextVQA_VAL", {"answer": str(["nike"] * 10)}, "vqa", "Which?" + WORD),
        ("VizWiz", {"answers": str(["nike"] * 10), "answer": "adidas"}, "vqa", "Which?" + WORD),
        ("GQA_TestDev_Balanced", {"answer": "cat"}, "exact", "Which?" + WORD),
        ("OCRBench", {"answer": "['CENTRE']", "category": "Digit String Recognition"}, "contains", "Which?" + WORD),
        (
            "OCRBench", {"answer": "['x^2']", "category": "Handwritten Mathematical Expression Recognition"},
            "contains_formula", "Which?" + WORD,
        ),
        ("MME", {"answer": "Yes"}, "yes_no", "Which? Answer the question using a single word or phrase."),
        ("HallusionBench", {"answer": "No"}, "yes_no", "Which? Please answer yes or no. Answer the question using a single word or phrase."),
        ("POPE", {"answer": "No"}, "yes_no", "Which?"),
        ("AI2D_TEST", {"A": "x", "B": "y", "answer": "B"}, "choice", "Which?\nA. x\nB. y" + LETTER),
        ("MMMU_DEV_VAL", {"answer": "7.2"}, "choice", "Which?\nAnswer the question directly."),
        (
            "RefCOCO_val", {"answer": "[1, 2, 30, 40]"}, "box",
            "Please provide the bounding box coordinate of the region this sentence describes: <ref>Which?</ref>",
        ),
        ("own", {"A": "x", "B": "y", "answer": "B"}, "choice", "Which?\nA. x\nB. y" + LETTER),
    ],
)  # fmt: skip
def test_metric_and_prompt_by_name_and_columns(tmp_path, name, cells, metric, prompt):
    question = only(tmp_path / f"{name}.tsv", **cells)
    assert (question.metric, question.request.question) == (metric, prompt)
    assert METRICS[metric](question.gold.answers[0], question.gold).value == 1


def test_all_answers_are_gold(tmp_path):
    assert only(tmp_path / "DocVQA.tsv", answer="['a', 'b']").gold.answers == ("a", "b")
    assert only(tmp_path / "VizWiz.tsv", answers=str(["x"] * 9 + ["y"])).gold.answers == ("x",) * 9 + ("y",)
    assert only(tmp_path / "HallusionBench.tsv", answer="No", category="VD", **{"l2-category": "chart"}).kind == "chart"
    # An open question of MMMU: its answer is an option beside all others.
    opened = only(tmp_path / "MMMU.tsv", answer="7.2")
    assert METRICS["choice"]("It is 7.2", opened.gold).value == 1 and METRICS["choice"]("8", opened.gold).value == 0


def test_pictures_in_several_forms(tmp_path):
    (tmp_path / "images" / "GQA").mkdir(parents=True)
    for name, shade in (("a.png", 3), ("b.png", 3), ("c.png", 4)):
        picture(shade).save(tmp_path / "images" / "GQA" / name)
    path = write_tsv(
        tmp_path / "GQA.tsv",
        {"index": 0, "image": str([in_base64(1), in_base64(2)]), "question": "Which?", "answer": "left"},
        {"index": 1, "image": in_base64(2), "question": "Whose?", "answer": "left"},
        {"index": 2, "image_path": "a.png", "question": "Where?", "answer": "left"},
        {"index": 3, "image_path": "['c.png', 'b.png']", "question": "When?", "answer": "left"},
        {"index": 4, "question": "Why?", "answer": "left"},
    )
    groups = list(open_check_set(path).groups())
    # 0 and 1 share base64, 2 and 3 the bytes of two files, 4 shows nothing.
    assert [[question.index for question in group] for group in groups] == [["0", "1"], ["2", "3"], ["4"]]
    assert [shade_of(question) for group in groups for question in group] == [[1, 2], [2], [3], [4, 3], []]
    before = open_check_set(path).sha256
    picture(5).save(tmp_path / "images" / "GQA" / "c.png")
    assert open_check_set(path).sha256 != before


def test_contents_are_what_is_hashed(tmp_path):
    rows = [{"index": 0, "image": in_base64(1), "question": "Which?", "answer": "left"}]
    (tmp_path / "elsewhere").mkdir()
    first, second = write_tsv(tmp_path / "GQA.tsv", *rows), write_tsv(tmp_path / "elsewhere" / "GQA.tsv", *rows)
    assert open_check_set(first).sha256 == open_check_set(second).sha256
    assert questions(first)[0].key == questions(second)[0].key


def test_a_limit_takes_whole_pictures_that_the_seed_decides(tmp_path):
    rows = [{"index": n, "image": in_base64(n // 3), "question": "Which?", "answer": "left"} for n in range(60)]
    path = write_tsv(tmp_path / "GQA.tsv", *rows)
    some = questions(path, limit=10)
    assert len(some) == 12 and set(Counter(question.picture for question in some).values()) == {3}
    assert [each.index for each in some] == [each.index for each in questions(path, limit=10)]
    assert [each.index for each in some] != [each.index for each in questions(path, limit=10, seed=1)]
    assert {each.index for each in some} < {each.index for each in questions(path, limit=20)}  # More adds to it.
    assert len(open_check_set(path, limit=1000)) == len(open_check_set(path)) == 60


def test_a_large_file_is_not_held_in_memory(tmp_path):
    noise = [base64.b64encode(os.urandom(3_000_000)).decode() for _ in range(8)]
    path = write_tsv(tmp_path / "GQA.tsv", *({"index": n, "image": each, "question": "?", "answer": "x"} for n, each in enumerate(noise)))
    tracemalloc.start()
    chosen = open_check_set(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(chosen) == 8 and kept < 1e6 and peak < 40e6


def test_conversations_become_questions(tmp_path):
    for shade in (1, 2):
        picture(shade).save(tmp_path / f"{shade}.png")
    path = write_jsonl(
        tmp_path / "train.jsonl",
        talk("<image>\nWhich?\nA. left\nB. right", "B"),
        talk("Where is the cat?", "<ref>cat</ref><box>[[1, 2, 30, 40]]</box>", "2.png"),
        talk("Is it old?", "Yes."),
        talk("Which differ?", "Those two.", ["2.png", "2.png"]),
        talk("And this?", None, "2.png"),
    )
    groups = list(open_check_set(path).groups())
    (choice, old), (where, differ, unanswered) = groups
    assert [each.metric for each in (choice, where, old, differ, unanswered)] == ["choice", "box", "yes_no", "exact", ""]
    assert choice.gold == Gold(("B",), (("A", "left"), ("B", "right"))) and unanswered.gold is None
    assert (choice.key, choice.kind, choice.text) == ("train.jsonl, line 1", "train", "Which?\nA. left\nB. right")
    assert shade_of(differ) == [2, 2] and differ.text == "Which differ?" and differ.picture == where.key
    assert questions(path, metric="anls")[0].metric == "anls"


def test_a_meta_file(tmp_path):
    picture(1).save(tmp_path / "1.png")
    write_jsonl(tmp_path / "a.jsonl", talk("Who?", "Ann"))
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b" / "a.jsonl", talk("When?", "Now"))
    meta = {"first": {"root": ".", "annotation": "a.jsonl"}, "second": {"root": ".", "annotation": "b/a.jsonl"}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert [each.key for each in questions(str(tmp_path / "meta.json"))] == ["a.jsonl, line 1", "b/a.jsonl, line 1"]


REFUSED = {
    "nothing of the name": ("none.tsv", None, {}, "none.tsv: there is no such set or file; use builtin"),
    "kind of file": ("a.csv", "x", {}, "this kind of file is not known; use builtin"),
    "metric": ("GQA.tsv", "x", {"metric": "f1"}, "--metric f1: there is no such metric; use verbatim, exact"),
    "limit": ("GQA.tsv", "x", {"limit": 0}, "--limit 0 leaves nothing to ask"),
    "unknown set": ("own.tsv", "index\timage\tquestion\tanswer\n1\t{0}\tx\ty\n", {}, "own.tsv: how answers .* say it with --metric"),
    "index": ("GQA.tsv", "index\timage\tquestion\n1\t{0}\tx\n1\t{0}\ty\n", {}, "line 3: its index '1' is that of line 2"),
    "reference": ("GQA.tsv", "index\timage\tquestion\n1\t12\tx\n", {}, "line 2: its image is '12'"),
    "file": ("GQA.tsv", "index\timage_path\tquestion\n1\t12.png\tx\n", {}, "line 2: .*12.png does not exist"),
    "no right answer": (
        "own.tsv", "index\timage\tquestion\tanswer\n1\t{0}\tx\tperhaps\n", {"metric": "yes_no"},
        "by the metric yes_no not one of its own answers is right, 'perhaps' .own.tsv, line 2. for example",
    ),
    "pixels": ("RefCOCO.tsv", "index\timage\tquestion\tanswer\n1\t{0}\tx\t[1, 2, 30, 1400]\n", {}, "1400 is beyond the picture"),
    "no object": ("a.jsonl", "[]\n", {}, "line 1: it holds no conversations"),
}  # fmt: skip


@pytest.mark.parametrize("name, text, settings, message", REFUSED.values(), ids=REFUSED)
def test_refused_when_it_is_opened(tmp_path, name, text, settings, message):
    if text is not None:
        (tmp_path / name).write_text(text.replace("{0}", in_base64(1)))
    with pytest.raises(InvalidRequest, match=message) as refusal:
        open_check_set(str(tmp_path / name), **settings)
    assert not str(refusal.value).endswith(".")


def test_a_broken_picture_is_named_when_it_is_read(tmp_path):
    path = write_tsv(tmp_path / "GQA.tsv", {"index": 0, "image": "A" * 80, "question": "Which?", "answer": "x"})
    with pytest.raises(InvalidRequest, match="GQA.tsv, line 2: the picture .* cannot be read"):
        questions(path)
    with pytest.raises(InvalidRequest, match="this is a folder, which holds no questions"):
        open_check_set(str(tmp_path))


def test_groups_of_pictures():
    # 0 and 2 share a, 2 and 3 share b: all three depend on each other.
    assert groups_of([("a",), ("c",), ("a", "b"), ("b",), (), ()]) == [[0, 2, 3], [1], [4], [5]]
    assert taken([[0, 2, 3], [1], [4], [5]], None, seed=0) == [[0, 2, 3], [1], [4], [5]]
    assert sum(map(len, taken([[0, 2, 3], [1], [4], [5]], 6, seed=0))) == 6
