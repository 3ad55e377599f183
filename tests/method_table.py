"""How far quantizers take the demo model from itself: mean KL(original || quantized) over answers about pictures.

    PYTHONPATH=. python tests/method_table.py FOLDER [--split check --pictures 600 --bits 3 4] [--peer FOLDER]

Every method calibrates on the same conversations, once for each of five seeds, and is asked one question about each
picture of a set that shares no scene with them; the answers are forced, so that only distributions differ. FOLDER keeps
what is measured, and a second run goes on there. --peer: what tests/record_gptqmodel_peer.py wrote.
Knobs are chosen on `--split development`, the table in README is of `--split check`.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy
import torch
from safetensors.torch import load_file

from vlquant import activations, gptq, quantized_layers
from vlquant.bundle import ModuleRecord
from vlquant.calib_data import demo_model
from vlquant.calib_data.samples import KINDS, CalibrationScenes, draw_sample, sample_request
from vlquant.calibrate import CalibrationInputs, calibration_inputs
from vlquant.decoder import LINEARS, DecoderLayer, FloatLinear
from vlquant.events import silent
from vlquant.intervals import student_quantile
from vlquant.model import Model, open_model
from vlquant.packing import dequantize_gptq
from vlquant.recipe import Recipe
from vlquant.request import Request
from vlquant.runtime.generate import Generation
from vlquant.runtime.pipeline import Pipeline, load

SEEDS = range(5)
WITH_PICTURES = [kind for kind in KINDS if kind != "text_only"]
ROWS = 48
"""Questions answered side by side."""
Weights = list[dict[str, torch.Tensor]]
"""Of every layer, float32 by linear."""


def plain_inverse(hessian, damping):
    """Columns as they come, and the paper's damping."""
    order = torch.arange(len(hessian))
    return gptq.Inverse(order, *gptq.inverse_factor(hessian, order, 0.01))


def plain_gptq(weight, importance, inverse, *, bits, group_size):
    """GPTQ as its paper has it, with the usual symmetric scales: largest value of a group over the highest code."""
    zero = 2 ** (bits - 1)
    grouped = weight.reshape(len(weight), -1, group_size)
    scales = gptq.representable(grouped.abs().amax(2) * 2 / (2 * zero - 1)).T.to(torch.float16).contiguous()
    codes = gptq.solve(weight, gptq.expand_scales(scales, group_size), inverse.factor, bits=bits)
    return gptq.Rounding(codes, scales, inverse.damping)


def keep_gptq(name, weight, target, part, *, judging, bits):
    """No second opinion."""
    return part, ModuleRecord(name=name, method="gptq", error=None, nearest_error=None, damping=None, fallback=False)


def weights_of(model: Model, inputs: CalibrationInputs, recipe: Recipe) -> Weights:
    """What our quantizer makes of every linear."""
    method = quantized_layers.rounded_layers(model, recipe) if recipe.method == "rtn" else quantized_layers.gptq_layers(
        model, inputs, recipe=recipe, device="cpu"
    )  # fmt: skip
    return [{name: dequantize_gptq(packed(layer.tensors, name), bits=recipe.bits) for name in LINEARS} for layer in method]


