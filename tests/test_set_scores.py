"""Scores of whole sets against hand-worked examples, and what is known of sets by their names."""

import pytest

from vlquant.known_sets import KNOWN_SETS, UNKNOWN, known_set
from vlquant.metrics import METRICS
from vlquant.set_scores import SET_SCORES, Graded, set_scores


def test_mme_adds_accuracy_and_accuracy_plus():
    rows = [
        Graded(1, "count", "first", "0"), Graded(1, "count", "first", "1"),
        Graded(1, "count", "second", "2"), Graded(0, "count", "second", "3"),
        Graded(0, "text_translation", "first", "4"), Graded(1, "text_translation", "third", "5"),
    ]  # fmt: skip
    # count: 3 of 4 right, 75, and 1 of 2 pictures with all right, 50. Translation: 1 of 2 and, as a picture of another
    # category is another, 1 of 2: 50 + 50.
    assert set_scores("MME", rows) == {
        "perception": 125.0, "reasoning": 100.0, "total": 225.0, "count": 125.0, "text_translation": 100.0,
    }  # fmt: skip


def test_hallusion_counts_answers_figures_and_questions():
    # index: ..._set_figure_question. Set 0 has figures 0 and 1 and questions 0 and 1; one answer of four is wrong.
    rows = [
        Graded(1, "chart", "a", "VS_chart_1_0_0_0"),
        Graded(1, "chart", "a", "VS_chart_1_0_0_1"),
        Graded(1, "chart", "b", "VS_chart_1_0_1_0"),
        Graded(0, "chart", "b", "VS_chart_1_0_1_1"),
        Graded(1, "map", "c", "VS_map_1_0_0_0"),
    ]
    # 4 of 5 answers. Figures: chart 0 right, chart 1 not, map 0 right. Questions: chart 0 right, 1 not, map 0 right.
    expected = {"aAcc": 80.0, "fAcc": 200 / 3, "qAcc": 200 / 3}
    assert set_scores("HallusionBench", rows) == pytest.approx(expected)
    with pytest.raises(ValueError, match="'7' is not HallusionBench's"):
        set_scores("HallusionBench", [Graded(1, "chart", "a", "7")])


def test_mmbench_wants_every_order_of_the_options_right():
    # 7 and its variant are right; of 8 one of three is wrong.
    scores = {"7": 1, "1000007": 1, "8": 1, "1000008": 0, "2000008": 1}
    rows = [Graded(score, "kind", "picture", index) for index, score in scores.items()]
    assert set_scores("MMBench_DEV_EN", rows) == {"circular": 50.0, "vanilla": 80.0}


def test_other_sets_have_no_scores_of_their_own():
    assert set_scores("DocVQA_VAL", [Graded(1, "kind", "picture", "0")]) == set_scores("MME", []) == {}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("DocVQA_VAL", "DocVQA"),
        ("mini-docvqa", "DocVQA"),
        ("MMBench_DEV_EN_V11", "MMBench"),
        ("SEEDBench_IMG", "SEEDBench"),
        ("MME-RealWorld-CN", "MME-RealWorld"),
        ("refcoco+_val", "RefCOCO"),
        ("OCRBench_v2", "OCRBench_v2"),
    ],
)
def test_sets_are_known_by_their_names(name, part):
    assert known_set(name) is KNOWN_SETS[part]


def test_a_name_is_a_word():
    assert known_set("summer") is known_set("questions") is known_set("ChartQAPro") is UNKNOWN


def test_all_that_is_named_exists():
    assert {known.metric for known in KNOWN_SETS.values()} - {None} <= set(METRICS)
    assert {known.own_scores for known in KNOWN_SETS.values()} - {None} == set(SET_SCORES)
    assert all("{question}" in known.prompt for known in KNOWN_SETS.values())
