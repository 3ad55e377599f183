"""The `vlquant` command: options become calls of the verbs, errors one line and an exit code.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from vlquant import __version__
from vlquant.errors import VlquantError
from vlquant.recipe import Recipe

USER_ERROR = 2  # Everything the user can put right, as typer's own usage errors.
DIFFERENT = 3  # A comparison that found a difference, as a failed check.


class Commands(TyperGroup):
    """Commands in the order of use; a VlquantError is one line on standard error. Bugs keep their traceback."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except VlquantError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(USER_ERROR) from None


BUNDLE_DEFAULT = "Default: the bundle here or below, else the demo."

ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Folder, or a name such as InternVL2_5-8B. Default: the demo model."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left there.")]
DeviceOption = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where it runs.")]
VisionOption = Annotated[
    str | None, typer.Option(metavar="onnx|torch", help="Which vision tower. Default: the exported one of a bundle.")
]


ImageOption = Annotated[list[str] | None, typer.Option(metavar="FILE", help="A picture; may be repeated.")]
VideoOption = Annotated[str | None, typer.Option(metavar="FILE", help="A video.")]
FramesOption = Annotated[int | None, typer.Option(help="Frames taken from it.")]
MaxTilesOption = Annotated[int | None, typer.Option(help="Tiles per picture; none: as the model says.")]


def model_option(help_text: str):
    return typer.Option("--model", "-m", metavar="MODEL_OR_BUNDLE", help=help_text)


def output_option(default: str):
    return typer.Option("--output", "-o", help="Folder to write.", show_default=default)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `vlquant` command."""
    app(prog_name="vlquant")


def show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vlquant {__version__}")
        raise typer.Exit()


def say(line: str) -> None:
    """Remarks go to standard error; standard output is for results."""
    typer.echo(line, err=True)


def model_or_demo(named: str | None) -> str | Path:
    """The model that was named, else the demo model, saying so."""
    if named is not None:
        return named
    from vlquant.calib_data import demo_model

    say("no MODEL named: using the demo model that comes with vlquant")
    return demo_model()


def bundle_or_demo(named: str | None) -> str | Path:
    """What was named, else the bundle here or directly below, else one made of the demo model; saying which."""
    return named if named is not None else bundle_here() or demo_bundle()


def bundle_or_demo_model(named: str | None) -> str | Path:
    """As `bundle_or_demo`, for what needs no bundle: without one the demo model as it is."""
    return named if named is not None else bundle_here() or model_or_demo(None)


def bundle_here() -> Path | None:
    """The bundle in the current folder or directly below, saying which."""
    from vlquant.bundle import find_bundle

    found = find_bundle()
    if found is not None:
        say(f"no bundle named: using {found.resolve().name}")
    return found


def demo_bundle() -> Path:
    """The demo model quantized as by default, with its vision tower, in the current folder."""
    from vlquant.calib_data import demo_model
    from vlquant.export.vision import export_vision
    from vlquant.progress import drawn_progress
    from vlquant.quantize import quantize

    say("no bundle here: making one of the demo model that comes with vlquant")
    with drawn_progress() as report:
        bundle = quantize(demo_model(), recipe=Recipe(), output=None, overwrite=False, report=report)
        export_vision(bundle, report=report)
    say(f"using {bundle}")
    return bundle


def given(**options) -> dict:
    """The options that were typed; the others keep the default of the record they go into."""
    return {name: value for name, value in options.items() if value is not None}


@app.callback()
def vlquant(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Run InternVL in 4 or 8 bits, and know what it cost.

    quantize, export-vision, check, chat: in this order, each leaving its files in the same bundle.
    Exit codes: 0 done or passed, 2 a request that cannot be carried out, 3 check failed, 4 check inconclusive.
    """


