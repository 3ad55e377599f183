"""OpenAI-style messages from Python, a file or standard input; the prompt's two forms."""

import io
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from vlquant.cli import app
from vlquant.config import with_prompt_form
from vlquant.errors import InvalidRequest
from vlquant.prompt import TEMPLATES, processor_form
from vlquant.request import Request, encode_request
from vlquant.runtime import Generation, load
from vlquant.runtime.messages import as_request, read_messages
from vlquant.show_prompt import fold_runs, show_prompt

INTERNVL2_5 = "qwen2_internvl2_5_vit6b"
# What the -hf repositories' chat templates write, and InternVLProcessor puts in the places of pictures and videos.
PROCESSOR = """{% for message in messages -%}
{{ '<|im_start|>' ~ message.role ~ '\n' }}
{%- if message.content is string %}{{ message.content }}{% else -%}
{% for part in message.content -%}
{{ '<IMG_CONTEXT>\n' if part.type == 'image' else '<video>\n' if part.type == 'video' else part.text }}
{%- endfor %}{% endif %}{{ '<|im_end|>\n' }}
{%- endfor %}{{ '<|im_start|>assistant\n' }}"""


def part(kind, value):
    return {"type": kind, kind: value}


def conversation(path, other):
    """Two turns, two pictures in the second, text between them."""
    return [
        {"role": "user", "content": [part("image", path), part("text", "What?")]},
        {"role": "assistant", "content": "A ball."},
        {"role": "user", "content": [part("text", "Compare "), part("image", other), part("text", "with "), part("image", path)]},
    ]


@pytest.fixture
def pictures(named_case):
    folder = named_case(INTERNVL2_5).folder.parent / "images"
    return [str(folder / name) for name in ("frame_0.png", "frame_1.png")]


def rendered(messages, tiles, per_tile=16):
    """The processor's text for `messages`, runs folded."""
    jinja2 = pytest.importorskip("jinja2")
    text = jinja2.Template(PROCESSOR, keep_trailing_newline=True).render(messages=messages)
    for count in tiles:
        text = text.replace("<IMG_CONTEXT>\n", f"<img>{{{count * per_tile} x <IMG_CONTEXT>}}</img>\n".replace("<IMG", "<@"), 1)
    frames = "\n".join(f"Frame{index + 1}: <img>{{{per_tile} x <IMG_CONTEXT>}}</img>" for index in range(2))
    return text.replace("<@", "<IMG").replace("<video>", frames)


@pytest.mark.parametrize("case_name", [INTERNVL2_5, "internlm2_internvl2_5", "qwen2_hermes2", "internlm2_chat_ntk"])
def test_hf_form_is_the_processors(named_case, pictures, case_name):
    case = named_case(case_name)
    messages = conversation(*pictures)
    shown = show_prompt(messages, model=case.folder, max_tiles=1, prompt="hf")
    assert shown.text == rendered(messages, shown.tiles, case.config.chat.tokens_per_tile)
    assert shown.ids == case.tokenizer.encode(shown.text.replace("{%d x <IMG_CONTEXT>}" % case.config.chat.tokens_per_tile,
                                                                 "<IMG_CONTEXT>" * case.config.chat.tokens_per_tile))  # fmt: skip
    system = [{"role": "system", "content": "Be brief."}, *messages]
    assert show_prompt(system, model=case.folder, max_tiles=1, prompt="hf").text == rendered(system, shown.tiles, case.config.chat.tokens_per_tile)


def test_hf_form_of_video_frames(named_case):
    case = named_case(INTERNVL2_5)
    frames = [case.image(f"frame_{index}.png") for index in range(2)]
    shown = show_prompt(Request("What happens?", video=frames), model=case.folder, prompt="hf")
    asked = [{"role": "user", "content": [{"type": "video"}, part("text", "What happens?")]}]
    assert shown.text == rendered(asked, [])


def test_original_form_of_messages_is_what_chat_is_asked(named_case, pictures):
    case = named_case(INTERNVL2_5)
    first, second = pictures
    same = Request(
        "Image-1: <image>\nImage-2: <image>\nCompare \nwith ", images=(first, second, first), history=[("<image>\nWhat?", "A ball.")]
    )
    messages = conversation(first, second)
    assert show_prompt(messages, model=case.folder).text == show_prompt(same, model=case.folder).text
    asked = as_request(messages)
    assert fold_runs(encode_request(asked, case.config, case.tokenizer).prompt) == show_prompt(messages, model=case.folder).text


