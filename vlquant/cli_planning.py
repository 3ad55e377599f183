"""Commands that tell what would run, before anything is downloaded or loaded."""

from typing import Annotated

import typer

from vlquant.cli_options import bundle_or_demo_model, say, wide_console

NOTHING_FITS = 3  # Looked into, and the answer is no: as a failed check.

app = typer.Typer()


@app.command("plan")
def plan_command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL|BUNDLE", help="Folder, a name such as InternVL2_5-8B, or owner/name on the hub.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where it would run; a GPU need not be here.")] = "cuda",
    vram: Annotated[
        str | None,
        typer.Option("--vram", "--memory", metavar="SIZE", help="11GB, 10.5GiB, 11. Default: 11GB; on a cpu what is free here."),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of the conversation, tiles included. Default: 8192.")] = None,
    tiles: Annotated[int | None, typer.Option(help="Tiles in it. Default: those of one whole picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON, sizes in bytes.")] = False,
) -> None:
    """What fits into memory, by method and precision: exit code 0 something, 3 nothing. Downloads and loads no weights."""
    named = bundle_or_demo_model(model)
    from vlquant.plan import parse_bytes, plan, to_json
    from vlquant.plan_table import print_plan

    memory = None if vram is None else parse_bytes(vram)
    found = plan(named, device=device, memory=memory, context=context, tiles=tiles, report=lambda event: say(event.message))
    if as_json:
        typer.echo(to_json(found))
    else:
        print_plan(found, wide_console())
    raise typer.Exit(0 if found.fits else NOTHING_FITS)
