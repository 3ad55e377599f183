"""What the runtime's own roundings cost: compiled kernels, a head in 8 bits, keys and values in 8 bits.

    PYTHONPATH=. python tests/runtime_precision.py FOLDER [--questions 200]

One GPTQ-4 bundle of the demo model answers along the same answers (its own, computed exactly) in every way; the mean KL
divergence from float32 arithmetic on the same packed weights is per answer token, in nats. Printed, for tests/RESULTS.md.
"""

import argparse
import os
from pathlib import Path

import torch

from vlquant.calib_data import demo_model
from vlquant.calib_data.check_sets import open_check_set
from vlquant.export.vision import export_vision
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime import Generation, load

WAYS = {
    "avx2, head as stored": ("avx2", 16, 32),
    "vnni, head as stored": ("vnni", 16, 32),
    "head in 8 bits": ("vnni", 8, 32),
    "head in 8 bits, cache in 8 bits": ("vnni", 8, 8),
}
"""Kernels, head_bits and cache_bits."""


def opened(bundle: Path, kernels: str):
    os.environ["VLQUANT_KERNELS"] = kernels
    return load(bundle)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    arguments = parser.parse_args()
    bundles = {bits: quantize(demo_model(), recipe=Recipe(head_bits=bits), output=arguments.folder / f"head-{bits}") for bits in (8, 16)}
    for bundle in bundles.values():
        export_vision(bundle)
    groups = open_check_set("builtin", limit=arguments.questions, seed=1).groups()
    asked = [each.request for group in groups for each in group]
    exact = opened(bundles[16], "torch")
    answers = [exact.ask(each, generation=Generation(max_new_tokens=64)).ids for each in asked]
    wanted = [exact.answer_logits([each], [ids])[0].double().log_softmax(-1) for each, ids in zip(asked, answers, strict=True)]
    for name, (kernels, head, cache) in WAYS.items():
        pipe, apart, same = opened(bundles[head], kernels), [], []
        for request, ids, right in zip(asked, answers, wanted, strict=True):
            found = pipe.answer_logits([request], [ids], cache_bits=cache)[0].double().log_softmax(-1)
            apart.append((right.exp() * (right - found)).sum(-1))
            same.append(right.argmax(-1) == found.argmax(-1))
        apart, same = torch.cat(apart), torch.cat(same)
        print(f"{name}: mean KL {apart.mean():.2e}, largest {apart.max():.2e}, same token {same.double().mean():.4%} of {len(same)}", flush=True)


if __name__ == "__main__":
    main()
