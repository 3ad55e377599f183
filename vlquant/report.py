"""A check's result as one HTML file that needs nothing else: no network, no script. Knows no model and measures nothing."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from vlquant import check_words as words
from vlquant.charts import PALETTE, Chart, Mark, class_names, class_word, histogram_chart, layer_chart
from vlquant.check_result import CheckResult, Disagreement
from vlquant.intervals import Interval
from vlquant.publishing import write_whole
from vlquant.report_cards import Card, ShownCard, show_card
from vlquant.verdict import FAIL, FAILED, INCONCLUSIVE, INFORMATIVE_SCORES, NOT_DECIDED, PASS, PASSED, UNINFORMATIVE

__all__ = ["Card", "write_report"]

MOST_CARDS = 24
MOST_ROWS = 200
"""Of disagreements without a card."""
ROW_CHARACTERS = 400
ROLES = {
    PASS: "good", FAIL: "bad", INCONCLUSIVE: "unsure",
    PASSED: "good", FAILED: "bad", NOT_DECIDED: "unsure", UNINFORMATIVE: "muted", words.NOT_SCORED: "muted",
}  # fmt: skip
"""Colours of outcomes."""
ROUND = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
"""Numbers that an axis ends with, times a power of ten."""
WIDEST_SCALE = 1.0
"""A score cannot change by more."""


@dataclass(frozen=True)
class Bar:
    """An interval on a scale from -span to span, as percentages of its width."""

    low: str
    high: str
    point: str
    margin: str
    cut_low: bool
    """Whether the interval goes on beyond the scale."""
    cut_high: bool


def write_report(path: Path, result: CheckResult, cards: Sequence[Card]) -> None:
    """Write the page; the same result and cards give the same bytes. At most MOST_CARDS cards are shown.

    Raises OutputRefused if `path` cannot be written.
    """
    write_whole(Path(path), page(result, cards))


def page(result: CheckResult, cards: Sequence[Card]) -> str:
    """The text of the page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=finalize)
    environment.filters.update(
        points=words.points,
        signed=lambda share: typeset(words.points(share, True)),
        interval=lambda interval: typeset(words.interval_text(interval)),
        nats=words.nats,
        percent=lambda share, digits=2: typeset(words.percent(share, digits)),
        decibels=lambda value: typeset(words.decibels(value)),
        typeset=typeset,
        tick=lambda share: typeset(f"{100 * share:+g}"),
        setting=setting,
    )
    shown = [show_card(card, result.verdict.parts.tile) for card in cards[:MOST_CARDS]]
    template = environment.from_string(resource("report.html.j2"))
    text = template.render(
        result=result,
        verdict=result.verdict,
        words=words,
        style=variables() + resource("report.css"),
        roles=ROLES,
        informative=INFORMATIVE_SCORES,
        kinds=words.sorted_kinds(result),
        grounds=words.grounds_by_name(result.verdict),
        span=scale(result),
        overall_scale=overall_scale(result),
        bar=bar,
        charts=charts(result),
        class_names=class_names(result.layers),
        class_word=class_word,
        card_groups=group_cards(shown),
        other_disagreements=without_cards(result, shown),
        more_disagreements=max(0, len(result.disagreements) - len(shown) - MOST_ROWS),
        shortened=shortened,
    )
    return text.strip() + "\n"


def resource(name: str) -> str:
    """A file that ships beside this module."""
    return files("vlquant").joinpath(name).read_text(encoding="utf-8")


def finalize(value: object) -> object:
    """What a template prints: no character of a question or answer hides or reorders anything."""
    # What has __html__ was escaped by the template itself, or is our own.
    return words.visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def typeset(text: str) -> str:
    """Numbers with a minus sign instead of a hyphen, and their unit on the same line."""
    return re.sub(r"(?<![\w-])-(?=\d)", "\u2212", text).replace(" %", "\u00a0%").replace(" dB", "\u00a0dB")


def setting(value: object) -> str:
    """A value of a recipe in words."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def shortened(text: str) -> str:
    """A text for a table's cell."""
    return text if len(text) <= ROW_CHARACTERS else text[:ROW_CHARACTERS] + " …"


def variables() -> str:
    """The palette as rules of a style sheet; paper is light."""
    light, dark = (" ".join(f"--{role}: {colours[theme]};" for role, colours in PALETTE.items()) for theme in (0, 1))
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def charts(result: CheckResult) -> dict[str, Chart | None]:
    """The charts there is something to draw in."""
    histogram = layers = None
    if any(each.tokens for each in result.histogram):
        histogram = histogram_chart(result.histogram, histogram_marks(result))
    if any(each.error is not None for each in result.layers):
        layers = layer_chart(result.layers)
    return {"histogram": histogram, "layers": layers}


def histogram_marks(result: CheckResult) -> list[Mark]:
    """The mean, beside the limit that it is held to."""
    marks = []
    if result.distribution:
        mean = result.distribution.mean_divergence
        marks.append(Mark(f"mean {words.nats(mean)}", mean, "ink"))
    if result.verdict.distribution:
        limit = result.verdict.distribution.limits.divergence
        marks.append(Mark(f"limit {limit:g}", limit, "bad"))
    return marks


def scale(result: CheckResult) -> float:
    """Half the width of what the bars of all kinds are drawn on: wide enough for most of them, not for the least certain."""
    judged = [kind.verdict for kind in result.kinds if kind.verdict]
    if not judged:
        return WIDEST_SCALE
    ends = sorted(max(abs(each.difference.low), abs(each.difference.high)) for each in judged)
    needed = [ends[3 * len(ends) // 4], *(abs(each.difference.mean) for each in judged), *(1.5 * each.margin for each in judged)]
    return round_up(max(needed))


def overall_scale(result: CheckResult) -> float:
    """The same for the change over all pictures, which is never cut."""
    difference, margin = result.verdict.difference, result.verdict.margin
    return round_up(max(-difference.low, difference.high, 2 * margin))


def round_up(share: float) -> float:
    """The next round number of points, as a share; WIDEST_SCALE at most."""
    wanted = max(1.05 * share, 1e-4)
    unit = 10.0 ** math.floor(math.log10(wanted))
    rounded = next(step * unit for step in ROUND if step * unit >= wanted * (1 - 1e-9))
    return min(WIDEST_SCALE, rounded)


def bar(interval: Interval, margin: float, span: float) -> Bar:
    """Where an interval and its margin lie on a scale from -span to span."""

    def place(value: float) -> str:
        return f"{50 + 50 * min(1.0, max(-1.0, value / span)):.2f}%"

    return Bar(
        low=place(interval.low),
        high=place(interval.high),
        point=place(interval.mean),
        margin=place(-margin),
        cut_low=interval.low < -span,
        cut_high=interval.high > span,
    )


def group_cards(cards: Sequence[ShownCard]) -> dict[str, list[ShownCard]]:
    """Cards by what happened to the score."""
    groups: dict[str, list[ShownCard]] = {}
    for card in cards:
        groups.setdefault(what_happened(card.disagreement), []).append(card)
    return groups


def what_happened(disagreement: Disagreement) -> str:
    """What another answer did to the score."""
    before, after = disagreement.reference_score, disagreement.quantized_score
    if before is None or after is None:
        return "Another text, not scored"
    if before > after:
        return "Worse than the reference"
    return "Better than the reference" if after > before else "Another text, the same score"


def without_cards(result: CheckResult, cards: Sequence[ShownCard]) -> list[Disagreement]:
    """Disagreements that are listed without their pictures."""
    shown = {card.disagreement for card in cards}
    return [each for each in result.disagreements if each not in shown][:MOST_ROWS]
