"""A diagnosis for people: tables on a terminal, plain lines elsewhere; and for programs."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlquant.doctor import NO, YES, Card, Diagnosis
from vlquant.doctor_rules import BROKEN, NOTE, SLOW, UNUSED

STYLES = {YES: "green", NO: "red", SLOW: "yellow", BROKEN: "bold red", UNUSED: "yellow", NOTE: "dim"}


def to_json(diagnosis: Diagnosis) -> str:
    """The diagnosis as it is, for programs."""
    return json.dumps(asdict(diagnosis), indent=2, ensure_ascii=False) + "\n"


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Facts, what each card runs, what is wrong and what mends it, the verdict and the command to install by."""
    draw = draw_tables if console.is_terminal else write_lines
    draw(diagnosis, console)
    for finding in diagnosis.findings:
        say(console, "")
        say(console, f"{finding.severity}: {finding.sentence}", STYLES[finding.severity])
        say(console, f"  why: {finding.why}")
        if finding.mend:
            say(console, f"  mend: {finding.mend}")
    say(console, "")
    for line in diagnosis.verdict:
        say(console, line, "bold")
    for each in diagnosis.install:
        say(console, f"to install what fits{' ' + ' and '.join(each.cards) if len(diagnosis.install) > 1 else ''}: {each.command}")


def draw_tables(diagnosis: Diagnosis, console: Console) -> None:
    table = Table(show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in diagnosis.facts:
        table.add_row(name, escape(value))
    console.print(table)
    for card in diagnosis.cards:
        rows = Table("what", "runs", "why", title=escape(title(card)), title_justify="left", caption=card.measured, caption_justify="left")
        for row in card.rows:
            rows.add_row(row.name, f"[{STYLES[row.runs]}]{row.runs}[/]", escape(row.why))
        console.print(rows)


def write_lines(diagnosis: Diagnosis, console: Console) -> None:
    for name, value in diagnosis.facts:
        say(console, f"{name}: {value}")
    for card in diagnosis.cards:
        say(console, "")
        say(console, title(card))
        for row in card.rows:
            say(console, f"  {row.name}: {row.runs}: {row.why}")
        say(console, f"  {card.measured}")


def title(card: Card) -> str:
    major, minor = card.capability
    return f"{card.name}, compute capability {major}.{minor} ({card.generation}), {card.memory_bytes / 1e9:.1f} GB"


def say(console: Console, line: str, style: str | None = None) -> None:
    """One line as it is: commands are to be copied, so nothing is wrapped or read as markup."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
