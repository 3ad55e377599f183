"""Scores against hand-worked cases."""

import pytest

from vlquant.metrics import box_overlap, read_box, score


@pytest.mark.parametrize(
    ("kind", "answer", "prediction", "expected"),
    [
        ("text", "A1B2", "A1B2", 1.0),
        ("text", "A1B2", " A1B2\n", 1.0),
        ("text", "A1B2", "a1b2", 0.0),
        ("receipt", "7.50", "7.5", 0.0),
        ("yes_no", "yes", "", 0.0),
        ("locate", "[[0, 0, 100, 100]]", "[[0, 0, 100, 100]]", 1.0),
        # 100 x 50 of 100 x 100: exactly a half counts.
        ("locate", "[[0, 0, 100, 100]]", "[[0, 0, 100, 50]]", 1.0),
        ("locate", "[[0, 0, 100, 100]]", "[[0, 0, 100, 49]]", 0.0),
        ("locate", "[[0, 0, 100, 100]]", "<ref>star</ref><box>[[10, 0, 100, 100]]</box>", 1.0),
        ("locate", "[[0, 0, 100, 100]]", "[[200, 200, 300, 300]]", 0.0),
        ("locate", "[[0, 0, 100, 100]]", "nothing", 0.0),
        ("locate", "[[0, 0, 100, 100]]", "[[a, b, c, d]]", 0.0),
    ],
)
def test_score(kind, answer, prediction, expected):
    assert score(kind, answer, prediction) == expected


def test_read_box_takes_the_first():
    assert read_box("[[1, 2, 3, 4]] or [[5, 6, 7, 8]]") == (1.0, 2.0, 3.0, 4.0)
    assert read_box("[1,2,3,4]") == (1.0, 2.0, 3.0, 4.0)


def test_overlap_of_a_corner():
    # 50 x 50 shared; 10000 + 10000 - 2500 covered.
    assert box_overlap((0, 0, 100, 100), (50, 50, 150, 150)) == pytest.approx(2500 / 17500)
    assert box_overlap((0, 0, 0, 0), (0, 0, 10, 10)) == 0.0
    assert box_overlap((10, 10, 0, 0), (0, 0, 10, 10)) == 0.0
