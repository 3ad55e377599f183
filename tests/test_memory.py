"""The arithmetic of memory: against the table worked out by hand for eleven gigabytes, and properties that hold for every model."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from vlquant.config import parse_config
from vlquant.layout import language_shapes, tensor_shapes
from vlquant.members import MEMBERS, member_config
from vlquant.memory import COMPILED, FORMS, HALF, PLACES, SINGLE, TEXT_TOKENS, Form, Weights, linear_names, model_memory, prompt_bytes, running_place, vision_bytes, work_bytes

BY_HAND = {
    "InternVL2_5-1B": (0.19, 0.27, 0.27, 0.62, 0.10, 2.6),
    "InternVL2_5-2B": (0.78, 0.38, 0.38, 0.63, 0.81, 4.2),
    "InternVL2_5-4B": (1.44, 0.62, 0.62, 0.63, 0.30, 4.8),
    "InternVL2_5-8B": (3.63, 0.76, 0.76, 0.68, 1.07, 8.3),
    "InternVL2_5-26B": (9.73, 1.14, 1.14, 11.3, 1.61, None),
    # Its rope changes beyond 4,096 positions, so that a prompt goes in whole: 1.3 GB of float32 for 8,192 tokens instead of 0.3.
    "Mini-InternVL-Chat-4B-V1-5": (1.88, 0.20, 0.20, 0.65, 3.22, 8.5),
}
"""GB of linears in 4 bits, embedding, head, tower in fp16, 8K of keys and values in fp16, and all: independent of this code."""


def config_of(name):
    return parse_config(member_config(MEMBERS[name]), name)


def held(name, form=HALF):
    config = config_of(name)
    return Weights(config, dict.fromkeys(linear_names(language_shapes(config.decoder)), form))


def memory_of(name, form, *, device="cuda", vision="fp16", context=8192, tiles=13):
    weights = held(name, form)
    return model_memory(weights, running_place(PLACES[device], weights), vision=vision, context=context, tiles=tiles)


@pytest.mark.parametrize("name", BY_HAND)
def test_four_bits_in_eleven_gigabytes_as_worked_out_by_hand(name):
    memory = memory_of(name, FORMS["GPTQ-4"])
    *parts, total = BY_HAND[name]
    found = (memory.linears, memory.embedding, memory.head, memory.vision, memory.cache)
    # The table is rounded to 0.01 GB, and leaves norms and biases out.
    assert [each / 1e9 for each in found] == [pytest.approx(each, abs=0.006 + 0.01 * each) for each in parts]
    if total is not None:
        assert memory.total / 1e9 == pytest.approx(total, rel=0.1) and memory.total < 11e9
    else:
        assert memory.total > 24.9e9


def test_other_formats_of_8b_as_worked_out_by_hand():
    linears = {method: memory_of("InternVL2_5-8B", FORMS[method]).linears / 1e9 for method in FORMS}
    assert linears["NF4"] == pytest.approx(3.93, rel=0.01) and linears["int8"] == pytest.approx(6.98, rel=0.01)
    assert memory_of("InternVL2_5-8B", HALF).linears / 1e9 == pytest.approx(14, rel=0.01)
    assert memory_of("InternVL2_5-8B", FORMS["int8"]).total > 11e9
    assert memory_of("InternVL2_5-8B", FORMS["GPTQ-4"], vision="fp32").total / 1e9 == pytest.approx(9.0, rel=0.1)


def test_a_prompt_on_a_gpu_is_computed_in_parts_in_float32():
    """By hand for InternVL2_5-8B after 8,192 tokens: hidden 4096, 32 heads of 128 with 8 of keys, 14336 between."""
    config, place = config_of("InternVL2_5-8B").decoder, PLACES["cuda"]
    part = 1024 * (4 * 4096 + max(7 * 4096 + 2 * 1024, 2 * 14336))
    whole = 8192 * (2 * 4096 + 4 * 128 + 2 * 1024)  # Embeddings, rotations, keys and values of a layer as numbers of 32 bits.
    masks = 4 * 1024 * 8192 * (1 + 4)
    assert prompt_bytes(config, place, 8192) == 4 * (part + whole) + masks
    assert part * 4 < prompt_bytes(config, place, 1024) < part * 4 + 1024 * 4 * 10_000  # Plainly causal: no mask.


def test_a_prompt_whose_rope_depends_on_its_length_goes_in_whole_on_a_gpu():
    config, place = config_of("Mini-InternVL-Chat-4B-V1-5").decoder, PLACES["cuda"]
    assert config.rope.long.short_reach == 4096
    each = 4 * (4 * 3072 + 7 * 3072 + 2 * 3072)
    assert prompt_bytes(config, place, 4097) == 4097 * each and prompt_bytes(config, place, 4096) < 0.75 * 4096 * each
    # The compiled kernels rotate the whole before they cut it.
    assert prompt_bytes(config, COMPILED, 4097) < 0.5 * 4097 * each


def test_a_tower_takes_memory_only_with_tiles():
    config = config_of("InternVL2_5-1B")
    none, one = (work_bytes(config, COMPILED, context=512, tiles=tiles) for tiles in (0, 1))
    scores = 4 * 1025 * 16 * 1025
    assert none < 30_000_000 and one - none > scores


def test_26b_fits_in_no_form():
    smallest = [memory_of("InternVL2_5-26B", form, vision=vision, context=TEXT_TOKENS, tiles=0) for form in FORMS.values() for vision in ("fp16", "int8")]
    assert min(each.total for each in smallest) > 11e9


def test_a_matrix_takes_its_codes_and_its_scales():
    assert FORMS["GPTQ-4"].matrix_bytes(256, 384) == 256 * 384 // 2 + 256 * 3 * 2
    assert FORMS["int8"].matrix_bytes(256, 384) == 256 * 384 + 256 * 4
    assert Form(4, 128, 2).matrix_bytes(1, 130) == 65 + 2 * 2
    assert (HALF.matrix_bytes(3, 5), SINGLE.matrix_bytes(3, 5)) == (30, 60)
    assert Form(4, 128, 6, in_order=False).matrix_bytes(256, 384) == 256 * 384 // 2 + 256 * 3 * 6 + 384 * 8


@pytest.mark.parametrize(
    ("form", "head_bits", "kernels", "compiled"),
    [
        (FORMS["GPTQ-4"], 8, True, True), (FORMS["GPTQ-8"], 8, True, True), (FORMS["int8"], 8, True, True),
        (Form(4, 896, 2), 8, True, True), (Form(3, 128, 2), 8, True, False), (FORMS["NF4"], 8, True, False),
        (HALF, 8, True, False), (FORMS["GPTQ-4"], 8, False, False), (Form(4, 128, 6), 8, True, False),
        (Form(4, 128, 2, in_order=False), 8, True, False), (Form(4, 16, 2), 8, True, False),
    ],
)  # fmt: skip
def test_the_compiled_kernels_run_what_they_know(form, head_bits, kernels, compiled):
    weights = replace(held("InternVL2_5-1B", form), head_bits=head_bits)
    place = running_place(PLACES["cpu"], weights, kernels=kernels)
    assert (place == COMPILED) == compiled
    packed = kernels and form.group_size is not None and form != FORMS["NF4"]
    assert (place.head is not None) == packed  # Of a quantized model they take the head in any case.
    assert running_place(PLACES["cuda"], weights, kernels=kernels) is PLACES["cuda"]


def test_heads_of_odd_width_and_stored_heads_are_left_to_torch():
    weights = held("InternVL2_5-1B", FORMS["GPTQ-4"])
    odd = replace(weights, config=replace(weights.config, decoder=replace(weights.config.decoder, head_dim=72)))
    assert running_place(PLACES["cpu"], odd).embedding is None
    stored = running_place(PLACES["cpu"], replace(weights, head_bits=16))
    assert (stored.head, stored.expands_head, stored.loading) == (None, True, 0)
    # What others quantized is packed at every load, in memory, which leaves something behind.
    assert running_place(PLACES["cpu"], replace(weights, in_bundle=False)) == replace(COMPILED, loading=PLACES["cpu"].loading)
    # Its head is expanded in blocks of 16 Mi weights.
    more = work_bytes(weights.config, stored, context=512, tiles=0) - work_bytes(weights.config, COMPILED, context=512, tiles=0)
    assert more == 4 * 16 * 2**20


@pytest.mark.parametrize("name", ["InternVL2_5-1B", "InternVL2-40B", "InternVL2-4B"])
def test_in_float_every_parameter_is_counted_once(name):
    """Embedding, head and linears in float32, the tower in float32: four bytes for each parameter there is."""
    weights = replace(held(name, SINGLE), embedding=SINGLE, head=SINGLE)
    memory = model_memory(weights, PLACES["cpu"], vision="fp32", context=TEXT_TOKENS + 256, tiles=1)
    parameters = sum(map(math.prod, tensor_shapes(weights.config).values()))
    assert memory.linears + memory.embedding + memory.head + memory.vision == 4 * parameters


def test_a_tied_head_is_held_once():
    tied, apart = memory_of("InternVL3_5-4B", HALF), memory_of("InternVL3_5-8B", HALF)
    assert tied.head == 0 and apart.head == apart.embedding > 0


def test_precisions_of_the_tower_are_in_order():
    config = config_of("InternVL2_5-1B")
    single, half, int8 = (vision_bytes(config, precision) for precision in ("fp32", "fp16", "int8"))
    assert single == 2 * half and half > int8 > single / 4


def test_layers_that_do_not_run_are_not_exported():
    config = config_of("InternVL2_5-1B")
    earlier = replace(config, vision=replace(config.vision, select_layer=-4))
    assert vision_bytes(earlier, "fp32") < vision_bytes(config, "fp32")


@settings(deadline=None)
@given(
    name=some.sampled_from(sorted(MEMBERS)),
    form=some.sampled_from([HALF, *FORMS.values()]),
    device=some.sampled_from(sorted(PLACES)),
    tiles=some.integers(0, 40),
    text=some.integers(0, 9000),
    more=some.integers(1, 3000),
)
def test_more_context_or_tiles_never_take_less(name, form, device, tiles, text, more):
    context = tiles * 256 + text
    at = [(context, tiles), (context + more, tiles), (context + more, tiles + 1)]
    totals = [memory_of(name, form, device=device, vision="fp32", context=context, tiles=tiles).total for context, tiles in at]
    assert totals == sorted(totals) and totals[0] < totals[1]


def test_a_text_needs_no_tower_where_the_first_picture_loads_it():
    def vision_of(device, tiles):
        return memory_of("InternVL2_5-1B", FORMS["GPTQ-4"], device=device, vision="fp32", context=TEXT_TOKENS + 256 * tiles, tiles=tiles).vision

    assert vision_of("cpu", 0) == 0 < vision_of("cpu", 1) == vision_of("cpu", 2)
    assert vision_of("cuda", 0) == vision_of("cuda", 1) > 0
