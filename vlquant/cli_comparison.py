"""Commands that set models beside each other: bisect, compare. They change no bundle."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

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
