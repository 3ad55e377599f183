"""`vlquant prompt`: the exact text and tokens that a question becomes. Needs config and tokenizer, no weights."""

import re
from dataclasses import dataclass
from pathlib import Path

from vlquant.config import read_config
from vlquant.model import resolve_model
from vlquant.prompt import IMAGE_CONTEXT
from vlquant.request import Request, encode_request
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


def show_prompt(request: Request, *, model: str | Path, tokenizer: str | None = None) -> ShownPrompt:
    """The prompt of a request as `model` (checkpoint or bundle) gets it.

    tokenizer: "slow" or "fast" where both exist. Raises InvalidRequest for pictures or text that do not fit together.
    """
    folder = resolve_model(model)
    encoded = encode_request(with_frames(request), read_config(folder), load_tokenizer(folder, tokenizer))
    return ShownPrompt(fold_runs(encoded.prompt), encoded.ids, encoded.tiles_per_image)


def fold_runs(prompt: str) -> str:
    """`prompt` with every run of n picture tokens written as "{n x <IMG_CONTEXT>}"."""
    length = len(IMAGE_CONTEXT)
    return re.sub(f"(?:{re.escape(IMAGE_CONTEXT)})+", lambda run: f"{{{len(run[0]) // length} x {IMAGE_CONTEXT}}}", prompt)