def test_forms_that_do_not_exist(named_case):
    config = named_case(INTERNVL2_5).config
    assert with_prompt_form(config, "original") is config
    with pytest.raises(InvalidRequest, match="use original or hf"):
        with_prompt_form(config, "vicuna")
    with pytest.raises(InvalidRequest, match="phi3-chat"):
        with_prompt_form(named_case("phi3_longrope").config, "hf")
    own = replace(config, chat=replace(config.chat, system_message="of the checkpoint"))
    assert with_prompt_form(own, "hf").chat.system_message is None
    assert processor_form(TEMPLATES["Hermes-2"]).separator == "<|im_end|>\n"


def test_answers_take_messages_everywhere(named_case, pictures):
    pipe = load(named_case(INTERNVL2_5).folder, vision="torch", max_tiles=1, prompt="hf")
    messages, few = conversation(*pictures), Generation(max_new_tokens=4)
    answer = pipe.ask(messages, generation=few)
    assert pipe(messages, few).ids == pipe.batch([messages], few)[0].ids == answer.ids
    stream = pipe.stream(messages, generation=few)
    assert "".join(stream) == answer.text and stream.answer.history == answer.history
    assert len(pipe.answer_logits([messages], [list(answer.ids)])[0]) == len(answer.ids)
    with pytest.raises(InvalidRequest, match="put them there"):
        pipe.ask(messages, [pictures[0]])


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user", "content": [{"type": "text"}]}], "'text'"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}], "'audio'"),
        ([{"role": "user", "content": None}], "NoneType"),
        ([{"role": "user", "content": "a"}, "b"], "message 2"),
        ([{"role": "assistant", "content": "a"}], "out of turn"),
        ([{"role": "user", "content": [part("video", "a.mp4"), part("image", "b.png")]}], "a video has to be alone"),
        ([{"role": "system", "content": [part("image", "b.png")]}, {"role": "user", "content": "a"}], "only the user's can"),
        ([{"role": "user", "content": [part("video_url", {"url": None})]}], "given as None"),
        ([{"role": "user", "content": [part("image_url", {"url": 5})]}], "given as 5"),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "use <image>"},
             {"role": "user", "content": [part("image", "b.png"), part("text", "what")]}],
            "message 2 has <image>",
        ),
    ],
)
def test_messages_that_are_none(messages, said):
    with pytest.raises(InvalidRequest, match=said):
        as_request(messages)


def test_text_may_place_its_own_pictures():
    own = [{"role": "user", "content": [part("image", "a.png"), part("text", "Is <image> red?")]}]
    assert as_request(own) == Request("Is <image> red?", images=("a.png",))
    assert as_request([{"role": "user", "content": "What does <image> mean?"}]) == Request("What does <image> mean?")


def test_messages_from_a_file(tmp_path, pictures, monkeypatch):
    messages = [{"role": "user", "content": [part("image_url", {"url": "file://" + pictures[0]}), part("text", "What?")]}]
    file = tmp_path / "m.json"
    for contents in (messages, {"model": "any", "messages": messages}):
        file.write_text(json.dumps(contents))
        assert read_messages(str(file)) == messages
    assert as_request(messages) == Request("<image>\nWhat?", images=(pictures[0],))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(messages)))
    assert read_messages("-") == messages
    for contents in ("{", "{}", "[]", '["a"]'):
        file.write_text(contents)
        with pytest.raises(InvalidRequest, match="holds no messages"):
            read_messages(str(file))


def test_commands_take_messages(named_case, tmp_path, pictures):
    folder, file = str(named_case(INTERNVL2_5).folder), tmp_path / "m.json"
    file.write_text(json.dumps(conversation(*pictures)))
    common = ["--messages", str(file), "-m", folder, "--max-tiles", "1", "--prompt", "hf"]
    shown = CliRunner().invoke(app, ["prompt", *common])
    assert shown.exit_code == 0 and shown.stdout.startswith("<|im_start|>user\n<img>{16 x"), shown.stderr
    told = CliRunner().invoke(app, ["chat", *common, "--max-new-tokens", "3", "--vision", "torch"])
    answer = load(folder, vision="torch", max_tiles=1, prompt="hf").ask(conversation(*pictures), generation=Generation(max_new_tokens=3))
    assert told.exit_code == 0 and told.stdout == answer.text + "\n"
    for extra in (["What?"], ["--image", pictures[0]], ["--system", "x"]):
        assert CliRunner().invoke(app, ["chat", *extra, *common]).exit_code == 2
    assert CliRunner().invoke(app, ["prompt", "-m", folder]).exit_code == 2
