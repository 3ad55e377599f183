"""The `vlquant` command: options become calls of the verbs, errors one line and an exit code.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from vlquant import __version__, cli_comparison, cli_inspection, cli_planning
from vlquant.check_options import CheckOptions
from vlquant.cli_options import (
    BUNDLE_DEFAULT,
    CheckSeedOption,
    CheckTokensOption,
    CheckVisionOption,
    DeviceOption,
    FramesOption,
    ImageOption,
    JsonOption,
    LimitOption,
    MaxDropOption,
    MaxTilesOption,
    MemoryOption,
    MessagesOption,
    MetricOption,
    ModelArgument,
    OverwriteOption,
    PredictionsOption,
    PromptOption,
    ReferenceOption,
    SetsOption,
    SystemOption,
    TokenizerOption,
    VideoOption,
    VisionOption,
    bundle_or_demo,
    given,
    model_option,
    model_or_demo,
    output_option,
    question_of,
    say,
)
from vlquant.ending import end_in_order
from vlquant.errors import NO_SPACE, VlquantError
from vlquant.recipe import Recipe

USER_ERROR = 2  # Everything the user can put right, as typer's own usage errors.


class Commands(TyperGroup):
    """Commands in the order of use; a VlquantError is one line on standard error. Bugs keep their traceback."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except VlquantError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(USER_ERROR) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `vlquant` command."""
    end_in_order()
    # Python has None for a stream that the caller closed; to libraries that is a bug of ours.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    try:
        app(prog_name="vlquant")
    except OSError as error:
        if error.errno not in NO_SPACE or error.filename is not None:
            raise
        sys.stdout = None  # What is still in its buffer would fail once more at the end.
        with suppress(OSError):
            typer.echo("error: standard output, or a file that was written, met a full disk; make room and repeat the command", err=True)
        sys.exit(USER_ERROR)


def show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vlquant {__version__}")
        raise typer.Exit()


