"""The terminal's table of a check: everything is in it, and nothing in it is taken for markup or control."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from vlquant.check_result import CheckResult
from vlquant.check_table import MOST_REASONS, print_result
from vlquant.check_words import grounds_by_name, interval_text
from vlquant.verdict import FAIL, INCONCLUSIVE

from tests.made_up_check import OUTCOMES, made_up, minimal


def printed(result: CheckResult, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_result(result, console)
    return console.file.getvalue()


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_number_is_there(outcome):
    result = made_up(outcome)
    text = one_line(printed(result))
    assert outcome in text and result.bundle in text and result.reference in text
    for kind in result.kinds:
        assert f"{kind.kind} {kind.questions} {100 * kind.verdict.reference:.2f} {100 * kind.quantized:.2f}" in text
        assert f"{kind.flips.lost} {kind.flips.won} {kind.verdict.outcome}" in text
    for word in ("mean KL", "likeliest token", "noise floor", "comes from", "faults", "worst tile 3 of", "layers layer", "truncated 0 -> 2"):
        assert word in text


def test_the_table_fits_eighty_columns():
    """A kind is one line, and its numbers are not cut."""
    result = made_up(INCONCLUSIVE)
    lines = printed(result).splitlines()
    for kind in result.kinds:
        (line,) = (line for line in lines if line.startswith(kind.kind + " "))
        assert interval_text(kind.verdict.difference) in line and line.rstrip().endswith(kind.verdict.outcome)
    assert max(map(len, lines)) <= 80


def test_every_ground_is_named():
    result = made_up(FAIL)
    text = one_line(printed(result, width=200))
    assert {ground.name for ground in result.verdict.grounds} == {"structure", "distribution", "accuracy"}
    for name, reasons in grounds_by_name(result.verdict).items():
        assert all(f"{name} {reason}" in text for reason in reasons[:MOST_REASONS])
        assert (f"{name} and {len(reasons) - MOST_REASONS} more in the report" in text) == (len(reasons) > MOST_REASONS)


def test_what_would_decide_is_said():
    result = made_up(INCONCLUSIVE)
    assert f"About {result.verdict.pictures_needed:,} pictures would decide" in one_line(printed(result))
    assert "allow more memory" in one_line(printed(minimal()))
    assert "score " not in printed(minimal())


def test_names_are_no_markup_and_no_escape_sequences():
    result = made_up(INCONCLUSIVE)
    kinds = (replace(result.kinds[0], kind="[red]a[/b]\x1b[2J"), replace(result.kinds[1], verdict=None, quantized=None, flips=None))
    text = printed(replace(result, bundle="x[/]\u202e", kinds=kinds), width=120)
    assert "[red]a[/b]⟨U+001B⟩[2J" in text and "x[/]⟨U+202E⟩" in text
    assert "\x1b" not in text and "\u202e" not in text
    assert "not scored" in text
