"""Two models side by side: each in its own process, what differs is marked, errors arrive."""

import io

import pytest
from rich.console import Console

from vlquant.compare import Told, compare, facts, marked, side_by_side, split_words
from vlquant.errors import BrokenCheckpoint
from vlquant.request import Request
from vlquant.runtime.generate import Generation
from vlquant.runtime.pipeline import load


def test_both_answer_as_chat_does(named_case):
    folders = [named_case(name).folder for name in ("internlm2_chat_ntk", "qwen2_hermes2")]
    generation, request = Generation(max_new_tokens=5), Request("What is the total?")
    console = Console(file=io.StringIO(), width=120, record=True)
    told = compare(folders, request, generation=generation, console=console)
    for each, folder in zip(told, folders, strict=True):
        answer = load(folder, vision="torch").ask(request, generation=generation)
        assert (each.name, each.text, each.tokens) == (folder.name, answer.text, len(answer.ids))
        assert each.done and each.first_token_seconds > 0 and each.peak_bytes > 10**8
    drawn = console.export_text()
    assert all(folder.name in drawn for folder in folders) and "tokens/s" in drawn


def test_what_cannot_be_loaded_is_said(tmp_path):
    with pytest.raises(BrokenCheckpoint, match="nowhere"):
        compare((tmp_path / "nowhere", tmp_path / "nowhere"), Request("?"), console=Console(file=io.StringIO()))


def test_words_that_differ_are_marked():
    first, second = marked("The total is 12.50 euros.", "The total is 13.50 euros.")
    spans = [(text.plain[span.start : span.end], str(span.style)) for text in (first, second) for span in text.spans]
    assert [text.strip() for text, style in spans if "underline" in style] == ["12.50", "13.50"]
    assert first.plain == "The total is 12.50 euros."


def test_scripts_without_spaces_are_compared_by_characters():
    assert split_words("合计 12 元") == ["合", "计 ", "12 ", "元"]
    (first, _) = marked("合计十二元", "合计十三元")
    assert [first.plain[span.start : span.end] for span in first.spans if "underline" in str(span.style)] == ["二"]


def test_what_is_not_known_is_left_out():
    assert facts(Told("m")) == "loading" and facts(Told("m", "a")) == "..."
    assert facts(Told("m", "a", 1, 0.5, None, None, True)) == "1 tokens, first after 0.50 s"
    assert side_by_side([Told("m"), Told("n")]).equal
