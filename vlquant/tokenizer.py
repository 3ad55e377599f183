"""Text to token ids and back, exactly as the original tokenizers. Knows no prompts and no models."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import tokenizers

from vlquant.errors import BrokenCheckpoint, UnsupportedCheckpoint
from vlquant.fast_tokenizer import add_missing_tokens, byte_level_tokenizer, sentencepiece_tokenizer
from vlquant.special_tokens import (
    ADDED_TOKENS,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    AddedToken,
    TokenizerFiles,
    read_tokenizer_files,
)

SENTENCEPIECE_FILE = "tokenizer.model"
BYTE_LEVEL_FILES = ("vocab.json", "merges.txt")
FAST_FILE = "tokenizer.json"
SENTENCEPIECE_CLASSES = ("InternLM2Tokenizer", "InternLM2TokenizerFast", "PreTrainedTokenizerFast")

# transformers' clean_up_tokenization, in its order.
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")) + tuple(
    (f" '{ending}", f"'{ending}") for ending in ("m", "s", "ve", "re")
)


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    pad_id: int
    """Fills the left of shorter rows in a batch."""
    vocabulary_size: int
    """Tokens with an id, added ones included."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the bos token where the original adds one."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`."""

    def token_id(self, token: str) -> int:
        """Id of one token. Raises BrokenCheckpoint if there is none."""


class SentencePieceTokenizer:
    """InternLM2: stretches of text between added tokens go to sentencepiece, re-labelled pieces keep their ids."""

    def __init__(self, files: TokenizerFiles):
        from sentencepiece import SentencePieceProcessor

        self.folder = files.folder
        try:
            self._pieces = SentencePieceProcessor(model_file=str(files.folder / SENTENCEPIECE_FILE))
        except (RuntimeError, OSError):
            raise BrokenCheckpoint(
                f"{files.folder / SENTENCEPIECE_FILE} is not a sentencepiece model; download it again"
            ) from None
        self._added = dict(files.added)
        for content in files.special - self._added.keys():
            # Older folders list only what is not already a piece.
            if self._pieces.id_to_piece(self._pieces.piece_to_id(content)) == content:
                self._added[content] = AddedToken(content, self._pieces.piece_to_id(content))
        self._by_id = {token.id: token for token in self._added.values()}
        self._special = files.special
        longest_first = sorted(self._added, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        self._bos = self._id_of(files, "bos_token") if files.settings.get("add_bos_token", True) else None
        pad, eos = self._id_of(files, "pad_token"), self._id_of(files, "eos_token")
        self.pad_id = next((each for each in (pad, eos) if each is not None), 0)
        self._clean_up = files.settings.get("clean_up_tokenization_spaces", True)
        self.vocabulary_size = max(self._by_id.keys() | {self._pieces.get_piece_size() - 1}) + 1

    def _id_of(self, files: TokenizerFiles, role: str) -> int | None:
        token = self._added.get(files.roles.get(role))
        return None if token is None else token.id

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, bos first."""
        ids = [] if self._bos is None else [self._bos]
        for stretch in self._split(text):
            if stretch in self._added:
                ids.append(self._added[stretch].id)
            elif stretch:
                ids += self._pieces.encode(stretch)
        return ids

    def _split(self, text: str) -> list[str]:
        """Stretches between added tokens and the added tokens; those may swallow white space around them."""
        if self._splitter is None:
            return [text]
        stretches = self._splitter.split(text)  # text, token, text, token, ..., text
        for position in range(1, len(stretches), 2):
            token = self._added[stretches[position]]
            if token.lstrip:
                stretches[position - 1] = stretches[position - 1].rstrip()
            if token.rstrip:
                stretches[position + 1] = stretches[position + 1].lstrip()
        return stretches

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; added tokens stand apart with a space, as in the original, unless skipped."""
        texts, run = [], []
        for index in map(int, ids):
            token = self._by_id.get(index)
            if token is None or token.content in self._special and not self._stands_apart(token):
                if token is None or not skip_special:
                    run.append(index)
                continue
            if skip_special and token.content in self._special:
                continue
            if run:
                texts.append(self._decode_run(run))
                run = []
            texts.append(token.content)
        if run:
            texts.append(self._decode_run(run))
        text = " ".join(text for text in texts if text)
        return clean_up(text) if self._clean_up else text

    def _stands_apart(self, token: AddedToken) -> bool:
        """The original separates added tokens by spaces, but not special ones inside the .model's range."""
        return token.content not in self._special or token.id >= self._pieces.get_piece_size()

    def _decode_run(self, ids: list[int]) -> str:
        """Pieces, and special tokens among them: a space before the first of several special ones in a row."""
        text, pieces, after_special = "", [], False
        for index in ids:
            token = self._by_id.get(index)
            if token is None:
                pieces.append(index)
                after_special = False
                continue
            text += "" if after_special else " "
            text += self._pieces.decode(pieces) + token.content
            pieces, after_special = [], True
        # The original cleans up here whatever clean_up_tokenization_spaces says.
        return clean_up(text + self._pieces.decode(pieces))

    def token_id(self, token: str) -> int:
        """Id of one token. Raises BrokenCheckpoint if there is none."""
        if token in self._added:
            return self._added[token].id
        index = self._pieces.piece_to_id(token)
        if self._pieces.id_to_piece(index) != token:
            raise _no_such_token(self.folder, token)
        return index


class FastTokenizer:
    """Qwen2 and tokenizer.json folders: a `tokenizers.Tokenizer` does the work."""

    def __init__(self, files: TokenizerFiles, backend: tokenizers.Tokenizer, *, clean_up_default: bool):
        self.folder, self._backend = files.folder, backend
        self._clean_up = files.settings.get("clean_up_tokenization_spaces", clean_up_default)
        self.vocabulary_size = max(backend.get_vocab().values()) + 1
        roles = (files.roles.get(role) for role in ("pad_token", "eos_token"))
        ids = [self._backend.token_to_id(content) for content in roles if content]
        self.pad_id = next((each for each in ids if each is not None), 0)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with whatever the tokenizer's own post-processing adds."""
        return self._backend.encode(text).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`."""
        text = self._backend.decode([int(index) for index in ids], skip_special_tokens=skip_special)
        return clean_up(text) if self._clean_up else text

    def token_id(self, token: str) -> int:
        """Id of one token. Raises BrokenCheckpoint if there is none."""
        index = self._backend.token_to_id(token)
        if index is None:
            raise _no_such_token(self.folder, token)
        return index


def clean_up(text: str) -> str:
    """Remove the spaces before punctuation and English contractions that some tokenizers leave."""
    for spaced, joined in _CLEAN_UP:
        text = text.replace(spaced, joined)
    return text


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint or bundle, from the files the original would read.

    Raises BrokenCheckpoint for missing or unreadable files, UnsupportedCheckpoint for an unknown tokenizer class.
    """
    files = read_tokenizer_files(folder)
    if (files.folder / SENTENCEPIECE_FILE).exists():
        _require_sentencepiece_class(files)
        return SentencePieceTokenizer(files)
    if all((files.folder / name).exists() for name in BYTE_LEVEL_FILES):
        return FastTokenizer(files, byte_level_tokenizer(files), clean_up_default=False)
    return FastTokenizer(files, _read_fast(files), clean_up_default=True)


