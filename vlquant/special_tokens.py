"""Added and special tokens as the tokenizer files of a folder declare them; ids come from there, never from a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlquant.checkpoint import read_json
from vlquant.errors import BrokenCheckpoint

TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""What every InternVL appends to its language model's vocabulary, in this order."""
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token matched literally, before the text around it is tokenized."""

    content: str
    id: int
    lstrip: bool = False
    """Swallow the white space before it."""
    rstrip: bool = False
    """Swallow the white space after it."""
    special: bool = True


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says about its tokens."""

    folder: Path
    settings: Mapping
    """tokenizer_config.json."""
    added: Mapping[str, AddedToken]
    special: frozenset[str]
    """Contents of the tokens that play a role (bos, eos, ...) or are listed as additional special tokens."""
    roles: Mapping[str, str]
    """"bos_token" -> content, only roles that are filled."""

    def id_of(self, role: str) -> int | None:
        """Id of the token that plays `role`, None if nobody does."""
        content = self.roles.get(role)
        return self.added[content].id if content in self.added else None


def read_tokenizer_files(folder: str | Path) -> TokenizerFiles:
    """Collect tokenizer_config.json, added_tokens.json and special_tokens_map.json of a folder.

    Raises BrokenCheckpoint if tokenizer_config.json is absent or a token entry is malformed.
    """
    folder = Path(folder)
    settings = read_json(folder / TOKENIZER_CONFIG)
    declared = _optional(folder / SPECIAL_TOKENS_MAP) | {key: value for key, value in settings.items() if value is not None}
    try:
        added = {content: AddedToken(content, index) for content, index in _optional(folder / ADDED_TOKENS).items()}
        for index, entry in (settings.get("added_tokens_decoder") or {}).items():
            added[entry["content"]] = _added_token(int(index), entry)
        roles = {role: _content(declared[role]) for role in ROLES if declared.get(role)}
        # transformers 5 renames the list and allows a mapping of further roles beside it.
        extra = declared.get("extra_special_tokens") or []
        listed = list(declared.get("additional_special_tokens") or [])
        listed += list(extra.values()) if isinstance(extra, dict) else list(extra)
        special = frozenset(roles.values()) | {_content(entry) for entry in listed}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise BrokenCheckpoint(f"{folder}: a token entry in {TOKENIZER_CONFIG} is malformed ({error!r}); download it again") from None
    return TokenizerFiles(folder=folder, settings=settings, added=added, special=special, roles=roles)


def _optional(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def _added_token(index: int, entry: Mapping) -> AddedToken:
    flags = {flag: bool(entry.get(flag, False)) for flag in ("lstrip", "rstrip", "special")}
    return AddedToken(entry["content"], index, **flags)


def _content(entry) -> str:
    return entry["content"] if isinstance(entry, dict) else str(entry)
