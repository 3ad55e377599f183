"""What a model's scores are worth: `python -m vlquant.controls MODEL` beside the same set asked unfairly.

Three controls: always the most frequent answer, pictures blanked, tiles in another order.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from vlquant.calib_data import demo_model
from vlquant.calib_data.check_questions import CheckQuestion
from vlquant.calib_data.check_sets import scene_questions
from vlquant.calib_data.samples import KINDS, samples
from vlquant.metrics import METRICS
from vlquant.request import EncodedRequest
from vlquant.runtime.generate import Generation
from vlquant.runtime.pipeline import Pipeline, load

Change = Callable[[EncodedRequest], EncodedRequest]
SCENES_AT_ONCE = 14
"""About 50 questions."""
GENERATION = Generation(max_new_tokens=40)
"""Greedy; the longest right answer of the built-in set has 30 tokens."""


@dataclass(frozen=True)
class KindControls:
    """Shares of right answers to one kind of question."""

    kind: str
    questions: int
    score: float
    most_frequent: float
    """Always giving the set's most frequent answer of this kind."""
    blanked: float
    """With every tile grey."""
    permuted: float
    """With each picture's tiles in another order, its thumbnail in place."""
    several_tiles: float
    """Share of its pictures (frames are not pictures) cut into more than one tile."""
    crossing: float
    """Share of its questions that need several tiles, or a tile's place."""


def controls(pipeline: Pipeline, *, split: str = "check", scenes: int = 800, seed: int = 0) -> list[KindControls]:
    """Scores and controls of `pipeline` on the built-in set, by kind."""
    drawn = samples(split, scenes, seed=seed)
    crossing = {(each.key, question.text): question.crosses_tiles for each in drawn for question in each.questions}
    rows: list[dict] = []
    for asked in batches(split, scenes, seed=seed):
        encoded = [pipeline.encode(each.request) for each in asked]
        scores = [answer_scores(pipeline, asked, [change(each) for each in encoded]) for change in (same, blank_tiles, permute_tiles)]
        for each, shown, fair, blanked, permuted in zip(asked, encoded, *scores, strict=True):
            rows.append({
                "asked": each, "tiles": shown.tiles_per_image, "score": fair, "blanked": blanked, "permuted": permuted,
                "crossing": crossing[each.picture, each.text],
            })  # fmt: skip
    return [summarize_kind(kind, [row for row in rows if row["asked"].kind == kind]) for kind in KINDS]


def batches(split: str, scenes: int, *, seed: int) -> Iterator[list[CheckQuestion]]:
    """Questions of the built-in set, some scenes at a time."""
    drawn = iter(samples(split, scenes, seed=seed))
    while some := list(islice(drawn, SCENES_AT_ONCE)):
        yield [question for sample in some for question in scene_questions(sample)]


def answer_scores(pipeline: Pipeline, asked: Sequence[CheckQuestion], encoded: Sequence[EncodedRequest]) -> list[float]:
    """Scores of greedy answers to requests."""
    answers = pipeline.batch(encoded, GENERATION)
    return [METRICS[each.metric](answer.text, each.gold).value for each, answer in zip(asked, answers, strict=True)]


def same(encoded: EncodedRequest) -> EncodedRequest:
    return encoded


def blank_tiles(encoded: EncodedRequest) -> EncodedRequest:
    """Every tile a uniform grey."""
    return replace(encoded, tiles=[Image.new("RGB", tile.size, (128, 128, 128)) for tile in encoded.tiles])


def permute_tiles(encoded: EncodedRequest) -> EncodedRequest:
    """The tiles of each picture shuffled, its thumbnail left at the end; frames of one tile stay."""
    tiles, start = [], 0
    for count in encoded.tiles_per_image:
        *own, last = encoded.tiles[start : start + count]
        order = random.Random(f"{encoded.prompt}/{start}").sample(own, len(own))
        tiles += [*order, last]
        start += count
    return replace(encoded, tiles=tiles)


def summarize_kind(kind: str, rows: Sequence[dict]) -> KindControls:
    """Means over the questions of one kind."""
    answers = Counter(row["asked"].gold.answers[0] for row in rows)
    several = [count > 1 for row in rows for count in row["tiles"]]
    return KindControls(
        kind=kind,
        questions=len(rows),
        score=fmean(row["score"] for row in rows),
        most_frequent=answers.most_common(1)[0][1] / len(rows),
        blanked=fmean(row["blanked"] for row in rows),
        permuted=fmean(row["permuted"] for row in rows),
        several_tiles=fmean(several) if several else 0.0,
        crossing=fmean(row["crossing"] for row in rows),
    )


def print_controls(
    model: Annotated[str | None, typer.Argument(help="Checkpoint or bundle. Default: the demo model.")] = None,
    split: Annotated[str, typer.Option(help="check or development.")] = "check",
    scenes: Annotated[int, typer.Option(help="Scenes of the set.")] = 800,
) -> None:
    """Print scores and controls by kind, and their averages over kinds."""
    rows = controls(load(model or demo_model(), vision="torch"), split=split, scenes=scenes)
    table = Table("kind", box=None, header_style="dim")
    fields = ("score", "most_frequent", "blanked", "permuted", "several_tiles", "crossing")
    for heading in ("questions", *(field.replace("_", " ") for field in fields)):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.kind, str(row.questions), *(f"{100 * getattr(row, field):.1f}" for field in fields))
    averages = (f"{100 * fmean(getattr(row, field) for row in rows):.1f}" for field in fields)
    table.add_row("average over kinds", str(sum(row.questions for row in rows)), *averages)
    Console().print(table)


if __name__ == "__main__":
    typer.run(print_controls)
