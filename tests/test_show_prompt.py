"""`vlquant prompt` shows what the original implementation was recorded to get."""

import pytest

from vlquant.errors import InvalidRequest
from vlquant.request import Request
from vlquant.show_prompt import show_prompt


def test_the_recorded_prompt_is_shown(case):
    turn = next(each for each in case.conversations if each["key"] == "single_image_implicit/turn1")
    (image,) = turn["images"]
    picture = case.folder.parent / "images" / image["file"]
    shown = show_prompt(Request(turn["question"], images=[picture], max_tiles=image["max_num"]), model=case.folder)
    assert shown.text == turn["prompt_with_runs"] and shown.tiles == [image["tiles"]]
    assert shown.ids == case.tensors[turn["key"] + "/input_ids"][0].tolist()


def test_another_system_message_and_frames(small_case):
    frames = [small_case.image(f"frame_{index}.png") for index in range(2)]
    shown = show_prompt(Request("What?", video=frames, system_message="Be brief."), model=small_case.folder)
    assert "system\nBe brief." in shown.text
    assert "Frame1: <img>{16 x <IMG_CONTEXT>}</img>\nFrame2: <img>{16 x <IMG_CONTEXT>}</img>\nWhat?" in shown.text


def test_placeholders_that_do_not_fit(small_case):
    picture = small_case.image("frame_0.png")
    with pytest.raises(InvalidRequest, match="placeholder"):
        show_prompt(Request("<image> What?", images=[picture, picture]), model=small_case.folder)
