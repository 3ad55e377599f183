"""Ids and texts of every tokenizer against the original, and the written tokenizer.json against our own."""

import json
import re

import pytest

from vlquant.errors import BrokenCheckpoint, UnsupportedCheckpoint
from vlquant.tokenizer import FLAVOURS, clean_up, load_tokenizer, write_fast_tokenizer


def texts_of(case):
    prompts = [conversation["prompt_with_runs"] for conversation in case.conversations]
    flat = [text for prompt in prompts for text in (prompt if isinstance(prompt, list) else [prompt])]
    return [entry["text"] for entry in case.header["tokenizer"] if "text" in entry] + flat


def test_ids(case):
    for entry in case.header["tokenizer"]:
        if "text" in entry:
            assert case.tokenizer.encode(entry["text"]) == entry["ids"], entry["text"]


def test_both_flavours(case):
    """Where the slow and the fast original disagree, the goldens hold both."""
    default = case.header["reference_tokenizer"]
    for flavour in FLAVOURS:
        tokenizer = load_tokenizer(case.folder, flavour)
        for entry in case.header["tokenizer"]:
            if "text" in entry:
                expected = entry["ids"] if flavour == default else entry.get(f"ids_{flavour}", entry["ids"])
                assert tokenizer.encode(entry["text"]) == expected, (flavour, entry["text"])


def test_both_flavours_of_prompts(case, conversation):
    """Prompts of single calls; a batch holds several."""
    if conversation["call"] == "batch_chat":
        return
    prompt = re.sub(r"\{(\d+) x (<IMG_CONTEXT>)\}", lambda run: run[2] * int(run[1]), conversation["prompt_with_runs"])
    for flavour in FLAVOURS:
        recorded = case.tensors.get(f"{conversation['key']}/input_ids_{flavour}", case.tensors[conversation["key"] + "/input_ids"])
        assert load_tokenizer(case.folder, flavour).encode(prompt) == recorded[0].tolist()


def test_an_unknown_flavour_is_refused(small_case):
    with pytest.raises(UnsupportedCheckpoint, match="slow or fast"):
        load_tokenizer(small_case.folder, "medium")


def test_texts(case):
    for entry in case.header["tokenizer"]:
        ids = entry.get("decode_ids", entry.get("ids"))
        assert case.tokenizer.decode(ids) == entry["decoded_skip_special"]
        assert case.tokenizer.decode(ids, skip_special=False) == entry["decoded"]


def test_every_id_has_its_embedding_row(case):
    assert case.tokenizer.vocabulary_size <= case.config.decoder.vocab_size


def test_a_run_of_bytes_is_not_settled(named_case):
    qwen2, internlm2 = named_case("qwen2_hermes2"), named_case("internlm2_chat_ntk")
    assert qwen2.tokenizer.unsettled(qwen2.tokenizer.encode("Hello")) == 0
    fast = load_tokenizer(internlm2.folder, "fast")
    first, last, broken = (fast.token_id(token) for token in ("<0x41>", "<0x42>", "<0xDD>"))
    ids = [first, *fast.encode("Hello"), last, broken]
    assert fast.unsettled(ids) == 2 and fast.unsettled(ids[:-2]) == 0 and fast.unsettled([]) == 0
    assert internlm2.tokenizer.unsettled(ids) == 0


def test_a_token_that_is_not_there(case):
    with pytest.raises(BrokenCheckpoint, match="<no such token>"):
        case.tokenizer.token_id("<no such token>")


@pytest.mark.interop
def test_the_written_tokenizer_gives_transformers_the_same_ids(case, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers reads the written tokenizer.json")
    write_fast_tokenizer(case.folder, tmp_path)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in texts_of(case):
        assert fast(text).input_ids == case.tokenizer.encode(text), text
    assert len(fast) == case.tokenizer.vocabulary_size
    assert (fast.pad_token_id or case.tokenizer.pad_id) == case.tokenizer.pad_id


def test_the_written_folder_reads_back_as_the_same_tokenizer(case, tmp_path):
    write_fast_tokenizer(case.folder, tmp_path)
    again = load_tokenizer(tmp_path)
    for text in texts_of(case):
        ids = case.tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids, skip_special=False) == case.tokenizer.decode(ids, skip_special=False)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in settings and "chat_template" not in settings


@pytest.fixture(params=[True, False], ids=["dummy prefix", "no dummy prefix"])
def trained(request, tmp_path, copied):
    """A freshly trained sentencepiece model with other settings than the goldens', and other added tokens."""
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat\nnumbers 12 345 and, punctuation!\nabababa ababa bababab\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(copied / "tokenizer"), vocab_size=330, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=request.param, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]"], minloglevel=2,
    )  # fmt: skip
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    tokens = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<|im_end|>", 330: "<img>", 331: "</img>", 340: "<IMG_CONTEXT>"}
    settings["added_tokens_decoder"] = {str(index): {"content": text, "special": True} for index, text in tokens.items()}
    settings["additional_special_tokens"] = list(tokens.values())[3:]
    (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    (copied / "added_tokens.json").unlink()
    (copied / "special_tokens_map.json").unlink()
    return copied


@pytest.mark.interop
def test_other_sentencepiece_settings_are_honoured(trained, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers reads the written tokenizer.json")
    written = tmp_path / "written"
    written.mkdir()
    write_fast_tokenizer(trained, written)
    ours, fast = load_tokenizer(trained), transformers.PreTrainedTokenizerFast.from_pretrained(written)
    assert ours.token_id("<|im_end|>") == 3 and ours.token_id("<IMG_CONTEXT>") == 340
    for text in ("", " ", "the cat", "  two  spaces ", "a<img><IMG_CONTEXT></img>\nthe mat<|im_end|> b", "é ☃ 12,", "abababab"):
        assert fast(text).input_ids == ours.encode(text), text
        if "<img>" not in text:
            assert ours.decode(ours.encode(text)) == text


def test_added_tokens_may_swallow_white_space(copied):
    path = copied / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    plain = load_tokenizer(copied)
    settings["added_tokens_decoder"]["798"] |= {"rstrip": True, "lstrip": True}
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert load_tokenizer(copied).encode("a  <|im_end|>\n b") == plain.encode("a<|im_end|>b")


def test_spaces_before_punctuation_are_cleaned_up_as_the_original_does(small_case):
    assert clean_up("so , it is n't he 's . ok ?") == "so, it isn't he's. ok?"
    ids = small_case.tokenizer.encode("so , what ?")
    assert small_case.tokenizer.decode(ids) == "so, what?"


def test_unusable_tokenizer_files(copied):
    config = copied / "tokenizer_config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("InternLM2Tokenizer", "T5Tokenizer"), encoding="utf-8")
    with pytest.raises(UnsupportedCheckpoint, match="T5Tokenizer"):
        load_tokenizer(copied)
    config.write_text(text, encoding="utf-8")
    (copied / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BrokenCheckpoint, match="tokenizer.model"):
        load_tokenizer(copied)
    (copied / "tokenizer.model").unlink()
    with pytest.raises(BrokenCheckpoint, match="none of tokenizer.model"):
        load_tokenizer(copied)
    config.unlink()
    with pytest.raises(BrokenCheckpoint, match="tokenizer_config.json"):
        load_tokenizer(copied)
