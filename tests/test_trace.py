"""Traces hold what the original was recorded to compute, call by call, and their first difference is named."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlquant.errors import InvalidRequest, OutputRefused
from vlquant.trace import trace
from vlquant.trace_difference import first_difference

TOLERANCE = 1e-4


def request_of(case, conversations):
    """A request file's contents for recorded calls."""
    calls = []
    for each in conversations:
        images = [{"file": str(case.folder.parent / "images" / image["file"]), "max_num": image["max_num"]} for image in each["images"]]
        fields = {"key": each["key"], "call": each["call"], "images": images or None}
        fields["max_new_tokens"] = each["generation_config"]["max_new_tokens"]
        if each["call"] == "chat":
            history = each["history_in"]
            fields |= {"question": each["question"], "history": history, "num_patches_list": each["num_patches_list"]}
        else:
            counts = each["num_patches_list"] or [image["tiles"] for image in each["images"]]
            fields |= {"questions": each["questions"], "num_patches_list": counts}
        calls.append(fields)
    return {"calls": calls}


def write_request(path, contents):
    path.write_text(json.dumps(contents), encoding="utf-8")
    return path


def traced(case, conversations, folder, **options):
    request = write_request(folder / "request.json", request_of(case, conversations))
    return trace(case.folder, request, folder / "trace.safetensors", **options)


def test_every_recorded_call(case, tmp_path):
    path = traced(case, case.conversations, tmp_path)
    tensors, golden = load_file(path), case.tensors
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for each in case.conversations:
        key = each["key"]
        for name in ("input_ids", "attention_mask", "generated_ids"):
            assert tensors[f"{key}/{name}"].tolist() == golden[f"{key}/{name}"].tolist(), (key, name)
        mask = tensors[f"{key}/attention_mask"].bool()
        logits, positions = tensors[f"{key}/prefill_logits"], each["logit_positions"]
        assert logits.shape[:2] == mask.shape and logits.dtype == torch.float32
        difference = (logits[:, positions] - golden[f"{key}/prefill_logits"]).abs()[mask[:, positions]]
        assert difference.max() <= TOLERANCE, key
        chat = each["call"] == "chat"
        assert metadata[f"{key}/response"] == (each["response"] if chat else json.dumps(each["responses"], ensure_ascii=False))
        assert (f"{key}/features" in tensors) == bool(each["images"])
        if each["images"]:
            names = [f"features/{image['file']}/m{image['max_num']}" for image in each["images"]]
            features = case.recorded_tokens(tensors[f"{key}/features"]).split([image["tiles"] for image in each["images"]])
            for name, own in zip(names, features, strict=True):
                assert (own - golden[name]).abs().max() <= TOLERANCE, (key, name)
        prompts = [metadata[f"{key}/prompt"]] if chat else json.loads(metadata[f"{key}/prompt"])
        assert [case.tokenizer.encode(prompt) for prompt in prompts] == [
            row[own].tolist() for row, own in zip(tensors[f"{key}/input_ids"], mask, strict=True)
        ]


def test_relative_files_and_repeated_runs(small_case, tmp_path):
    (tmp_path / "frame_0.png").write_bytes((small_case.folder.parent / "images" / "frame_0.png").read_bytes())
    call = {"key": "a", "call": "chat", "question": "What?", "images": [{"file": "frame_0.png", "max_num": 1}], "max_new_tokens": 3}
    request = write_request(tmp_path / "request.json", {"calls": [call]})
    first, second = (trace(small_case.folder, request, tmp_path / f"{name}.safetensors") for name in "ab")
    assert first_difference(first, second) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "frame_0.png", "request.json"]


def test_history_decides_about_the_placeholder(small_case, tmp_path):
    """chat() puts <image> in front only where history is None, and counts placeholders through the whole prompt."""
    picture = [{"file": str(small_case.folder.parent / "images" / "frame_0.png"), "max_num": 1}]
    calls = [
        {"key": "none", "call": "chat", "question": "What?", "images": picture, "max_new_tokens": 1},
        {"key": "earlier", "call": "chat", "question": "And?", "history": [["<image> What?", "A ball."]], "images": picture,
         "max_new_tokens": 1},
        {"key": "text", "call": "batch_chat", "questions": ["Hello", "What?"], "num_patches_list": [0, 0], "max_new_tokens": 2},
    ]  # fmt: skip
    path = trace(small_case.folder, write_request(tmp_path / "r.json", {"calls": calls}), tmp_path / "t.safetensors")
    with safe_open(path, "pt") as file:
        prompts = file.metadata()
    assert "<IMG_CONTEXT></img>\nWhat?" in prompts["none/prompt"] and "<img>" in prompts["earlier/prompt"]
    assert "<img>" not in prompts["text/prompt"]
    missing = [{**calls[1], "history": []}]
    with pytest.raises(InvalidRequest, match="0 places for visual tokens"):
        trace(small_case.folder, write_request(tmp_path / "r.json", {"calls": missing}), tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("call", "ids"),
    [
        ({"call": "chat", "question": "<IMG_CONTEXT>"}, [1]),
        ({"call": "chat", "question": "<image>", "num_patches_list": [1]}, [16]),
        ({"call": "chat", "question": "hi", "num_patches_list": [1]}, [0]),
        ({"call": "batch_chat", "questions": ["<image>x", "y"], "num_patches_list": [1, 0]}, [16, 0]),
        ({"call": "chat", "question": "What?", "images": [{"file": "frame_0.png", "max_num": 1}], "num_patches_list": [1, 0]}, [16]),
    ],
)
def test_what_the_original_answers_without_minding(small_case, tmp_path, call, ids):
    """Without pixel_values chat() embeds every id as text, and a count without placeholder replaces nothing."""
    for image in call.get("images", []):
        image["file"] = str(small_case.folder.parent / "images" / "frame_0.png")
    request = write_request(tmp_path / "r.json", {"calls": [{"key": "a", "max_new_tokens": 1, **call}]})
    tensors = load_file(trace(small_case.folder, request, tmp_path / "t.safetensors"))
    image_id = small_case.header["img_context_token_id"]
    assert (tensors["a/input_ids"] == image_id).sum(1).tolist() == ids
    assert ("a/features" in tensors) == ("images" in call)


