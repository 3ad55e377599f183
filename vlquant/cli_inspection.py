"""Commands that show what there is and what a model sees. They change no bundle."""

from pathlib import Path
from typing import Annotated

import typer

from vlquant.cli_options import (
    BUNDLE_DEFAULT,
    FramesOption,
    ImageOption,
    MaxTilesOption,
    MessagesOption,
    PromptOption,
    SystemOption,
    TokenizerOption,
    VideoOption,
    bundle_or_demo_model,
    model_option,
    question_of,
    say,
)

DIFFERENT = 3  # A comparison that found a difference, as a failed check.

app = typer.Typer()


@app.command("prompt")
def prompt_command(
    question: Annotated[str | None, typer.Argument(metavar="QUESTION")] = None,
    model: Annotated[str | None, model_option(f"Whose prompt. {BUNDLE_DEFAULT}")] = None,
    image: ImageOption = None,
    video: VideoOption = None,
    frames: FramesOption = None,
    max_tiles: MaxTilesOption = None,
    messages: MessagesOption = None,
    system: SystemOption = None,
    form: PromptOption = "original",
    tokenizer: TokenizerOption = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print the token ids instead.")] = False,
) -> None:
    """Print the exact text the model gets, runs of picture tokens folded."""
    if question is None and messages is None:
        raise typer.BadParameter("give a QUESTION, or --messages FILE")
    asked = question_of(question, messages, image, video, frames=frames, system_message=system)
    model = bundle_or_demo_model(model)
    from vlquant.show_prompt import show_prompt

    shown = show_prompt(asked, model=model, max_tiles=max_tiles, prompt=form, tokenizer=tokenizer)
    typer.echo(" ".join(map(str, shown.ids)) if ids else shown.text)
    say(f"{len(shown.ids)} tokens, tiles per picture: {', '.join(map(str, shown.tiles)) or 'none'}")


@app.command("tiles")
def tiles_command(
    image: Annotated[str, typer.Argument(metavar="IMAGE")],
    model: Annotated[str | None, model_option("Who cuts. Default: 448 pixels, at most 12 tiles.")] = None,
    max_tiles: Annotated[int | None, typer.Option(help="Most tiles, the thumbnail not counted.")] = None,
    draw: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the picture with the grid drawn on it.")] = None,
) -> None:
    """Show how a picture is cut into tiles, and how many tokens it costs."""
    from vlquant.tiles import tiles

    typer.echo(tiles(image, model=model, max_tiles=max_tiles, draw=draw))


@app.command("trace")
def trace_command(
    what: Annotated[list[str], typer.Argument(metavar="MODEL | A B", help="Who answers; with --compare two traces.")],
    request: Annotated[Path | None, typer.Option(metavar="FILE", help="request.json: the calls to run.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE")] = Path("trace.safetensors"),
    vision: Annotated[str, typer.Option(metavar="torch|onnx|fp32|fp16|int8", help="Vision tower.")] = "torch",
    tokenizer: TokenizerOption = None,
    compare: Annotated[bool, typer.Option("--compare", help="Name the first difference of two traces: exit code 3.")] = False,
) -> None:
    """Record every intermediate of chat() and batch_chat() calls, or compare two recordings.

    A request is {"calls": [{"key": "a", "call": "chat", "question": "What?", "images": [{"file": "x.png", "max_num": 6}]}]};
    further entries: history, num_patches_list, max_new_tokens, system_message; batch_chat has questions instead.
    """
    if len(what) != (2 if compare else 1) or compare == (request is not None):
        raise typer.BadParameter("give MODEL --request FILE to record, or --compare A B")
    if compare:
        from vlquant.trace_difference import first_difference

        difference = first_difference(*what)
        typer.echo(difference or "no difference")
        raise typer.Exit(DIFFERENT if difference else 0)
    from vlquant.progress import drawn_progress
    from vlquant.trace import trace

    with drawn_progress() as report:
        typer.echo(trace(what[0], request, output, vision=vision, tokenizer=tokenizer, report=report))


@app.command("synthesize")
def synthesize_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A published model, such as InternVL2_5-1B.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    layers: Annotated[int | None, typer.Option(help="Layers of the language model. Default: all.")] = None,
    vision_layers: Annotated[int | None, typer.Option(help="Layers of the vision tower. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Other random weights.")] = 0,
) -> None:
    """Write random weights in a published model's true shape, to measure speed and memory with."""
    from vlquant.progress import drawn_progress
    from vlquant.synthesize import synthesize

    with drawn_progress() as report:
        typer.echo(synthesize(name, output, layers=layers, vision_layers=vision_layers, seed=seed, report=report))


@app.command("inspect")
def inspect_command(
    bundle: Annotated[str | None, typer.Argument(metavar="BUNDLE", help="Default: the bundle here or below.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its hash.")] = False,
) -> None:
    """Show what a bundle was made from, how, and what is known about it."""
    from vlquant.inspect import inspect

    inspect(bundle, verify=verify)


@app.command("doctor")
def doctor_command(as_json: Annotated[bool, typer.Option("--json", help="The diagnosis as JSON, for programs.")] = False) -> None:
    """Say what is installed, what this GPU can run and why, and what mends the rest.

    Exit codes: 0 vlquant can run, with or without a GPU; 3 something installed is broken.
    """
    from rich.console import Console

    from vlquant.doctor import doctor
    from vlquant.doctor_table import print_diagnosis, to_json
    from vlquant.probes import probe_machine

    diagnosis = doctor(probe_machine())
    if as_json:
        typer.echo(to_json(diagnosis), nl=False)
    else:
        print_diagnosis(diagnosis, Console())
    raise typer.Exit(diagnosis.exit_code)
