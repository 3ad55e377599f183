"""Questions, pictures and history to prompt, ids and tiles; and pictures that cannot be read."""

import base64
import io

import pytest
import torch
from PIL import Image

from vlquant.errors import InvalidRequest
from vlquant.request import Request, encode_request, open_image


@pytest.fixture
def picture():
    return Image.new("RGB", (64, 32), (200, 30, 30))


@pytest.fixture
def encode(small_case):
    return lambda *args, **settings: encode_request(Request(*args, **settings), small_case.config, small_case.tokenizer)


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def user_turn(encoded):
    return encoded.prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0].replace("<IMG_CONTEXT>", "")


def test_recorded_calls_through_the_front_door(case):
    """Calls whose pictures share one limit can be asked for exactly as a user would."""
    asked = 0
    for conversation in case.conversations:
        images = conversation["images"]
        one_each = conversation["num_patches_list"] or len(images) <= 1
        if conversation["call"] != "chat" or not one_each or len({image["max_num"] for image in images}) > 1:
            continue
        request = Request(
            conversation["question"],
            images=[case.folder.parent / "images" / image["file"] for image in images],
            history=conversation["history_in"],
            max_tiles=images[0]["max_num"] if images else None,
        )
        encoded = encode_request(request, case.config, case.tokenizer)
        assert encoded.ids == case.tensors[conversation["key"] + "/input_ids"][0].tolist()
        assert encoded.tiles_per_image == [image["tiles"] for image in images]
        assert encoded.question == conversation["history_out"][-1][0]
        asked += 1
    assert asked >= 5


def test_text_only(encode):
    encoded = encode("Hello")
    assert user_turn(encoded) == "Hello" and encoded.tiles == [] and encoded.pixel_values() is None


def test_placeholders_are_added_to_an_opening_question(encode, picture):
    assert user_turn(encode("What?", [picture])) == "<img></img>\nWhat?"
    assert user_turn(encode("What?", [picture] * 2)) == "Image-1: <img></img>\nImage-2: <img></img>\nWhat?"
    assert user_turn(encode("What?", video=[picture] * 2)) == "Frame1: <img></img>\nFrame2: <img></img>\nWhat?"
    assert user_turn(encode("In <image> what?", [picture])) == "In <img></img> what?"


def test_tiles_follow_the_limits(encode, picture):
    large = picture.resize((640, 320))
    assert encode("What?", [large]).tiles_per_image == [9]  # 4 x 2, the largest grid of that shape, and the thumbnail
    assert encode("What?", [picture]).tiles_per_image == [3]  # too few pixels for that
    assert encode("What?", [picture], max_tiles=1).tiles_per_image == [1]
    assert encode("What?", [picture], max_tiles=2).tiles_per_image == [3]
    assert encode("What?", video=[picture] * 3).tiles_per_image == [1, 1, 1]
    pixels = encode("What?", [picture], max_tiles=2).pixel_values()
    assert pixels.shape == (3, 3, 112, 112) and pixels.dtype == torch.float32
    with pytest.raises(InvalidRequest, match="max_tiles is 0"):
        encode("What?", [picture], max_tiles=0)


@pytest.mark.parametrize("history", [5, [("What?",)], [("What?", None)], ["What?"]], ids=str)
def test_a_history_is_questions_with_their_answers(history):
    with pytest.raises(InvalidRequest, match="history"):
        Request("Why?", history=history)


def test_history_is_written_first_and_never_gets_placeholders(encode, picture):
    first = encode("What?", [picture], max_tiles=1)
    history = [(first.question, "A box.")]
    second = encode("And its colour?", [picture], history=history, max_tiles=1)
    assert second.prompt.startswith(first.prompt + "A box.<|im_end|>")
    assert second.question == "And its colour?"
    third = encode("And <image>?", [picture, picture], history=history, max_tiles=1)
    assert third.tiles_per_image == [1, 1]
    with pytest.raises(InvalidRequest, match="2 pictures were given but the conversation has 1"):
        encode("And this?", [picture, picture], history=history)


def test_context_tokens_in_the_text_are_refused_beside_pictures(encode, picture):
    with pytest.raises(InvalidRequest, match="take <IMG_CONTEXT> out"):
        encode("What is <IMG_CONTEXT>?", [picture])


def test_the_system_message(encode):
    assert encode("Hello", system_message="Be brief.").prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert encode("Hello", system_message="").prompt.startswith("<|im_start|>system\n<|im_end|>")


def test_every_form_of_a_picture(picture, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(png(picture))
    url = "data:image/png;base64," + base64.b64encode(png(picture)).decode()
    for form in (path, str(path), png(picture), url, picture, picture.convert("RGBA")):
        opened = open_image(form)
        assert opened.mode == "RGB" and opened.tobytes() == picture.tobytes()


def test_pictures_that_cannot_be_read(picture, tmp_path):
    whole, text = tmp_path / "whole.png", tmp_path / "text.png"
    noise = Image.frombytes("RGB", (64, 64), torch.randint(0, 256, (64 * 64 * 3,), dtype=torch.uint8).numpy().tobytes())
    whole.write_bytes(png(noise)[:3000])
    text.write_text("no picture")
    cases = {
        whole: "cannot be read",
        text: "not a picture format",
        tmp_path: "is a folder",
        tmp_path / "absent.png": "absent.png does not exist",
        b"": "0 bytes",
        "data:image/png;base64,!!!": "data URL",
        "data:image/png,abc": "data URL",
        "https://example.org/a.png": "download it",
        7: "int is no picture",
    }
    for thing, words in cases.items():
        with pytest.raises(InvalidRequest) as error:
            open_image(thing)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_videos_that_are_none(encode):
    with pytest.raises(InvalidRequest, match="no frames"):
        encode("What?", video=[])
    with pytest.raises(InvalidRequest, match="clip.mp4 has not been decoded"):
        encode("What?", video="clip.mp4")