CALL = {"key": "a", "call": "chat", "question": "What?"}


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({"calls": []}, "calls"),
        ({"calls": [CALL], "other": 1}, "other"),
        ({"calls": [{**CALL, "temperature": 1}]}, "temperature"),
        ({"calls": [{**CALL, "call": "ask"}]}, "calls.0"),
        ({"calls": [CALL, CALL]}, "several calls"),
        ({"calls": [{**CALL, "question": "\ud800"}]}, "no UTF-8"),
        ({"calls": [{**CALL, "key": "\ud800"}]}, "no UTF-8"),
        ({"calls": [{**CALL, "max_new_tokens": 10**13}]}, "max_new_tokens"),
        ({"calls": [{**CALL, "num_patches_list": [-1]}]}, "num_patches_list"),
        ({"calls": [{**CALL, "images": [{"file": "x" * 300}]}]}, "does not exist"),
        ({"calls": [{**CALL, "history": [["q"]]}]}, "history"),
        ({"calls": [{**CALL, "num_patches_list": [1], "images": [{"file": "x.png"}]}]}, "x.png does not exist"),
        ({"calls": [{"key": "a", "call": "batch_chat", "questions": ["What?"]}]}, "num_patches_list"),
        ({"calls": [{"key": "a", "call": "batch_chat", "questions": ["What?"], "num_patches_list": [1, 2]}]}, "give one each"),
    ],
    ids=str,
)
def test_requests_that_are_none(small_case, tmp_path, contents, said):
    request = write_request(tmp_path / "request.json", contents)
    with pytest.raises(InvalidRequest, match=said):
        trace(small_case.folder, request, tmp_path / "trace.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["request.json"]


def test_counts_that_do_not_fit_and_a_missing_folder(small_case, tmp_path):
    picture = [{"file": str(small_case.folder.parent / "images" / "frame_0.png"), "max_num": 1}]
    request = write_request(tmp_path / "r.json", {"calls": [{**CALL, "images": picture, "num_patches_list": [2]}]})
    with pytest.raises(InvalidRequest, match="sums to 2"):
        trace(small_case.folder, request, tmp_path / "t.safetensors")
    with pytest.raises(OutputRefused, match="does not exist"):
        trace(small_case.folder, request, tmp_path / "nowhere" / "t.safetensors")


@pytest.fixture
def pair(small_case, tmp_path):
    """A trace, and a function that writes another with changed tensors or metadata and compares."""
    path = traced(small_case, [each for each in small_case.conversations if each["key"] == "single_tile/turn1"], tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    def difference(change=lambda tensors: None, **texts):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, tmp_path / "other.safetensors", metadata=metadata | {f"single_tile/turn1/{k}": v for k, v in texts.items()})
        return first_difference(path, tmp_path / "other.safetensors")

    return difference


def test_the_first_difference_is_named(pair):
    key = "single_tile/turn1"

    def nudge(name, amount):
        def change(tensors):
            tensors[f"{key}/{name}"].view(-1)[5] += amount

        return change

    assert pair() is None
    assert pair(nudge("prefill_logits", 5e-5)) is None
    assert f"{key}/prefill_logits[0, 0, 5]" in pair(nudge("prefill_logits", 0.5))
    assert f"{key}/features[0, 0, 5]" in pair(nudge("features", 0.5))
    assert f"{key}/input_ids[0, 5]" in pair(nudge("input_ids", 1))
    assert f"{key}/prompt differs from character 0" in pair(nudge("input_ids", 1), prompt="Something else")
    assert f"{key}/response" in pair(response="Something else")
    assert "only" in pair(lambda tensors: tensors.pop(f"{key}/features"))
    assert "shape" in pair(lambda tensors: tensors.update({f"{key}/features": torch.zeros(1)}))


def test_not_a_number_is_a_difference(pair):
    def spoil(tensors):
        tensors["single_tile/turn1/prefill_logits"][0, 0, 0] = float("nan")

    assert "prefill_logits[0, 0, 0]" in pair(spoil)


def test_files_that_are_no_traces(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    for name in ("a.safetensors", "missing.safetensors"):
        with pytest.raises(InvalidRequest, match="trace"):
            first_difference(tmp_path / name, tmp_path / name)
