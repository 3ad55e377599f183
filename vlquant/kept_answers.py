"""Greedy answers of one model, kept from run to run: an interrupted check goes on, a repeated one asks nothing twice.

An answer is known by what the model was shown, so that other sets and limits find it as well.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vlquant.request import EncodedRequest


@dataclass(frozen=True)
class KeptAnswer:
    """What a model answered."""

    ids: tuple[int, ...]
    """Generated ids, with the stop token if it ended the answer."""
    text: str
    truncated: bool
    """Whether it was cut at the largest number of tokens."""


class KeptAnswers:
    """Answers in a file of JSON lines, each written as soon as it is known."""

    def __init__(self, path: Path | None):
        self.path = path
        """None: nothing outlives this object."""
        self._known: dict[str, KeptAnswer] = {}
        if path is not None and path.is_file():
            for line in path.read_bytes().splitlines():
                self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            key, answer = json.loads(line)
            self._known[key] = KeptAnswer(tuple(answer["ids"]), answer["text"], answer["truncated"])
        except (ValueError, KeyError, TypeError):
            pass  # The line that was being written when the run was stopped.

    def get(self, key: str) -> KeptAnswer | None:
        """What is known of a question, by `question_key`."""
        return self._known.get(key)

    def add(self, answers: Mapping[str, KeptAnswer]) -> None:
        """Keep answers of some questions."""
        self._known |= answers
        if self.path is not None:
            lines = "".join(json.dumps([key, asdict(answer)], ensure_ascii=False) + "\n" for key, answer in answers.items())
            # A line that was cut off must not swallow the next one.
            try:
                with open(self.path, "ab") as file:
                    file.write((b"" if ends_with_line(self.path) else b"\n") + lines.encode())
            except OSError:
                self.path = None  # A full disk costs the next run time, not this one its work.


def ends_with_line(path: Path) -> bool:
    """Whether a file is empty or ends a line."""
    if not path.stat().st_size:
        return True
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def question_key(encoded: EncodedRequest) -> str:
    """Hash of what a model is shown: token ids and pixels."""
    digest = hashlib.sha256(json.dumps([list(encoded.ids), encoded.tiles_per_image]).encode())
    for tile in encoded.tiles:
        digest.update(tile.tobytes())
    return digest.hexdigest()


def kept_answers(identity: Mapping[str, object]) -> KeptAnswers:
    """The answers of the model that `identity` describes, in the user's cache; only in memory if that cannot be written.

    identity: everything that decides an answer, ready for JSON.
    """
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / "answers"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.jsonl"
        path.touch()
    except OSError:
        return KeptAnswers(None)
    return KeptAnswers(path)


def cache_folder() -> Path:
    """Where vlquant keeps what it can make again: $XDG_CACHE_HOME/vlquant, or ~/.cache/vlquant."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "vlquant"
