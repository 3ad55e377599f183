"""Rows for test_bad_input.py: checkpoints, recipes and output folders that cannot be used."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
FUSED = "language_model.model.layers.0.attention.wqkv.weight"
BROKEN = {}
"""What is wrong, to (what makes it so in a folder and returns the arguments, what the error has to say)."""


def row(name: str, *words: str):
    """Add what the decorated function breaks to the table; the error has to hold all `words`."""

    def add(function):
        BROKEN[name] = function, words
        return function

    return add


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_folder(path: Path) -> None:
    """Put a folder in the place of a file."""
    path.unlink()
    path.mkdir()


def change_tensors(folder: Path, **changes) -> None:
    """Replace tensors of a checkpoint, or take them out where the new one is None."""
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


@row("folder is missing", "./nowhere", "does not exist", "give an existing folder")
def _(place):
    return "quantize", "./nowhere"


@row("folder is empty", "empty", "config.json", "give the folder of an InternVL checkpoint")
def _(place):
    (place / "empty").mkdir()
    return "quantize", "empty"


@row("model is no InternVL", "config.json", "'llama'", "give an InternVL folder")
def _(place):
    change_config(place / "model", model_type="llama")
    return "quantize", "model"


@row("config.json is cut short", "config.json", "not valid JSON", "download it again")
def _(place):
    os.truncate(place / "model" / "config.json", 100)
    return "quantize", "model"


@row("language model is unsupported", "'GemmaForCausalLM'", "InternLM2ForCausalLM", "Qwen2ForCausalLM", "take a model with")
def _(place):
    change_config(place / "model", llm_config={"architectures": ["GemmaForCausalLM"]})
    return "quantize", "model"


@row("name is unknown", "'InternVL2_5-8b'", "nearest known names are", "InternVL2_5-8B")
def _(place):
    return "quantize", "InternVL2_5-8b"


@row("weights are truncated", f"model/{WEIGHTS}", "truncated", "download it again")
def _(place):
    os.truncate(place / "model" / WEIGHTS, 200_000)
    return "quantize", "model", "--method", "bnb"


@row("weights are a Git LFS pointer", f"model/{WEIGHTS}", "Git LFS pointer", "git lfs pull")
def _(place):
    (place / "model" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n")
    return "quantize", "model"


@row("weights are missing", "model has no weights", WEIGHTS)
def _(place):
    (place / "model" / WEIGHTS).unlink()
    return "quantize", "model"


@row("weights are a folder", f"model/{WEIGHTS}", "Is a directory", "download it again")
def _(place):
    make_folder(place / "model" / WEIGHTS)
    return "chat", "What?", "-m", "model"


@row("weights to plan with are a folder", f"model/{WEIGHTS}", "Is a directory", "download it again")
def _(place):
    make_folder(place / "model" / WEIGHTS)
    return "plan", "model"


@row("weights to quantize are a folder", f"model/{WEIGHTS}", "Is a directory", "download it again")
def _(place):
    make_folder(place / "model" / WEIGHTS)
    return "quantize", "model"


@row("tokenizer is a folder", "model/tokenizer.model", "Is a directory", "download it again")
def _(place):
    make_folder(place / "model" / "tokenizer.model")
    return "quantize", "model", "--method", "bnb"


@row("manifest of a vision tower is a folder", "vision/vlquant.json is missing", "vlquant export-vision")
def _(place):
    make_folder(place / "bundle" / "vision" / "vlquant.json")
    return "inspect", "bundle"


@row("tokenizer is missing", "model", "tokenizer", "download")
def _(place):
    (place / "model" / "tokenizer.model").unlink()
    return "quantize", "model", "--method", "bnb"


@row("a tensor is missing", FUSED, "download the checkpoint again")
def _(place):
    change_tensors(place / "model", **{FUSED: None})
    return "quantize", "model", "--method", "bnb"


@row("a tensor has another shape", "mlp1.1.weight", "[64, 8]", "same checkpoint")
def _(place):
    change_tensors(place / "model", **{"mlp1.1.weight": torch.zeros(64, 8)})
    return "export-vision", "model"


@row("bits that do not exist", "5 bits", "--bits 4 or --bits 8")
def _(place):
    return "quantize", "model", "--bits", "5"


@row("group size that does not divide", "group size 128", "64 inputs", "q_proj", "--group-size 32 or 64 or -1")
def _(place):
    return "quantize", "model"


@row("shapes that GPTQ cannot pack", "k_proj", "16 x 64", "--method bnb")
def _(place):
    return "quantize", "model", "--group-size", "32"


@row("a bundle is quantized again", "bundle is already quantized", "the checkpoint it was made from")
def _(place):
    return "quantize", "bundle"


@row("output is somebody else's", "holiday", "not a bundle", "-o")
def _(place):
    (place / "holiday").mkdir()
    (place / "holiday" / "photo.jpg").write_bytes(b"mine")
    return "quantize", "model", "--method", "bnb", "-o", "holiday", "--overwrite"


@row("output is a file", "notes.txt", "is not a folder", "-o")
def _(place):
    (place / "notes.txt").write_text("mine")
    return "quantize", "model", "--method", "bnb", "-o", "notes.txt"


@row("output lies in a file", "notes.txt/out", "cannot be written", "-o")
def _(place):
    (place / "notes.txt").write_text("mine")
    return "quantize", "model", "--method", "bnb", "-o", "notes.txt/out"


@row("output has too long a name", "cannot be written (File name too long)", "-o")
def _(place):
    return "quantize", "model", "--method", "bnb", "-o", 300 * "x"


@row("vision output has too long a name", "cannot be written (File name too long)", "-o")
def _(place):
    return "export-vision", "model", "-o", 300 * "x"


@row("output is a bundle with another recipe", "bundle", "another recipe", "--overwrite")
def _(place):
    return "quantize", "model", "--method", "bnb", "--bits", "8", "-o", "bundle"


@row("output is the current folder", "is the current folder", "-o")
def _(place):
    (place / "empty").mkdir()
    os.chdir(place / "empty")
    return "quantize", "../model", "--method", "bnb", "-o", "."


@row("vision output is somebody else's", "holiday", "something other than a vision export", "-o")
def _(place):
    (place / "holiday").mkdir()
    (place / "holiday" / "photo.jpg").write_bytes(b"mine")
    return "export-vision", "model", "-o", "holiday", "--overwrite"
