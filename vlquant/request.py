"""A question with pictures or video frames to token ids and tiles. Knows no weights and decodes no video."""

import base64
import binascii
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from vlquant.config import ModelConfig
from vlquant.errors import InvalidRequest
from vlquant.prompt import (
    IMAGE_PLACEHOLDER,
    build_prompt,
    expand_images,
    frame_placeholders,
    picture_placeholders,
)
from vlquant.tiling import Box, normalize, require_tiles, tile_picture
from vlquant.tokenizer import Tokenizer

Picture = str | os.PathLike | bytes | Image.Image

DATA_URL_START = "data:"
BROKEN_PICTURE = (OSError, ValueError, SyntaxError, EOFError, NotImplementedError, RuntimeError)
"""What Pillow's readers raise, each its own."""


@dataclass(frozen=True)
class Request:
    """One question, with what it is about."""

    question: str
    images: Sequence[Picture] = ()
    """Pictures of this and of earlier turns, in the order of their placeholders."""
    video: str | os.PathLike | Sequence[Image.Image] | None = None
    """A file, or frames already decoded."""
    history: Sequence[tuple[str, str]] | None = None
    """Earlier (question, answer) turns, questions with their `<image>` placeholders."""
    max_tiles: int | None = None
    """Per picture; None: the checkpoint's."""
    frames: int = 8
    """How many frames to take from a video file."""
    system_message: str | None = None
    """None: the checkpoint's, else its template's."""

    def __post_init__(self) -> None:
        turns = self.history or ()
        if not isinstance(turns, Sequence) or not all(map(is_turn, turns)):
            raise InvalidRequest("the history is no list of (question, answer) texts; give an answer's own history")


def is_turn(turn: object) -> bool:
    """Whether it is a question with its answer."""
    return isinstance(turn, Sequence) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


@dataclass(frozen=True)
class EncodedRequest:
    """A request as the model sees it."""

    prompt: str
    ids: list[int]
    tiles: list[Image.Image]
    """Tiles of all pictures, in order."""
    tile_map: list[list[Box]]
    """For each picture, what each of its tiles shows: (left, top, right, bottom) in pixels of the picture."""
    question: str
    """The question as it enters the history, placeholders included."""

    @property
    def tiles_per_image(self) -> list[int]:
        return [len(boxes) for boxes in self.tile_map]

    def pixel_values(self) -> Tensor | None:
        """Pixels float32 [tiles, 3, side, side], None without pictures."""
        return normalize(self.tiles) if self.tiles else None


def encode_request(request: Request, config: ModelConfig, tokenizer: Tokenizer) -> EncodedRequest:
    """Cut the pictures, place them in the conversation and tokenize it, as the original chat().

    A video must have been decoded to frames. Raises InvalidRequest for unreadable pictures and
    for placeholders that do not match the pictures.
    """
    pictures = [open_image(picture) for picture in request.images]
    frames = _frames(request.video)
    chat = config.chat
    max_tiles = chat.max_tiles if request.max_tiles is None else request.max_tiles
    require_max_tiles(max_tiles, config)
    limits = [(picture, chat.min_tiles, max_tiles) for picture in pictures]
    limits += [(frame, 1, 1) for frame in frames]
    tiles, tile_map = [], []
    for image, low, high in limits:
        own, boxes = tile_picture(
            image, min_tiles=low, max_tiles=high, image_size=chat.image_size, use_thumbnail=chat.use_thumbnail
        )
        tiles += own
        tile_map.append(boxes)
    question = place_images(request, len(pictures), len(frames), numbered=chat.conversation.numbers_pictures)
    prompt, ids = encode_prompt(request, question, list(map(len, tile_map)), config=config, tokenizer=tokenizer)
    return EncodedRequest(prompt, ids, tiles, tile_map, question)


def require_max_tiles(max_tiles: int, config: ModelConfig) -> None:
    """Raise InvalidRequest unless a model can be given pictures of so many tiles."""
    require_tiles(min(config.chat.min_tiles, max_tiles) if max_tiles > 0 else 1, max_tiles)


def place_images(request: Request, pictures: int, frames: int, *, numbered: bool = True) -> str:
    """The question, with placeholders in front if it opens a conversation and has none itself."""
    if request.history or IMAGE_PLACEHOLDER in request.question or pictures + frames == 0:
        return request.question
    before = picture_placeholders(pictures, numbered=numbered) if pictures else ""
    return before + frame_placeholders(frames) + request.question


