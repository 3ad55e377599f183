"""Record how GPTQModel, and transformers with optimum or bitsandbytes, compute with our bundles: writes data/interop.json.

Run by hand, in an environment of its own (the readers need far more than vlquant does), about 10 minutes on two cores:
    pip install torch==2.13.0 transformers==5.23.0 optimum==2.3.0 bitsandbytes==0.50.2 numpy==2.2.6 requests onnxruntime
    pip install torch==2.13.0 transformers==5.23.0 numpy==2.2.6 gptqmodel==7.3.6
    pip install --no-deps -e . && pip install sentencepiece onnx pydantic typer rich
    PYTHONPATH=. GPTQMODEL_CPU_WORKERS=2 python tests/record_interop.py [mixed]

"mixed" renews only what is recorded of linears with 4 and 8 bits side by side, which GPTQModel reads and transformers does not.
Two models, the trained demo model (a Llama to these readers) and a Qwen2 of random weights; every kind of bundle; a prompt
with a picture and one without; the logits of all positions beside those of our own runtime, which computes in float32.
The readers compute in the precision that the bundle's config.json names, with the kernel they choose, and once more in a better
one; the model before quantizing, as "float", shows what their bfloat16 alone does.
"""

import gc
import importlib.metadata
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from vlquant.calib_data import demo_model
from vlquant.calib_data.samples import draw_sample, sample_request
from vlquant.decoder import LINEARS
from vlquant.family import LANGUAGE_MODEL
from vlquant.hf_layout import quantization_config, write_json, write_settings
from vlquant.layout import tensor_shapes
from vlquant.model import open_model
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.request import EncodedRequest, Request
from vlquant.runtime import load
from vlquant.runtime.pipeline import Pipeline
from vlquant.synthesize import synthesize
from vlquant.tokenizer import load_tokenizer, write_fast_tokenizer

RECORDED = Path(__file__).parent / "data" / "interop.json"
LIBRARIES = ("torch", "transformers", "optimum", "gptqmodel", "bitsandbytes", "numpy")
RECIPES = {
    "gptq-4": Recipe(),
    "gptq-8": Recipe(bits=8),
    "rtn-4": Recipe(method="rtn"),
    "nf4": Recipe(method="bnb"),
    "int8": Recipe(method="bnb", bits=8),
}
MIXED = Recipe(average_bits=5)
FLOAT = "float"
"""Stands beside them for the model before quantizing."""
FEW = {"samples": 8, "tokens": 512}
"""Calibration of random weights: what it yields does not matter."""
MOST_TILES = {"demo": 6, "qwen2": 1}
TEXT = "What is the capital of France, and how many people live there?"
PRECISIONS = {"transformers + optimum": torch.float32, "transformers + bitsandbytes": torch.float32, "GPTQModel": torch.float16}
"""The best that each reader can."""


def make_bundles(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Every model, in `folder`, as it is and as every kind of bundle."""
    qwen2 = synthesize("InternVL2_5-1B", folder / "source", layers=2, vision_layers=2)
    for model, source in (("demo", demo_model()), ("qwen2", qwen2)):
        yield model, FLOAT, write_float(source, folder / f"{model}-{FLOAT}")
        for kind, recipe in RECIPES.items():
            if model == "qwen2" and recipe.method == "gptq":
                recipe = replace(recipe, **FEW)
            yield model, kind, quantize(source, recipe=recipe, output=folder / f"{model}-{kind}")


def write_float(source: Path, folder: Path) -> Path:
    """The model with the files of a bundle, but not quantized."""
    model, tokenizer = open_model(source), load_tokenizer(source)
    folder.mkdir()
    write_fast_tokenizer(source, folder)
    settings = quantization_config(Recipe(), "bfloat16")
    write_settings(folder, model.config, tokenizer, quantization=settings, dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    write_json(folder / "config.json", config)
    tensors = {name: model.tensor(name).contiguous() for name in tensor_shapes(model.config)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompts(pipe: Pipeline, most_tiles: int) -> dict[str, EncodedRequest]:
    """What is asked: about a picture of the check set, and without one."""
    sample = draw_sample("check", 0)
    about = sample_request(sample, sample.questions[0])
    picture = Request(about.question, images=about.images, max_tiles=most_tiles)
    return {"picture": pipe.encode(picture), "text": pipe.encode(Request(TEXT))}


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
    """How far a reader's logits [positions, vocab] are from ours.

    clear: positions where our two likeliest tokens are further apart than twice the largest difference; clear_agreeing: of
    these, and agreeing: of all, where the reader finds the same token likeliest.
    """
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
    """The class of all linears of the decoder layers; if it is a quantized one, none other in the model may be of it."""
    modules = dict(model.named_modules())
    kinds = Counter(type(modules[f"{prefix}layers.{index}.{name}"]).__name__ for index in range(layers) for name in LINEARS)
    (kind,) = kinds
    everywhere = sum(type(module).__name__ == kind for module in modules.values())
    assert kind == "Linear" or everywhere == kinds[kind], f"{kind} outside the decoder layers"
    return kind


def open_whole(bundle: Path, recipe: Recipe | None, precision: torch.dtype | None) -> nn.Module:
    """A bundle in transformers' own class; nothing may be missing or left over."""
    from transformers import GPTQConfig, InternVLForConditionalGeneration

    options = {}
    if recipe and recipe.packed_as_gptq and precision:
        # The kernel it chooses itself for 4 bits on a CPU multiplies in bfloat16 whatever it is given.
        options = {"dtype": precision, "quantization_config": GPTQConfig(bits=recipe.bits, backend="gptq_torch")}
    model, loading = InternVLForConditionalGeneration.from_pretrained(
        bundle, trust_remote_code=False, output_loading_info=True, device_map="cpu", **options
    )
    wrong = {kind: keys for kind, keys in loading.items() if keys}
    assert not wrong, f"{bundle.name}: {wrong}"
    if recipe and not recipe.packed_as_gptq and precision:
        widen(model, precision)
    return model.eval()


def widen(model: nn.Module, precision: torch.dtype) -> None:
    """Let bitsandbytes multiply in `precision`: transformers' `dtype` leaves some of its weights as they are stored.

    Where the processor can, its NF4 linears multiply in bfloat16 whatever they are given; here they do not. Its int8 linears
    round their inputs to 8 bits as well; here their inputs stay, and meet the weights that bitsandbytes dequantizes.
    """
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(precision)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = precision
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, Linear8bitLt):
            weight = int8_vectorwise_dequant(module.weight.data, module.weight.SCB).to(precision)
            module.forward = partial(linear, weight=weight, bias=module.bias)


