"""Record how GPTQModel, and transformers with optimum or bitsandbytes, compute with our bundles: writes data/interop.json.

Run by hand, in an environment of its own (the readers need far more than vlquant does):
    pip install torch==2.13.0 transformers==5.23.0 optimum==2.3.0 bitsandbytes==0.50.2 numpy==2.2.6 requests onnxruntime
    pip install torch==2.13.0 transformers==5.23.0 numpy==2.2.6 gptqmodel==7.3.6
    pip install --no-deps -e . && pip install sentencepiece onnx pydantic typer rich
    PYTHONPATH=. GPTQMODEL_CPU_WORKERS=2 python tests/record_interop.py

Two models, the trained demo model (a Llama to these readers) and a Qwen2 of random weights; every kind of bundle; a prompt
with a picture and one without; the logits of all positions beside those of our own runtime, which computes in float32.
"""

import importlib.metadata
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlquant.calib_data import demo_model
from vlquant.calib_data.samples import draw_sample, sample_request
from vlquant.decoder import LINEARS
from vlquant.family import LANGUAGE_MODEL
from vlquant.hf_layout import write_json
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.request import EncodedRequest, Request
from vlquant.runtime import load
from vlquant.runtime.pipeline import Pipeline
from vlquant.synthesize import synthesize

from tests.record_gptqmodel import import_gptqmodel

RECORDED = Path(__file__).parent / "data" / "interop.json"
LIBRARIES = ("torch", "transformers", "optimum", "gptqmodel", "bitsandbytes", "numpy")
RECIPES = {
    "gptq-4": Recipe(),
    "gptq-8": Recipe(bits=8),
    "rtn-4": Recipe(method="rtn"),
    "nf4": Recipe(method="bnb"),
    "int8": Recipe(method="bnb", bits=8),
}
FEW = {"samples": 8, "tokens": 512}
"""Calibration of random weights: what it yields does not matter."""
PICTURE_SAMPLE, TEXT = 0, "What is the capital of France, and how many people live there?"
MOST_TILES = 2


@dataclass(frozen=True)
class Compared:
    """One bundle in one reader: how far its logits are from ours."""

    model: str
    bundle: str
    reader: str
    linear: str
    """The reader's class of the quantized linears."""
    dtype: str
    """In which the reader computed."""
    prompt: str
    """"picture" or "text"."""
    positions: int
    relative_difference: float
    """max|difference of logits| / max|our logit|."""
    clear: int
    """Positions at which our two likeliest tokens are further apart than twice the largest difference."""
    clear_agreeing: int
    """Of those, where the reader's likeliest token is ours."""
    agreeing: int
    """Of all positions."""


def make_bundles(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Every model as every kind of bundle, in `folder`."""
    qwen2 = synthesize("InternVL2_5-1B", folder / "source", layers=2, vision_layers=2)
    for model, source in (("demo", demo_model()), ("qwen2", qwen2)):
        for kind, recipe in RECIPES.items():
            if model == "qwen2" and recipe.method == "gptq":
                recipe = Recipe(**recipe.to_dict() | FEW)
            yield model, kind, quantize(source, recipe=recipe, output=folder / f"{model}-{kind}")


def prompts(pipe: Pipeline) -> dict[str, EncodedRequest]:
    """What is asked: about a picture of the check set, and without one."""
    sample = draw_sample("check", PICTURE_SAMPLE)
    picture = sample_request(sample, sample.questions[0])
    requests = {"picture": Request(picture.question, images=picture.images, max_tiles=MOST_TILES), "text": Request(TEXT)}
    return {name: pipe.encode(request) for name, request in requests.items()}


@torch.inference_mode()
def our_logits(pipe: Pipeline, encoded: EncodedRequest) -> Tensor:
    """Of every position [length, vocab]."""
    batch = pipe.prepare([encoded])
    return pipe.decoder(batch.embeddings, attention_mask=batch.attention_mask, all_positions=True)[0]


@torch.inference_mode()
def their_logits(model: nn.Module, encoded: EncodedRequest) -> Tensor:
    """Of every position float32 [length, vocab]."""
    ids = torch.tensor([encoded.ids])
    pixels = encoded.pixel_values()
    pictures = {} if pixels is None else {"pixel_values": pixels.to(model.dtype)}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **pictures).logits[0].float()


def compare(ours: Tensor, theirs: Tensor) -> dict:
    """The figures of the comparison."""
    difference = (theirs - ours).abs().max()
    first, second = ours.topk(2).values.unbind(-1)
    clear, same = first - second > 2 * difference, ours.argmax(-1) == theirs.argmax(-1)
    return {
        "positions": len(ours),
        "relative_difference": float(f"{difference / ours.abs().max():.3g}"),
        "clear": int(clear.sum()),
        "clear_agreeing": int((clear & same).sum()),
        "agreeing": int(same.sum()),
    }


def linear_class(model: nn.Module, prefix: str, layers: int) -> str:
    """The class of all linears of the decoder layers; none other in the model may be of it."""
    modules = dict(model.named_modules())
    kinds = Counter(type(modules[f"{prefix}layers.{index}.{name}"]).__name__ for index in range(layers) for name in LINEARS)
    (kind,) = kinds
    assert kind != "Linear", "the linears of the language model are not quantized ones"
    assert sum(type(module).__name__ == kind for module in modules.values()) == kinds[kind], f"{kind} outside the layers"
    return kind


def open_whole(bundle: Path, dtype: torch.dtype | None) -> nn.Module:
    """A bundle in transformers' own class; nothing may be missing or left over."""
    from transformers import InternVLForConditionalGeneration as InternVL

    options = {} if dtype is None else {"dtype": dtype}
    model, loading = InternVL.from_pretrained(bundle, trust_remote_code=False, output_loading_info=True, device_map="cpu", **options)
    wrong = {kind: keys for kind, keys in loading.items() if keys}
    assert not wrong, f"{bundle.name}: {wrong}"
    return model.eval()


def main() -> None:
    import_gptqmodel()
    folder = Path(sys.argv[1])
    for dtype in (None, torch.float32, torch.float16):
        for kind in sys.argv[2:]:
            bundle = folder / kind
            pipe = load(bundle, vision="torch")
            model = open_whole(bundle, dtype)
            layers = pipe.config.decoder.layers
            print(bundle.name, model.dtype, linear_class(model, LANGUAGE_MODEL, layers))
            for name, encoded in prompts(pipe).items():
                print("   ", name, compare(our_logits(pipe, encoded), their_logits(model, encoded)), flush=True)


if __name__ == "__main__":
    main()