def packed(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {kind: tensors[f"{name}.{kind}"] for kind in ("qweight", "qzeros", "scales", "g_idx")}


def plain_weights(model: Model, inputs: CalibrationInputs, recipe: Recipe) -> Weights:
    """The same with every token alike, no cap on norms, plain scales, columns in order, no compensation, no choice of the better one."""
    uniform = torch.full((3,), 1 / inputs.tokens)
    with (
        mock.patch.object(CalibrationInputs, "token_weights", uniform),
        mock.patch.object(activations, "LARGEST_NORM", torch.inf),
        mock.patch.object(gptq, "invert", plain_inverse),
        mock.patch.object(gptq, "quantize_weight", plain_gptq),
        mock.patch.object(quantized_layers, "better_rounding", keep_gptq),
    ):
        return weights_of(model, inputs, replace(recipe, compensation=0.0))


def peer_weights(folder: Path, seed: int, bits: int, layers: int) -> Weights:
    """What another quantizer made of them."""
    tensors = load_file(folder / f"seed{seed}-bits{bits}.safetensors")
    return [{name: tensors[f"layers.{index}.{name}.weight"].float() for name in LINEARS} for index in range(layers)]


class Judge:
    """Questions about pictures, the original's answers to them and its distributions along these."""

    def __init__(self, split: str, pictures: int):
        self.pipeline = load(demo_model(), vision="torch")
        self.layers = self.pipeline.decoder.layers
        self.groups = []
        for start in range(0, pictures, ROWS):
            encoded = [self.pipeline.encode(one_request(split, index)) for index in range(start, min(start + ROWS, pictures))]
            features = self.pipeline.features(encoded)
            answers = [each.ids for each in self.pipeline.batch(encoded, Generation(max_new_tokens=40), features=features)]
            wanted = [torch.log_softmax(row.double(), -1) for row in self.pipeline.answer_logits(encoded, answers, features=features)]
            self.groups.append((encoded, features, answers, wanted))

    def divergences(self, weights: Weights) -> numpy.ndarray:
        """Mean KL in nats over the answer to each question, for the decoder with these weights."""
        pipeline, found = self.with_weights(weights), []
        for encoded, features, answers, wanted in self.groups:
            for row, right in zip(pipeline.answer_logits(encoded, answers, features=features), wanted, strict=True):
                given = torch.log_softmax(row.double(), -1)
                found.append((right.exp() * (right - given)).sum(-1).mean().item())
        return numpy.array(found)

    def with_weights(self, weights: Weights) -> Pipeline:
        """The original with other weights in its linears."""
        self.pipeline.decoder.layers = [
            DecoderLayer(layer.config, {name: FloatLinear(own[name]) for name in LINEARS}, layer.norms)
            for layer, own in zip(self.layers, weights, strict=True)
        ]
        return self.pipeline


def one_request(split: str, index: int) -> Request:
    """One of the questions about a picture: pictures are what is independent."""
    sample = draw_sample(split, index, seed=1, kinds=WITH_PICTURES)
    return sample_request(sample, sample.questions[index % len(sample.questions)])


def fresh_inputs(model: Model, folder: Path, recipe: Recipe) -> CalibrationInputs:
    """The first layer's inputs, encoded once for each seed and copied for each run, which consumes them."""
    kept, used = folder / f"inputs-{recipe.seed}", folder / "inputs"
    kept.mkdir(exist_ok=True)
    conversations = CalibrationScenes(recipe.samples, recipe.seed)
    limits = {"most_tokens": recipe.tokens, "device": "cpu", "report": silent}
    calibration_inputs(model, kept, conversations, **limits)
    shutil.rmtree(used, ignore_errors=True)
    shutil.copytree(kept, used)
    return calibration_inputs(model, used, conversations, **limits)


def measured(options: argparse.Namespace) -> Iterator[tuple[str, int, numpy.ndarray]]:
    """Method, bits and divergences [seeds, pictures] of everything, each kept as soon as it is known."""
    model, judge = open_model(demo_model()), None
    methods = {"rtn": weights_of, "plain GPTQ": plain_weights, "vlquant": weights_of}
    for bits in options.bits:
        for name in [*methods, *(["GPTQModel 7.3.6"] if options.peer else [])]:
            rows = []
            for seed in SEEDS:
                seed = 0 if name == "rtn" else seed  # It looks at no data.
                path = options.folder / f"{options.split}-{name.replace(' ', '-')}-{bits}-{seed}.npy"
                if not path.exists():
                    judge = judge or Judge(options.split, options.pictures)
                    recipe = Recipe(method="rtn", bits=bits) if name == "rtn" else Recipe(bits=bits, seed=seed)
                    if name in methods:
                        weights = methods[name](model, fresh_inputs(model, options.folder, Recipe(seed=seed)), recipe)
                    else:
                        weights = peer_weights(options.peer, seed, bits, len(judge.layers))
                    numpy.save(path, judge.divergences(weights))
                rows.append(numpy.load(path))
                print(f"{name} {bits} bit, seed {seed}: {rows[-1].mean():.5f}", flush=True)
            yield name, bits, numpy.stack(rows)


def paired(differences: numpy.ndarray) -> tuple[float, float]:
    """Mean of differences by picture, and how far its 95 % t-interval reaches."""
    quantile = student_quantile(0.975, len(differences) - 1)
    return differences.mean(), quantile * differences.std(ddof=1) / len(differences) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="check")
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--peer", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        results = {(name, bits): rows for name, bits, rows in measured(options)}
    print(f"\n| bits | method | mean KL (nats) | smallest .. largest of {len(SEEDS)} seeds | difference from vlquant, 95 % interval |")
    print("|---|---|---|---|---|")
    for (name, bits), rows in results.items():
        mean, reach = paired((rows - results["vlquant", bits]).mean(0))
        by_seed = rows.mean(1)
        cells = [bits, name, f"{rows.mean():.5f}", f"{by_seed.min():.5f} .. {by_seed.max():.5f}"]
        cells.append("" if name == "vlquant" else f"{mean:+.5f} [{mean - reach:+.5f}, {mean + reach:+.5f}]")
        print("| " + " | ".join(map(str, cells)) + " |")
    print(json.dumps({f"{name} {bits}": rows.mean(1).tolist() for (name, bits), rows in results.items()}))


if __name__ == "__main__":
    main()
