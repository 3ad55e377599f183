"""What the runtime's own roundings cost: inputs of compiled kernels, a head in 8 bits, keys and values in 8 bits.

    PYTHONPATH=. python tests/runtime_precision.py FOLDER [--questions 200]

A GPTQ-4 and a GPTQ-8 bundle of the demo model answer along the same answers (their own, computed exactly) in every way; the
mean KL divergence from float32 arithmetic on the same packed weights is per answer token, in nats. Printed, for
tests/RESULTS.md.
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
from vlquant.request import Request
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
    groups = open_check_set("builtin", limit=arguments.questions, seed=1).groups()
    asked = [each.request for group in groups for each in group]
    for bits in (4, 8):
        compare(bundles_of(bits, arguments.folder), asked, f"GPTQ-{bits}")


def bundles_of(bits: int, folder: Path) -> dict[int, Path]:
    """Bundles whose weights have so many bits, by the bits of their head."""
    made = {
        head: quantize(demo_model(), recipe=Recipe(bits=bits, head_bits=head), output=folder / f"{bits}-head-{head}") for head in (8, 16)
    }
    for bundle in made.values():
        export_vision(bundle)
    return made


def compare(bundles: dict[int, Path], asked: list[Request], title: str) -> None:
    """Print a line for every way."""
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
        print(
            f"{title}, {name}: mean KL {apart.mean():.2e}, largest {apart.max():.2e}, same token {same.double().mean():.4%} of {len(same)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
