"""Sampling, decoding with a cache, and text from growing ids."""

import weakref
from dataclasses import replace

import pytest
import torch

from vlquant.decoder import Decoder, DecoderConfig, FloatLinear, KeyValueCache, LongRope, Rope, float_layer
from vlquant.errors import InvalidRequest
from vlquant.runtime.answer import AnswerText, PieceStream
from vlquant.runtime.conversation_cache import ConversationCache
from vlquant.runtime.decode_step import DecodeStep, attend_stored
from vlquant.runtime.generate import Decoding, Ending, Generation, shape_logits
from vlquant.runtime.sampling import choose, keep_top_k, keep_top_p, penalize_repetition

CONFIG = DecoderConfig(
    hidden_size=32,
    layers=2,
    heads=4,
    key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=60,
    norm_eps=1e-6,
    rope=Rope(10_000.0),
    max_positions=128,
)
STOP, PAD = 7, 0


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(11)
    sizes = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
    shapes = {f"self_attn.{name}": (rows, 32) for name, rows in sizes.items()}
    shapes |= {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
    layers = []
    for _ in range(CONFIG.layers):
        tensors = {f"{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
        tensors |= {f"{name}.weight": torch.ones(32) for name in ("input_layernorm", "post_attention_layernorm")}
        layers.append(float_layer(tensors, CONFIG))
    head = FloatLinear(torch.randn(60, 32))
    return Decoder(CONFIG, embedding=torch.randn(60, 32), layers=layers, norm=torch.ones(32), head=head)


def decode(decoder, prompts, *, stop=-1, reached=None, **options):
    """Rows and steps of a left-padded batch of id lists."""
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    ending = Ending(stop, PAD, reached) if reached else Ending(stop, PAD)
    decoding = Decoding(decoder, decoder.embed(ids), mask, generation=Generation(**options), ending=ending)
    steps = list(decoding)
    return decoding.rows, torch.stack(steps, dim=1)


def greedy_without_cache(decoder, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(decoder(decoder.embed(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cached_decoding_equals_uncached(decoder):
    rows, _ = decode(decoder, [[5, 9, 13]], max_new_tokens=20)
    assert rows[0] == greedy_without_cache(decoder, [5, 9, 13], 20)


def test_cached_logits_equal_uncached(decoder):
    ids = torch.randint(0, 60, (1, 12), generator=torch.Generator().manual_seed(2))
    whole = decoder(decoder.embed(ids), all_positions=True)
    cache = KeyValueCache(CONFIG, batch=1, capacity=12)
    parts = [decoder(decoder.embed(part), cache=cache, all_positions=True) for part in ids.split([5, 1, 4, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


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
