"""Commands that set models beside each other, or beside other programs: bisect, compare, bench. They change no bundle."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vlquant.bench_options import KERNELS, MEASURES, BenchOptions
from vlquant.check_options import CheckOptions
from vlquant.cli_options import (
    BUNDLE_DEFAULT,
    CheckSeedOption,
    CheckTokensOption,
    CheckVisionOption,
    DeviceOption,
    ImageOption,
    JsonOption,
    LimitOption,
    MaxDropOption,
    MaxTilesOption,
    MemoryOption,
    MetricOption,
    PredictionsOption,
    ReferenceOption,
    SetsOption,
    VideoOption,
    bundle_or_demo,
    given,
    question_of,
    wide_console,
)

app = typer.Typer()


@app.command("bisect")
def bisect_command(
    bundle: Annotated[str | None, typer.Argument(metavar="BUNDLE", help=f"What failed. {BUNDLE_DEFAULT}")] = None,
    reference: ReferenceOption = None,
    sets: SetsOption = list(CheckOptions.sets),
    limit: LimitOption = None,
    seed: CheckSeedOption = CheckOptions.seed,
    metric: MetricOption = None,
    max_drop: MaxDropOption = None,
    memory: MemoryOption = None,
    max_new_tokens: CheckTokensOption = CheckOptions.max_new_tokens,
    reference_predictions: PredictionsOption = None,
    device: DeviceOption = "cpu",
    vision: CheckVisionOption = CheckOptions.vision,
    as_json: JsonOption = False,
) -> None:
    """Name the smallest part of a bundle whose return to float ends the FAIL of its check."""
    options = CheckOptions(
        sets=tuple(sets), limit=limit, seed=seed, metric=metric, max_drop=max_drop, memory=memory,
        max_new_tokens=max_new_tokens, reference_predictions=reference_predictions, device=device, vision=vision,
    )  # fmt: skip
    bundle = bundle_or_demo(bundle)
    from rich.console import Console

    from vlquant.bisect import bisect
    from vlquant.check_table import print_bisection
    from vlquant.progress import drawn_progress, json_progress

    with json_progress() if as_json else drawn_progress() as report:
        found = bisect(bundle, reference=reference, options=options, report=report)
    if as_json:
        typer.echo(json.dumps(asdict(found), ensure_ascii=False))
    else:
        print_bisection(found, Console())


@app.command("compare")
def compare_command(
    first: Annotated[str, typer.Argument(metavar="MODEL_OR_BUNDLE")],
    second: Annotated[str, typer.Argument(metavar="MODEL_OR_BUNDLE")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question.")],
    image: ImageOption = None,
    video: VideoOption = None,
    max_tiles: MaxTilesOption = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens after which an answer is cut.")] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Two models answer the same question side by side: what differs, how fast, in how much memory."""
    asked = question_of(prompt, None, image, video)
    from rich.console import Console

    from vlquant.compare import compare
    from vlquant.runtime.generate import Generation

    console = Console(quiet=as_json)
    generation = Generation(**given(max_new_tokens=max_new_tokens))
    told = compare((first, second), asked, generation=generation, device=device, console=console, max_tiles=max_tiles)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in told], ensure_ascii=False))


@app.command("bench")
def bench_command(
    bundle: Annotated[str | None, typer.Argument(metavar="BUNDLE", help=f"What is measured. {BUNDLE_DEFAULT}")] = None,
    shape: Annotated[str | None, typer.Option(metavar="NAME", help="Random weights in a published model's shape instead.")] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Peers, separated by commas: torch, transformers, llama-cpp, onnxruntime-genai, "
                     "openvino; none. Default: those installed.")
    ] = None,
    measure: Annotated[str, typer.Option(metavar="NAMES", help=f"Of {', '.join(MEASURES)}.")] = ",".join(BenchOptions.measures),
    kernels: Annotated[str, typer.Option(metavar="NAMES", help=f"Ours by other kernels too: {', '.join(KERNELS)}.")] = "",
    rounds: Annotated[int, typer.Option(help="Measurements of each.")] = BenchOptions.rounds,
    prompts: Annotated[str, typer.Option(metavar="TOKENS", help="Lengths whose prefill is measured.")] = ",".join(map(str, BenchOptions.prompts)),
    contexts: Annotated[str, typer.Option(metavar="TOKENS", help="Lengths after which decoding is.")] = ",".join(map(str, BenchOptions.contexts)),
    batch: Annotated[int, typer.Option(help="Conversations side by side.")] = BenchOptions.batch,
    tokens: Annotated[int, typer.Option(help="Tokens decoded each time.")] = BenchOptions.tokens,
    layers: Annotated[int | None, typer.Option(help="Of the shape's language model. Default: all.")] = None,
    vision_layers: Annotated[int | None, typer.Option(help="Of the shape's vision tower. Default: all.")] = None,
    keep: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep what was made for measuring, and use it again.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the result.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure load time, vision, prefill, decode and memory, beside other programs, in alternating rounds."""
    if shape is not None and bundle is not None:
        raise typer.BadParameter("a bundle is named as well; give one of them", param_hint="--shape")
    if shape is None and given(layers=layers, vision_layers=vision_layers):
        raise typer.BadParameter("they shorten a shape; add --shape NAME", param_hint="--layers, --vision-layers")
    if against is not None and not listed(against):
        raise typer.BadParameter(f"{against!r} names nobody; name peers, or none, or leave it out", param_hint="--against")
    options = BenchOptions(
        measures=listed(measure), against=None if against is None else tuple(each for each in listed(against) if each != "none"),
        kernels=listed(kernels), rounds=rounds, prompts=numbers(prompts, "--prompts"), contexts=numbers(contexts, "--contexts"),
        batch=batch, tokens=tokens,
    )  # fmt: skip
    bundle = bundle_or_demo(bundle) if shape is None else None
    import torch

    from vlquant.bench import bench
    from vlquant.bench_result import to_json
    from vlquant.bench_shape import bundle_of_shape
    from vlquant.bench_table import plot_bench, print_bench, require_folder, require_picture
    from vlquant.machine import this_machine
    from vlquant.progress import drawn_progress, json_progress

    if plot is not None:
        require_picture(plot)
    with tempfile.TemporaryDirectory(prefix="vlquant-bench-") as made, json_progress() if as_json else drawn_progress() as report:
        work = require_folder(keep or Path(made))
        machine = this_machine(torch.get_num_threads())  # Before we keep it busy ourselves.
        if shape is not None:
            bundle = bundle_of_shape(shape, work, layers=layers, vision_layers=vision_layers, report=report)
        result = bench(bundle, work, options=options, machine=machine, report=report)
    if as_json:
        typer.echo(to_json(result), nl=False)
    else:
        print_bench(result, wide_console())
    if plot is not None:
        plot_bench(result, plot)


def listed(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(each.strip() for each in text.split(",") if each.strip())


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Numbers separated by commas."""
    if not all(each.isdecimal() for each in listed(text)):
        raise typer.BadParameter(f"{text!r} is not numbers separated by commas", param_hint=option)
    return tuple(map(int, listed(text)))
