"""Sampling, decoding with a cache, and text from growing ids."""

import pytest
import torch

from vlquant.decoder import KeyValueCache
from vlquant.errors import InvalidRequest
from vlquant.runtime.answer import AnswerText, PieceStream
from vlquant.runtime.generate import Decoding, Ending, Generation, shape_logits
from vlquant.runtime.sampling import choose, keep_top_k, keep_top_p, penalize_repetition

from tests.small_decoder import CONFIG, PAD, greedy_without_cache, small_decoder

STOP = 7


@pytest.fixture(scope="module")
def decoder():
    return small_decoder()


def decode(decoder, prompts, *, stop=-1, reached=None, **options):
    """Rows and steps of a left-padded batch of id lists."""
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    ending = Ending(stop, PAD, reached) if reached else Ending(stop, PAD)
    decoding = Decoding(decoder, decoder.embed(ids), mask, generation=Generation(**options), ending=ending)
    steps = list(decoding)
    return decoding.rows, torch.stack(steps, dim=1)


def test_cached_decoding_equals_uncached(decoder):
    rows, _ = decode(decoder, [[5, 9, 13]], max_new_tokens=20)
    assert rows[0] == greedy_without_cache(decoder, [5, 9, 13], 20)


def test_cached_logits_equal_uncached(decoder):
    ids = torch.randint(0, 60, (1, 12), generator=torch.Generator().manual_seed(2))
    whole = decoder(decoder.embed(ids), all_positions=True)
    cache = KeyValueCache(CONFIG, batch=1, capacity=12)
    parts = [decoder(decoder.embed(part), cache=cache, all_positions=True) for part in ids.split([5, 1, 4, 1, 1], dim=1)]
    # Logits reach 22, and float32 sums in another order are up to 2.5e-5 apart (torch 2.7); a wrong position makes whole units.
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


def test_left_padded_rows_answer_as_if_alone(decoder):
    prompts = [[5, 9, 13, 21, 40], [33], [12, 8, 50]]
    rows, steps = decode(decoder, prompts, max_new_tokens=15)
    assert rows == [greedy_without_cache(decoder, prompt, 15) for prompt in prompts]
    assert steps.tolist() == rows


def test_a_row_that_ended_is_padded_and_the_rest_goes_on(decoder):
    free, _ = decode(decoder, [[5, 9, 13], [33]], max_new_tokens=12)
    stop = next(token for token in free[0] if token not in free[1])
    rows, steps = decode(decoder, [[5, 9, 13], [33]], max_new_tokens=12, stop=stop)
    end = free[0].index(stop) + 1
    assert rows == [free[0][:end], free[1]]
    assert steps[0].tolist() == free[0][:end] + [PAD] * (12 - end)


def test_decoding_ends_with_the_last_row(decoder):
    rows, steps = decode(decoder, [[5], [33]], max_new_tokens=50, reached=lambda ids: len(ids) == 4)
    assert steps.shape == (2, 4) and list(map(len, rows)) == [4, 4]


def test_sampling_is_repeatable_under_a_seed_and_free_of_neighbours(decoder):
    options = {"max_new_tokens": 25, "temperature": 1.5, "top_p": 0.95, "seed": 3}
    first, _ = decode(decoder, [[5, 9, 13], [33, 2]], **options)
    again, _ = decode(decoder, [[5, 9, 13], [33, 2]], **options)
    alone, _ = decode(decoder, [[33, 2]], **options)
    other, _ = decode(decoder, [[5, 9, 13], [33, 2]], **options | {"seed": 4})
    assert first == again and first != other
    assert first[1] == alone[0]


def test_without_a_seed_draws_differ(decoder):
    runs = [decode(decoder, [[5]], max_new_tokens=25, temperature=2.0)[0] for _ in range(2)]
    assert runs[0] != runs[1]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, 3)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    shares = torch.bincount(choose(logits, generators), minlength=3) / 4000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.03, rtol=0)


def test_top_one_is_greedy():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator() for _ in range(5)]
    assert torch.equal(choose(keep_top_k(logits, 1), generators), logits.argmax(-1))
    assert torch.equal(choose(keep_top_p(logits, 1e-6), generators), logits.argmax(-1))


