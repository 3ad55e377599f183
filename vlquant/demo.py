"""`vlquant demo`: the whole job on the demo model, in minutes: quantize, export, compare, chat."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlquant.calib_data import demo_model
from vlquant.calib_data.samples import Sample, draw_sample, sample_request
from vlquant.check import check
from vlquant.check_options import CheckOptions
from vlquant.check_result import CheckResult
from vlquant.check_words import interval_text
from vlquant.events import Event, Report, silent
from vlquant.export.vision import export_vision
from vlquant.publishing import require_empty
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime.generate import Generation
from vlquant.runtime.pipeline import Pipeline, load
from vlquant.vision_manifest import read_vision_manifest

RECIPES = {
    "GPTQ-4": Recipe(bits=4),
    "GPTQ-8": Recipe(bits=8),
    "NF4": Recipe(method="bnb", bits=4),
}
QUESTIONS = 200
"""An estimate, no verdict."""
SHOWN = (0, 1, 2)
"""Scenes of the development split that are shown with both answers: a document, a receipt, a chart."""


def demo(folder: str | Path | None = None, *, console: Console | None = None, report: Report = silent) -> Path:
    """Quantize the demo model three ways into `folder`, compare them with the original and print a table.

    folder: None makes a temporary one. Returns the folder. Raises OutputRefused if the folder is not empty.
    """
    console = console or Console()
    place = make_place(folder)
    console.print(f"working in {place}")
    bundles = {}
    for name, recipe in RECIPES.items():
        report(Event("demo", message=f"{name}: quantizing the language model, exporting the vision tower"))
        bundles[name] = quantize(demo_model(), recipe=recipe, output=place / f"demo-{recipe.label}", report=report)
        export_vision(bundles[name], report=report)
    report(Event("demo", message="asking the original and all three the same questions"))
    results = {name: check(bundle, options=CheckOptions(limit=QUESTIONS), report=report) for name, bundle in bundles.items()}
    original = load(demo_model(), vision="torch")
    pipelines = {name: load(bundle) for name, bundle in bundles.items()}
    print_table(console, bundles, results, {"reference": original, **pipelines})
    print_answers(console, place, original, pipelines["GPTQ-4"])
    return place


def make_place(folder: str | Path | None) -> Path:
    """An empty folder to work in."""
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="vlquant-demo-"))
    place = Path(folder)
    require_empty(place)
    place.mkdir(parents=True, exist_ok=True)
    return place


def print_table(
    console: Console, bundles: dict[str, Path], results: dict[str, CheckResult], pipelines: dict[str, Pipeline]
) -> None:
    """Size, score and speed of the original and of every bundle."""
    first = next(iter(results.values()))
    original_bytes = weight_bytes(demo_model())
    table = Table("", box=None, header_style="dim")
    for heading in ("MB", "ratio", "score", "difference [90 %]", "ONNX parity", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    speed = decoding_speed(pipelines["reference"])
    table.add_row("original", megabytes(original_bytes), "1.00", f"{100 * first.generated.reference:.1f}", "", "", f"{speed:.0f}")
    for name, bundle in bundles.items():
        result, size = results[name], weight_bytes(bundle)
        table.add_row(
            name,
            megabytes(size),
            f"{original_bytes / size:.2f}",
            f"{100 * result.generated.quantized:.1f}",
            interval_text(result.verdict.difference),
            f"{onnx_difference(bundle):.1e}",
            f"{decoding_speed(pipelines[name]):.0f}",
        )
    console.print(f"{first.questions} questions about {first.pictures} unseen scenes: an estimate, no verdict")
    console.print("MB: safetensors; ratio: original to bundle; difference: points, paired by scene", style="dim")
    console.print(table)
    console.print("The vision tower, embeddings and head stay 16 bit; in a model this small they weigh most.", style="dim")


def print_answers(console: Console, place: Path, original: Pipeline, quantized: Pipeline) -> None:
    """Three questions with their pictures, both answers side by side."""
    for index in SHOWN:
        sample = draw_sample("development", index)
        question = sample.questions[0]
        paths = save_pictures(sample, place / "pictures")
        request = sample_request(sample, question)
        answers = [pipeline.ask(request, generation=Generation(max_new_tokens=40)).text for pipeline in (original, quantized)]
        console.print(f"\n{', '.join(map(str, paths))}", style="dim", highlight=False, soft_wrap=True)
        console.print(f"{question.text}  [right: {question.answer}]", markup=False, highlight=False)
        console.print(f"  original {answers[0]!r}   GPTQ-4 {answers[1]!r}", markup=False, highlight=False)


def save_pictures(sample: Sample, folder: Path) -> list[Path]:
    """Write a scene's pictures as PNG files."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{sample.key.replace('/', '-')}-{number}.png" for number in range(1, len(sample.images) + 1)]
    for image, path in zip(sample.images, paths, strict=True):
        image.save(path)
    return paths


def weight_bytes(folder: Path) -> int:
    """Size of a checkpoint's or bundle's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def onnx_difference(bundle: Path) -> float:
    """Largest difference between ONNX and torch features, as export-vision measured it."""
    return read_vision_manifest(bundle / "vision").parity.largest_difference


def decoding_speed(pipeline: Pipeline, requests: Sequence[str] = ("Repeat A1B2C3D4", "Repeat ZYXW9876")) -> float:
    """Tokens per second of answers to text questions, one at a time, the first token left out."""
    tokens, seconds = 0, 1e-9
    for text in requests:
        started = time.perf_counter()
        usage = pipeline.ask(text, generation=Generation(max_new_tokens=40)).usage
        tokens += usage.answer_tokens - 1
        seconds += min(usage.answer_seconds, time.perf_counter() - started)
    return tokens / seconds
