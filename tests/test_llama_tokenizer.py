"""LlamaTokenizer in the settings of Yi's checkpoints, slow and fast, against what transformers 4.37.2 was recorded to give."""

import base64
import json
from pathlib import Path

import pytest

from vlquant.tokenizer import load_tokenizer, write_fast_tokenizer

RECORDED = json.loads((Path(__file__).parent / "data" / "llama_tokenizer.json").read_text(encoding="utf-8"))


def name_of(case):
    settings = case["settings"]
    return f"prefix {case['dummy_prefix']}, legacy {settings.get('legacy')}, bos {settings['add_bos_token']}, eos {settings['add_eos_token']}"


@pytest.fixture(params=RECORDED["cases"], ids=name_of)
def recorded(request, tmp_path):
    """(folder, entries) of one combination of settings."""
    case = request.param
    (tmp_path / "tokenizer.model").write_bytes(base64.b64decode(RECORDED["models"][str(case["dummy_prefix"])]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(case["settings"]))
    return tmp_path, case["entries"]


@pytest.mark.parametrize("flavour", ["slow", "fast"])
def test_ids(recorded, flavour):
    folder, entries = recorded
    tokenizer = load_tokenizer(folder, flavour)
    assert {each["text"]: tokenizer.encode(each["text"]) for each in entries} == {each["text"]: each[flavour] for each in entries}


def test_texts(recorded):
    folder, entries = recorded
    tokenizer = load_tokenizer(folder, "slow")
    assert [tokenizer.decode(each["slow"], skip_special=False) for each in entries] == [each["decoded"] for each in entries]
    assert [tokenizer.decode(each["slow"]) for each in entries] == [each["bare"] for each in entries]


def test_the_written_tokenizer_gives_the_default_ids(recorded, tmp_path):
    folder, entries = recorded
    written = tmp_path / "written"
    written.mkdir()
    write_fast_tokenizer(folder, written)
    default, again = load_tokenizer(folder), load_tokenizer(written)
    assert [again.encode(each["text"]) for each in entries] == [default.encode(each["text"]) for each in entries]


def test_a_tokenizer_json_is_subject_to_the_settings(recorded):
    """LlamaTokenizerFast puts its own ends on texts, whatever the file says."""
    folder, entries = recorded
    fast = load_tokenizer(folder, "fast")
    fast._backend.post_processor = None
    fast._backend.save(str(folder / "tokenizer.json"))
    default = load_tokenizer(folder)
    assert [default.encode(each["text"]) for each in entries] == [each["fast"] for each in entries]


@pytest.mark.interop
def test_transformers_reads_the_default_ids_from_the_written_tokenizer(recorded, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers reads the written tokenizer.json")
    folder, entries = recorded
    written = tmp_path / "written"
    written.mkdir()
    write_fast_tokenizer(folder, written)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(written)
    assert {each["text"]: fast(each["text"]).input_ids for each in entries} == {each["text"]: each["slow"] for each in entries}