@app.callback()
def vlquant(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Run InternVL in 4 or 8 bits, and know what it cost.

    quantize, export-vision, check, chat: in this order, each leaving its files in the same bundle.
    Exit codes: 0 done or passed, 2 a request that cannot be carried out, 3 check failed or nothing fits, 4 check inconclusive.
    """


@app.command("quantize")
def quantize_command(
    model: ModelArgument = None,
    method: Annotated[str, typer.Option(help="gptq, rtn (rounding, no data) or bnb (bitsandbytes: NF4, int8).")] = Recipe.method,
    bits: Annotated[int, typer.Option(help="Bits per weight: 4 or 8; 3 is experimental.")] = Recipe.bits,
    average_bits: Annotated[
        float | None, typer.Option(help="Between 4 and 8: linears that need it most get 8 bits, the others 4 (gptq).")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Input columns sharing one scale (gptq, rtn).")] = Recipe.group_size,
    head_bits: Annotated[int, typer.Option(help="Of the head while answering on a CPU: 8, or 16 as stored.")] = Recipe.head_bits,
    calib: Annotated[
        list[str],
        typer.Option(
            metavar="SET",
            help="What to calibrate on (gptq): builtin, photos (of scikit-image and scikit-learn), a .jsonl or .json file "
            "(InternVL fine-tuning), a .tsv file (VLMEvalKit) or a folder of pictures. Several take turns.",
        ),
    ] = list(Recipe.calibration),
    samples: Annotated[int, typer.Option(help="Conversations taken from it.")] = Recipe.samples,
    seed: Annotated[int, typer.Option(help="Which ones are taken.")] = Recipe.seed,
    tokens: Annotated[int, typer.Option(help="Most tokens of each: pictures get fewer tiles.")] = Recipe.tokens,
    damping: Annotated[float, typer.Option(help="Share of the Hessian's mean added to its diagonal.")] = Recipe.damping,
    vision_share: Annotated[float, typer.Option(help="Weight of all picture tokens, 0 to 1.")] = Recipe.vision_share,
    answer_share: Annotated[float, typer.Option(help="Weight of all answer tokens; the rest is the prompt's.")] = Recipe.answer_share,
    compensation: Annotated[float, typer.Option(help="Share of earlier layers' error to make up for, at most.")] = Recipe.compensation,
    device: DeviceOption = "cpu",
    vram: Annotated[float | None, typer.Option(metavar="GB", help="Use no more of the GPU's memory than this.")] = None,
    output: Annotated[Path | None, output_option("MODEL-METHOD-BITSbit")] = None,
    overwrite: OverwriteOption = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what was done to every linear.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Progress as lines of JSON, for programs.")] = False,
) -> None:
    """Quantize the language model; vision tower, projector, embeddings and head stay as they are."""
    recipe = Recipe(
        method=method, bits=bits, average_bits=average_bits, group_size=group_size, head_bits=head_bits, damping=damping, calibration=tuple(calib),
        samples=samples, tokens=tokens, seed=seed, vision_share=vision_share, answer_share=answer_share, compensation=compensation,
    )  # fmt: skip
    source = model_or_demo(model)
    from vlquant.progress import drawn_progress, json_progress
    from vlquant.quantize import quantize
    from vlquant.rehearsal import limit_memory

    if vram is not None:
        limit_memory(device, vram)
    with json_progress() if as_json else drawn_progress(verbose=verbose) as report:
        bundle = quantize(source, recipe=recipe, output=output, overwrite=overwrite, device=device, report=report)
    typer.echo(bundle)


@app.command("export-vision")
def export_vision_command(
    source: Annotated[str | None, typer.Argument(metavar="MODEL|BUNDLE", help=f"Whose tower. {BUNDLE_DEFAULT}")] = None,
    output: Annotated[Path | None, output_option("vision/, vision-fp16/ or vision-int8/ in the bundle")] = None,
    precision: Annotated[str, typer.Option(metavar="fp32|fp16|int8", help="int8 is the fastest on a CPU, fp16 is for a GPU.")] = "fp32",
    overwrite: OverwriteOption = False,
) -> None:
    """Write vision tower and projector as ONNX, compared with PyTorch before it is accepted."""
    source = bundle_or_demo(source)
    from vlquant.export.vision import export_vision
    from vlquant.progress import drawn_progress

    with drawn_progress() as report:
        folder = export_vision(source, output=output, precision=precision, overwrite=overwrite, report=report)
    typer.echo(folder)


@app.command("check")
def check_command(
    bundle: Annotated[str | None, typer.Argument(metavar="BUNDLE", help=f"What to check. {BUNDLE_DEFAULT}")] = None,
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
    """Measure the loss against the original: exit code 0 passed, 3 failed, 4 inconclusive."""
    options = CheckOptions(
        sets=tuple(sets), limit=limit, seed=seed, metric=metric, max_drop=max_drop, memory=memory,
        max_new_tokens=max_new_tokens, reference_predictions=reference_predictions, device=device, vision=vision,
    )  # fmt: skip
    bundle = bundle_or_demo(bundle)
    from rich.console import Console

    from vlquant.check import check
    from vlquant.check_result import to_json
    from vlquant.check_table import print_result
    from vlquant.progress import drawn_progress, json_progress

    with json_progress() if as_json else drawn_progress() as report:
        result = check(bundle, reference=reference, options=options, report=report)
    if as_json:
        typer.echo(to_json(result), nl=False)
    else:
        print_result(result, Console())
    raise typer.Exit(result.exit_code)


@app.command("chat")
def chat_command(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The question; none: a conversation.")] = None,
    model: Annotated[str | None, model_option(f"Who answers. {BUNDLE_DEFAULT}")] = None,
    image: ImageOption = None,
    video: VideoOption = None,
    frames: FramesOption = None,
    max_tiles: MaxTilesOption = None,
    messages: MessagesOption = None,
    system: SystemOption = None,
    form: PromptOption = "original",
    tokenizer: TokenizerOption = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens after which an answer is cut.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: avoid repeating.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draw the same tokens again.")] = None,
    cache_bits: Annotated[int | None, typer.Option(help="Of keys and values: 32, or 8 for a quarter of the memory.")] = None,
    device: DeviceOption = "cpu",
    vision: VisionOption = None,
) -> None:
    """Ask about pictures, a video or nothing; without PROMPT, converse."""
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("it is empty; write a question, or leave it out for a conversation", param_hint="PROMPT")
    asked = question_of(prompt, messages, image, video, frames=frames, system_message=system)
    model = bundle_or_demo(model)
    from vlquant.runtime.chat import chat
    from vlquant.runtime.generate import Generation

    generation = given(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        repetition_penalty=repetition_penalty, seed=seed, cache_bits=cache_bits,
    )  # fmt: skip
    chat(
        asked, model=model, device=device, vision=vision, max_tiles=max_tiles, prompt=form, tokenizer=tokenizer,
        generation=Generation(**generation), report=say,
    )  # fmt: skip


@app.command("demo")
def demo_command(
    folder: Annotated[str | None, typer.Argument(metavar="FOLDER", help="Where to work. Default: a temporary folder.")] = None,
) -> None:
    """All of it on the demo model, in minutes: sizes, scores, speed, and answers side by side."""
    from vlquant.demo import demo
    from vlquant.progress import drawn_progress

    with drawn_progress() as report:
        demo(folder, report=report)


app.add_typer(cli_comparison.app)
app.add_typer(cli_planning.app)
app.add_typer(cli_inspection.app)


if __name__ == "__main__":
    main()
