"""The built-in sets: the same everywhere, never overlapping, and as hard as promised."""

from collections import Counter

import pytest

from vlquant.calib_data.samples import KINDS, SPLITS, draw_sample, sample_request, samples, set_hash
from vlquant.calib_data.scenes import SYMBOLS
from vlquant.tiling import choose_grid


@pytest.fixture(scope="module")
def check_set():
    return list(samples("check", 550))


def tiles_of(image) -> int:
    columns, rows = choose_grid(*image.size, min_tiles=1, max_tiles=12, image_size=112)
    return columns * rows


def test_the_same_sample_again():
    first, second = draw_sample("check", 12), draw_sample("check", 12)
    assert first.questions == second.questions
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in second.images]
    assert set_hash("check", 11) == set_hash("check", 11) != set_hash("check", 11, seed=1)


def test_splits_do_not_overlap():
    seen = {}
    for split in SPLITS:
        for sample in samples(split, 220):
            for image in sample.images:
                assert seen.setdefault(image.tobytes(), split) == split


def test_every_kind_takes_its_turn(check_set):
    assert Counter(sample.kind for sample in check_set) == dict.fromkeys(KINDS, 50)
    assert all(question.kind == sample.kind for sample in check_set for question in sample.questions)
    assert sum(len(sample.questions) for sample in samples("check", 800)) >= 2000


def test_half_of_the_pictures_have_several_tiles(check_set):
    counts = [tiles_of(image) for sample in check_set if not sample.video for image in sample.images]
    assert sum(2 <= count <= 12 for count in counts) >= len(counts) / 2


def test_a_quarter_of_the_answers_need_several_tiles(check_set):
    questions = [question for sample in check_set for question in sample.questions]
    assert sum(question.crosses_tiles for question in questions) >= len(questions) / 4


def test_no_answer_is_frequent():
    answers = {kind: Counter() for kind in KINDS}
    for sample in samples("check", 2200):
        answers[sample.kind].update(question.answer for question in sample.questions)
    for kind, counts in answers.items():
        assert counts.most_common(1)[0][1] / counts.total() <= (0.55 if kind == "yes_no" else 0.2), kind


def test_ranges(check_set):
    by_kind = {kind: [each for each in check_set if each.kind == kind] for kind in KINDS}
    words = [question.answer for sample in by_kind["text"] for question in sample.questions]
    assert {len(word) for word in words} == set(range(3, 9))
    assert set("".join(words)) == set(SYMBOLS) and len(SYMBOLS) == 36
    counts = {question.answer for sample in by_kind["count"] for question in sample.questions}
    assert counts == set("123456789")
    values = {q.answer for sample in by_kind["chart"] for q in sample.questions if q.text.startswith("What is the value")}
    assert values <= {str(value) for value in range(1, 21)} and len(values) >= 18


def test_boxes_lie_in_the_picture():
    for sample in samples("check", 110, kinds=("locate",)):
        for question in sample.questions:
            left, top, right, bottom = (int(side) for side in question.answer.strip("[]").split(","))
            assert 0 <= left < right <= 1000 and 0 <= top < bottom <= 1000


def test_requests_carry_pictures_or_frames(check_set):
    for sample in check_set[:11]:
        request = sample_request(sample, sample.questions[0])
        assert (request.video is not None) == sample.video
        assert len(request.images) == (0 if sample.video else len(sample.images))
