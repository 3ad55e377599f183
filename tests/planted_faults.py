"""What `vlquant check` and `vlquant bisect` say of bundles of the demo model with a fault planted, and of good ones.

    PYTHONPATH=. python tests/planted_faults.py FOLDER [--limit QUESTIONS]

Faults at three places each; five clean quantizations (other calibration seeds), a float copy, and the reference beside
itself. Writes tests/data/planted_faults.json, which tests/test_planted_faults.py reads; tests/RESULTS.md says what it means.
"""

import argparse
import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from vlquant.bisect import bisect
from vlquant.calib_data import demo_model
from vlquant.check import check
from vlquant.check_options import CheckOptions
from vlquant.export.vision import export_vision
from vlquant.quantize import quantize
from vlquant.recipe import Recipe

from tests import planted

RECORD = Path(__file__).parent / "data" / "planted_faults.json"
LAYERS, HEADS = (0, 1, 3), ((0, 1), (2, 0), (3, 2))
SEEDS = range(5)


def said(bundle: Path, options: CheckOptions, *, blamed: bool) -> dict:
    """Outcome and grounds of a check, and what bisect names."""
    result = check(bundle, options=options)
    found = {"outcome": result.verdict.outcome, "grounds": sorted({each.name for each in result.verdict.grounds})}
    found |= {"reason": result.verdict.reason, "mean_difference": result.verdict.difference.mean}
    if result.distribution:
        found |= {"divergence": result.distribution.mean_divergence, "top_agreement": result.distribution.top_agreement}
    if blamed:
        bisection = bisect(bundle, options=options)
        found |= {"parts": list(bisection.parts), "after": bisection.after.outcome, "largest_gain": bisection.gains[:1]}
    print(bundle.name, json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    options, folder, source = CheckOptions(limit=arguments.limit), arguments.folder, demo_model()
    found = {}
    clean = [quantize(source, recipe=Recipe(seed=seed), output=folder / f"clean-{seed}") for seed in SEEDS]
    for bundle in clean:
        export_vision(bundle)
        found[bundle.name] = said(bundle, options, blamed=False)
    copy = planted.float_bundle(clean[0], source, folder / "float")
    found["float copy"] = said(copy, options, blamed=False)
    # Without its exported tower nothing is left that differs: the reference against the reference.
    shutil.rmtree(copy / "vision")
    found["reference"] = said(copy, options, blamed=False)

    def plant(name, change, *, blamed, around=nullcontext()):
        bundle = planted.copied(clean[0], folder / name.replace(" ", "-"))
        change(bundle)
        with around if not callable(around) else around(bundle):
            found[name] = said(bundle, options, blamed=blamed)

    for number, message in enumerate(("You are a parrot.", "", "You are an AI assistant whose name is InternLM (书生·浦语)!")):
        plant(f"system message {number}", lambda bundle: planted.set_system_message(bundle, message), blamed=False)
    for turn in (1, 2, 3):
        plant(f"tiles turned {turn}", lambda bundle: None, blamed=False, around=lambda bundle: planted.tiles_turned(bundle, turn))
    for layer in LAYERS:
        plant(f"scales of layer {layer}", lambda bundle: planted.scale_layer(bundle, layer), blamed=True)
        plant(f"2 bits in layer {layer}", lambda bundle: planted.two_bit_layer(bundle, source, layer), blamed=True)
    for block, head in HEADS:
        plant(f"head {head} of block {block}", lambda bundle: planted.zero_head(bundle, block, head), blamed=True)
    RECORD.write_text(json.dumps({"options": asdict(options), "found": found}, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