@app.command("quantize")
def quantize_command(
    model: ModelArgument = None,
    method: Annotated[str, typer.Option(help="gptq, or bnb (bitsandbytes: NF4, int8).")] = Recipe.method,
    bits: Annotated[int, typer.Option(help="Bits per weight: 4 or 8.")] = Recipe.bits,
    group_size: Annotated[int, typer.Option(help="Input columns sharing one scale (gptq).")] = Recipe.group_size,
    calib: Annotated[str, typer.Option(metavar="SET", help="Calibration set (gptq).")] = Recipe.calibration,
    samples: Annotated[int, typer.Option(help="Conversations taken from it.")] = Recipe.samples,
    output: Annotated[Path | None, output_option("MODEL-METHOD-BITSbit")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Quantize the language model; vision tower, projector, embeddings and head stay as they are."""
    recipe = Recipe(method=method, bits=bits, group_size=group_size, calibration=calib, samples=samples)
    source = model_or_demo(model)
    from vlquant.progress import drawn_progress
    from vlquant.quantize import quantize

    with drawn_progress() as report:
        bundle = quantize(source, recipe=recipe, output=output, overwrite=overwrite, report=report)
    typer.echo(bundle)


@app.command("export-vision")
def export_vision_command(
    source: Annotated[str | None, typer.Argument(metavar="MODEL|BUNDLE", help=f"Whose tower. {BUNDLE_DEFAULT}")] = None,
    output: Annotated[Path | None, output_option("vision/ in the bundle")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write vision tower and projector as ONNX, compared with PyTorch before it is accepted."""
    source = bundle_or_demo(source)
    from vlquant.export.vision import export_vision
    from vlquant.progress import drawn_progress

    with drawn_progress() as report:
        folder = export_vision(source, output=output, overwrite=overwrite, report=report)
    typer.echo(folder)


@app.command("check")
def check_command(
    bundle: Annotated[str | None, typer.Argument(metavar="BUNDLE", help=f"What to check. {BUNDLE_DEFAULT}")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original. Default: the source that the bundle names.")
    ] = None,
    max_drop: Annotated[float | None, typer.Option(metavar="POINTS", help="Largest loss that passes. Default: by bits.")] = None,
    scenes: Annotated[int | None, typer.Option(help="Scenes of the check set to ask about. Default: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another check set of the same kind.")] = None,
) -> None:
    """Measure the loss against the original: exit code 0 passed, 3 failed, 4 inconclusive."""
    bundle = bundle_or_demo(bundle)
    from rich.console import Console

    from vlquant.check import check
    from vlquant.check_table import print_check
    from vlquant.progress import drawn_progress

    with drawn_progress() as report:
        result = check(bundle, reference=reference, max_drop=max_drop, report=report, **given(scenes=scenes, seed=seed))
    print_check(result, Console())
    raise typer.Exit(result.exit_code)


def request_of(question: str, image: list[str] | None, video: str | None, **options):
    """The request that options describe; frames are refused without a video to take them from."""
    if options.get("frames") is not None and video is None:
        raise typer.BadParameter("there is no video to take frames from; add --video FILE", param_hint="--frames")
    from vlquant.request import Request

    return Request(question, images=tuple(image or ()), video=video, **given(**options))


@app.command("chat")
def chat_command(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The question; none: a conversation.")] = None,
    model: Annotated[str | None, model_option(f"Who answers. {BUNDLE_DEFAULT}")] = None,
    image: ImageOption = None,
    video: VideoOption = None,
    frames: FramesOption = None,
    max_tiles: MaxTilesOption = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens after which an answer is cut.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: avoid repeating.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draw the same tokens again.")] = None,
    device: DeviceOption = "cpu",
    vision: VisionOption = None,
) -> None:
    """Ask about pictures, a video or nothing; without PROMPT, converse."""
    request = request_of(prompt or "", image, video, max_tiles=max_tiles, frames=frames)
    model = bundle_or_demo(model)
    from vlquant.runtime.chat import chat
    from vlquant.runtime.generate import Generation

    generation = given(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    chat(request, model=model, device=device, vision=vision, generation=Generation(**generation), report=say)


@app.command("prompt")
def prompt_command(
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    model: Annotated[str | None, model_option(f"Whose prompt. {BUNDLE_DEFAULT}")] = None,
    image: ImageOption = None,
    video: VideoOption = None,
    frames: FramesOption = None,
    max_tiles: MaxTilesOption = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Another system message.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="slow|fast", help="Which, where the two differ.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print the token ids instead.")] = False,
) -> None:
    """Print the exact text the model gets, runs of picture tokens folded."""
    request = request_of(question, image, video, max_tiles=max_tiles, frames=frames, system_message=system)
    model = bundle_or_demo_model(model)
    from vlquant.show_prompt import show_prompt

    shown = show_prompt(request, model=model, tokenizer=tokenizer)
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
    vision: Annotated[str, typer.Option(metavar="torch|onnx", help="Vision tower.")] = "torch",
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
        typer.echo(trace(what[0], request, output, vision=vision, report=report))


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


@app.command("demo")
def demo_command(
    folder: Annotated[str | None, typer.Argument(metavar="FOLDER", help="Where to work. Default: a temporary folder.")] = None,
) -> None:
    """All of it on the demo model, in minutes: sizes, scores, speed, and answers side by side."""
    from vlquant.demo import demo
    from vlquant.progress import drawn_progress

    with drawn_progress() as report:
        demo(folder, report=report)


@app.command("inspect")
def inspect_command(
    bundle: Annotated[str | None, typer.Argument(metavar="BUNDLE", help="Default: the bundle here or below.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its hash.")] = False,
) -> None:
    """Show what a bundle was made from, how, and what is known about it."""
    from vlquant.inspect import inspect

    inspect(bundle, verify=verify)


if __name__ == "__main__":
    main()
