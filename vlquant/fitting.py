"""How a conversation is asked so that it fits into so many tokens: fewer tiles and frames, then fewer turns. Computes no pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vlquant.calib_data.conversations import Conversation
from vlquant.config import ModelConfig
from vlquant.prompt import IMAGE_PLACEHOLDER, picture_placeholders
from vlquant.request import Request, encode_prompt, open_image, place_images, require_text
from vlquant.tiling import choose_grid, tile_boxes
from vlquant.tokenizer import Tokenizer

TEXT_TOKENS = 128
"""Room left at least for question, answer and system message."""
TEMPLATE_TOKENS = 64
"""What system message and roles take of it, about."""
LONGEST_ANSWER = 256
"""Tokens of an answer that a model writes, and the room kept for it."""


def fitting_request(conversation: Conversation, config: ModelConfig, tokenizer: Tokenizer, *, most_tokens: int) -> Request:
    """What is asked, with its pictures opened and as many tiles of them as `most_tokens` leave room for.

    Where the answer would begin beyond that, as many of the earliest turns are left out as it takes; none if that is no help.
    Raises InvalidRequest for texts and pictures that cannot be read.
    """
    request = conversation.request
    for text in (*texts_of(request), request.system_message or "", conversation.answer or ""):
        require_text(text)
    opened = placed(replace(request, images=tuple(map(open_image, request.images))), config)
    asked = (with_room(conversation, each, config, tokenizer, most_tokens=most_tokens) for each in shortened(opened))
    first = next(asked)
    if reaches_answer(first, config, tokenizer, most_tokens=most_tokens):
        return first
    return next((each for each in asked if reaches_answer(each, config, tokenizer, most_tokens=most_tokens)), first)


def texts_of(request: Request) -> list[str]:
    """All that was said, in order."""
    return [*(text for turn in request.history or () for text in turn), request.question]


def placed(request: Request, config: ModelConfig) -> Request:
    """The same conversation with its pictures in the first turn if it does not say where they are."""
    history = list(request.history or ())
    if not history or any(IMAGE_PLACEHOLDER in text for text in (request.question, *(question for question, _ in history))):
        return request
    (question, answer), *rest = history
    frames, numbered = len(request.video or ()), config.chat.conversation.numbers_pictures
    opening = place_images(replace(request, question=question, history=None), len(request.images), frames, numbered=numbered)
    return replace(request, history=[(opening, answer), *rest])


def shortened(request: Request) -> Iterator[Request]:
    """The request, the same without its first turn, and so on; pictures of a turn that is left out open the next one."""
    turns = [*(request.history or ()), (request.question, None)]
    yield request
    while len(turns) > 1:
        (left_out, _), (question, answer), *rest = turns
        pictures = left_out.count(IMAGE_PLACEHOLDER)
        turns = [((picture_placeholders(pictures) if pictures else "") + question, answer), *rest]
        *history, (last, _) = turns
        yield replace(request, question=last, history=tuple(history) or None)


def with_room(
    conversation: Conversation, request: Request, config: ModelConfig, tokenizer: Tokenizer, *, most_tokens: int
) -> Request:
    """`request` with as many tiles or frames as there is room for beside its texts and the conversation's answer.

    The same for an answer still to be written as when it has been: it is about what will be calibrated on.
    """
    chat, unwritten = config.chat, conversation.answer is None or conversation.generated
    texts = texts_of(request) + ([] if unwritten else [conversation.answer])
    text_tokens = sum(len(tokenizer.encode(text)) for text in texts) + LONGEST_ANSWER * unwritten
    tiles = max(1, (most_tokens - max(TEXT_TOKENS, text_tokens + TEMPLATE_TOKENS)) // chat.tokens_per_tile)
    if request.video is not None:
        return replace(request, video=list(request.video)[:: -(-len(request.video) // tiles)])
    each = max(1, tiles // max(1, len(request.images)))
    # The thumbnail comes on top of more than one.
    return replace(request, max_tiles=min(chat.max_tiles, each if each == 1 or not chat.use_thumbnail else each - 1))


def reaches_answer(request: Request, config: ModelConfig, tokenizer: Tokenizer, *, most_tokens: int) -> bool:
    """Whether anything of the answer is seen when the conversation ends after `most_tokens`."""
    ids = prompt_ids(request, config, tokenizer)
    pictures = bool(request.images or request.video)
    return len(ids) < kept_tokens(ids, config, tokenizer, pictures=pictures, most_tokens=most_tokens)


def prompt_ids(request: Request, config: ModelConfig, tokenizer: Tokenizer) -> list[int]:
    """Ids of a request whose pictures are open, as encode_request finds them; raises InvalidRequest as it does."""
    chat, frames = config.chat, len(request.video or ())
    limits = {"min_tiles": chat.min_tiles, "max_tiles": request.max_tiles, "image_size": chat.image_size}
    grids = [(image.size, choose_grid(*image.size, **limits)) for image in request.images]
    tiles = [len(tile_boxes(size, grid, use_thumbnail=chat.use_thumbnail)) for size, grid in grids] + [1] * frames
    question = place_images(request, len(request.images), frames, numbered=chat.conversation.numbers_pictures)
    return encode_prompt(request, question, tiles, config=config, tokenizer=tokenizer)[1]


def kept_tokens(
    ids: Sequence[int], config: ModelConfig, tokenizer: Tokenizer, *, pictures: bool, most_tokens: int
) -> int:
    """After how many tokens a conversation ends, which begins with these ids: `most_tokens`, or a little after its last picture."""
    image = tokenizer.token_id(config.chat.image_token)
    end = len(ids) - list(ids)[::-1].index(image) if pictures else 0  # Without, the token is a text like any other.
    return max(most_tokens, end + TEXT_TOKENS)
