"""From made-up answers to scores, kinds, flips and disagreements, worked out by hand."""

import pytest
import torch

from vlquant.asking import Asked
from vlquant.bundle import ModuleRecord
from vlquant.calib_data.check_questions import CheckQuestion
from vlquant.check_folder import file_name
from vlquant.distributions import TokenComparison
from vlquant.examination import Findings
from vlquant.findings_summary import (
    answer_tokens,
    differences,
    disagreements,
    flips_of,
    generated_result,
    histogram,
    kind_results,
    kind_scores,
    layer_errors,
    pairs_of,
)
from vlquant.kept_answers import KeptAnswer
from vlquant.metrics import Gold
from vlquant.request import Request
from vlquant.verdict import judge_kinds


def asked(number, picture, kind="text", gold="x", metric="verbatim", set_name="set", index=None):
    question = CheckQuestion(
        f"q{number}", picture=picture, kind=kind, index=index or str(number), text="?", request=Request("?"),
        gold=None if gold is None else Gold((gold,)), metric=metric, cells={},
    )  # fmt: skip
    return Asked(set_name, question)


def said(text, truncated=False):
    return KeptAnswer((1,), text, truncated)


@pytest.fixture
def findings():
    """Pictures a (two questions), b, c; the bundle loses one of a and wins c, and words one answer otherwise that nobody scores."""
    questions = [asked(0, "a"), asked(1, "a"), asked(2, "b"), asked(3, "c", "chart"), asked(4, "c", "chart", gold=None)]
    reference = [said("x"), said("x"), said("x"), said("y"), said("free")]
    quantized = [said("x"), said(""), said("x"), said("x"), said("other", True)]
    return Findings(asked=questions, reference=reference, quantized=quantized)


def test_scores_are_means_over_pictures(findings):
    pairs = pairs_of(findings)
    assert differences(pairs) == [-0.5, 0, 1]
    result = generated_result(pairs)
    assert (result.questions, result.reference, result.quantized) == (4, pytest.approx(2 / 3), pytest.approx((0.5 + 1 + 1) / 3))
    assert (result.flips.lost, result.flips.won, result.flips.changed) == (1, 1, 3)
    assert result.chance == 1.0  # one against one
    assert (result.reference_faults.truncated, result.quantized_faults.truncated, result.quantized_faults.empty) == (0, 1, 1)
    assert result.display.low <= result.display.mean <= result.display.high


def test_kinds(findings):
    scores = kind_scores(pairs_of(findings))
    assert [(each.kind, each.reference, each.differences) for each in scores] == [("text", 1.0, (-0.5, 0)), ("chart", 0.0, (1.0,))]
    compared = {number: comparison([0.5, 1.5]) for number in (3, 4)}
    text, chart = kind_results(findings.asked, pairs_of(findings), judge_kinds(scores, 0.01), compared)
    assert (text.kind, text.questions, text.quantized, text.divergence) == ("text", 3, 0.75, None)
    assert (chart.questions, chart.flips.won, chart.flips.changed, chart.divergence) == (2, 1, 2, 1.0)


def comparison(divergences, same=True):
    values = torch.tensor(divergences, dtype=torch.float64)
    return TokenComparison(values, torch.full((len(values),), same), values, values, values)


def test_tokens_are_added_up_by_picture(findings):
    tokens = answer_tokens(findings.asked, {0: comparison([1.0]), 1: comparison([2.0, 3.0], False), 2: comparison([4.0])})
    assert [(each.tokens, each.divergence, each.same_top) for each in tokens] == [(3, 6.0, 1), (1, 4.0, 1)]


def test_every_token_is_in_one_bin():
    bins = histogram([comparison([0.0, 5e-7, 0.02, 3.0, 1e12])])
    assert sum(each.tokens for each in bins) == 5 and bins[0].tokens == 2 and bins[-1].tokens == 1
    assert all(first.high == second.low for first, second in zip(bins, bins[1:], strict=False))
    assert histogram([]) == ()


def test_what_was_lost_comes_first(findings):
    found = disagreements(pairs_of(findings))
    assert [(number, each.reference_score, each.quantized_score) for number, each in found] == [(1, 1, 0), (3, 0, 1), (4, None, None)]
    assert found[2][1].gold == ()


def test_nobody_knows_what_is_right():
    findings = Findings(asked=[asked(0, "a", gold=None)], reference=[said("x")], quantized=[said("y")])
    assert generated_result(pairs_of(findings)) is None and flips_of(pairs_of(findings)).changed == 1


def test_one_model_did_not_answer():
    assert pairs_of(Findings(asked=[asked(0, "a")], reference=[said("x")])) == []


def test_answers_without_a_form_are_counted():
    findings = Findings(
        asked=[asked(0, "a", gold="yes", metric="yes_no")], reference=[said("Yes.")], quantized=[said("perhaps")]
    )  # fmt: skip
    result = generated_result(pairs_of(findings))
    assert (result.reference_faults.unparsed, result.quantized_faults.unparsed, result.quantized) == (0, 1, 0.0)


def test_published_scores_of_a_whole_set():
    questions = [asked(number, "a", "color", "yes", "yes_no", "MME") for number in (0, 1)]
    findings = Findings(asked=questions, reference=[said("Yes"), said("Yes")], quantized=[said("Yes"), said("No")])
    scores = generated_result(pairs_of(findings)).set_scores["MME"]
    # accuracy 100 and accuracy+ 100; after losing one of two questions about the picture 50 and 0.
    assert scores["color"] == (200.0, 50.0) and scores["total"] == (200.0, 50.0)


class Manifest:
    def __init__(self, *records):
        self.modules = [
            ModuleRecord(name=name, method="gptq", error=error, nearest_error=error, damping=None, fallback=False, class_errors=own)
            for name, error, own in records
        ]


def test_errors_by_layer():
    found = layer_errors(Manifest(
        ("model.language_model.layers.10.mlp.up_proj", 0.2, {"vision": 0.1}),
        ("model.language_model.layers.2.mlp.up_proj", 0.1, {}),
        ("model.language_model.layers.10.mlp.down_proj", None, {"vision": 0.3, "answer": 0.5}),
    ))  # fmt: skip
    assert [(each.layer, each.error) for each in found] == [(2, 0.1), (10, 0.2)]
    assert found[1].class_errors == {"vision": pytest.approx(0.2), "answer": 0.5}


def test_file_names_of_sets():
    assert [file_name(name) for name in ("DocVQA_VAL", "mein Satz/ä", "../x")] == ["DocVQA_VAL", "mein_Satz_ä", ".._x"]
