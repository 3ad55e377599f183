"""What the built-in calibration set holds beyond the demo's kinds: screens, dialogue, and answers of natural length."""

import random
import re

import pytest
from vlquant.calib_data.dialogue import LANGUAGES, dialogue, load_topics
from vlquant.calib_data.samples import CALIBRATION_TURNS, KINDS, CalibrationScenes, draw_sample
from vlquant.calib_data.screens import BODIES, screen
from vlquant.calib_data.sums import SUMS

COUNT = 128


def turns_of(conversation) -> list[tuple[str, str]]:
    return [*conversation.request.history, (conversation.request.question, conversation.answer)]


def kind_of(conversation) -> str:
    return conversation.key.rpartition("/")[2]


@pytest.fixture(scope="module")
def conversations():
    scenes = CalibrationScenes(COUNT)
    return [scenes[index] for index in range(COUNT)]


@pytest.fixture(scope="module")
def screens():
    return [screen(random.Random(number)) for number in range(40)]


def test_the_same_again_and_another_with_another_seed(conversations):
    same, other = CalibrationScenes(COUNT), CalibrationScenes(COUNT, seed=1)
    for index in range(len(CALIBRATION_TURNS)):
        assert turns_of(same[index]) == turns_of(conversations[index]) != turns_of(other[index])
        pictures = [[image.tobytes() for image in each.request.images] for each in (same[index], conversations[index])]
        assert pictures[0] == pictures[1]


def test_nothing_is_repeated_and_answers_are_long(conversations):
    assert len({str(turns_of(each)) for each in conversations}) == len({each.key for each in conversations}) == COUNT
    spoken = [turn for each in conversations if "dialogue" in kind_of(each) for turn in turns_of(each)]
    assert len({answer for _, answer in spoken}) > 0.95 * len(spoken)
    assert sum(len(answer) for each in conversations for _, answer in turns_of(each)) >= 20_000


def test_every_prefix_is_mixed(conversations):
    kinds = [kind_of(each) for each in conversations]
    for first in range(COUNT - 32):
        assert {"screen", "dialogue_en", "dialogue_zh", *KINDS} == set(kinds[first : first + 32])
    # Every sixteenth is held out: of every kind, too.
    assert len(CALIBRATION_TURNS) % 2 == 1 and set(CALIBRATION_TURNS) - set(KINDS) == set(kinds) - set(KINDS)
    assert all(kinds.count(kind) in (15, 16) for kind in set(kinds) - set(KINDS))


def test_scenes_are_the_splits_own_in_order(conversations):
    scenes = [each for each in conversations if kind_of(each) in KINDS]
    for index, each in enumerate(scenes[:22]):
        sample = draw_sample("calibration", index)
        assert each.key == sample.key
        assert [image.tobytes() for image in each.request.images] == [
            image.tobytes() for image in (() if sample.video else sample.images)
        ]
        assert {(question.text, question.answer) for question in sample.questions} <= set(turns_of(each))


def test_descriptions_tell_every_answer(conversations):
    described = [dict(turns_of(each)) for each in conversations if kind_of(each) in ("document", "receipt", "chart")]
    for turns in described:
        told = turns.pop("Describe the picture in detail.")
        assert told.count(". ") >= 2 and all(answer in told for answer in turns.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_topics_are_many_and_their_slots_are_filled(language):
    assert len(load_topics(language)) >= 40
    for number in range(60):
        turns = dialogue(language, number)
        assert 2 <= len(turns) <= 3
        assert not any(re.search(r"<\w+>|^\w+(, \w+)*: .*[|;]", text) or "\nQ:" in text for turn in turns for text in turn)
    chinese = [bool(re.search("[一-鿿]", answer)) for number in range(20) for _, answer in dialogue(language, number)]
    assert all(chinese) if language == "zh" else sum(chinese) < len(chinese) / 5


def test_equations_are_right():
    """Every `a + b = c` in the word problems."""
    found = 0
    for language in LANGUAGES:
        for number in range(200):
            text = " ".join(answer for _, answer in dialogue(language, number))
            for term, result in re.findall(r"(?<![0-9.])(\d+(?: [-+×÷] \d+)+) = (\d+)", text):
                assert eval(term.replace("×", "*").replace("÷", "/")) == int(result), text
                found += 1
    assert found > 300


def test_sums_that_no_equation_shows():
    for number in range(200):
        drawn = {name: draw(random.Random(number)) for name, draw in SUMS.items()}
        assert all(value > 0 for values in drawn.values() for value in values.values())
        marks = drawn["scores"]
        assert marks["sum"] == marks["a"] + marks["b"] + marks["c"] + marks["d"] and marks["fifth"] <= 100
        assert drawn["journey"]["distance"] == drawn["journey"]["slow"] * drawn["journey"]["back"]


def test_texts_survive_the_tokenizer(case, conversations):
    """No piece of them is unknown, in the vocabulary of every golden checkpoint."""
    texts = [text for each in conversations if kind_of(each) not in KINDS for turn in turns_of(each) for text in turn]
    assert [text for text in texts if case.tokenizer.decode(case.tokenizer.encode(text)).strip() != text.strip()] == []


def test_screens_show_what_their_answers_say(screens):
    """Text is compared symbol by symbol with what was drawn, line by line."""
    kinds = set()
    for scene in screens:
        (page,) = scene.pictures
        lines: dict[float, str] = {}
        for glyph in page.glyphs:
            assert 0 < glyph.x < page.size[0] and 0 < glyph.y < page.size[1]
            lines[glyph.y] = lines.get(glyph.y, "") + glyph.symbol
        shown = "".join(lines.values())
        for question in scene.questions:
            quoted = re.findall(r'"([^"]+)"', question.answer + question.text)
            if question.text.startswith(("What is in the field", "What does the", "How large", "What is the title")):
                quoted.append(question.answer)
            assert all(text.replace(" ", "") in shown for text in quoted), question
        told = {each.text: each.answer for each in scene.questions}["Describe this screen."]
        assert 3 <= len(re.findall(r"[.]\"? |[.]\"?$", told)) <= 6
        kinds |= {name for name, word in zip(BODIES, ("form with", "A table", "settings", "A box"), strict=True) if word in told}
    assert kinds == set(BODIES)


def test_settings_are_told_as_they_are_drawn(screens):
    for scene in screens:
        colors = [figure.color for figure in scene.pictures[0].figures]
        told = {each.text: each.answer for each in scene.questions}["Describe this screen."]
        if "Switched on" in told:
            on = re.search(r"Switched on: (.*); switched off", told)[1]
            assert len(re.split(", | and ", on)) == colors.count("green")
