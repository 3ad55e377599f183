"""The whole way from a request to an answer, against what the original implementation answered (goldens)."""

import base64
import dataclasses
import io
import json

import pytest
import torch
from PIL import Image

from vlquant.config import read_config
from vlquant.errors import BrokenCheckpoint, InvalidRequest
from vlquant.model import float_decoder
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.request import Request, encode_answer, open_image
from vlquant.runtime import Answer, Generation, load
from vlquant.runtime.reader import position_limit

from tests.golden_folder import golden_folder
from tests.golden_requests import picture, pipeline, requests_of

GOLDEN = golden_folder()
SMALL = "qwen2_internvl2_5_vit6b"
GREEDY = Generation(max_new_tokens=24)


@pytest.fixture
def pipe():
    pipe = pipeline(GOLDEN / SMALL)
    pipe.position_limit, pipe.max_tiles = position_limit(pipe.config.decoder), None
    return pipe


@pytest.fixture(scope="module")
def recorded():
    """The calls recorded with the small checkpoint, by key."""
    golden = json.loads((GOLDEN / SMALL / "golden.json").read_text(encoding="utf-8"))
    return {turn["key"]: turn for turn in golden["conversations"]}


def test_answers_are_the_originals(case, conversation):
    pipe, requests = pipeline(case.folder), requests_of(pipeline(case.folder), conversation)
    answers = pipe.batch(requests, Generation(max_new_tokens=conversation["generation_config"]["max_new_tokens"]))
    assert [answer.text for answer in answers] == case.answers(conversation)
    for answer, ids in zip(answers, case.tensors[f"{conversation['key']}/generated_ids"], strict=True):
        assert list(answer.ids) == ids[: len(answer.ids)].tolist()
    if "history_out" in conversation and isinstance(requests[0], Request):
        assert [list(pair) for pair in answers[0].history] == conversation["history_out"]


def test_streams_say_what_ask_says(case):
    pipe = pipeline(case.folder)
    for key in ("text_unicode/turn1", "single_tile/turn1"):
        turn = next(turn for turn in case.conversations if turn["key"] == key)
        stream = pipe.stream(*requests_of(pipe, turn), generation=GREEDY)
        pieces = list(stream)
        assert "".join(pieces) == stream.answer.text == turn["response"]
        assert len(pieces) > 2
        assert list(stream.answer.ids) == case.tensors[f"{key}/generated_ids"][0].tolist()


def test_forced_logits_are_the_originals(case):
    key, pipe = "single_tile/turn1", pipeline(case.folder)
    turn = next(turn for turn in case.conversations if turn["key"] == key)
    ids = case.tensors[f"{key}/generated_ids"][0].tolist()
    (logits,) = pipe.answer_logits(requests_of(pipe, turn), [ids])
    torch.testing.assert_close(logits[0], case.tensors[f"{key}/prefill_logits"][0, -1], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits.max(-1).values, case.tensors[f"{key}/step_top_logit"][0], atol=1e-4, rtol=0)
    assert logits.argmax(-1).tolist() == ids


def test_forced_answers_in_a_batch_equal_the_uncached_decoder(pipe):
    requests = [Request("What is it?", images=[picture("rgba_300x200.png")], max_tiles=1), Request("Hello!")]
    answers = ["a panda", "one two three four"]
    batched = pipe.answer_logits(requests, answers)
    decoder = float_decoder(pipe.model)
    for request, text, logits in zip(requests, answers, batched, strict=True):
        encoded = pipe.encode(request)
        ids = encode_answer(text, encoded.prompt, encoded.ids, config=pipe.config, tokenizer=pipe.tokenizer)
        assert ids[-1] == pipe.tokenizer.token_id("<|im_end|>") and logits.shape == (len(ids), pipe.config.decoder.vocab_size)
        embeddings = decoder.embed(torch.tensor([[*encoded.ids, *ids[:-1]]])).clone()
        (visual,) = pipe.features([encoded])
        if visual is not None:
            places = torch.tensor(encoded.ids) == pipe.tokenizer.token_id("<IMG_CONTEXT>")
            embeddings[0, : len(encoded.ids)][places] = visual
        whole = decoder(embeddings, all_positions=True)[0, -len(ids) :]
        torch.testing.assert_close(logits, whole, atol=2e-5, rtol=0)


