"""LMDeploy-style prompts and OpenAI-style messages to requests. Opens nothing, runs nothing."""

from collections.abc import Mapping, Sequence

from vlquant.errors import InvalidRequest
from vlquant.prompt import IMAGE_PLACEHOLDER, picture_placeholders
from vlquant.request import Request

FORMS = (
    "a prompt is a text, a pair (text, picture or list of pictures), a Request, "
    'or a list of messages {"role": ..., "content": ...}'
)


def is_conversation(prompt: object) -> bool:
    """Whether `prompt` is one list of OpenAI-style messages."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def as_request(prompt: object) -> Request:
    """The request a prompt stands for; raises InvalidRequest naming the accepted forms."""
    if isinstance(prompt, Request):
        return prompt
    if isinstance(prompt, str):
        return Request(question=prompt)
    if is_conversation(prompt):
        return _from_messages(prompt)
    if isinstance(prompt, tuple) and len(prompt) == 2 and isinstance(prompt[0], str):
        question, images = prompt
        return Request(question=question, images=tuple(images) if isinstance(images, (list, tuple)) else (images,))
    raise InvalidRequest(f"{FORMS}; this one is a {type(prompt).__name__}")


def with_placeholders(text: str, pictures: int) -> str:
    """`text` with a placeholder for every picture in front, unless it places them itself."""
    return text if IMAGE_PLACEHOLDER in text or not pictures else picture_placeholders(pictures) + text


def _from_messages(messages: Sequence[Mapping]) -> Request:
    """System message first if any, then user and assistant in turn, a user's message last."""
    system, turns, images = None, [], []
    for index, message in enumerate(messages):
        role = message.get("role")
        text, pictures = _content(message.get("content"))
        if role == "system" and index == 0:
            system = text
        elif role == "user" and (not turns or len(turns[-1]) == 2):
            turns.append((with_placeholders(text, len(pictures)),))
            images += pictures
        elif role == "assistant" and turns and len(turns[-1]) == 1:
            turns[-1] += (text,)
        else:
            raise InvalidRequest(
                f"message {index + 1} has role {role!r} out of turn; give system (optional), then user and assistant in turn"
            )
    if not turns or len(turns[-1]) == 2:
        raise InvalidRequest("the last message has to be the user's; add one")
    return Request(
        question=turns[-1][0], images=tuple(images), history=tuple(turns[:-1]) or None, system_message=system
    )


def _content(content: object) -> tuple[str, list]:
    """Text and pictures of one message's content, a text or a list of parts."""
    if isinstance(content, str):
        return content, []
    texts, pictures = [], []
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == "text":
            texts.append(part["text"])
        elif kind in ("image_url", "image"):
            picture = part[kind]
            pictures.append(picture["url"] if isinstance(picture, Mapping) else picture)
        else:
            raise InvalidRequest(f'a message part of type {kind!r} is not understood; use "text", "image_url" or "image"')
    return "\n".join(texts), pictures
