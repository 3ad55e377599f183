"""Conversation templates and picture placeholders: turns to prompt text. Knows no tokenizer and no pixels."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlquant.errors import InvalidRequest, UnsupportedCheckpoint

PROMPT_FORMS = ("original", "hf")
"""As the original's chat() writes a conversation, or as transformers' InternVLProcessor does."""

IMAGE_PLACEHOLDER = "<image>"
IMAGE_START, IMAGE_CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"


@dataclass(frozen=True)
class Template:
    """How one generation of InternVL writes a conversation."""

    name: str
    system_message: str | None
    """Used when neither the checkpoint nor the caller gives one; None: then there is no system block at all."""
    system_prefix: str
    user: str
    assistant: str
    separator: str
    """Ends the system block and every turn."""
    stop_token: str
    answer_separator: str | None = None
    """Ends assistant turns, where that differs from `separator`."""
    text_lead: str = ""
    """Between a role and its text."""
    numbers_pictures: bool = True
    """Whether several pictures of one question become "Image-1: ", "Image-2: " in front of it."""


_SHANGHAI_SENSETIME = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SHANGHAI_TSINGHUA = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


def _im_template(name: str, system_message: str, separator: str) -> Template:
    return Template(
        name=name,
        system_message=system_message,
        system_prefix="<|im_start|>system\n",
        user="<|im_start|>user\n",
        assistant="<|im_start|>assistant\n",
        separator=separator,
        stop_token="<|im_end|>",
    )


TEMPLATES = {
    template.name: template
    for template in (
        _im_template("Hermes-2", _SHANGHAI_SENSETIME, "<|im_end|>"),
        _im_template("internlm2-chat", _SHANGHAI_SENSETIME, "<|im_end|>"),
        _im_template("internvl2_5", _SHANGHAI_TSINGHUA, "<|im_end|>\n"),
        Template(
            name="phi3-chat",
            system_message=_SHANGHAI_SENSETIME,
            system_prefix="<|system|>\n",
            user="<|user|>\n",
            assistant="<|assistant|>\n",
            separator="<|end|>",
            stop_token="<|end|>",
        ),
        Template(
            name="internvl_zh",
            system_message="",
            system_prefix="",
            user="<human>:",
            assistant="<bot>:",
            separator=" ",
            stop_token="</s>",
            answer_separator="</s>",
            text_lead=" ",
        ),
    )
}


def find_template(name: str) -> Template:
    """The template called `name`. Raises UnsupportedCheckpoint naming the nearest one."""
    if not isinstance(name, str) or name not in TEMPLATES:
        nearest = difflib.get_close_matches(str(name), TEMPLATES, n=1, cutoff=0)[0]
        raise UnsupportedCheckpoint(
            f"conversation template {name!r} is not known, the nearest is {nearest!r}; "
            f"set \"template\" in config.json to one of {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def processor_form(template: Template) -> Template:
    """The form that transformers' InternVLProcessor gives a conversation, for models with `template`.

    Without a system block unless asked for, pictures where they stand and not numbered. Raises InvalidRequest for
    templates of models that the processor does not know.
    """
    if template.stop_token != "<|im_end|>":
        raise InvalidRequest(f"InternVLProcessor writes no {template.name} conversations; leave --prompt hf out")
    return replace(template, system_message=None, separator="<|im_end|>\n", numbers_pictures=False)


def build_prompt(
    template: Template, turns: Sequence[tuple[str, str | None]], *, system_message: str | None = None
) -> str:
    """Write `turns` (question, answer) as the model was trained to see them.

    An answer of None is the open turn the model is to continue; an empty text adds its role but no
    separator, as the original does. system_message None means the template's own.
    """
    system = template.system_message if system_message is None else system_message
    pieces = [] if system is None else [template.system_prefix + system + template.separator]
    answer_separator = template.separator if template.answer_separator is None else template.answer_separator
    for question, answer in turns:
        pieces.append(_message(template, template.user, question, template.separator))
        pieces.append(_message(template, template.assistant, answer, answer_separator))
    return "".join(pieces)


def _message(template: Template, role: str, text: str | None, separator: str) -> str:
    return role + template.text_lead + text + separator if text else role


def expand_images(prompt: str, tiles_per_image: Sequence[int], tokens_per_tile: int, *, strict: bool = True) -> str:
    """Replace one `<image>` after the other by as many context tokens as that picture has.

    Placeholders beyond the last picture stay literal text. Raises InvalidRequest if there are fewer placeholders than
    pictures; not strict, pictures beyond the last placeholder are passed over, as the original does.
    """
    placeholders = prompt.count(IMAGE_PLACEHOLDER)
    if strict and placeholders < len(tiles_per_image):
        raise InvalidRequest(
            f"{len(tiles_per_image)} pictures were given but the conversation has {placeholders} {IMAGE_PLACEHOLDER} "
            f"placeholders; write one {IMAGE_PLACEHOLDER} per picture where it belongs"
        )
    first, *others = prompt.split(IMAGE_PLACEHOLDER)
    pieces = [first]
    for index, text in enumerate(others):
        if index < len(tiles_per_image):
            pieces += [IMAGE_START, IMAGE_CONTEXT * (tokens_per_tile * tiles_per_image[index]), IMAGE_END, text]
        else:
            pieces += [IMAGE_PLACEHOLDER, text]
    return "".join(pieces)


def picture_placeholders(count: int, *, numbered: bool = True) -> str:
    """What goes before a question about `count` pictures; a single one is never numbered."""
    if count == 1 or not numbered:
        return f"{IMAGE_PLACEHOLDER}\n" * count
    return "".join(f"Image-{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, count + 1))


def frame_placeholders(count: int) -> str:
    """What goes before a question about `count` video frames."""
    return "".join(f"Frame{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, count + 1))