def write_fast_tokenizer(folder_in: str | Path, folder_out: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json that give transformers the ids of `load_tokenizer`.

    The source's own tokenizer files are copied beside them, so that `load_tokenizer(folder_out)` stays exact.
    Raises as `load_tokenizer`.
    """
    files, target = read_tokenizer_files(folder_in), Path(folder_out)
    if (files.folder / SENTENCEPIECE_FILE).exists():
        _require_sentencepiece_class(files)
        backend = sentencepiece_tokenizer(files)
    elif all((files.folder / name).exists() for name in BYTE_LEVEL_FILES):
        backend = byte_level_tokenizer(files)
    else:
        backend = _read_fast(files)
    for name in (SENTENCEPIECE_FILE, *BYTE_LEVEL_FILES, ADDED_TOKENS, SPECIAL_TOKENS_MAP):
        if (files.folder / name).exists():
            shutil.copyfile(files.folder / name, target / name)
    backend.save(str(target / FAST_FILE))
    text = json.dumps(_fast_settings(files), ensure_ascii=False, indent=2, sort_keys=True)
    (target / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _fast_settings(files: TokenizerFiles) -> dict:
    """tokenizer_config.json without remote code and without the chat template, which is not what chat() sends."""
    settings = {key: value for key, value in files.settings.items() if key not in ("auto_map", "chat_template")}
    tokens = {token.id: replace(token, special=token.special or token.content in files.special) for token in files.added.values()}
    settings["added_tokens_decoder"] = {
        str(index): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": False,
            "rstrip": token.rstrip,
            "single_word": False,
            "special": token.special,
        }
        for index, token in sorted(tokens.items())
    }
    clean_up_default = not (files.folder / BYTE_LEVEL_FILES[0]).exists()
    settings.setdefault("clean_up_tokenization_spaces", clean_up_default)
    return settings | {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(files.roles)


def _read_fast(files: TokenizerFiles) -> tokenizers.Tokenizer:
    path = files.folder / FAST_FILE
    if not path.exists():
        raise BrokenCheckpoint(
            f"{files.folder} has none of {SENTENCEPIECE_FILE}, {' + '.join(BYTE_LEVEL_FILES)}, {FAST_FILE}; "
            "download the tokenizer files"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BrokenCheckpoint(f"{path} is not a tokenizer file ({error}); download it again") from None
    return add_missing_tokens(backend, files)


def _require_sentencepiece_class(files: TokenizerFiles) -> None:
    name = files.settings.get("tokenizer_class", SENTENCEPIECE_CLASSES[0])
    if name not in SENTENCEPIECE_CLASSES:
        raise UnsupportedCheckpoint(
            f"{files.folder}: tokenizer class {name!r} is not supported; take a model with {SENTENCEPIECE_CLASSES[0]} or Qwen2Tokenizer"
        )


def _no_such_token(folder: Path, token: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(f"{folder}: the tokenizer has no token {token!r}; take the tokenizer files of the same checkpoint")