def open_text(bundle: Path, folder: Path, precision: torch.dtype | None) -> nn.Module:
    """The language model alone in GPTQModel, from a checkpoint of its own made in `folder`."""
    from gptqmodel import BACKEND, GPTQModel

    config = json.loads((bundle / "config.json").read_text())
    quantization = config["quantization_config"] | {"block_name_to_quantize": "model.layers"}
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("*.safetensors*", "vlquant.json", "*processor*"))
    write_json(folder / "config.json", config["text_config"] | {"quantization_config": quantization})
    write_json(folder / "quantize_config.json", quantization)
    tensors = {name: each for path in bundle.glob("*.safetensors") for name, each in load_file(path).items()}
    own = {name.replace(LANGUAGE_MODEL, "model."): each for name, each in tensors.items() if name.startswith((LANGUAGE_MODEL, "lm_head."))}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    options = {} if precision is None else {"dtype": precision}
    return GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", **options).model.eval()


def readers(bundle: Path, recipe: Recipe | None, scratch: Path) -> Iterator[tuple[str, str, nn.Module]]:
    """Name, prefix of the language model and model of every program that reads a bundle, in every precision."""
    if recipe is None:
        yield "transformers", LANGUAGE_MODEL, open_whole(bundle, None, None)
        return
    whole = "transformers + optimum" if recipe.packed_as_gptq else "transformers + bitsandbytes"
    for precision in (None, PRECISIONS[whole]):
        yield whole, LANGUAGE_MODEL, open_whole(bundle, recipe, precision)
    for precision in (None, PRECISIONS["GPTQModel"]) if recipe.packed_as_gptq else ():
        yield "GPTQModel", "model.", open_text(bundle, scratch / f"{bundle.name}-{precision}", precision)


def record_bundle(model: str, kind: str, bundle: Path, scratch: Path) -> Iterator[dict]:
    """Compare every reader of one bundle, prompt by prompt."""
    pipe = load(bundle, vision="torch")
    encoded = prompts(pipe, MOST_TILES[model])
    ours = {name: our_logits(pipe, each) for name, each in encoded.items()}
    for reader, prefix, theirs in readers(bundle, RECIPES.get(kind), scratch):
        kernel = linear_class(theirs, prefix, pipe.config.decoder.layers)
        assert (kernel == "Linear") == (kind == FLOAT), f"{reader} reads {bundle.name} with {kernel}"
        how = {"linear": kernel, "precision": str(theirs.dtype).removeprefix("torch.")}
        for name in encoded if prefix == LANGUAGE_MODEL else ["text"]:
            figures = compare(ours[name], their_logits(theirs, encoded[name]))
            yield {"model": model, "bundle": kind, "reader": reader, **how, "prompt": name, **figures}
        gc.collect()


def record_mixed() -> Iterator[dict]:
    """The demo model's linears with the bits that `--average-bits` gives them, in GPTQModel."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = quantize(demo_model(), recipe=MIXED, output=Path(scratch) / "mixed")
        pipe = load(bundle, vision="torch")
        encoded = prompts(pipe, MOST_TILES["demo"])["text"]
        for precision in (None, PRECISIONS["GPTQModel"]):
            theirs = open_text(bundle, Path(scratch) / str(precision), precision)
            kinds = Counter(module.bits for module in theirs.modules() if hasattr(module, "qweight"))
            figures = compare(our_logits(pipe, encoded), their_logits(theirs, encoded))
            yield {"precision": str(theirs.dtype).removeprefix("torch."), "linears_by_bits": dict(kinds), **figures}


def main() -> None:
    from tests.record_gptqmodel import import_gptqmodel  # Its libraries are not where RECIPES and RECORDED are tested.

    import_gptqmodel()
    if sys.argv[1:] == ["mixed"]:
        write_json(RECORDED, json.loads(RECORDED.read_text()) | {"mixed": list(record_mixed())})
        return
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    cases, configs = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for model, kind, bundle in make_bundles(Path(scratch)):
            config = json.loads((bundle / "config.json").read_text()).get("quantization_config")
            assert configs.setdefault(kind, config) == config, f"{bundle.name} says otherwise how it is quantized"
            for case in record_bundle(model, kind, bundle, Path(scratch)):
                cases.append(case)
                print(json.dumps(case), flush=True)
    record = {"versions": versions, "quantization_configs": configs, "cases": cases, "mixed": list(record_mixed())}
    write_json(RECORDED, record)


if __name__ == "__main__":
    main()
