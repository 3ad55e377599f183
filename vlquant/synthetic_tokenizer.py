"""A small working tokenizer in the files, classes and special ids of each family, for models of random weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from vlquant.sentencepiece_model import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, Piece, SentencePieceModel, serialize
from vlquant.slow_tokenizer import SENTENCEPIECE_FILE, SPACE
from vlquant.special_tokens import IMAGE_TOKENS

CONTROLS = {"<unk>": 0, "<s>": 1, "</s>": 2}
CHATML = ("<|im_start|>", "<|im_end|>")
PHI3_TURNS = {"<|endoftext|>": 32000, "<|assistant|>": 32001, "<|system|>": 32006, "<|end|>": 32007, "<|user|>": 32010}
QWEN_TURNS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
LLAMA3_TURNS = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|im_start|>": 128002, "<|im_end|>": 128003}


@dataclass(frozen=True)
class Layout:
    """Where a family has its special tokens, and in which files."""

    tokenizer_class: str
    first_image_token: int
    turns: Mapping[str, int]
    roles: Mapping[str, str]
    pieces: int = 0
    """Of a sentencepiece model; 0: byte-level."""
    settings: Mapping = ()


LAYOUTS = {
    ("InternLM2ForCausalLM", 92553): Layout(
        "InternLM2Tokenizer", 92544, {"<|im_end|>": 92542, "<|im_start|>": 92543},
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}, pieces=92544,
    ),
    ("Phi3ForCausalLM", 32020): Layout(
        "LlamaTokenizer", 32011, PHI3_TURNS,
        {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"},
        pieces=32000, settings={"legacy": False},
    ),
    ("LlamaForCausalLM", 64009): Layout(
        "LlamaTokenizer", 64000, {"<|im_start|>": 63998, "<|im_end|>": 63999},
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>", "unk_token": "<unk>"},
        pieces=64000, settings={"legacy": False, "add_bos_token": False},
    ),
    ("LlamaForCausalLM", 128265): Layout(
        "PreTrainedTokenizerFast", 128256, LLAMA3_TURNS, {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}
    ),
    ("Qwen2ForCausalLM", 151655): Layout(
        "Qwen2Tokenizer", 151646, QWEN_TURNS, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    ),
    ("Qwen2ForCausalLM", 151674): Layout(
        "Qwen2Tokenizer", 151665, QWEN_TURNS, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    ),
    ("Qwen3ForCausalLM", 151936): Layout(
        "Qwen2Tokenizer", 151669, QWEN_TURNS, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    ),
}  # fmt: skip
"""By class of the language model and size of its vocabulary."""


def write_synthetic_tokenizer(folder: Path, architecture: str, vocab_size: int) -> None:
    """Write the tokenizer files of a family into `folder`; raises KeyError for one that is not in LAYOUTS."""
    layout = LAYOUTS[architecture, vocab_size]
    images = {token: layout.first_image_token + index for index, token in enumerate(IMAGE_TOKENS)}
    added = {**(CONTROLS if layout.pieces else {}), **layout.turns, **images}
    if layout.pieces:
        (folder / SENTENCEPIECE_FILE).write_bytes(serialize(sentencepiece_model(layout.pieces)))
    elif layout.tokenizer_class == "Qwen2Tokenizer":
        _write(folder / "vocab.json", byte_vocabulary(added))
        (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    else:
        byte_level_json(layout, added).save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", settings_of(layout, added))


def settings_of(layout: Layout, added: Mapping[str, int]) -> dict:
    """tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "single_word": False, "special": True}
    swallows = {token for token in layout.turns if layout.turns is PHI3_TURNS and token != "<|endoftext|>"}
    return {
        "added_tokens_decoder": {
            str(index): {"content": token, "rstrip": token in swallows, **flags}
            for token, index in sorted(added.items(), key=lambda item: item[1])
        },
        "additional_special_tokens": [*layout.turns, *IMAGE_TOKENS],
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": layout.tokenizer_class,
        **layout.roles,
        **dict(layout.settings),
    }


def sentencepiece_model(count: int) -> SentencePieceModel:
    """Bytes and printable ASCII, filled up with unused pieces to `count`."""
    pieces = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL)]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    texts = [SPACE, *map(chr, range(33, 127))]
    pieces += [Piece(text, -float(rank), NORMAL) for rank, text in enumerate(texts)]
    pieces += [Piece(f"[UNUSED_TOKEN_{index}]", 0.0, UNUSED) for index in range(count - len(pieces))]
    return SentencePieceModel(tuple(pieces), BPE, b"", add_dummy_prefix=False, remove_extra_whitespaces=False)


def byte_vocabulary(added: Mapping[str, int]) -> dict[str, int]:
    """Byte-level BPE's 256 characters, and unused pieces for the other ids below those of added tokens.

    Without them tokenizers before 0.23 prints every missing id on standard output when it writes tokenizer.json.
    """
    characters = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    missing = set(range(len(characters), max(added.values()))) - set(added.values())
    return {**characters, **{f"[UNUSED_TOKEN_{index}]": index for index in sorted(missing)}}


def byte_level_json(layout: Layout, added: Mapping[str, int]) -> tokenizers.Tokenizer:
    """A tokenizer.json in Llama 3's style: bytes, and bos in front."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={**byte_vocabulary(added), **added}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in added])
    bos = layout.roles["bos_token"]
    backend.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, added[bos])])
    return backend


def _write(path: Path, contents: dict) -> None:
    path.write_text(json.dumps(contents, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
