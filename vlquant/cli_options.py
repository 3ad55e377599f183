"""Options that several commands share, and what stands in for a model or bundle that was not named."""

from pathlib import Path
from typing import Annotated

import typer

from vlquant.recipe import Recipe

TABLE_WIDTH = 80
BUNDLE_DEFAULT = "Default: the bundle here or below, else the demo."

ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Folder, or a name such as InternVL2_5-8B. Default: the demo model."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left there.")]
DeviceOption = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where it runs.")]
VisionOption = Annotated[
    str | None,
    typer.Option(
        metavar="onnx|fp32|fp16|int8|torch",
        help="Which vision tower. Default: the exported one of a bundle; of several, int8 on a CPU, fp16 on CUDA.",
    ),
]  # fmt: skip
CheckVisionOption = Annotated[
    str, typer.Option(metavar="onnx|fp32|fp16|int8|torch", help="Which of the bundle's vision towers; onnx: as chat takes it.")
]
ImageOption = Annotated[list[str] | None, typer.Option(metavar="FILE", help="A picture; may be repeated.")]
VideoOption = Annotated[str | None, typer.Option(metavar="FILE", help="A video.")]
FramesOption = Annotated[int | None, typer.Option(help="Frames taken from it.")]
MaxTilesOption = Annotated[int | None, typer.Option(help="Tiles per picture; none: as the model says.")]
MessagesOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="OpenAI-style messages in JSON instead of a question; - reads standard input.")
]
SystemOption = Annotated[str | None, typer.Option(metavar="TEXT", help="Another system message.")]
TokenizerOption = Annotated[str | None, typer.Option(metavar="slow|fast", help="Which, where the two differ.")]
PromptOption = Annotated[
    str, typer.Option("--prompt", metavar="original|hf", help="As chat() writes it, or transformers' processor.")
]
ReferenceOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The original. Default: the source that the bundle names.")
]
SetsOption = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="SET",
        help="What to ask: builtin, a .tsv file (VLMEvalKit) or a .jsonl or .json file (InternVL fine-tuning); may be repeated.",
    ),
]  # fmt: skip
LimitOption = Annotated[int | None, typer.Option(help="Questions of each set; pictures are asked about whole. Default: all.")]
CheckSeedOption = Annotated[int, typer.Option(help="Another built-in set of the same kind, other pictures of a file.")]
MetricOption = Annotated[
    str | None, typer.Option(help="How answers are scored: exact, contains, anls, relaxed, vqa, yes_no, choice, box. Default: by the set.")
]
MaxDropOption = Annotated[float | None, typer.Option(metavar="POINTS", help="Largest loss that passes. Default: by bits.")]
MemoryOption = Annotated[
    float | None, typer.Option(metavar="GB", help="A model that needs more does not answer by itself. Default: what is free.")
]
CheckTokensOption = Annotated[int, typer.Option(help="Tokens after which an answer is cut.")]
PredictionsOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="The original's answers, made elsewhere: a .tsv file (VLMEvalKit).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Progress and result as JSON, for programs.")]


def model_option(help_text: str):
    return typer.Option("--model", "-m", metavar="MODEL_OR_BUNDLE", help=help_text)


def output_option(default: str):
    return typer.Option("--output", "-o", help="Folder to write.", show_default=default)


def say(line: str) -> None:
    """Remarks go to standard error; standard output is for results."""
    typer.echo(line, err=True)


def wide_console():
    """Standard output for tables, whose numbers a narrower terminal would lose: it wraps the lines instead."""
    from rich.console import Console

    console = Console()
    console.width = max(TABLE_WIDTH, console.width)
    return console


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


def question_of(question: str | None, messages: str | None, image: list[str] | None, video: str | None, **options):
    """What is asked: a request made of options, or the messages of a file, beside which nothing else is asked."""
    if messages is not None:
        if question is not None or image or video is not None or given(**options):
            raise typer.BadParameter("the file holds the whole conversation; leave question, pictures and video out",
                                     param_hint="--messages")  # fmt: skip
        from vlquant.runtime.messages import read_messages

        return read_messages(messages)
    if options.get("frames") is not None and video is None:
        raise typer.BadParameter("there is no video to take frames from; add --video FILE", param_hint="--frames")
    from vlquant.request import Request

    return Request(question or "", images=tuple(image or ()), video=video, **given(**options))
