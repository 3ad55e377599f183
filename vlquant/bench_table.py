"""The result of a bench on a terminal and as a picture."""

import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlquant.bench_result import OURS, SPEED, BenchResult, Series, measures_of
from vlquant.counting import counted
from vlquant.errors import InvalidRequest

PICTURES = (".png", ".svg", ".pdf")
PANEL_SIZE = 3.6, 2.6
"""Inches of one chart."""
LEGEND = (
    f"ours / this: in {SPEED}, where more is better, ours is ahead above 1; in s and MB, where less is better, below 1. "
    "Behind a name: the precision of the vision tower that it ran."
)


def print_bench(result: BenchResult, console: Console) -> None:
    """Print the contestants of each measure, ours divided by each; then who was not measured, machine and versions."""
    rounds = f"medians of {counted(result.options.rounds, 'alternating round')}, with first and third quartile"
    console.print(escape(f"{result.model}, {result.date} UTC: {rounds}"), highlight=False)
    table = Table("", box=None, pad_edge=False, header_style="dim")
    for heading in ("median", "quartiles", "ours / this"):
        table.add_column(heading, justify="right", no_wrap=True)
    for measure in measures_of(result.series):
        found = [each for each in result.series if each.measure == measure]
        table.add_row(escape(f"{measure}, {unit_and_scale(found[0])[0]}"), style="bold")
        for series in found:
            ratio = result.ratio(series)
            name = series.contestant if series.tower is None else f"{series.contestant}, {series.tower}"
            table.add_row(f"  {name}", *numbers(series), "" if ratio is None else f"{ratio:.2f}")
    console.print(table, highlight=False)
    console.print(LEGEND, style="dim", highlight=False)
    for line in remarks(result):
        console.print(escape(line), style="dim", highlight=False)


def unit_and_scale(series: Series) -> tuple[str, float]:
    """How values are shown: the unit's name, and how many of a series' own it is."""
    return ("MB", 1e6) if series.unit == "bytes" else (series.unit, 1)


def numbers(series: Series) -> list[str]:
    """Median and quartiles as text."""
    spread, (_, scale) = series.spread, unit_and_scale(series)
    median, first, third = (number(each / scale) for each in (spread.median, spread.first_quartile, spread.third_quartile))
    return [median, escape(f"[{first}, {third}]")]


def number(value: float) -> str:
    """Three digits or more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def remarks(result: BenchResult) -> list[str]:
    """Who was not measured, what everybody is, where it was."""
    machine = result.machine
    load = "" if machine.load_average is None else f"; load average before: {machine.load_average:.1f}"
    load += ", so that this is worth little" if machine.is_busy else ""
    return [
        *(f"not measured: {name}: {reason}" for name, reason in result.not_measured.items()),
        *(f"{name}: {words}" for name, facts in result.contestants.items() if (words := in_words(facts))),
        f"{machine.processor}, {counted(machine.cores, 'core')}, {counted(machine.threads, 'thread')} each, {' '.join(machine.instructions)}{load}",
        ", ".join(f"{name} {version}" for name, version in machine.libraries.items()),
    ]


def in_words(facts: dict) -> str:
    """What a contestant says of itself, without its numbers."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if isinstance(value, str))


def require_picture(path: Path) -> None:
    """Raise InvalidRequest unless a chart can be written there."""
    if path.suffix not in PICTURES:
        raise InvalidRequest(f"{path} is no name of a picture; let it end in {', '.join(PICTURES)}")
    if not path.absolute().parent.is_dir():
        raise InvalidRequest(f"{path} cannot be written, its folder is not there; make it first")
    if path.is_dir():
        raise InvalidRequest(f"{path} is a folder; name a file")
    require_folder(path.absolute().parent)


def require_folder(folder: Path) -> Path:
    """The folder, made if it was not there; raises InvalidRequest unless files can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be written to ({error.strerror or error}); name another place") from error


def plot_bench(result: BenchResult, path: Path) -> None:
    """Write a chart of each measure: bars to the medians, lines from first to third quartile. Raises InvalidRequest."""
    from matplotlib.figure import Figure

    measures = measures_of(result.series)
    columns = min(3, len(measures))
    lines = -(-len(measures) // columns)
    figure = Figure(figsize=(PANEL_SIZE[0] * columns, PANEL_SIZE[1] * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for place, measure in zip(axes, measures, strict=False):
        draw_measure(place, [each for each in result.series if each.measure == measure])
    for place in axes[len(measures) :]:
        place.set_axis_off()
    figure.suptitle(f"{result.model} on {result.machine.processor}, {counted(result.machine.threads, 'thread')}")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written ({error.strerror or error}); name another with --plot") from error


def draw_measure(axes, series: list[Series]) -> None:
    """One measure's bars, the first contestant at the top."""
    unit, scale = unit_and_scale(series[0])
    spreads = [each.spread for each in series]
    medians = [each.median / scale for each in spreads]
    below = [(each.median - each.first_quartile) / scale for each in spreads]
    above = [(each.third_quartile - each.median) / scale for each in spreads]
    colours = ["tab:blue" if each.contestant.startswith(OURS) else "tab:gray" for each in series]
    axes.barh([each.contestant for each in series], medians, xerr=[below, above], color=colours)
    axes.invert_yaxis()
    axes.set_title(f"{series[0].measure} ({unit})", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
