"""Recipes: what is accepted, what is refused and in which words."""

import json
import subprocess
import sys

import pytest

from vlquant.errors import InvalidRecipe
from vlquant.recipe import Recipe


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "awq"}, "--method"),
        ({"bits": 5}, "--bits 4"),
        ({"method": "bnb", "bits": 3}, "--bits 4"),
        ({"group_size": 48}, "--group-size 32"),
        ({"method": "bnb", "group_size": 64}, "leave --group-size out"),
        ({"method": "bnb", "samples": 8}, "leave --samples out"),
        ({"method": "rtn", "samples": 8}, "leave --samples out"),
        ({"damping": 0.0}, "damping"),
        ({"calibration": ()}, "--calib"),
        ({"method": "rtn", "calibration": "photos"}, "leave --calib out"),
        ({"samples": 0}, "--samples"),
        ({"vision_share": 0.8}, "--vision-share"),
        ({"vision_share": float("nan")}, "--vision-share"),
        ({"compensation": 1.5}, "compensation"),
    ],
)
def test_bad_fields_are_refused_in_one_sentence(fields, words):
    with pytest.raises(InvalidRecipe, match=words) as caught:
        Recipe(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(bits=8, group_size=-1, seed=4), Recipe(calibration=("builtin", "a.tsv")), Recipe(method="bnb", bits=8), Recipe(method="rtn", group_size=32)])
def test_stored_recipe_reads_back(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_unknown_stored_field_is_refused():
    with pytest.raises(InvalidRecipe, match="rotation"):
        Recipe.from_dict({"bits": 4, "rotation": "r1"})


def test_shapes_are_checked_with_a_way_out():
    with pytest.raises(InvalidRecipe, match="--group-size 32 or 64 or -1"):
        Recipe().require_shape("mlp.down_proj", out_features=64, in_features=192)
    with pytest.raises(InvalidRecipe, match="--method bnb"):
        Recipe().require_shape("mlp.down_proj", out_features=72, in_features=128)
    Recipe(group_size=64).require_shape("mlp.down_proj", out_features=64, in_features=192)
    Recipe(method="bnb").require_shape("mlp.down_proj", out_features=72, in_features=100)


def test_label_names_method_and_bits():
    assert Recipe(method="bnb").label == "bnb-4bit"


def test_importing_recipes_is_light():
    code = "import sys, vlquant.recipe; print(any(m in sys.modules for m in ('torch', 'numpy', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
