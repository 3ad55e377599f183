"""Everything the original computed on the golden checkpoints: prompts, ids, features, logits and greedy answers."""

import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch

from vlquant.decoder import KeyValueCache
from vlquant.layout import POSITIONS
from vlquant.request import Request, encode_prompt, place_images
from vlquant.tiling import cut_tiles, normalize
from vlquant.vision import vision_features

from tests.golden_folder import golden_folder

TOLERANCE = 1e-4


def image_pixels(case, image):
    """Pixel values of one picture of a recorded call; the thumbnail is always on there."""
    return picture_pixels(case, image["file"], image["max_num"])


def picture_pixels(case, file, max_tiles):
    tiles = cut_tiles(case.image(file), max_tiles=max_tiles, image_size=case.config.chat.image_size, use_thumbnail=True)
    return normalize(tiles)


def encoded_rows(case, conversation):
    """(prompt, ids, question) of every row of a call."""
    tiles = [image["tiles"] for image in conversation["images"]]
    if conversation["call"] == "batch_chat":
        rows = [(question, None, [count]) for question, count in zip(conversation["questions"], tiles, strict=True)]
    else:
        counts = conversation["num_patches_list"] or ([sum(tiles)] if tiles else [])
        rows = [(conversation["question"], conversation["history_in"], counts)]
    for question, history, counts in rows:
        request = Request(question, history=history)
        placed = place_images(request, len(counts), 0)
        yield *encode_prompt(request, placed, counts, config=case.config, tokenizer=case.tokenizer), placed


def padded(rows, pad_id):
    """Left-padded ids and mask [batch, length]."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


def embedded(case, conversation, ids):
    """Token embeddings with the pictures' features in place of the context tokens."""
    embeddings = case.decoder.embed(ids)
    if conversation["images"]:
        pixels = torch.cat([image_pixels(case, image) for image in conversation["images"]])
        features = vision_features(pixels, case.vision, case.config.vision)
        embeddings[ids == case.header["img_context_token_id"]] = features.flatten(0, 1)
    return embeddings


def greedy(case, embeddings, mask, *, steps, stop_id, pad_id):
    """Ids [batch, steps or fewer] until every row has stopped; finished rows are filled with `pad_id`."""
    decoder, (batch, length) = case.decoder, mask.shape
    cache = KeyValueCache(case.config.decoder, batch=batch, capacity=length + steps)
    running, chosen = torch.ones(batch, dtype=torch.bool), []
    for _ in range(steps):
        logits = decoder(embeddings, attention_mask=mask, cache=cache)[:, -1]
        best = logits.argmax(-1).where(running, torch.tensor(pad_id))
        chosen.append(best)
        running = running & (best != stop_id)
        if not running.any():
            break
        mask = torch.cat((mask, torch.ones(batch, 1, dtype=torch.bool)), dim=1)
        embeddings = decoder.embed(best[:, None])
    return torch.stack(chosen, dim=1)


