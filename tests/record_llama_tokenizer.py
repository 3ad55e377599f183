"""Made tests/data/llama_tokenizer.json: what transformers 4.37.2's LlamaTokenizer, slow and fast, makes of odd texts.

Run once, as `python tests/record_llama_tokenizer.py`, where transformers 4.37.2 and sentencepiece are installed. No golden covers
the tokenizer of InternVL2-40B (Yi): a sentencepiece model without bos, whose chat tokens lie inside its vocabulary.
"""

import base64
import json
import tempfile
from itertools import product
from pathlib import Path

import sentencepiece
import transformers

CORPUS = "the cat sat on the mat\nuser assistant system\nnumbers 12 345 and, punctuation! isn't it?\n你好，世界。图片\n"
CHAT = ("<|im_start|>", "<|im_end|>", "<|im_sep|>")
IMAGE = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
TEXTS = [
    "", " ", "  ", "\n", "▁", "the cat", " the cat", "  two  spaces ", "the\ncat\t!", "isn't it ? no , never", "12345", "é ☃ 😀 你好",
    "<|im_start|>system\nthe cat<|im_end|><|im_start|>user\nthe mat?<|im_end|><|im_start|>assistant\n",
    "<|im_start|> user", "the cat<|im_end|> the mat", " <|im_end|>", "<|im_end|><|im_end|>", "<|im_end|>\n<|im_end|>",
    "<img><IMG_CONTEXT><IMG_CONTEXT></img>\nthe cat", "the <box>[[1, 2]]</box> mat", "<s>the</s> cat<unk>", "▁the▁cat", "<|im_start", "<0x41>",
]  # fmt: skip


def main() -> None:
    model = trained_model()
    cases = []
    ends = [(True, False, True, True), (False, None, False, True)]
    for dummy_prefix, legacy, bos, eos in [*product((True, False), (True, False, None), (True, False), (False,)), *ends]:
        with tempfile.TemporaryDirectory() as folder:
            settings = write(Path(folder), model[dummy_prefix], legacy=legacy, bos=bos, eos=eos)
            slow = transformers.LlamaTokenizer.from_pretrained(folder)
            fast = transformers.LlamaTokenizerFast.from_pretrained(folder)
            entries = [
                {"text": text, "slow": slow(text).input_ids, "fast": fast(text).input_ids,
                 "decoded": slow.decode(slow(text).input_ids), "bare": slow.decode(slow(text).input_ids, skip_special_tokens=True)}
                for text in TEXTS
            ]  # fmt: skip
        cases.append({"dummy_prefix": dummy_prefix, "settings": settings, "entries": entries})
    models = {str(key): base64.b64encode(value).decode() for key, value in model.items()}
    out = Path(__file__).parent / "data" / "llama_tokenizer.json"
    out.write_text(json.dumps({"transformers": transformers.__version__, "models": models, "cases": cases}, ensure_ascii=False) + "\n")


def trained_model() -> dict[bool, bytes]:
    """tokenizer.model with and without add_dummy_prefix."""
    models = {}
    for dummy_prefix in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "corpus.txt").write_text(CORPUS * 40, encoding="utf-8")
            sentencepiece.SentencePieceTrainer.train(
                input=f"{folder}/corpus.txt", model_prefix=f"{folder}/m", vocab_size=380, model_type="bpe", byte_fallback=True,
                add_dummy_prefix=dummy_prefix, normalization_rule_name="identity", remove_extra_whitespaces=False,
                user_defined_symbols=list(CHAT), minloglevel=2,
            )  # fmt: skip
            models[dummy_prefix] = (Path(folder) / "m.model").read_bytes()
    return models


def write(folder: Path, model: bytes, *, legacy: bool | None, bos: bool, eos: bool) -> dict:
    """The files of a checkpoint's tokenizer; returns its settings."""
    (folder / "tokenizer.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = {pieces.piece_to_id(token): token for token in ("<unk>", "<s>", "</s>", *CHAT)}
    tokens |= {pieces.get_piece_size() + index: token for index, token in enumerate(IMAGE)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": bos, "add_eos_token": eos, "bos_token": "<s>",
        "eos_token": "<|im_end|>", "pad_token": "<unk>", "unk_token": "<unk>",
        "additional_special_tokens": [*CHAT, *IMAGE],
        "added_tokens_decoder": {str(index): {"content": token, **flags} for index, token in tokens.items()},
    }  # fmt: skip
    if not eos:
        settings["clean_up_tokenization_spaces"] = False
    if legacy is not None:
        settings["legacy"] = legacy
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return settings


if __name__ == "__main__":
    main()
