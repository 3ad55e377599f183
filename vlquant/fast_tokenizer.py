"""Tokenizer files to a `tokenizers.Tokenizer` with the same ids. Knows no prompts and no models."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from vlquant.checkpoint import read_json
from vlquant.errors import BrokenCheckpoint, UnsupportedCheckpoint
from vlquant.sentencepiece_model import BPE, USER_DEFINED, Piece, SentencePieceModel, read_sentencepiece_model
from vlquant.slow_tokenizer import SPACE
from vlquant.special_tokens import TokenizerFiles

# How Qwen2 cuts text into words before BPE (its pattern is part of the tokenizer class, not of the files).
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_tokenizer(files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer from vocab.json and merges.txt.

    Raises BrokenCheckpoint if the two do not belong together.
    """
    vocabulary = _with_added(read_json(files.folder / "vocab.json"), files)
    try:
        bpe = models.BPE(vocab=vocabulary, merges=_read_merges(files.folder / "merges.txt"))
    except Exception as error:  # tokenizers raises plain Exception
        raise BrokenCheckpoint(f"{files.folder}: vocab.json and merges.txt do not fit ({error}); download both again") from None
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return add_missing_tokens(tokenizer, files)


def add_missing_tokens(tokenizer: tokenizers.Tokenizer, files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Make every added token of the files known to `tokenizer`, in the order of their ids."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    fresh = [token for token in files.added.values() if token.content not in known]
    for token in sorted(fresh, key=lambda token: token.id):
        special = token.special or token.content in files.special
        added = AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
        if tokenizer.token_to_id(token.content) != token.id:
            raise UnsupportedCheckpoint(
                f"{files.folder}: added token {token.content!r} cannot keep its id {token.id}; "
                "take the tokenizer files of the published checkpoint"
            )
    return tokenizer


def sentencepiece_tokenizer(
    files: TokenizerFiles, *, prefix: str | None = None, user_defined: bool = True
) -> tokenizers.Tokenizer:
    """InternLM2's or Llama's tokenizer from tokenizer.model, re-labelled pieces under their new names.

    prefix: a space goes before the "first" stretch of a text or "always" before each; None: as the .model says.
    user_defined: match the .model's user-defined pieces literally, as sentencepiece does and InternLM2TokenizerFast does not.
    Raises UnsupportedCheckpoint if the model is not byte pair encoding.
    """
    path = files.folder / "tokenizer.model"
    model = read_sentencepiece_model(path)
    if model.model_type != BPE:
        raise UnsupportedCheckpoint(f"{path} is not a BPE model; take the tokenizer.model of the published checkpoint")
    labels = {token.id: token.content for token in files.added.values()}
    vocabulary = {labels.get(index, piece.text): index for index, piece in enumerate(model.pieces)}
    # Added tokens outside the .model join the vocabulary so that they keep their ids whatever the gaps.
    vocabulary = _with_added(vocabulary, files)
    unknown = files.roles.get("unk_token", model.pieces[0].text)
    bpe = models.BPE(
        vocab=vocabulary, merges=merges_from_scores(model.pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    if prefix == "always":
        model = replace(model, add_dummy_prefix=True)
    if prefix == "first":
        model = replace(model, add_dummy_prefix=False)
        # One of them puts a space in front, where the normalizer has left none, and the other makes it the mark:
        # with the mark as its replacement Metaspace would leave out the prefix of a text that starts with a space.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(mark, prepend_scheme=scheme, split=False) for mark, scheme in ((" ", "first"), (SPACE, "never"))]
        )
    tokenizer.normalizer = _normalizer(model)
    tokenizer.decoder = _decoder(model, first_space=prefix == "first")
    add_ends(tokenizer, files)
    add_missing_tokens(tokenizer, files)
    if user_defined:
        literal = [piece.text for index, piece in enumerate(model.pieces) if piece.kind == USER_DEFINED and index not in labels]
        # normalized: the piece may contain the space mark, which exists only after normalization.
        tokenizer.add_tokens([AddedToken(text, normalized=SPACE in text, special=False) for text in literal])
    return tokenizer


def merges_from_scores(pieces: Iterable[Piece]) -> list[tuple[str, str]]:
    """BPE merges, best first, that rebuild what sentencepiece does by piece scores.

    Every way to cut a piece into two pieces is a merge that ranks by the score of the whole.
    """
    mergeable = [piece for piece in pieces if piece.kind == 1]
    order = {piece.text: rank for rank, piece in enumerate(mergeable)}
    ranked = []
    for piece in mergeable:
        cuts = ((piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text)))
        merges = sorted((order[left], order[right], left, right) for left, right in cuts if left in order and right in order)
        ranked += [(-piece.score, left, right) for _, _, left, right in merges]
    ranked.sort(key=lambda merge: merge[0])  # stable: equal scores keep vocabulary order
    return [(left, right) for _, left, right in ranked]


def _normalizer(model: SentencePieceModel):
    steps = []
    if model.character_map:
        steps.append(normalizers.Precompiled(model.character_map))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(model: SentencePieceModel, *, first_space: bool):
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix or first_space else []))


def add_ends(tokenizer: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Have the tokens put before and after every text that the settings ask for, whatever a tokenizer.json says."""
    wanted = {"bos_token": files.settings.get("add_bos_token", True), "eos_token": files.settings.get("add_eos_token", False)}
    bos, eos = ([files.roles[role]] if wanted[role] and files.roles.get(role) else [] for role in wanted)
    known = [(token, tokenizer.token_to_id(token)) for token in {*bos, *eos}]
    single = [*bos, "$A", *eos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, *(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)], special_tokens=known
    )


def _with_added(vocabulary: dict[str, int], files: TokenizerFiles) -> dict[str, int]:
    return vocabulary | {token.content: token.id for token in files.added.values()}


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    # Only the first line may be a comment: "#" is also an ordinary token.
    lines = lines[1:] if lines[0].startswith("#version") else lines
    return [tuple(line.split(" ")) for line in lines if line]
