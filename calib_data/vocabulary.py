"""Make the demo model's tokenizer: InternLM2's file layout with a vocabulary learned from our questions."""

import io
import json
import re
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as protocol

from vlquant.calib_data.drawing import SYMBOLS
from vlquant.calib_data.samples import samples
from vlquant.prompt import TEMPLATES
from vlquant.special_tokens import IMAGE_TOKENS

RELABELLED = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
"""Take over the last pieces inside the sentencepiece vocabulary, as InternLM2's do."""
CONTROL = ("<unk>", "<s>", "</s>")
LEARNED_PIECES = 768


def write_tokenizer(folder: Path) -> int:
    """Write tokenizer.model and its three JSON files into `folder`; returns the vocabulary's size."""
    model = learn_pieces(corpus())
    for number, _ in enumerate(RELABELLED):
        piece = model.pieces.add()
        piece.piece, piece.score = f"[UNUSED_TOKEN_{number}]", 0.0
        piece.type = protocol.ModelProto.SentencePiece.USER_DEFINED
    model.trainer_spec.vocab_size = len(model.pieces)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    first_relabelled = len(model.pieces) - len(RELABELLED)
    ids = {token: index for index, token in enumerate(CONTROL)}
    ids |= {token: first_relabelled + index for index, token in enumerate(RELABELLED + IMAGE_TOKENS)}
    write_json(folder / "tokenizer_config.json", tokenizer_config(ids))
    write_json(folder / "added_tokens.json", {token: ids[token] for token in IMAGE_TOKENS})
    write_json(folder / "special_tokens_map.json", special_tokens())
    return len(model.pieces) + len(IMAGE_TOKENS)


def corpus() -> list[str]:
    """Questions with every drawn word and number taken out, and the fixed texts of the template."""
    template = TEMPLATES["internvl2_5"]
    lines = [template.system_message] * 400 + ["system\n", "user\n", "assistant\n"] * 400
    for sample in samples("train", 2200):
        for question in sample.questions:
            # Symbols must stay single pieces: a reader spells what it sees.
            lines.append(re.sub(rf"[{SYMBOLS}]{{2,}}|\d", "", question.text))
    return lines


def learn_pieces(lines: list[str]) -> protocol.ModelProto:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        model_type="bpe",
        vocab_size=LEARNED_PIECES,
        byte_fallback=True,
        hard_vocab_limit=False,
        split_by_unicode_script=False,
        split_digits=True,
        max_sentencepiece_length=24,
        required_chars=SYMBOLS + SYMBOLS.lower() + "[](),.:;?!'\"-+%/",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    model = protocol.ModelProto()
    model.ParseFromString(trained.getvalue())
    return model


def tokenizer_config(ids: dict[str, int]) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(index): {"content": token, **flags} for token, index in ids.items()},
        **special_tokens(),
        "chat_template": (
            "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
            "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "tokenizer_class": "InternLM2Tokenizer",
    }


def special_tokens() -> dict:
    return {
        "additional_special_tokens": [*reversed(RELABELLED), *IMAGE_TOKENS],
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
