"""Prompt texts against what the original wrote."""

import json

import pytest

from vlquant.errors import InvalidRequest, UnsupportedCheckpoint
from vlquant.prompt import (
    TEMPLATES,
    build_prompt,
    expand_images,
    find_template,
    frame_placeholders,
    picture_placeholders,
)


def recorded(root):
    return json.loads((root / "templates.json").read_text(encoding="utf-8"))


def test_templates(golden_root):
    templates = recorded(golden_root)["templates"]
    assert templates.keys() <= TEMPLATES.keys()
    for name, template in templates.items():
        assert TEMPLATES[name].system_message == template["system_message"]
        assert TEMPLATES[name].stop_token == template["stop_token"]


def test_prompts(golden_root):
    prompts = recorded(golden_root)["prompts"]
    assert prompts
    for entry in prompts:
        prompt = build_prompt(TEMPLATES[entry["template"]], entry["turns"], system_message=entry["system_message"])
        assert prompt == entry["prompt"], entry


def test_expansions(golden_root):
    for entry in recorded(golden_root)["expansions"]:
        counts, tokens = entry["num_patches_list"], entry["num_image_token"]
        if entry["text"].count("<image>") >= len(counts):
            assert expand_images(entry["text"], counts, tokens) == entry["expanded"]
        else:
            # The original goes on and fails later with a shape error.
            with pytest.raises(InvalidRequest, match="<image>"):
                expand_images(entry["text"], counts, tokens)


def test_placeholders_are_numbered_from_one():
    assert picture_placeholders(1) == "<image>\n"
    assert picture_placeholders(2) == "Image-1: <image>\nImage-2: <image>\n"
    assert frame_placeholders(2) == "Frame1: <image>\nFrame2: <image>\n"


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(UnsupportedCheckpoint, match="nearest is 'internvl2_5'"):
        find_template("internvl2_6")
