"""`vlquant prompt`: the exact text and tokens that a question becomes. Needs config and tokenizer, no weights."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from vlquant.config import read_config, with_prompt_form
from vlquant.model import resolve_model
from vlquant.prompt import IMAGE_CONTEXT
from vlquant.request import encode_request
from vlquant.runtime.messages import Prompt, as_request
from vlquant.runtime.video import with_frames
from vlquant.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ShownPrompt:
    """What the model is given."""

    text: str
    """Every run of picture tokens folded: "{3328 x <IMG_CONTEXT>}"."""
    ids: list[int]
    """Not folded."""
    tiles: list[int]
    """Tiles per picture or frame."""


def show_prompt(
    question: Prompt,
    *,
    model: str | Path,
    max_tiles: int | None = None,
    prompt: str = "original",
    tokenizer: str | None = None,
) -> ShownPrompt:
    """What a question with its pictures, or a whole conversation, becomes for `model` (checkpoint or bundle).

    max_tiles: per picture, None: as the request or the model says; prompt: the "original" form or that of the "hf" processor; tokenizer: "slow" or "fast" where both exist.
    Raises InvalidRequest for pictures or text that do not fit together.
    """
    folder = resolve_model(model)
    config = with_prompt_form(read_config(folder), prompt)
    request = with_frames(as_request(question, config.chat.conversation))
    request = request if max_tiles is None else replace(request, max_tiles=max_tiles)
    encoded = encode_request(request, config, load_tokenizer(folder, tokenizer))
    return ShownPrompt(fold_runs(encoded.prompt), encoded.ids, encoded.tiles_per_image)


def fold_runs(prompt: str) -> str:
    """`prompt` with every run of n picture tokens written as "{n x <IMG_CONTEXT>}"."""
    length = len(IMAGE_CONTEXT)
    return re.sub(f"(?:{re.escape(IMAGE_CONTEXT)})+", lambda run: f"{{{len(run[0]) // length} x {IMAGE_CONTEXT}}}", prompt)
