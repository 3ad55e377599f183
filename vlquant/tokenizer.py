"""Text to token ids and back, exactly as the original tokenizers. Knows no prompts and no models."""

import json
import re
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Protocol

import tokenizers

from vlquant.errors import BrokenCheckpoint, UnsupportedCheckpoint
from vlquant.fast_tokenizer import add_ends, add_missing_tokens, byte_level_tokenizer, sentencepiece_tokenizer
from vlquant.slow_tokenizer import (
    SENTENCEPIECE_FILE,
    LlamaTokenizer,
    SentencePieceTokenizer,
    clean_up,
    is_legacy,
    no_such_token,
)
from vlquant.special_tokens import (
    ADDED_TOKENS,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TokenizerFiles,
    read_tokenizer_files,
)

BYTE_LEVEL_FILES = ("vocab.json", "merges.txt")
FAST_FILE = "tokenizer.json"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
INTERNLM2_CLASSES = ("InternLM2Tokenizer", "InternLM2TokenizerFast", "PreTrainedTokenizerFast")
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
FLAVOURS = ("slow", "fast")
SOURCE_CLASS, SOURCE_FLAVOUR = "source_tokenizer_class", "source_tokenizer_flavour"
"""Our entries in a bundle's tokenizer_config.json, whose tokenizer_class and tokenizer.json are for other readers."""


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

    def unsettled(self, ids: Sequence[int]) -> int:
        """How many of the last `ids` may come to stand for another text once more follow."""

    def token_id(self, token: str) -> int:
        """Id of one token. Raises BrokenCheckpoint if there is none."""


