"""The original's "slow" tokenizers: sentencepiece between added tokens, as InternLM2Tokenizer and LlamaTokenizer.

Knows tokenizer files; no prompts and no models.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from vlquant.errors import BrokenCheckpoint
from vlquant.special_tokens import AddedToken, TokenizerFiles

SENTENCEPIECE_FILE = "tokenizer.model"
SPACE = "▁"

NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""Appended to a serialized model: protobuf merges it into normalizer_spec as add_dummy_prefix = false."""

# transformers' clean_up_tokenization, in its order.
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")) + tuple(
    (f" '{ending}", f"'{ending}") for ending in ("m", "s", "ve", "re")
)


class SentencePieceTokenizer:
    """InternLM2: stretches of text between added tokens go to sentencepiece, re-labelled pieces keep their ids."""

    cleans_up = True
    """Takes out spaces before punctuation where the settings are silent."""

    def __init__(self, files: TokenizerFiles):
        self.folder = files.folder
        self._pieces = self._open(files)
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
        self._eos = self._id_of(files, "eos_token") if files.settings.get("add_eos_token", False) else None
        pad, eos = self._id_of(files, "pad_token"), self._id_of(files, "eos_token")
        self.pad_id = next((each for each in (pad, eos) if each is not None), 0)
        self._clean_up = files.settings.get("clean_up_tokenization_spaces", self.cleans_up)
        self.vocabulary_size = max(self._by_id.keys() | {self._pieces.get_piece_size() - 1}) + 1

    def _open(self, files: TokenizerFiles, changes: bytes = b""):
        from sentencepiece import SentencePieceProcessor

        path = files.folder / SENTENCEPIECE_FILE
        try:
            return SentencePieceProcessor(model_proto=path.read_bytes() + changes)
        except (RuntimeError, OSError):
            raise BrokenCheckpoint(f"{path} is not a sentencepiece model; download it again") from None

    def _id_of(self, files: TokenizerFiles, role: str) -> int | None:
        token = self._added.get(files.roles.get(role))
        return None if token is None else token.id

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, bos first, and eos last where the settings ask for it."""
        first, last = ([] if each is None else [each] for each in (self._bos, self._eos))
        return first + self._encode_stretches(text) + last

    def _encode_stretches(self, text: str) -> list[int]:
        ids = []
        for stretch in self._split(text):
            if stretch in self._added:
                ids.append(self._added[stretch].id)
            elif stretch:
                ids += self._encode_text(stretch)
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """Ids of text without added tokens."""
        return self._pieces.encode(text)

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

    def unsettled(self, ids: Sequence[int]) -> int:
        """None: sentencepiece reads each byte or character by itself."""
        return 0

    def token_id(self, token: str) -> int:
        """Id of one token. Raises BrokenCheckpoint if there is none."""
        if token in self._added:
            return self._added[token].id
        index = self._pieces.piece_to_id(token)
        if self._pieces.id_to_piece(index) != token:
            raise no_such_token(self.folder, token)
        return index


class LlamaTokenizer(SentencePieceTokenizer):
    """Phi-3 and Yi: a space before the whole text, none after added tokens (with `legacy`: one before every stretch)."""

    cleans_up = False

    def __init__(self, files: TokenizerFiles):
        self._legacy = is_legacy(files)
        super().__init__(files)
        self._space = self._pieces.piece_to_id(SPACE)
        self._roles = frozenset(files.roles.values())
        self._guard = files.roles.get("unk_token", "<unk>")
        self._guard_length = len(self._pieces.encode(self._guard))

    def _open(self, files: TokenizerFiles, changes: bytes = b""):
        return super()._open(files, changes if self._legacy else NO_DUMMY_PREFIX)

    def _encode_stretches(self, text: str) -> list[int]:
        if self._legacy or not text:
            return super()._encode_stretches(text)
        ids = super()._encode_stretches(SPACE + text.replace(SPACE, " "))
        followed = self._by_id.get(ids[1]) if len(ids) > 1 else None
        alone = ids[0] == self._space and followed is not None and followed.content in self._special
        return ids[1:] if alone else ids

    def _encode_text(self, text: str) -> list[int]:
        if self._legacy or not text.startswith((SPACE, " ")):
            return self._pieces.encode(text)
        # In front of the text stands something, so that sentencepiece leaves its leading space alone.
        return self._pieces.encode(self._guard + text)[self._guard_length :]

    def _stands_apart(self, token: AddedToken) -> bool:
        return super()._stands_apart(token) and token.content not in self._roles

    def _decode_run(self, ids: list[int]) -> str:
        """Pieces, and special tokens among them; the very first space is the one that encoding has put there."""
        text, pieces, after_special = "", [], False
        for position, index in enumerate(ids):
            token = self._by_id.get(index)
            if token is None:
                piece = self._pieces.id_to_piece(index)
                pieces.append(piece.removeprefix(SPACE) if position == 0 else piece)
                after_special = False
                continue
            text += " " if self._legacy and position and not after_special else ""
            text += self._pieces.decode(pieces) + token.content
            pieces, after_special = [], True
        return text + self._pieces.decode(pieces)


def is_legacy(files: TokenizerFiles) -> bool:
    """Whether a LlamaTokenizer treats every stretch between added tokens as a text of its own; its default."""
    return files.settings.get("legacy") is not False


def clean_up(text: str) -> str:
    """Remove the spaces before punctuation and English contractions that some tokenizers leave."""
    for spaced, joined in _CLEAN_UP:
        text = text.replace(spaced, joined)
    return text


def no_such_token(folder: Path, token: str) -> BrokenCheckpoint:
    """The error for a token that a folder's tokenizer does not have."""
    return BrokenCheckpoint(f"{folder}: the tokenizer has no token {token!r}; take the tokenizer files of the same checkpoint")
