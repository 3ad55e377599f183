"""A prompt that goes in by parts leaves the same logits and cache as one that goes in whole."""

from types import SimpleNamespace

import pytest
import torch

from vlquant.rope import rope_depends_on_length
from vlquant.runtime.prefill import prefill

EMPTY = SimpleNamespace(length=0)


@pytest.fixture(autouse=True)
def rows_alone(monkeypatch):
    """Rows of any length go in one by one, unless a number of tokens at a time is asked for."""
    monkeypatch.setattr("vlquant.runtime.prefill.ROWS_ALONE", 1)


def prompt(decoder, length, padding):
    embeddings = torch.randn(2, length, decoder.config.hidden_size, generator=torch.Generator().manual_seed(1)) * 0.1
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :padding] = False
    return embeddings, mask


def outcome(decoder, embeddings, mask, **options):
    cache = decoder.new_cache(batch=2, capacity=embeddings.shape[1])
    return prefill(decoder, embeddings, mask, cache, **options), cache


@pytest.mark.parametrize("padding", [0, 3, 6], ids="padded by {}".format)
@pytest.mark.parametrize("at_a_time", [1, 5, 8, 100])
@torch.inference_mode()
def test_parts_equal_the_whole(case, padding, at_a_time):
    embeddings, mask = prompt(case.decoder, 13, padding)
    whole, whole_cache = outcome(case.decoder, embeddings, mask)
    parts, cache = outcome(case.decoder, embeddings, mask, at_a_time=at_a_time)
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-5)
    for one, other in zip(cache.layers, whole_cache.layers, strict=True):
        assert one.length == other.length == 13
        torch.testing.assert_close(one.keys[1, :, padding:], other.keys[1, :, padding:], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(one.values[0], other.values[0], atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_what_lay_in_the_cache_before_padding_does_not_matter(case):
    embeddings, mask = prompt(case.decoder, 9, 4)
    mask, found = torch.cat((mask, torch.ones(2, 1, dtype=torch.bool)), 1), []
    for before in (0.0, float("nan")):
        cache = case.decoder.new_cache(batch=2, capacity=10)
        for layer in cache.layers:
            layer.keys.fill_(before), layer.values.fill_(before)
        prefill(case.decoder, embeddings, mask[:, :9], cache)
        found.append(case.decoder(embeddings[:, :1], attention_mask=mask, cache=cache))
    assert found[0].isfinite().all() and torch.equal(*found)


@torch.inference_mode()
def test_a_prompt_that_changes_the_rope_goes_in_whole(named_case, monkeypatch):
    """Keys of the original are all rotated for the whole prompt's length."""
    decoder = named_case("internlm2_chat_ntk").decoder
    length = decoder.config.max_positions + 1
    assert rope_depends_on_length(decoder.config, length)
    lengths = []

    def recorded(embeddings, **options):
        lengths.append(embeddings.shape[1])
        return torch.zeros(2, 1, 3)

    recorded.config = decoder.config
    embeddings, mask = prompt(decoder, length, 0)
    prefill(recorded, embeddings, mask, EMPTY, at_a_time=100)
    prefill(recorded, embeddings[:, :-1], mask[:, :-1], EMPTY, at_a_time=length - 2)
    assert lengths == [length, length - 2, 1]


@pytest.mark.parametrize("shortest, asked", [(9, [13, 9]), (10, [13])])
@torch.inference_mode()
def test_short_rows_go_in_together(case, monkeypatch, shortest, asked):
    monkeypatch.setattr("vlquant.runtime.prefill.ROWS_ALONE", shortest)
    lengths, run_layers = [], case.decoder.run_layers
    monkeypatch.setattr(case.decoder, "run_layers", lambda hidden, *args, **more: lengths.append(hidden.shape[1]) or run_layers(hidden, *args, **more))
    outcome(case.decoder, *prompt(case.decoder, 13, 4))
    assert lengths == asked
