"""What a next turn takes over from the one before: the same answers, less to read, one cache at a time."""

import weakref
from dataclasses import replace

import pytest
import torch

from vlquant.decoder import Decoder
from vlquant.decoder_config import LongRope, Rope
from vlquant.runtime.conversation_cache import ConversationCache
from vlquant.runtime.decode_step import DecodeStep, attend_stored
from vlquant.runtime.generate import Decoding, Ending, Generation

from tests.small_decoder import CONFIG, PAD, greedy_without_cache, small_decoder


@pytest.fixture(scope="module")
def decoder():
    return small_decoder()


def said_with(decoder, memory, embeddings, *, count=6):
    """Ids of an answer, and how much of its prompt was known."""
    mask = torch.ones(1, len(embeddings), dtype=torch.bool)
    decoding = Decoding(
        decoder, embeddings[None], mask, generation=Generation(max_new_tokens=count), ending=Ending(-1, PAD), memory=memory,
    )  # fmt: skip
    return [int(ids) for ids in decoding], decoding.reused_tokens


def test_a_next_turn_reads_only_what_is_new(decoder):
    memory, first = ConversationCache(), torch.tensor([5, 9, 13, 21])
    said, reused = said_with(decoder, memory, decoder.embed(first))
    assert reused == 0
    second = torch.cat((first, torch.tensor(said), torch.tensor([40, 3])))
    again, reused = said_with(decoder, memory, decoder.embed(second))
    # The last token of an answer is never read while it is generated.
    assert reused == len(first) + len(said) - 1
    assert again == greedy_without_cache(decoder, second.tolist(), 6)
    changed = torch.cat((first[:2], torch.tensor([50]), second[3:]))
    third, reused = said_with(decoder, memory, decoder.embed(changed))
    assert reused == 2 and third == greedy_without_cache(decoder, changed.tolist(), 6)


def test_a_next_turn_knows_what_a_step_on_the_device_wrote(decoder, monkeypatch):
    # As on a GPU, but for the graph: there every step runs by itself as well, three times before it is captured.
    steps = []
    monkeypatch.setattr(
        "vlquant.runtime.generate.open_step",
        lambda decoder, cache, mask: steps.append(DecodeStep(decoder, cache, mask, attention=attend_stored)) or steps[-1],
    )
    memory, first = ConversationCache(), torch.tensor([5, 9, 13, 21])
    said, _ = said_with(decoder, memory, decoder.embed(first))
    second = torch.cat((first, torch.tensor(said), torch.tensor([40, 3])))
    again, reused = said_with(decoder, memory, decoder.embed(second))
    assert len(steps) == 2 and reused == len(first) + len(said) - 1
    assert said == greedy_without_cache(decoder, first.tolist(), 6) and again == greedy_without_cache(decoder, second.tolist(), 6)


def test_a_prompt_known_in_full_is_answered_again(decoder):
    memory, ids = ConversationCache(), torch.tensor([5, 9, 13, 21])
    said, _ = said_with(decoder, memory, decoder.embed(ids))
    again, reused = said_with(decoder, memory, decoder.embed(ids))
    assert (again, reused) == (said, len(ids) - 1)


def test_a_new_conversation_knows_nothing(decoder):
    memory, ids = ConversationCache(), torch.tensor([5, 9, 13, 21])
    said_with(decoder, memory, decoder.embed(ids))
    memory.forget()
    assert said_with(decoder, memory, decoder.embed(ids))[1] == 0


def test_two_answers_at_a_time_do_not_share_a_cache(decoder):
    memory, prompts = ConversationCache(), ([5, 9, 13], [5, 9, 40])
    running = [
        Decoding(
            decoder, decoder.embed(torch.tensor([ids])), torch.ones(1, 3, dtype=torch.bool), memory=memory,
            generation=Generation(max_new_tokens=8), ending=Ending(-1, PAD),
        )
        for ids in prompts
    ]  # fmt: skip
    for _ in zip(*running, strict=True):
        pass
    assert [each.rows[0] for each in running] == [greedy_without_cache(decoder, ids, 8) for ids in prompts]