def test_answers_of_one_token_have_one_row_of_logits(pipe):
    encoded = pipe.encode(Request("Hello!"))
    short = pipe.answer_logits([encoded, encoded], [[5], [5, 6, 7]])
    assert [len(each) for each in short] == [1, 3]
    torch.testing.assert_close(short[0], short[1][:1])


def test_features_given_spare_the_vision_tower(pipe, monkeypatch):
    requests = [Request("What?", images=[picture("wide_1280x720.png")], max_tiles=2), Request("Hello!")]
    encoded = [pipe.encode(request) for request in requests]
    features = pipe.features(encoded)
    assert features[0].shape == (3 * 16, pipe.config.decoder.hidden_size) and features[1] is None
    expected = pipe.batch(requests, GREEDY)
    monkeypatch.setattr(pipe, "features", None)
    given = pipe.batch(encoded, GREEDY, features=features)
    assert [answer.ids for answer in given] == [answer.ids for answer in expected]


def test_equal_tiles_go_through_the_tower_once(pipe, monkeypatch):
    seen, session = [], pipe.tile_features.session
    monkeypatch.setattr(pipe.tile_features, "session", lambda pixels: seen.append(len(pixels)) or session(pixels))
    pipe.features([pipe.encode(Request("x"))])
    request = Request("What?", images=[picture("tall_360x640.png"), picture("tall_360x640.png")], max_tiles=4)
    (both,) = pipe.features([pipe.encode(request)])
    tiles = len(pipe.encode(request).tiles) // 2
    assert seen == [tiles]
    assert torch.equal(*both.chunk(2))
    pipe.features([pipe.encode(request)])
    assert seen == [tiles], "the next turn of a conversation shows the same pictures"


def test_ask_keeps_a_conversation_going(pipe):
    first = pipe.ask("What is shown?", [picture("square_448.png")], generation=GREEDY)
    assert isinstance(first, Answer) and first.history == (("<image>\nWhat is shown?", first.text),)
    second = pipe.ask("And why?", [picture("square_448.png")], history=first.history, generation=GREEDY)
    assert len(second.history) == 2 and second.tiles == first.tiles
    usage = second.usage
    assert usage.prompt_tokens > first.usage.prompt_tokens and usage.answer_tokens == len(second.ids)
    assert usage.ended_by in ("stop", "length") and min(usage.prompt_seconds, usage.answer_seconds) > 0


def test_every_form_of_a_picture_gives_one_answer(pipe):
    path = picture("rgba_300x200.png")
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    answers = {pipe.ask("What?", [form], generation=GREEDY).ids for form in (path, str(path), data, url, Image.open(path))}
    assert len(answers) == 1


def test_prompts_as_in_lmdeploy(pipe):
    path, generation = picture("rgba_300x200.png"), GREEDY
    plain, pictured = pipe.ask("Hi", generation=generation), pipe.ask("What?", [path], generation=generation)
    assert pipe("Hi", generation).ids == plain.ids
    assert pipe(("What?", Image.open(path)), generation).ids == pictured.ids
    assert [each.text for each in pipe(["Hi", ("What?", [path])], generation)] == [plain.text, pictured.text]
    assert pipe([Request("Hi")], generation)[0].ids == plain.ids


