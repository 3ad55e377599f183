"""What calibration sees: every answer of a conversation as an answer, and the sums GPTQ is made from."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from vlquant.activations import WIDE, GramSum, InputRecorder, pass_on, record_inputs, run_half, watched
from vlquant.calib_data.conversations import Conversation
from vlquant.calib_data.samples import CalibrationScenes
from vlquant.calibrate import ANSWER, PICTURE, CalibrationInputs, encode_conversation
from vlquant.decoder import LINEARS, FloatLinear, float_layer
from vlquant.fitting import fitting_request, prompt_ids
from vlquant.hf_layout import STAGES
from vlquant.hidden_states import write_states
from vlquant.model import open_model
from vlquant.request import Request, encode_request

from tests.golden_folder import golden_folder

SOURCE = golden_folder() / "internlm2_internvl2_5"
PICTURES = [Image.new("RGB", (300, 200), color) for color in ("red", "blue")]
TURNS = [("What is it?", "a red box"), ("Are you sure?", "Yes, 12.50"), ("Read it.", "是")]


def answers_of(case, request, answer, most_tokens=4000):
    """The tokens of class ANSWER, as texts between stop tokens; and how many picture tokens there are."""
    ids, classes, _ = encode_conversation(Conversation("x", request, answer), case.config, case.tokenizer, most_tokens=most_tokens)
    text = case.tokenizer.decode(ids[classes == ANSWER].tolist(), skip_special=False)
    stop = case.config.chat.conversation.stop_token
    return [part.strip() for part in text.split(stop) if part.strip()], int((classes == PICTURE).sum())


def test_answers_of_all_turns_count_as_answers(case):
    """In the template and with the tokenizer of every golden checkpoint."""
    (last, final), history = TURNS[-1], TURNS[:-1]
    found, visual = answers_of(case, Request(last, images=PICTURES[:1], history=history), final)
    assert found == [answer for _, answer in TURNS]
    assert visual == case.config.chat.tokens_per_tile * answers_of_tiles(case)


def answers_of_tiles(case):
    return len(encode_request(Request("x", images=PICTURES[:1]), case.config, case.tokenizer).tiles)


def test_pictures_belong_where_the_conversation_says_or_to_its_first_turn(named_case):
    case = named_case("internlm2_internvl2_5")
    history = [("First <image>?", "one"), ("Now <image>", "two")]
    placed, _ = answers_of(case, Request("Both?", images=PICTURES, history=history), "three")
    unplaced, _ = answers_of(case, Request("Both?", images=PICTURES, history=[("First?", "one"), ("Now", "two")]), "three")
    assert placed == unplaced == ["one", "two", "three"]


def test_every_question_about_a_scene_is_asked_once():
    scenes = CalibrationScenes(22)
    for index in range(22):
        conversation = scenes[index]
        texts = [question for question, _ in conversation.request.history] + [conversation.request.question]
        assert len(set(zip(texts, [*(answer for _, answer in conversation.request.history), conversation.answer]))) == len(texts)
    assert any(len(scenes[index].request.history) >= 2 for index in range(22))


@pytest.fixture
def streams(tmp_path):
    """Random hidden states of two conversations, as the quantized model and the float model have them."""
    model, generator = open_model(SOURCE), torch.Generator().manual_seed(0)
    classes = (torch.tensor([1, 0, 0, 0, 2, 2]), torch.tensor([1, 1, 2]))
    inputs = CalibrationInputs(tmp_path, classes, model.config.decoder.hidden_size, layer=1)
    floats = replace(inputs, stream="floats")
    states = [torch.randn(1, len(each), inputs.width, generator=generator) for each in classes]
    write_states(floats.path, states)
    write_states(inputs.path, [each + 0.1 * torch.randn(each.shape, generator=generator) for each in states])
    return model, inputs, floats


def layer_with(model, change=1.0):
    """The second layer with all weights multiplied."""
    tensors = {name: tensor.float() for name, tensor in model.decoder_layer(1).items()}
    linears = {name: FloatLinear(tensors[f"{name}.weight"] * change, tensors.get(f"{name}.bias")) for name in LINEARS}
    return float_layer(tensors, model.config.decoder).with_linears(linears)


def test_sums_are_those_of_all_inputs_and_the_float_stream_goes_on(streams):
    """Stage by stage against inputs collected by running both layers whole."""
    model, inputs, floats = streams
    layer, original, largest = layer_with(model, 0.9), layer_with(model), {}
    for half in (STAGES[:2], STAGES[2:]):
        expected_states = torch.cat([run_half(floats, index, original, "cpu")[0] for index in range(2)])
        for stage in half:
            seen, after = record_inputs(inputs, floats, (layer, original), stage, device="cpu")
            x, f = (collected(stream, each, stage[0]) for stream, each in ((inputs, layer), (floats, original)))
            weights = token_weights(inputs, x)
            stacked = torch.cat([original.linears[name].weight for name in stage])
            torch.testing.assert_close(seen.hessian, (x * weights[:, None]).T @ x, rtol=1e-4, atol=1e-6)
            drift = (((f - x) @ stacked.T) * weights[:, None]).T @ x
            torch.testing.assert_close(seen.drift, drift, rtol=1e-3, atol=1e-5)
            assert torch.equal(seen.judging.rows, x) and torch.equal(seen.judging.floats, f)
        whole = torch.cat([run_half(inputs, index, layer, "cpu")[0] for index in range(2)])
        last = watched(layer.linears, largest)[half[1][0]]
        inputs, floats = pass_on(inputs, last, largest, device="cpu"), after
        torch.testing.assert_close(torch.cat([inputs.hidden(index)[0] for index in range(2)]), whole)
        assert largest["hidden state"] >= float(whole.abs().max()) * 0.999
        assert torch.equal(torch.cat([floats.hidden(index)[0] for index in range(2)]), expected_states)
    assert floats.layer == inputs.layer == 2 and not floats.half


def collected(inputs, layer, name):
    """All inputs of a linear, from a run of the whole half."""
    rows = []

    class Listening(FloatLinear):
        def __call__(self, x):
            rows.append(x.flatten(0, 1))
            return super().__call__(x)

    linear = layer.linears[name]
    listening = type(layer)(layer.config, {**layer.linears, name: Listening(linear.weight, linear.bias)}, layer.norms)
    for index in range(2):
        run_half(inputs, index, listening, "cpu")
    return torch.cat(rows)


def token_weights(inputs, rows):
    """Of every token by its class, less for those that are longer than ten times the median of their conversation."""
    classes, found = torch.cat(inputs.classes), []
    for part in rows.split([len(each) for each in inputs.classes]):
        norms = part.square().sum(1)
        found.append((10 * norms.median() / norms).clamp(max=1))
    return inputs.token_weights[classes] * torch.cat(found)


@pytest.mark.parametrize("shape", [(8, 64), (64, 16)], ids=["projected", "not projected"])
def test_both_ways_to_add_up_the_drift_give_the_same(shape):
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(shape, generator=generator), torch.randn(50, shape[1], generator=generator)
    f = x + 0.3 * torch.randn(x.shape, generator=generator)
    recorder = InputRecorder(weight, torch.full((3,), 1 / 50), torch.ones(3))
    recorder.add(x, f, torch.zeros(50, dtype=torch.long), judging=torch.arange(3), adds_up=True)
    assert recorder.projects == (shape == (8, 64))
    norms = x.square().sum(1)
    counted = ((10 * norms.median() / norms).clamp(max=1) / 50)[:, None]
    torch.testing.assert_close(recorder.seen().drift, ((f - x) @ weight.T * counted).T @ x, rtol=1e-3, atol=1e-5)


def test_only_the_first_conversations_and_the_judging_ones_are_compared(monkeypatch):
    """Hessian of all that decide; drift of those that run through the float model too, which stand for all."""
    monkeypatch.setattr("vlquant.calibrate.COMPARED_TOKENS", 50)
    classes = tuple(torch.tensor([0, 0, 1, 2]) for _ in range(40))
    inputs = CalibrationInputs(None, classes, 8)
    assert len(inputs.held_out) == 2 and inputs.held_out < set(inputs.compared) and len(inputs.compared) == 15
    generator = torch.Generator().manual_seed(3)
    recorder = InputRecorder(torch.randn(4, 8, generator=generator), torch.ones(3), inputs.judging.stands_for)
    rows = [torch.ones(4, 8) * (1 + index) for index in range(40)]
    for index, each in enumerate(rows):
        floats = each + 1 if index in inputs.compared else None
        recorder.add(each, floats, classes[index], judging=inputs.judging.positions[index], adds_up=index not in inputs.held_out)
    seen = recorder.seen()
    deciding = [index for index in range(40) if index not in inputs.held_out]
    compared = [index for index in deciding if index in inputs.compared]
    assert len(compared) == 13
    torch.testing.assert_close(seen.hessian, sum(rows[index].T @ rows[index] for index in deciding))
    drift = sum((torch.ones(4, 8) @ recorder.weight.T).T @ rows[index] for index in compared)
    torch.testing.assert_close(seen.drift, drift * len(deciding) / len(compared), rtol=1e-4, atol=1e-3)
    assert torch.equal(seen.judging.floats, seen.judging.rows + 1) and len(seen.judging.rows) == 8


def test_sums_in_eight_bits(monkeypatch):
    """Wide inputs with giant columns and tokens: every entry is as near as 8 bits of its two columns are, and no square is negative."""
    monkeypatch.setattr("vlquant.activations.has_byte_products", lambda: True)
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(600, WIDE, generator=generator) * torch.rand(WIDE, generator=generator).mul(6).exp()
    rows[:, 3] = 0
    rows[5] *= 20
    total = GramSum(WIDE, like=rows)
    assert total.in_eight_bits
    for part in rows.split(250):
        total.add_rows(part.clone())
    found, wanted = total.whole().double(), rows.double().T @ rows.double()
    scale = wanted.diagonal().sqrt().clamp(min=1e-30)
    apart = ((found - wanted) / scale[:, None] / scale).abs()
    assert apart.max() < 0.02 and apart.square().mean().sqrt() < 0.002
    assert ((found - found.T) / scale[:, None] / scale).abs().max() < 1e-6
    assert not found[3].any()
    assert torch.linalg.eigvalsh(found / scale[:, None] / scale).min() > -1e-4


def test_narrow_inputs_are_summed_as_they_are():
    assert not GramSum(WIDE - 1, like=torch.zeros(1)).in_eight_bits


def test_a_picture_keeps_its_tiles_when_its_answer_has_been_written(small_case):
    """Room for the longest answer is kept then too: the answer is about these tiles."""
    request = Request("<image>\nWhat is it?", images=[Image.new("RGB", (1800, 900), "red")])
    fit = partial(fitting_request, config=small_case.config, tokenizer=small_case.tokenizer, most_tokens=400)
    asked = fit(Conversation("x", request, None))
    written = fit(Conversation("x", request, "A box.", generated=True))
    assert asked.max_tiles == written.max_tiles < fit(Conversation("x", request, "A box.")).max_tiles


def test_an_interrupted_answer_has_no_end(small_case):
    stop = small_case.tokenizer.token_id(small_case.config.chat.conversation.stop_token)
    encode = partial(encode_conversation, config=small_case.config, tokenizer=small_case.tokenizer, most_tokens=400)
    whole, cut = (encode(Conversation("x", Request("Why?"), "Because of", generated=True, cut=cut)) for cut in (False, True))
    assert whole[0][-1] == stop and torch.equal(cut[0], whole[0][:-1]) and torch.equal(cut[1], whole[1][:-1])


def test_the_earliest_turns_make_room_for_the_answer(small_case):
    """Their pictures stay, in as many tiles as there is room for now; where leaving all of them out does not help, none is left out."""
    long = "word " * 400
    history = [("<image>\n<image>\n" + long, "one"), ("And?", "two")]
    found, visual = answers_of(small_case, Request("Both?", images=PICTURES, history=history), "three", most_tokens=400)
    assert found == ["two", "three"] and visual == 14 * small_case.config.chat.tokens_per_tile
    hopeless = Request(long, history=[("What?", "one")])
    assert answers_of(small_case, hopeless, "two", most_tokens=300)[0] == ["one"]


def test_prompts_are_counted_without_cutting_pictures(case):
    """Picture sizes give the same ids as the tiles."""
    history = [("First <image>?", "one")]
    pictures = [Image.new("RGB", size) for size in ((1400, 500), (300, 900))]
    for request in (Request("Now <image>?", images=pictures, history=history), Request("What?", video=PICTURES), Request("Hi")):
        asked = fitting_request(Conversation("x", request, "two"), case.config, case.tokenizer, most_tokens=5000)
        assert prompt_ids(asked, case.config, case.tokenizer) == encode_request(asked, case.config, case.tokenizer).ids
