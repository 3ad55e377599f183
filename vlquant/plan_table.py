"""A plan on a terminal of eighty columns."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlquant.check_words import visible
from vlquant.counting import counted
from vlquant.memory import TEXT_TOKENS
from vlquant.plan import Choice, Plan

COLUMNS = ("linears", "embed", "head", "tower", "cache", "work", "base", "total")
"""The parts of a Memory in its own order, and their sum."""
LEGEND = (
    "{unit}. tower: vision and projector; cache: keys and values; work: activations and scratch; base: {base}. "
    "context: most tokens with {tiles}; tiles: most, each {tokens_per_tile} tokens, in a context just large enough."
)
SMALL_BYTES = 10**8
"""Of all weights, below which sizes are told in MB."""
BASES = {
    "cpu": "Python and libraries with nothing loaded",
    "cuda": "CUDA context and libraries, an estimate: nothing of this table was measured on a GPU",
}


def print_plan(found: Plan, console: Console) -> None:
    """Print what was asked, a row for each choice, what the columns mean and what the numbers rest on."""
    say(console, f"{found.model} on {found.device} in {found.limit / 1e9:.2f} GB: {found.context:,} tokens of context, {counted(found.tiles, 'tile')} in it")
    console.print(choices_table(found))
    unit = "MB of 10^6 bytes" if is_small(found) else "GB of 10^9 bytes"
    say(console, LEGEND.format(unit=unit, base=BASES[found.device], tiles=counted(found.tiles, "tile"), tokens_per_tile=found.tokens_per_tile), style="dim")
    for text in found.remarks:
        say(console, text)
    if not found.fits:
        say(console, f"nothing fits; {way_out(found)}", style="bold red")


def way_out(found: Plan) -> str:
    """What would fit instead, as options."""
    reach = max(choice.largest_context or 0 for choice in found.choices)
    if reach:
        return f"a --context of {reach} would"
    tiles = max(-1 if choice.most_tiles is None else choice.most_tiles for choice in found.choices)
    if tiles >= 0:
        return f"--tiles {tiles} --context {TEXT_TOKENS + tiles * found.tokens_per_tile} would"
    return "more memory or a smaller model would"


def choices_table(found: Plan) -> Table:
    """One row for each way to run the model."""
    table = Table("method", box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("ViT", no_wrap=True)
    for heading in (*COLUMNS, "fits", "context", "tiles"):
        table.add_column(heading, justify="right", no_wrap=True)
    scale = 1e6 if is_small(found) else 1e9
    for choice in found.choices:
        memory = choice.memory
        parts = (memory.linears, memory.embedding, memory.head, memory.vision, memory.cache, memory.work, memory.libraries)
        reach = ("-" if each is None else f"{each}" for each in (choice.largest_context, choice.most_tiles))
        numbers = (in_unit(each / scale) for each in (*parts, choice.total))
        table.add_row(escape(choice.method), choice.vision, *numbers, verdict(choice), *reach)
    return table


def verdict(choice: Choice) -> str:
    """Whether a choice fits, in colour."""
    return "[green]yes[/]" if choice.fits else "[red]no[/]"


def is_small(found: Plan) -> bool:
    """Whether a model's weights are such that GB with two digits would say nothing of them."""
    memories = (choice.memory for choice in found.choices)
    return all(each.linears + each.embedding + each.head + each.vision < SMALL_BYTES for each in memories)


def in_unit(value: float) -> str:
    """GB or MB in at most five characters."""
    return f"{value:.2f}" if value < 99.995 else f"{value:.1f}" if value < 999.95 else f"{value:.0f}"


def say(console: Console, text: str, style: str | None = None) -> None:
    """A paragraph whose brackets are brackets."""
    console.print(escape(visible(text)), highlight=False, style=style)