def test_messages_as_in_openai(pipe):
    path = str(picture("rgba_300x200.png"))
    opening = {
        "role": "user",
        "content": [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": path}}],
    }
    first = pipe.ask("What?", [path], generation=GREEDY)
    assert pipe([opening], GREEDY).ids == first.ids
    second = pipe.ask("Why?", [path], history=first.history, generation=GREEDY)
    messages = [opening, {"role": "assistant", "content": first.text}, {"role": "user", "content": "Why?"}]
    assert pipe(messages, GREEDY).ids == second.ids
    system = Request("Hi", system_message="Be brief.")
    assert pipe([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], GREEDY).ids == (
        pipe.ask(system, generation=GREEDY).ids
    )


@pytest.mark.parametrize(
    "prompt",
    [
        7,
        ("text",),
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        [{"role": "user", "content": [{"type": "audio"}]}],
    ],
    ids=str,
)
def test_prompts_that_mean_nothing_are_refused(pipe, prompt):
    with pytest.raises(InvalidRequest):
        pipe(prompt)


def test_sampling_is_repeatable_under_a_seed(pipe):
    generation = Generation(max_new_tokens=20, temperature=1.0, top_k=30, seed=5)
    answers = [pipe.ask("Tell me.", generation=generation) for _ in range(2)]
    assert answers[0].ids == answers[1].ids
    other = pipe.ask("Tell me.", generation=dataclasses.replace(generation, seed=6))
    assert other.ids != answers[0].ids


def test_a_stop_text_ends_the_answer(pipe):
    free = pipe.ask("Hello, who are you?", generation=GREEDY)
    stop = free.text[4:6]
    answer = pipe.ask("Hello, who are you?", generation=dataclasses.replace(GREEDY, stop=(stop,)))
    assert answer.text == free.text[: free.text.index(stop)].strip()
    assert answer.usage.ended_by == "stop" and len(answer.ids) < len(free.ids)


def test_the_pipelines_tile_limit_is_for_requests_that_do_not_say(pipe):
    pipe.max_tiles = 1
    image = [picture("wide_1280x720.png")]
    assert pipe.encode(Request("x", images=image)).tiles_per_image == [1]
    assert pipe.encode(Request("x", images=image, max_tiles=2)).tiles_per_image == [3]


def test_a_prompt_longer_than_the_context_names_lengths_and_the_way_out(pipe):
    pipe.position_limit = 40
    with pytest.raises(InvalidRequest, match="at most 40; lower --max-tiles"):
        pipe.ask("What?", [picture("wide_1280x720.png")], generation=GREEDY)
    with pytest.raises(InvalidRequest, match="at most 40; shorten the text"):
        pipe.ask("What? " * 40, images=None, generation=GREEDY)


def test_a_bundle_with_a_file_cut_short_is_not_loaded(tmp_path):
    folder = quantize(GOLDEN / SMALL, recipe=Recipe(method="bnb"), output=tmp_path / "bundle")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BrokenCheckpoint, match="incomplete: tokenizer.json .* quantize the model again"):
        load(folder, vision="torch")


def test_generation_ends_where_the_context_does(pipe):
    free = pipe.ask("Hello, who are you?", generation=GREEDY)
    pipe.position_limit = free.usage.prompt_tokens + 3
    answer = pipe.ask("Hello, who are you?", generation=GREEDY)
    assert answer.ids == free.ids[:3] and answer.usage.ended_by == "context"


def test_dynamic_rope_stretches_the_context():
    limits = [position_limit(read_config(GOLDEN / case).decoder) for case in ("qwen2_hermes2", "internlm2_chat_ntk")]
    assert limits == [32768, 192]


@pytest.mark.parametrize(
    "request_",
    [
        Request("one picture, more room <IMG_CONTEXT>", images=[picture("square_448.png")]),
        Request("And this?", images=[picture("square_448.png")], history=(("a", "b"),)),
        Request("x", images=["missing.png"]),
        Request("x", images=[b"no picture"]),
        Request("x", video="missing.mp4"),
        Request("x", max_tiles=0, images=[picture("square_448.png")]),
    ],
    ids=lambda request: request.question[:20] + str(request.images)[:12],
)
def test_requests_that_cannot_be_answered_are_refused(pipe, request_):
    with pytest.raises(InvalidRequest):
        pipe.ask(request_, generation=GREEDY)


def test_frames_make_a_video(pipe, recorded):
    frames = [open_image(picture(f"frame_{index}.png")) for index in range(4)]
    turn = recorded["video/turn1"]
    answer = pipe.ask("What is the red ball doing?", video=frames, generation=GREEDY)
    assert answer.text == turn["response"] and answer.tiles == (1, 1, 1, 1)


def test_only_pictures_need_the_exported_vision_tower():
    pipe = load(GOLDEN / SMALL)
    assert pipe.ask("Hello!", generation=GREEDY).ids
    with pytest.raises(InvalidRequest, match="vlquant export-vision .*vit6b"):
        pipe.ask("What is it?", [picture("rgba_300x200.png")])


@pytest.mark.parametrize("options", [{"vision": "tensorrt"}, {"device": "tpu9"}, {"device": "cuda:99"}, {"device": "meta"}], ids=str)
def test_what_is_not_there_cannot_be_chosen(options):
    with pytest.raises(InvalidRequest):
        load(GOLDEN / SMALL, **{"vision": "torch"} | options)


def test_nothing_to_load_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match="vlquant quantize"):
        load()


def test_an_empty_batch_is_answered_with_nothing(pipe):
    assert pipe.batch([]) == []


def test_the_picture_may_be_an_open_stream(pipe):
    image = Image.open(io.BytesIO(picture("rgba_300x200.png").read_bytes()))
    assert pipe(("What?", image), GREEDY).text == pipe.ask("What?", image, generation=GREEDY).text
