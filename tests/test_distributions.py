"""Distances of distributions against values worked out by hand."""

import math

import pytest
import torch

from vlquant.distributions import compare_logits, summarize_tokens

HALVES, QUARTERS = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()


def test_two_coins():
    # KL(1/2, 1/2 || 1/4, 3/4) = 1/2 ln 2 + 1/2 ln 2/3; the first side follows, whose probability falls from 1/2 to 1/4.
    found = compare_logits(HALVES, QUARTERS, [0])
    assert found.divergence.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found.probability_change.item() == pytest.approx(-0.25)
    assert found.reference_surprise.item() == pytest.approx(math.log(2))
    assert found.quantized_surprise.item() == pytest.approx(math.log(4))
    assert found.same_top.tolist() == [False]  # of two equals the first counts as likeliest


def test_the_same_is_no_distance_apart():
    logits = torch.randn(7, 100)
    found = compare_logits(logits, logits + 3, [0] * 7)  # a constant changes no distribution
    assert found.divergence.max() < 1e-6 and bool(found.same_top.all())


def test_what_the_reference_thinks_impossible_adds_nothing():
    wanted = torch.tensor([[0.0, -torch.inf]])
    assert compare_logits(wanted, HALVES, [0]).divergence.item() == pytest.approx(math.log(2))


def test_summary_over_tokens_of_all_answers():
    # Three tokens: twice no distance, once the two coins. The perplexity doubles on one of three: ratio 2^(1/3).
    same, apart = compare_logits(HALVES.repeat(2, 1), HALVES.repeat(2, 1), [0, 1]), compare_logits(HALVES, QUARTERS, [0])
    found = summarize_tokens([same, apart])
    divergence = apart.divergence.item()
    assert found.tokens == 3
    assert (found.mean_divergence, found.median_divergence) == (pytest.approx(divergence / 3), 0)
    assert (found.high_divergence, found.largest_divergence) == (0, pytest.approx(divergence))
    assert found.top_agreement == pytest.approx(2 / 3)
    assert found.mean_probability_change == pytest.approx(-0.25 / 3)
    assert found.probability_change_spread == pytest.approx(0.25 / math.sqrt(3))
    assert found.surprise_ratio == pytest.approx(2 ** (1 / 3))


def test_nothing_to_summarize():
    assert summarize_tokens([]) is None