def encode_prompt(
    request: Request, question: str, tiles_per_image: Sequence[int], *, config: ModelConfig, tokenizer: Tokenizer
) -> tuple[str, list[int]]:
    """Prompt text and token ids of `question` after the request's history.

    tiles_per_image: how many tiles each placeholder stands for. Raises InvalidRequest if the
    conversation does not hold exactly the context tokens of these tiles.
    """
    chat = config.chat
    system = chat.system_message if request.system_message is None else request.system_message
    turns = [*(request.history or ()), (question, None)]
    prompt = build_prompt(chat.conversation, turns, system_message=system)
    require_text(prompt)
    prompt = expand_images(prompt, tiles_per_image, chat.tokens_per_tile)
    ids = tokenizer.encode(prompt)
    expected, found = sum(tiles_per_image) * chat.tokens_per_tile, ids.count(tokenizer.token_id(chat.image_token))
    if tiles_per_image and found != expected:
        raise InvalidRequest(
            f"the conversation holds {found} {chat.image_token} tokens where its pictures need {expected}; "
            f"take {chat.image_token} out of the text"
        )
    return prompt, ids


def require_text(text: str) -> None:
    """Raise InvalidRequest for half a character, as bytes that are no UTF-8 leave behind: no tokenizer has an id for it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the text holds bytes that are no UTF-8; write it anew") from None


def encode_answer(
    answer: str, prompt: str, prompt_ids: Sequence[int], *, config: ModelConfig, tokenizer: Tokenizer
) -> list[int]:
    """Ids of an answer as the model would write it after the prompt, with the stop token."""
    stop_token = config.chat.conversation.stop_token
    whole = tokenizer.encode(prompt + answer + stop_token)
    if whole[: len(prompt_ids)] == list(prompt_ids):
        return whole[len(prompt_ids) :]
    # The answer's beginning merged with the prompt's end, which a model that writes token by token cannot do.
    alone = tokenizer.encode(stop_token + answer + stop_token)
    return alone[alone.index(tokenizer.token_id(stop_token)) + 1 :]


def open_image(picture: Picture) -> Image.Image:
    """A picture as RGB: from a file, bytes, a data URL or a PIL image.

    Only converted: no EXIF rotation and no alpha compositing, as in the original. Raises
    InvalidRequest if it cannot be read.
    """
    if isinstance(picture, Image.Image):
        return _to_rgb(picture, "the picture")
    if isinstance(picture, bytes | bytearray):
        return _decode(io.BytesIO(picture), f"the picture given as {len(picture)} bytes")
    if isinstance(picture, str) and picture.startswith(DATA_URL_START):
        return _decode(io.BytesIO(_data_url_bytes(picture)), "the picture given as data URL")
    if not isinstance(picture, str | os.PathLike):
        raise InvalidRequest(f"{type(picture).__name__} is no picture; give a file, bytes, a data URL or a PIL image")
    if str(picture).startswith(("http://", "https://")):
        raise InvalidRequest(f"{picture} is not fetched from the network; download it and give the file")
    path = Path(picture)
    if is_folder(path):
        raise InvalidRequest(f"picture {path} is a folder; give a picture file")
    if not is_file(path):
        raise InvalidRequest(f"picture {path} does not exist; give an existing picture file")
    return _decode(path, f"picture {path}")


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise InvalidRequest(f"{name} is too large ({error}); make it smaller") from None
    except BROKEN_PICTURE as error:
        raise _unreadable(name, error) from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        return image.convert("RGB")
    except BROKEN_PICTURE as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> InvalidRequest:
    # Pillow's message repeats the path or shows an object's address.
    reason = "not a picture format Pillow knows" if "cannot identify" in str(error) else str(error)
    return InvalidRequest(f"{name} cannot be read ({reason}); give a whole PNG, JPEG or other picture file")


def _data_url_bytes(url: str) -> bytes:
    head, separator, payload = url.partition(",")
    try:
        if not separator or not head.endswith(";base64"):
            raise ValueError("no base64 part")
        return base64.b64decode(payload, validate=True)
    except (ValueError, binascii.Error) as error:
        raise InvalidRequest(f"the data URL holds no base64 picture ({error}); write data:image/png;base64,...") from None


def _frames(video) -> list[Image.Image]:
    if video is None:
        return []
    if isinstance(video, str | os.PathLike):
        raise InvalidRequest(f"video {video} has not been decoded; load it through vlquant.runtime or give its frames")
    frames = [open_image(frame) for frame in video]
    if not frames:
        raise InvalidRequest("the video has no frames; give a video with at least one frame")
    return frames
