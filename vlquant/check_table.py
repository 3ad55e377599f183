"""A check's result on a terminal."""

from rich.console import Console
from rich.table import Table

from vlquant.check import CheckResult
from vlquant.intervals import Interval
from vlquant.verdict import FAIL, INCONCLUSIVE, PASS

STYLES = {PASS: "bold green", FAIL: "bold red", INCONCLUSIVE: "bold yellow"}


def print_check(result: CheckResult, console: Console) -> None:
    """Print scores by kind, the difference with its interval, the distributions and the verdict."""
    console.print(f"{result.bundle} against {result.reference}, vision {result.vision}")
    console.print(f"{result.questions} questions about {result.pictures} scenes of the built-in check set")
    console.print(kind_table(result))
    console.print(f"score        {points(result.reference_score)} -> {points(result.quantized_score)}  (mean over scenes)")
    console.print(f"difference   {interval_text(result.difference)} points (95 % confidence of each bound, paired by scene)")
    console.print(
        f"answers      mean KL {result.divergence:.4f} nats, same likeliest token {100 * result.top_agreement:.2f} %"
    )
    console.print(f"[{STYLES[result.verdict]}]{result.verdict}[/] at a margin of {result.margin:g} points{advice(result)}")


def kind_table(result: CheckResult) -> Table:
    """Scores and flips of every kind of question."""
    table = Table("kind", box=None, pad_edge=False, header_style="dim")
    for heading in ("questions", "reference", "quantized", "right -> wrong", "wrong -> right", "other text"):
        table.add_column(heading, justify="right")
    for each in result.kinds:
        counts = (str(count) for count in (each.lost, each.won, each.changed))
        table.add_row(each.kind, str(each.questions), points(each.reference), points(each.quantized), *counts)
    return table


def points(share: float) -> str:
    """A share of 1 in points."""
    return f"{100 * share:.1f}"


def interval_text(interval: Interval) -> str:
    """A mean and its interval in points."""
    return f"{100 * interval.mean:+.2f} [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"


def advice(result: CheckResult) -> str:
    """What the verdict leaves to do."""
    if result.verdict != INCONCLUSIVE:
        return ""
    if result.pictures_needed is None:
        return "; no number of scenes decides, for the drop is the margin"
    return f"; about {result.pictures_needed} scenes would decide"