class FastTokenizer:
    """Qwen2 and tokenizer.json folders: a `tokenizers.Tokenizer` does the work."""

    def __init__(self, files: TokenizerFiles, backend: tokenizers.Tokenizer, *, clean_up: bool, normalize_first: bool = False):
        self.folder, self._backend, self._clean_up, self._normalize_first = files.folder, backend, clean_up, normalize_first
        self.vocabulary_size = max(backend.get_vocab().values()) + 1
        roles = (files.roles.get(role) for role in ("pad_token", "eos_token"))
        ids = [self._backend.token_to_id(content) for content in roles if content]
        self.pad_id = next((each for each in ids if each is not None), 0)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with whatever the tokenizer's own post-processing adds."""
        if self._normalize_first:  # Before added tokens are looked for: a combining character after one hides it.
            text = unicodedata.normalize("NFC", text)
        return self._backend.encode(text).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`."""
        text = self._backend.decode([int(index) for index in ids], skip_special_tokens=skip_special)
        return clean_up(text) if self._clean_up else text

    def unsettled(self, ids: Sequence[int]) -> int:
        """Length of the run of byte tokens at the end: a single wrong byte makes all of it unreadable."""
        tokens = (self._backend.id_to_token(int(index)) or "" for index in reversed(ids))
        return sum(1 for _ in takewhile(BYTE_TOKEN.fullmatch, tokens))

    def token_id(self, token: str) -> int:
        """Id of one token. Raises BrokenCheckpoint if there is none."""
        index = self._backend.token_to_id(token)
        if index is None:
            raise no_such_token(self.folder, token)
        return index


def load_tokenizer(folder: str | Path, flavour: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint or bundle, from the files the original would read.

    flavour: "slow" or "fast", as AutoTokenizer's `use_fast`. They give the same ids for all families but Phi-3 and Yi.
    None: what the folder's own `use_fast` default gives: a tokenizer.json where the class is Llama's, else the slow one.
    Raises BrokenCheckpoint for missing or unreadable files, UnsupportedCheckpoint for an unknown class or flavour.
    """
    files = read_tokenizer_files(folder)
    if flavour not in (None, *FLAVOURS):
        raise UnsupportedCheckpoint(f"tokenizer flavour {flavour!r} is unknown; use {' or '.join(FLAVOURS)}")
    if (files.folder / SENTENCEPIECE_FILE).exists() and (flavour == "slow" or flavour is None and not _prefers_json(files)):
        return _sentencepiece_class(files)(files)
    backend = _fast_backend(files, like_slow=False)
    if _is_byte_level(files) and flavour != "fast":
        return FastTokenizer(files, backend, clean_up=False, normalize_first=True)
    return FastTokenizer(files, backend, clean_up=files.settings.get("clean_up_tokenization_spaces", _cleans_up(files)))


def _cleans_up(files: TokenizerFiles) -> bool:
    """Whether the tokenizer's class takes out spaces before punctuation where its files are silent."""
    return not _is_byte_level(files) and _source_class(files) not in LLAMA_CLASSES


def _is_byte_level(files: TokenizerFiles) -> bool:
    return not (files.folder / SENTENCEPIECE_FILE).exists() and all((files.folder / name).exists() for name in BYTE_LEVEL_FILES)


def _prefers_json(files: TokenizerFiles) -> bool:
    """Whether the default is the fast flavour from tokenizer.json; a bundle has one even if its source had none."""
    has_json = _source_class(files) in LLAMA_CLASSES and (files.folder / FAST_FILE).exists()
    return has_json and files.settings.get(SOURCE_FLAVOUR) != "slow"


def _fast_backend(files: TokenizerFiles, *, like_slow: bool) -> tokenizers.Tokenizer:
    """The fast flavour of a folder; like_slow: with the slow one's ids, where that is the default."""
    if (files.folder / SENTENCEPIECE_FILE).exists():
        if _prefers_json(files):
            return _read_fast(files)
        return sentencepiece_tokenizer(files, prefix=_space_prefix(files, like_slow=like_slow), user_defined=like_slow)
    return byte_level_tokenizer(files) if _is_byte_level(files) else _read_fast(files)


def _space_prefix(files: TokenizerFiles, *, like_slow: bool) -> str | None:
    """Before which stretches of text a space goes, where that is not as the .model says."""
    if _sentencepiece_class(files) is not LlamaTokenizer:
        return None
    if not like_slow:
        return "always"  # LlamaTokenizerFast does not ask the .model.
    return None if is_legacy(files) else "first"


def write_fast_tokenizer(folder_in: str | Path, folder_out: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json that give transformers the ids of `load_tokenizer`.

    The source's own tokenizer files are copied beside them, so that `load_tokenizer(folder_out)` stays exact.
    Raises as `load_tokenizer`.
    """
    files, target = read_tokenizer_files(folder_in), Path(folder_out)
    backend = _fast_backend(files, like_slow=True)
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
    settings.setdefault("clean_up_tokenization_spaces", _cleans_up(files))
    source = {SOURCE_CLASS: _source_class(files)}
    if (files.folder / SENTENCEPIECE_FILE).exists():
        source[SOURCE_FLAVOUR] = "fast" if _prefers_json(files) else "slow"
    return settings | {"tokenizer_class": "PreTrainedTokenizerFast"} | source | dict(files.roles)


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
    if _source_class(files) in LLAMA_CLASSES:
        add_ends(backend, files)  # LlamaTokenizerFast goes by the settings.
    return add_missing_tokens(backend, files)


def _source_class(files: TokenizerFiles) -> str | None:
    """The tokenizer class that the published checkpoint names."""
    return files.settings.get(SOURCE_CLASS) or files.settings.get("tokenizer_class")


def _sentencepiece_class(files: TokenizerFiles) -> type[SentencePieceTokenizer]:
    """The slow tokenizer of a folder with a sentencepiece model; raises UnsupportedCheckpoint for an unknown class."""
    name = _source_class(files)
    if name in LLAMA_CLASSES:
        return LlamaTokenizer
    if name is None or name in INTERNLM2_CLASSES:
        return SentencePieceTokenizer
    known = ", ".join((INTERNLM2_CLASSES[0], LLAMA_CLASSES[0]))
    raise UnsupportedCheckpoint(f"{files.folder}: tokenizer class {name!r} is not supported; take a model with {known} or Qwen2Tokenizer")
