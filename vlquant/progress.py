"""Draws what a long action reports, on standard error: bars on a terminal, now and then a line elsewhere."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlquant.events import Event

LINE_SECONDS = 15
"""Where no bars can be drawn, a line of progress at most this often."""


@contextmanager
def json_progress() -> Iterator[Callable[[Event], None]]:
    """What to report to for programs: every event is a line of JSON on standard error."""
    yield lambda event: print(json.dumps(asdict(event), ensure_ascii=False), file=sys.stderr, flush=True)


@contextmanager
def drawn_progress(*, verbose: bool = False) -> Iterator[Callable[[Event | str], None]]:
    """What to report to: events with steps move the bar of their stage, messages and plain lines are printed."""
    console = Console(stderr=True)
    times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times
    bars = Progress(*columns, console=console, transient=True)
    last_line = time.monotonic()

    def report(event: Event | str) -> None:
        nonlocal last_line
        message = event if isinstance(event, str) else event.message
        moving = not isinstance(event, str) and event.total > 0
        if moving and console.is_terminal:
            move_bar(bars, event)
        elif moving and not message and time.monotonic() - last_line > LINE_SECONDS:
            message = str(event)
        for line in event.details if verbose and not isinstance(event, str) else ():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if message:
            # Not rich markup: names in square brackets are ours. No wrapping: a log line is one line.
            console.print(message, style="dim", markup=False, highlight=False, soft_wrap=True)
            last_line = time.monotonic()

    try:
        yield report
    finally:
        if bars.live.is_started:  # Stopping what never started prints an empty line.
            bars.stop()


def move_bar(bars: Progress, event: Event) -> None:
    """Draw one stage's bar; when it is full nothing is drawn, so that results can be printed."""
    task = next((task.id for task in bars.tasks if task.description == event.stage), None)
    if task is None:
        bars.start()
        task = bars.add_task(event.stage)
    bars.update(task, completed=event.done, total=event.total)
    if event.done >= event.total:
        bars.remove_task(task)
        bars.stop()