def test_without_generators_the_first_of_the_largest_is_chosen():
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [-torch.inf, -5.0, -torch.inf, -6.0]])
    assert choose(logits, None).tolist() == [1, 1] and choose(logits, None).dtype == torch.int64
    wide = torch.randn(3, 1000)
    assert torch.equal(choose(wide[:, ::2], None), wide[:, ::2].argmax(-1))


LOGITS = torch.randn(3, 50, generator=torch.Generator().manual_seed(6)) * 3
ROWS = [[4, 9, 9, 30], [0, 1], [49, 48, 47]]


@pytest.mark.interop
@pytest.mark.parametrize("value", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_top_p_equals_transformers(value):
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    expected = logits_process.TopPLogitsWarper(value)(None, LOGITS) if value < 1 else LOGITS
    assert torch.equal(keep_top_p(LOGITS, value), expected)


@pytest.mark.interop
@pytest.mark.parametrize("count", [1, 2, 10, 50, 70])
def test_top_k_equals_transformers(count):
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    assert torch.equal(keep_top_k(LOGITS, count), logits_process.TopKLogitsWarper(count)(None, LOGITS))


@pytest.mark.interop
@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
    expected = torch.cat([processor(torch.tensor([row]), LOGITS[i : i + 1]) for i, row in enumerate(ROWS)])
    assert torch.equal(penalize_repetition(LOGITS, ROWS, penalty), expected)


@pytest.mark.interop
def test_everything_together_equals_transformers():
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    steps = [
        logits_process.RepetitionPenaltyLogitsProcessor(1.2),
        logits_process.TemperatureLogitsWarper(0.7),
        logits_process.TopKLogitsWarper(20),
        logits_process.TopPLogitsWarper(0.8),
    ]
    expected = LOGITS[:1]
    for step in steps:
        expected = step(torch.tensor([ROWS[0]]), expected)
    generation = Generation(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.2)
    assert torch.equal(shape_logits(LOGITS[:1], ROWS[:1], generation), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
        {"temperature": 1e-40},
        {"temperature": "0.5"},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": "5"},
        {"top_k": 2.5},
        {"seed": 1.5},
    ],
    ids=str,
)
def test_settings_nothing_could_be_generated_with_are_refused(options):
    with pytest.raises(InvalidRequest, match=next(iter(options))):
        Generation(**options)


def test_one_stop_text_may_be_given_bare():
    assert Generation(stop="END").stop == ("END",)


def byte_text(*stops):
    """Answer text over ids that are UTF-8 bytes."""
    return AnswerText(lambda ids: bytes(ids).decode("utf-8", errors="replace"), stops)


def pieces_of(text, data):
    stream = PieceStream(text)
    pieces = [stream.more(list(data[:count])) for count in range(1, len(data) + 1)]
    return [*pieces, stream.rest(list(data))]


@pytest.mark.parametrize("words", ["héllo 你好 😀!", "  spaces around  ", "it 's n't 've", "a" * 40, "\n\n", ""])
def test_pieces_add_up_to_the_answer_and_never_show_half_a_character(words):
    text, data = byte_text("<|im_end|>"), words.encode()
    pieces = pieces_of(text, data)
    assert "".join(pieces) == text.whole(list(data)) == words.strip()
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_shown_in_the_end():
    text, data = byte_text(), b"ok \xe4\xbd"
    assert "".join(pieces_of(text, data)) == "ok \ufffd"


def test_a_stop_text_ends_the_answer_and_is_never_shown():
    text, data = byte_text("<|im_end|>", "STOP"), b"one two ST OPS STOP three"
    pieces = pieces_of(text, data)
    assert "".join(pieces) == text.whole(list(data)) == "one two ST OPS"
    assert text.stopped(list(data)) and not text.stopped(list(b"one two ST"))


def test_pieces_arrive_while_the_answer_grows():
    pieces = pieces_of(byte_text("<|im_end|>"), b"alpha beta gamma")
    assert sum(map(bool, pieces)) > 10


def test_pieces_go_on_behind_text_that_was_read_anew():
    readings = {1: "ab", 2: "abc", 3: "aX", 4: "aXc and more"}
    stream = PieceStream(AnswerText(lambda ids: readings[len(ids)]))
    assert [stream.more([0] * n) for n in (1, 2, 3)] + [stream.rest([0] * 4)] == ["ab", "c", "", " and more"]
