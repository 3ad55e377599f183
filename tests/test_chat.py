"""The chat verb: what goes to standard output, and what a conversation remembers."""

import io
import shutil

import pytest

from vlquant.errors import InvalidRequest, VlquantError
from vlquant.request import Request
from vlquant.runtime import Generation, load
from vlquant.runtime.chat import Conversation, chat, default_vision, remarks

from tests.golden_folder import golden_folder

GOLDEN = golden_folder()
MODEL = GOLDEN / "qwen2_internvl2_5_vit6b"
PICTURE = GOLDEN / "images" / "rgba_300x200.png"
SHORT = Generation(max_new_tokens=16)


@pytest.fixture(scope="module")
def pipe():
    return load(MODEL, vision="torch")


@pytest.fixture
def typed(monkeypatch):
    """Lines for an interactive chat to read."""

    def type_lines(*lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))

    return type_lines


def test_one_question_prints_the_answer_and_nothing_else(pipe, capsys):
    remarks = []
    answer = chat(Request("What?", images=[PICTURE]), model=MODEL, generation=SHORT, report=remarks.append)
    assert capsys.readouterr().out == answer.text + "\n"
    assert answer.ids == pipe.ask("What?", [PICTURE], generation=SHORT).ids
    assert any(MODEL.name in line for line in remarks)


def test_remarks_go_to_standard_error_by_default(capsys):
    answer = chat(Request("Hello!"), model=MODEL, generation=SHORT)
    output = capsys.readouterr()
    assert output.out == answer.text + "\n" and MODEL.name in output.err


def test_a_conversation_remembers_turns_and_pictures(pipe, typed, capsys):
    typed("Hello!", f"/image {PICTURE}", "What is it?", "Why?", "/reset", "Hello!")
    assert chat(Request(""), model=MODEL, generation=SHORT) is None
    hello = pipe.ask("Hello!", generation=SHORT)
    what = pipe.ask("<image>\nWhat is it?", [PICTURE], history=hello.history, generation=SHORT)
    why = pipe.ask("Why?", [PICTURE], history=what.history, generation=SHORT)
    said = [answer.text + "\n" for answer in (hello, what, why, hello)]
    assert capsys.readouterr().out == "".join(said)


def test_pictures_of_the_command_belong_to_the_first_question(pipe, typed, capsys):
    typed("What is it?", "/quit", "not read")
    chat(Request("", images=[PICTURE, PICTURE], max_tiles=1), model=MODEL, generation=SHORT)
    expected = pipe.ask(Request("What is it?", images=[PICTURE, PICTURE], max_tiles=1), generation=SHORT)
    assert capsys.readouterr().out == expected.text + "\n"


def test_mistakes_do_not_end_a_conversation(pipe, typed, capsys):
    typed("/image nowhere.png", "/imagine", "", "Hello!")
    chat(Request(""), model=MODEL, generation=SHORT)
    output = capsys.readouterr()
    assert output.out == pipe.ask("Hello!", generation=SHORT).text + "\n"
    assert "nowhere.png" in output.err and "/imagine" in output.err
    assert "> " not in output.err  # Prompts are for people.


def test_a_picture_that_cannot_be_read_is_refused_at_once(pipe, typed, capsys, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    typed(f"/image {tmp_path / 'text.png'}", "/image", "Hello!")
    chat(Request(""), model=MODEL, generation=SHORT)
    output = capsys.readouterr()
    assert output.out == pipe.ask("Hello!", generation=SHORT).text + "\n"
    assert "text.png cannot be read" in output.err and "write /image FILE" in output.err


def test_pictures_of_a_refused_turn_are_taken_back(pipe, typed, capsys):
    typed(f"/image {PICTURE}", "One?", f"/image {PICTURE}", f"/image {PICTURE}", "Two <IMG_CONTEXT>?", "Why?")
    chat(Request(""), model=MODEL, generation=SHORT)
    one = pipe.ask("<image>\nOne?", [PICTURE], generation=SHORT)
    why = pipe.ask("Why?", [PICTURE], history=one.history, generation=SHORT)
    output = capsys.readouterr()
    assert output.out == f"{one.text}\n{why.text}\n"
    assert "taken back: 2 pictures; show them again" in output.err


@pytest.mark.parametrize("question, images, history, said", [
    ("<image> and <image>", [PICTURE], None, True),
    ("Why?", [], (("<image>\nWhat?", "It."),), True),
    ("Why?", [PICTURE], (("<image>\nWhat?", "It."),), False),
    ("Why?", [PICTURE], None, False),
])  # fmt: skip
def test_places_without_a_picture_are_remarked_on(question, images, history, said):
    assert bool(remarks(Request(question, images=images, history=history))) == said


def test_two_new_pictures_are_numbered():
    conversation = Conversation(Request(""))
    conversation.show(str(PICTURE))
    conversation.show(str(PICTURE))
    assert conversation.ask("Differences?").question == "Image-1: <image>\nImage-2: <image>\nDifferences?"


def test_pictures_do_not_join_a_video():
    conversation = Conversation(Request("", video="clip.mp4"))
    assert conversation.ask("What?").question == "What?", "frames are placed when the request is encoded"
    with pytest.raises(InvalidRequest, match="video"):
        conversation.show(str(PICTURE))


def test_vision_is_onnx_where_it_was_exported_or_a_bundle_lacks_it(tmp_path):
    assert default_vision(MODEL) == "torch"
    assert default_vision(None) == "onnx"
    (tmp_path / "vlquant.json").write_text("{}")
    assert default_vision(tmp_path) == "onnx"


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(VlquantError, match="nowhere"):
        chat(Request("Hello!"), model=tmp_path / "nowhere")
    shutil.copytree(MODEL, tmp_path / "copy", ignore=shutil.ignore_patterns("golden*", "model.safetensors"))
    with pytest.raises(VlquantError, match="copy"):
        chat(Request("Hello!"), model=tmp_path / "copy")


@pytest.mark.parametrize("request_", [Request("x", images=["nowhere.png"]), Request("x", video="nowhere.mp4")], ids=["picture", "video"])
def test_a_bad_picture_is_said_before_the_model_is_loaded(request_, monkeypatch):
    monkeypatch.setattr("vlquant.runtime.chat.load", None)
    with pytest.raises(InvalidRequest, match="nowhere"):
        chat(request_, model=MODEL)