def with_runs(prompt):
    return re.sub(r"(<IMG_CONTEXT>)+", lambda run: "{%d x <IMG_CONTEXT>}" % (len(run.group()) // 13), prompt)


def as_list(value):
    return value if isinstance(value, list) else [value]


def test_prompts_and_ids(case, conversation):
    rows = list(encoded_rows(case, conversation))
    assert [with_runs(prompt) for prompt, _, _ in rows] == as_list(conversation["prompt_with_runs"])
    hashes = [hashlib.sha256(prompt.encode()).hexdigest() for prompt, _, _ in rows]
    assert hashes == as_list(conversation["prompt_sha256"])
    ids, mask = padded([ids for _, ids, _ in rows], case.tokenizer.pad_id)
    assert ids.tolist() == case.tensors[conversation["key"] + "/input_ids"].tolist()
    assert mask.int().tolist() == case.tensors[conversation["key"] + "/attention_mask"].tolist()
    if conversation["call"] == "chat":
        assert rows[0][2] == conversation["history_out"][-1][0]


@torch.inference_mode()
def test_logits_and_greedy_answers(case, conversation):
    key, tensors = conversation["key"], case.tensors
    ids, mask = padded([ids for _, ids, _ in encoded_rows(case, conversation)], case.tokenizer.pad_id)
    embeddings = embedded(case, conversation, ids)

    logits = case.decoder(embeddings, attention_mask=mask, all_positions=True)
    positions = conversation["logit_positions"]
    difference = (logits[:, positions] - tensors[key + "/prefill_logits"]).abs()[mask[:, positions]]
    assert difference.max() <= TOLERANCE
    assert (logits.argmax(-1) == tensors[key + "/prefill_argmax"])[mask].all()

    steps, stop_id = conversation["generation_config"]["max_new_tokens"], case.header["stop_token_id"]
    # generate() fills finished rows with the language model's pad id, or without one the stop id.
    pad_id = case.config.source["llm_config"]["pad_token_id"]
    chosen = greedy(case, embeddings, mask, steps=steps, stop_id=stop_id, pad_id=stop_id if pad_id is None else pad_id)
    assert chosen.tolist() == tensors[key + "/generated_ids"].tolist()
    texts = [case.tokenizer.decode(row).split(case.header["stop_token"])[0].strip() for row in chosen.tolist()]
    assert texts == case.answers(conversation)


@torch.inference_mode()
def test_features(case):
    recorded = {name: tensor for name, tensor in case.tensors.items() if name.startswith("features/")}
    assert recorded
    for name, expected in recorded.items():
        _, file, limit = name.split("/")
        features = vision_features(picture_pixels(case, file, int(limit[1:])), case.vision, case.config.vision)
        features = case.recorded_tokens(features)
        assert features.shape == expected.shape
        assert (features - expected).abs().max() <= TOLERANCE, name


@torch.inference_mode()
def test_feature_variants(case):
    for variant in case.header.get("feature_variants") or []:
        config = replace(
            case.config.vision, pixel_shuffle=variant["ps_version"], select_layer=variant["select_layer"]
        )
        pixels = picture_pixels(case, variant["file"], variant["max_num"])
        features = case.recorded_tokens(vision_features(pixels, case.vision, config))
        assert (features - case.tensors[variant["key"]]).abs().max() <= TOLERANCE, variant["key"]


def test_header_agrees_with_what_was_read(case):
    header, chat, vision = case.header, case.config.chat, case.config.vision
    assert (chat.image_size, chat.tokens_per_tile) == (header["image_size"], header["num_image_token"])
    assert (vision.pixel_shuffle, vision.select_layer) == (header["ps_version"], header["select_layer"])
    assert chat.template == header["template"]
    assert case.tokenizer.token_id(header["stop_token"]) == header["stop_token_id"]
    assert case.tokenizer.token_id(chat.image_token) == header["img_context_token_id"]
    assert case.tokenizer.pad_id == header["pad_token_id"]


def test_position_embeddings_are_those_stored(case):
    patches = case.config.vision.patches_per_side**2
    assert case.model.tensor(POSITIONS).shape == (1, patches + 1, case.config.vision.hidden_size)


def test_every_case_and_call_is_here():
    """161 answers of eight checkpoints: a recording that got lost must not pass for one that agrees."""
    headers = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(golden_folder().glob("*/golden.json"))]
    calls = {header["case"]: header["conversations"] for header in headers if "conversations" in header}
    assert len(calls) == 8
    assert sum(len(as_list(call.get("responses", "one"))) for each in calls.values() for call in each) == 161


@pytest.mark.parametrize("length", [1, 7])
def test_uncached_and_cached_decoding_agree(small_case, length):
    torch.manual_seed(0)
    decoder, config = small_case.decoder, small_case.config.decoder
    ids = torch.randint(3, config.vocab_size, (2, 20))
    whole = decoder(decoder.embed(ids), all_positions=True)
    cache, parts = KeyValueCache(config, batch=2, capacity=20), []
    for start in range(0, 20, length):
        parts.append(decoder(decoder.embed(ids[:, start : start + length]), cache=cache, all_positions=True))
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)
