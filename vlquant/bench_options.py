"""What `vlquant bench` measures, and its defaults."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlquant.errors import InvalidRequest

MEASURES = {
    "start": "process start, load, first token of a text, memory of a text answer and of a picture's",
    "vision": "seconds per tile, every exported precision",
    "prefill": "tokens/s of a prompt",
    "decode": "tokens/s of one conversation",
    "batch": "tokens/s of several conversations side by side",
    "picture": "first token of a question about one tile, model loaded",
}
KERNELS = ("vnni", "avx2", "torch")
"""What VLQUANT_KERNELS may say."""


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, how often and against whom. Raises InvalidRequest for what could not be measured."""

    measures: tuple[str, ...] = tuple(MEASURES)
    against: tuple[str, ...] | None = None
    """Names of peers; None: those that are installed and can run the model, (): none."""
    kernels: tuple[str, ...] = ()
    """Kernels of ours that are measured beside the best."""
    rounds: int = 5
    prompts: tuple[int, ...] = (512, 2048)
    """Tokens whose prefill is measured."""
    contexts: tuple[int, ...] = (512, 4096)
    """Tokens in the cache when decoding begins; the first one is the longest conversation of the batch."""
    batch: int = 8
    """Conversations side by side, of half the context to all of it."""
    tokens: int = 32
    """Tokens decoded in each measurement."""

    def __post_init__(self) -> None:
        for field in ("measures", "kernels", "prompts", "contexts"):  # What is named twice is measured once.
            object.__setattr__(self, field, tuple(dict.fromkeys(getattr(self, field))))
        if not self.measures:
            raise InvalidRequest(f"there is nothing to measure; name some of {', '.join(MEASURES)}")
        for field, known in (("measures", MEASURES), ("kernels", KERNELS)):
            if unknown := [each for each in getattr(self, field) if each not in known]:
                raise InvalidRequest(f"{unknown[0]!r} is not known; {field} are {', '.join(known)}")
        numbers = (self.rounds, self.batch, self.tokens, *self.prompts, *self.contexts)
        if min(numbers) < 1 or not (self.prompts and self.contexts):
            raise InvalidRequest("rounds, batch, tokens, prompts and contexts are numbers of 1 or more; give at least one of each")

    @property
    def longest(self) -> int:
        """Positions that a model has to have."""
        lengths = {
            "prefill": max(self.prompts), "decode": max(self.contexts) + self.tokens, "batch": self.contexts[0] + self.tokens,
        }  # fmt: skip
        return max((lengths.get(each, 1) for each in self.measures))


def kept_model(settings: Mapping, peer: str, **made_with: object) -> Path:
    """Folder of a peer's model: another one for every shape, version and setting that it is made with."""
    known = json.dumps([settings["shape"], made_with], sort_keys=True)
    return Path(settings["work"]) / f"{peer}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"


def row_lengths(context: int, batch: int) -> list[int]:
    """Lengths of conversations side by side: from half the context to all of it."""
    return [context] if batch == 1 else [context - (context // 2) * row // (batch - 1) for row in range(batch)]