def test_an_abandoned_answer_can_be_continued(decoder):
    memory, first = ConversationCache(), torch.tensor([5, 9, 13, 21])
    decoding = Decoding(
        decoder, decoder.embed(first)[None], torch.ones(1, 4, dtype=torch.bool), generation=Generation(max_new_tokens=8),
        ending=Ending(-1, PAD), memory=memory,
    )  # fmt: skip
    steps = iter(decoding)
    next(steps), next(steps)
    steps.close()
    second = torch.cat((first, torch.tensor(decoding.rows[0]), torch.tensor([3])))
    said, reused = said_with(decoder, memory, decoder.embed(second))
    assert reused == 5 and said == greedy_without_cache(decoder, second.tolist(), 6)


def test_keys_that_turn_with_the_length_are_not_reused(decoder):
    stretched = Decoder(
        replace(CONFIG, rope=Rope(10_000.0, dynamic_factor=2.0), max_positions=8), embedding=decoder.embedding,
        layers=decoder.layers, norm=decoder.norm, head=decoder.head,
    )  # fmt: skip
    memory, ids = ConversationCache(), torch.tensor([5, 9, 13, 21])
    said_with(stretched, memory, stretched.embed(ids))
    assert said_with(stretched, memory, stretched.embed(ids))[1] == 0


@pytest.mark.parametrize("rope", [Rope(10_000.0, dynamic_factor=2.0), Rope(10_000.0, long=LongRope((1.0,) * 4, (8.0,) * 4, 8))])
def test_keys_of_a_long_conversation_are_not_those_of_a_short_one(decoder, rope):
    config = replace(CONFIG, rope=rope, max_positions=8 if rope.dynamic_factor else 128)
    stretched = Decoder(config, embedding=decoder.embedding, layers=decoder.layers, norm=decoder.norm, head=decoder.head)
    memory, ids = ConversationCache(), torch.tensor([5, 9, 13, 21, 40, 3, 11, 8, 30])
    said_with(stretched, memory, stretched.embed(ids), count=1)
    said, reused = said_with(stretched, memory, stretched.embed(ids[:4]), count=2)
    assert reused == 0 and said == greedy_without_cache(stretched, ids[:4].tolist(), 2)


@pytest.mark.parametrize("second", [[5, 9, 13, 21, 40], [5, 9, 13, 21] * 10, [40, 3]])
def test_a_turn_has_one_cache(decoder, monkeypatch, second):
    made, new_cache = [], decoder.new_cache
    monkeypatch.setattr(decoder, "new_cache", lambda **asked: (made.append(weakref.ref(cache := new_cache(**asked))), cache)[1])
    memory = ConversationCache()
    said_with(decoder, memory, decoder.embed(torch.tensor([5, 9, 13, 21])))
    decoding = Decoding(
        decoder, decoder.embed(torch.tensor([second])), torch.ones(1, len(second), dtype=torch.bool), memory=memory,
        generation=Generation(max_new_tokens=6), ending=Ending(-1, PAD),
    )  # fmt: skip
    for _ in decoding:
        assert sum(each() is not None for each in made) == 1
    assert decoding.rows[0] == greedy_without_cache(decoder, second, 6)


@pytest.mark.parametrize("before, after, moved", [(8, 20, True), (8, 8, False), (12, 8, False), (20, 8, True)])
def test_a_kept_cache_goes_on(decoder, before, after, moved):
    x, cache = decoder.embed(torch.tensor([[5, 9, 13, 21, 40, 3, 11]])), decoder.new_cache(batch=1, capacity=before)
    wanted = decoder(x, cache=cache, all_positions=True)
    place = cache.layers[0].keys.data_ptr()
    cache.keep(4, after)
    assert cache.length == 4 and (cache.layers[1].keys.shape[2] == after) == (moved or before == after)
    assert (cache.layers[0].keys.data_ptr() != place) == moved
    torch.testing.assert_close(decoder(x[:, 4:], cache=cache, all_positions=True), wanted[:, 4:])
