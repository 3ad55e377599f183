"""Scores against hand-worked cases: every number is worked out beside it."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from vlquant.answer_forms import COMPLETED, edit_distance, vqa_form, written_options
from vlquant.metrics import METRICS, Gold, Score, box_overlap, read_box, score

FRUIT = (("A", "apple"), ("B", "banana"), ("C", "an orange"), ("D", "none of them"))
UNREADABLE = Score(0.0, parsed=False)


def scored(metric: str, prediction: str, *answers: str, options=()) -> float:
    return METRICS[metric](prediction, Gold(answers, tuple(options))).value


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
def test_built_in_kinds(kind, answer, prediction, expected):
    assert score(kind, answer, prediction) == expected


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "expected"),
    [
        ("exact", " The Times ", ("the times",), 1.0),
        ("exact", "The Times.", ("the times",), 0.0),  # Marks count.
        ("exact", "b", ("a", "B"), 1.0),  # Any of the answers.
        ("contains", "It says CENTRE\nROAD here", ("centre road",), 1.0),  # A line break is a space.
        ("contains", "centreroad", ("centre road",), 0.0),
        ("contains_formula", "$ x ^ 2 + 1 $", ("x^2+1",), 1.0),  # Spaces are taken out of both.
        ("contains_formula", "X^2+1", ("x^2+1",), 0.0),  # Case counts here.
    ],
)
def test_text(metric, prediction, answers, expected):
    assert scored(metric, prediction, *answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Coca Cola", ("coca  cola",), 1.0),  # Case and spaces are evened out before the distance is taken.
        ("abcd", ("abce",), 0.75),  # 1 of 4 replaced.
        ("ab", ("abcd",), 0.5),  # 2 of 4 missing: a half still counts,
        ("a", ("abc",), 0.0),  # 2 of 3 missing, 1/3, does not.
        ("abcx", ("zzzz", "abcd"), 0.75),  # The nearest answer.
        # Distance 1 between "ab c" and "ab d", divided by 7, the length of "ab    d" as it was given: 6/7, and not 3/4.
        ("ab c", ("ab    d",), 6 / 7),
        ("", ("a",), 0.0),
    ],
)
def test_anls(prediction, answers, expected):
    assert scored("anls", prediction, *answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("105", ("100",), 1.0),  # 5/100 off: just within.
        ("105.1", ("100",), 0.0),
        ("95", ("100",), 1.0),
        ("100", ("95.2",), 0.0),  # 4.8 / 95.2 = 5.04 %: relative to the right one.
        ("-100", ("100",), 0.0),
        ("12%", ("0.12",), 1.0),  # A percent sign is hundredths,
        ("12", ("12%",), 0.0),  # so that 12 is a hundred times 12 %.
        ("0.0", ("0",), 0.0),  # 5 % of nothing is nothing: 0 is compared as text.
        ("0", ("0",), 1.0),
        ("Canada ", ("canada",), 1.0),
        ("1,000", ("1000",), 0.0),  # No number with a comma in it, so text.
        ("nan", ("nan",), 1.0),  # Text, where the original has it wrong: not a number is not equal to itself.
        ("7", ("blue", "7.2"), 1.0),  # Any of the answers: 0.2 / 7.2 = 2.8 %.
    ],
)
def test_relaxed(prediction, answers, expected):
    assert scored("relaxed", prediction, *answers) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Dog", "dog"),  # Articles go,
        ("a cat and an owl", "cat and owl"),
        ("Two dogs", "2 dogs"),  # number words are digits,
        ("none", "0"),  # none is nothing,
        ("dont", "don't"),  # and lost apostrophes are found again.
        ("couldnt've", "couldn't've"),
        ("red-white", "red white"),  # A mark between letters parts them,
        # one beside a space goes; and so does its like everywhere, while the hyphen still parts.
        ("red, white-blue,green", "red white bluegreen"),
        ("1,000", "1000"),  # With a number's comma all marks go,
        ("1,000/km", "1000km"),  # the slash with it.
        ("3.5", "3.5"),  # A number's point stays,
        ("U.S.A.", "usa"),  # others go.
        ("Yes!\n", "yes"),
    ],
)
def test_vqa_form(text, expected):
    assert vqa_form(text) == expected


def test_contractions_lack_one_apostrophe():
    assert COMPLETED["hed've"] == COMPLETED["he'dve"] == "he'd've" and "hedve" not in COMPLETED
    assert "lets" not in COMPLETED and COMPLETED["somebody'd"] == "somebodyd"


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # Of 10 people 2 said so: for those 2 one other agrees, 1/3; for the other 8 both do, 2/3. (2 * 1/3 + 8 * 2/3) / 10.
        ("nike", ("nike",) * 2 + ("adidas",) * 8, 0.6),
        # 3 of 10: for those 3 two others agree, 2/3; for the other 7 three do, 1. (3 * 2/3 + 7) / 10.
        ("Nike.", ("nike",) * 3 + ("adidas",) * 7, 0.9),
        ("nike", ("nike",) * 4 + ("adidas",) * 6, 1.0),  # Three others agree with each of the 4.
        ("nike", ("nike",) * 1 + ("adidas",) * 9, 0.3),  # The one has no other to agree with: 9 * 1/3 / 10.
        ("puma", ("nike",) * 10, 0.0),
        ("two", ("2",) * 10, 1.0),
        ("nike", ("the nike",), 1.0),  # A lone answer is compared with.
    ],
)
def test_vqa(prediction, answers, expected):
    assert scored("vqa", prediction, *answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Yes, it is.", "Yes", Score(1.0)),
        ("No", "Yes", Score(0.0)),
        ("yes and no", "Yes", UNREADABLE),  # Both.
        ("I do not know", "No", UNREADABLE),  # Neither: "not" and "know" are other words.
        ("There is none-no.", "No", Score(1.0)),  # The hyphen becomes a space.
        ("", "No", UNREADABLE),
    ],
)
def test_yes_no(prediction, answer, expected):
    assert METRICS["yes_no"](prediction, Gold((answer,))) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("B", "B", Score(1.0)),
        ("(B).", "B", Score(1.0)),  # Marks around a letter are spaces.
        ("C", "B", Score(0.0)),
        ("b", "B", UNREADABLE),  # A letter is a capital, and no option's text is in "b".
        ("The answer is B", "B", Score(1.0)),
        ("A or B", "B", UNREADABLE),  # Two letters; and no option's text.
        ("I see a Banana.", "B", Score(1.0)),  # No letter, but one text.
        ("apple, then banana", "B", UNREADABLE),  # Two texts.
        # The article is the only letter, but not among the last four words, so the text is looked for.
        ("A ripe and yellow fruit: banana", "B", Score(1.0)),
        ("A thing like this", "A", Score(1.0)),  # Among the last four words: taken for the option, as the original does.
        # 62 characters; the options have 5 + 6 + 9 + 12 = 32 together, twice that is 64: the text still counts,
        ("banana, for it is yellow and long and bent and sweet and so on", "B", Score(1.0)),
        ("banana, for it is yellow and long and bent and sweet and so on ...", "B", UNREADABLE),  # and 66 is too long.
        ("Z: perhaps a banana", "B", UNREADABLE),  # A judge's way to say that nothing is chosen.
    ],
)
def test_choice(prediction, answer, expected):
    assert METRICS["choice"](prediction, Gold((answer,), FRUIT)) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("[[100, 100, 300, 300]]", Score(1.0)),
        ("[100,100,300,200]", Score(1.0)),  # 200 x 100 of 200 x 200: a half.
        ("[100,100,300,199]", Score(0.0)),
        ("[[0.1, 0.1, 0.3, 0.3]]", Score(1.0)),  # A sum below 4 is in fractions.
        ("[[0, 0, 9, 9]] or [[100, 100, 300, 300]]", Score(0.0)),  # The first counts.
        ("at the left", UNREADABLE),
        ("[[a, b, c, d]]", UNREADABLE),
    ],
)
def test_box(prediction, expected):
    assert METRICS["box"](prediction, Gold(("[[100, 100, 300, 300]]",))) == expected


def test_read_box_takes_the_first():
    assert read_box("[[1, 2, 3, 4]] or [[5, 6, 7, 8]]") == (1.0, 2.0, 3.0, 4.0)
    assert read_box("[1,2,3,4]") == (1.0, 2.0, 3.0, 4.0)


def test_overlap_of_a_corner():
    # 50 x 50 shared; 10000 + 10000 - 2500 covered.
    assert box_overlap((0, 0, 100, 100), (50, 50, 150, 150)) == pytest.approx(2500 / 17500)
    assert box_overlap((0, 0, 0, 0), (0, 0, 10, 10)) == 0.0
    assert box_overlap((10, 10, 0, 0), (0, 0, 10, 10)) == 0.0


def test_written_options():
    assert written_options("Which?\nA. red\n(B) green \nC: blue\nAnswer.") == (("A", "red"), ("B", "green"), ("C", "blue"))
    assert written_options("A. red") == written_options("A. red\nC. blue") == written_options("It is A or B") == ()


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3  # s for k, i for e, and a g.
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3


TEXTS = some.text(max_size=30)
ANSWERED = some.one_of(TEXTS, some.sampled_from(["A", "no, B", "yes", "12%", "[[1, 2, 3, 4]]", "[[nan, 0, inf, 9]]", "dont"]))


@given(prediction=ANSWERED, answers=some.lists(ANSWERED, min_size=1, max_size=4), texts=some.lists(TEXTS, max_size=4))
def test_scores_are_shares_and_what_is_not_read_has_none(prediction, answers, texts):
    gold = Gold(tuple(answers), tuple(zip("ABCD", texts, strict=False)))
    for metric in METRICS.values():
        found = metric(prediction, gold)
        assert 0 <= found.value <= 1 and (found.parsed or found.value == 0)


@given(answer=TEXTS, others=some.lists(TEXTS, max_size=3))
def test_the_right_answer_is_right(answer, others):
    for metric in ("verbatim", "exact", "contains", "contains_formula", "anls", "relaxed"):
        assert scored(metric, answer, *others, answer) == 1, metric
    assert scored("vqa", answer, *[answer] * 10) == scored("vqa", answer, answer) == 1


@given(letter=some.sampled_from("ABCD"), around=some.sampled_from(["{}", "({})", "{}.", "**{}**", "The answer is {}."]))
def test_the_right_letter_is_right(letter, around):
    assert scored("choice", around.format(letter), letter, options=FRUIT) == 1


@given(first=some.text("abc", max_size=8), second=some.text("abc", max_size=8))
def test_edit_distance_is_a_distance(first, second):
    distance = edit_distance(first, second)
    assert distance == edit_distance(second, first) and (distance == 0) == (first == second)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))


@given(corner=some.tuples(some.integers(0, 900), some.integers(0, 900)), size=some.tuples(some.integers(2, 99), some.integers(2, 99)))
def test_the_right_box_is_right(corner, size):
    box = str([*corner, corner[0] + size[0], corner[1] + size[1]])
    assert scored("box", f"<box>[{box}]</box>", box) == 1
