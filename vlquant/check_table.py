"""The result of a check, or of a bisection, on a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlquant import check_words as words
from vlquant.bisect import Bisection
from vlquant.check_result import Blame, CheckResult, KindResult
from vlquant.check_words import interval_text
from vlquant.verdict import FAIL, FAILED, INCONCLUSIVE, NOT_DECIDED, PASS, PASSED, UNINFORMATIVE

STYLES = {
    PASS: "bold green", FAIL: "bold red", INCONCLUSIVE: "bold yellow",
    PASSED: "green", FAILED: "red", NOT_DECIDED: "yellow", UNINFORMATIVE: "dim", words.NOT_SCORED: "dim",
}  # fmt: skip
LABEL_WIDTH = 15
MOST_REASONS = 3
"""Of each ground: a wrong prompt is wrong in every question."""


def print_result(result: CheckResult, console: Console) -> None:
    """Print the verdict with its grounds, kinds of questions, likelihoods, where they come from and faulty answers."""
    verdict = result.verdict
    say(console, f"{result.bundle} against {result.reference}, vision {result.vision}")
    say(console, f"{result.questions:,} questions about {result.pictures:,} pictures, seed {result.seed}")
    console.print()
    outcome = f"{words.SYMBOLS[verdict.outcome]} {verdict.outcome}"
    fact(console, outcome, words.MEANINGS[verdict.outcome], style=STYLES[verdict.outcome])
    for name, reasons in words.grounds_by_name(verdict).items():
        for reason in reasons[:MOST_REASONS]:
            fact(console, name, reason)
        if len(reasons) > MOST_REASONS:
            fact(console, name, f"and {len(reasons) - MOST_REASONS} more in the report")
    for sentence in (words.known_text(result), words.unscored_reason(result), words.advice(result)):
        if sentence:
            fact(console, "", sentence)
    console.print()
    if result.kinds:
        console.print(kinds_table(result))
        say(console, "before: the reference; after: the bundle; lost: right before, wrong after; won: the other way", style="dim")
        console.print()
    print_numbers(result, console)


def print_numbers(result: CheckResult, console: Console) -> None:
    """One line for each thing that was measured over all questions."""
    generated, found = result.generated, result.distribution
    if words.is_scored(result):
        score = f"{words.points(generated.reference)} -> {words.points(generated.quantized)}"
        fact(console, "score", f"{score}, mean over pictures: {interval_text(result.verdict.difference)} points")
        fact(console, "flips", f"{generated.flips.lost} lost, {generated.flips.won} won; {words.chance_text(generated.chance)}")
    if found:
        fact(console, "mean KL", f"{words.nats(found.mean_divergence)} nats, 99 of 100 tokens below {words.nats(found.high_divergence)}")
        fact(console, "likeliest token", f"the same at {words.percent(found.top_agreement)} of {found.tokens:,} tokens")
        fact(console, "compared along", words.FORCED_TEXTS.get(result.forced_text, result.forced_text))
    if result.noise_floor:
        floor = result.noise_floor
        fact(console, "noise floor", f"{floor.changed} of {floor.questions} answers change, KL {words.nats(floor.divergence)} nats")
    if result.blame:
        fact(console, "comes from", blame_text(result.blame))
    parts = result.verdict.parts
    if parts.tile:
        fact(console, "worst tile", words.tile_text(parts.tile))
    if parts.layers:
        fact(console, "layers", words.layers_text(parts.layers))
    if generated:
        fact(console, "faults", faults_text(result))


def kinds_table(result: CheckResult) -> Table:
    """Scores, flips and outcome of every kind of question, those that failed first."""
    # One space between columns: with two, intervals would not fit into 80.
    table = Table("kind", box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for heading in ("asked", "before", "after", "difference [low, high]", "lost", "won"):
        table.add_column(escape(heading), justify="right", no_wrap=True)
    table.add_column("verdict")
    for kind in words.sorted_kinds(result):
        outcome = words.outcome_of(kind)
        table.add_row(escape(words.visible(kind.kind)), *kind_numbers(kind), f"[{STYLES[outcome]}]{outcome}[/]")
    return table


def kind_numbers(kind: KindResult) -> list[str]:
    """The numbers of one kind; empty where nobody scored it."""
    verdict, flips = kind.verdict, kind.flips
    return [
        f"{kind.questions}",
        words.points(verdict.reference) if verdict else "",
        "" if kind.quantized is None else words.points(kind.quantized),
        interval_text(verdict.difference) if verdict else "",
        f"{flips.lost}" if flips else "",
        f"{flips.won}" if flips else "",
    ]


def blame_text(blame: Blame) -> str:
    """Which part the divergence comes from, with its numbers."""
    vision = "not measured" if blame.vision is None else f"{words.nats(blame.vision)} nats"
    return f"vision {vision}, language model {words.nats(blame.language_model)}, both {words.nats(blame.both)}"


def faults_text(result: CheckResult) -> str:
    """Answers that are wrong by their form, in the reference and in the bundle."""
    before, after = (words.fault_counts(each) for each in (result.generated.reference_faults, result.generated.quantized_faults))
    return ", ".join(f"{name} {one} -> {other}" for name, one, other in zip(words.FAULTS, before, after, strict=True))


def fact(console: Console, label: str, text: str, style: str = "dim") -> None:
    """A line with a label in this style, or more lines beside it."""
    line = Table.grid(padding=(0, 2))
    line.add_column(width=LABEL_WIDTH, style=style)
    line.add_column(overflow="fold")
    line.add_row(label, escape(words.visible(text)))
    console.print(line, highlight=False)


def say(console: Console, text: str, style: str | None = None) -> None:
    """A line whose brackets are brackets."""
    console.print(escape(words.visible(text)), highlight=False, style=style)


def print_bisection(found: Bisection, console: Console) -> None:
    """Say what is to blame for a FAIL, and what each part alone would give back."""
    if found.before.outcome != FAIL:
        undecided = "nothing fails for certain, ask more" if found.before.outcome == INCONCLUSIVE else "there is nothing to find"
        say(console, f"{undecided}: {found.before.outcome}, {found.before.reason}")
        return
    say(console, f"FAIL: {found.before.reason}")
    table = Table("part in float again", box=None, pad_edge=False, header_style="dim")
    table.add_column("mean KL, nats", justify="right")
    for name, gain in found.gains:
        table.add_row(name, f"{-gain:+.5f}")
    console.print(table)
    say(console, f"with {', '.join(found.parts)} in float: {found.after.outcome}, {found.after.reason}")
