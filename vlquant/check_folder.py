"""What a check leaves in the bundle: checks/ID/ with report.json, report.html, and both models' answers as VLMEvalKit has them."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vlquant.check_result import CheckResult, to_json
from vlquant.errors import OutputRefused
from vlquant.events import Event, Report
from vlquant.examination import Findings
from vlquant.findings_summary import disagreements, pairs_of
from vlquant.kept_answers import KeptAnswer
from vlquant.predictions import write_predictions
from vlquant.publishing import write_whole
from vlquant.report import Card, write_report

REPORT, PAGE = "report.json", "report.html"
IDENTITY = ("reference_sha256", "vision", "sets", "seed", "max_new_tokens", "predictions_sha256", "forced_text")
"""Fields that tell one check of a bundle from another; equal checks have equal names and replace each other."""


def store_check(folder: Path, result: CheckResult, findings: Findings, report: Report) -> Path | None:
    """Write a check into its bundle and return its folder; minutes of work are not thrown away because that is impossible."""
    place = folder / "checks" / identity(result)
    try:
        write_check(place, result, findings)
    except OutputRefused as error:
        report(Event("check", message=f"warning: this result is not stored: {error}"))
        return None
    report(Event("check", message=f"report {place / PAGE}"))
    return place


def identity(result: CheckResult) -> str:
    """Twelve hex digits that name a check."""
    fields = {name: asdict(result)[name] for name in IDENTITY} | {"margin": result.verdict.margin}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def write_check(place: Path, result: CheckResult, findings: Findings) -> None:
    """Write all files of a check; report.json is the last, so that where it is the others are."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputRefused(f"{place} cannot be written ({error.strerror}); make room, or check its folder's rights") from error
    for side, answers in (("reference", findings.reference), ("bundle", findings.quantized)):
        for name in dict.fromkeys(each.set for each in findings.asked) if answers else ():
            write_predictions(place / f"{file_name(name)}-{side}.tsv", rows_of(name, findings, answers))
    write_report(place / PAGE, result, cards_of(findings))
    write_whole(place / REPORT, to_json(result))


def file_name(set_name: str) -> str:
    """A set's name with nothing in it that files cannot be called."""
    return re.sub(r"[^\w.-]+", "_", set_name)


def rows_of(set_name: str, findings: Findings, answers: Sequence[KeptAnswer]) -> list[tuple[dict[str, str], str]]:
    """Cells and answer of every question of one set."""
    pairs = zip(findings.asked, answers, strict=True)
    return [(dict(asked.question.cells), answer.text) for asked, answer in pairs if asked.set == set_name]


def cards_of(findings: Findings) -> list[Card]:
    """The disagreements whose pictures were kept, or that have none."""
    cards = []
    for number, each in disagreements(pairs_of(findings)):
        pictures = findings.pictures.get(number)
        if pictures is not None:
            images, tiles = (tuple(getattr(picture, name) for picture in pictures) for name in ("image", "boxes"))
            cards.append(Card(each, images, tiles))
    return cards
