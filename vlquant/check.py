"""`vlquant check`: what quantizing and exporting cost, measured against the original on the same questions."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vlquant.asking import Asked
from vlquant.bundle import MANIFEST, Manifest, changed_files, find_bundle, library_versions, read_manifest
from vlquant.calib_data.check_questions import CheckSet
from vlquant.calib_data.check_sets import open_check_set
from vlquant.check_folder import file_name, store_check
from vlquant.check_options import CheckOptions
from vlquant.check_result import FORMAT_VERSION, AskedSet, CheckResult, NoiseFloor
from vlquant.comparison import Measured, encoded_answers, measure
from vlquant.distributions import summarize_tokens
from vlquant.errors import NO_SPACE, BrokenCheckpoint, InvalidRequest, OutputRefused
from vlquant.events import Event, Report, silent
from vlquant.examination import Examination, Findings, Side
from vlquant.findings_summary import (
    answer_tokens,
    differences,
    disagreements,
    generated_result,
    histogram,
    kind_results,
    kind_scores,
    layer_errors,
    pairs_of,
    unlike_published,
)
from vlquant.hidden_states import HiddenStates
from vlquant.kept_answers import KeptAnswer
from vlquant.machine import available_memory, physical_memory
from vlquant.predictions import read_predictions
from vlquant.publishing import is_partial
from vlquant.reference import find_reference
from vlquant.runtime.generate import Generation
from vlquant.runtime.vision_session import pick_tower
from vlquant.shards import file_hash
from vlquant.verdict import INCONCLUSIVE, Verdict, judge_distribution, reach_verdict
from vlquant.vision_manifest import FOLDERS, read_vision_manifest

MARGINS = {3: 3.0, 4: 1.5, 8: 1.0}
"""Default of the largest acceptable drop in points, by bits per weight."""
ROOM = 1.25
"""A loaded model takes so many times the bytes of its files, with what it computes; estimated generously."""


def check(
    bundle: str | Path | None = None,
    *,
    reference: str | Path | None = None,
    options: CheckOptions = CheckOptions(),
    report: Report = silent,
) -> CheckResult:
    """Compare a bundle with the checkpoint it was made from; writes checks/ID/ into it: report.json, report.html, predictions.

    reference: None finds the source by the name in the manifest. The reference runs float weights and the torch vision
    tower. Raises VlquantError if either cannot be loaded, the reference is not the source, or a picture was calibrated on.
    """
    folder = find_bundle(bundle)
    if folder is None:
        raise InvalidRequest("there is no bundle here; name one, or make one with vlquant quantize")
    manifest = read_manifest(folder)
    source = find_reference(manifest, reference, beside=folder)
    report(Event("check", message=f"reference {source}"))
    sets = open_sets(options)
    sides = sides_of(folder, source, manifest, options, report)
    with working_folder("check") as work:
        findings, prompts = examine(sides, sets, manifest, work, options=options, report=report)
        measured = measure(sides, findings, prompts, work, options=options, report=report)
    result = conclude(manifest, sides, sets, findings, measured, options=options)
    for name in unlike_published(pairs_of(findings), result.generated):
        report(Event("check", message=f"{name}: scores of the whole set are left out, for its indices are not the published ones"))
    store_check(folder, result, findings, report)
    return result


@contextmanager
def working_folder(verb: str) -> Iterator[Path]:
    """A temporary folder for hidden states; raises OutputRefused if its disk is full."""
    try:
        with tempfile.TemporaryDirectory(prefix=f"vlquant-{verb}-") as work:
            yield Path(work)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise OutputRefused(
            f"there is no space left in {tempfile.gettempdir()} for the hidden states of so many questions; "
            "ask fewer with --limit, or name a folder on a larger disk in the environment variable TMPDIR"
        ) from error


def open_sets(options: CheckOptions) -> list[CheckSet]:
    """What is asked; raises InvalidRequest if two sets could not be told apart afterwards."""
    sets = [open_check_set(name, limit=options.limit, seed=options.seed, metric=options.metric) for name in options.sets]
    names = [file_name(each.name).casefold() for each in sets]
    twice = next((each.name for each, name in zip(sets, names, strict=True) if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"two sets are called {twice}; name it once, or rename one of the files")
    return sets


def sides_of(folder: Path, source: Path, manifest: Manifest, options: CheckOptions, report: Report) -> tuple[Side, Side]:
    """Reference and bundle, and whether each may be loaded to answer by itself; what may not is said."""
    tower = pick_tower(folder, options.vision, options.device)
    vision = "torch" if tower is None else read_vision_manifest(tower).name
    if tower is not None:
        report(Event("check", message=f"vision tower {tower.name} ({vision})"))
    elif options.vision == "torch":
        report(Event("check", message="the vision tower runs in torch, as was asked for, and is not checked"))
    else:
        report(Event("check", message=f"{folder.name} has no vision/: the vision tower runs in torch and is not checked"))
    changed = changed_files(folder, manifest)
    if tower is not None:
        changed += [f"{tower.name}/{name}" for name in changed_files(tower, read_vision_manifest(tower))]
    if changed:
        raise BrokenCheckpoint(f"{folder} is not as it was written: {', '.join(changed[:3])} changed; quantize or export again")
    allowed = available_memory() or physical_memory() if options.memory is None else int(options.memory * 1e9)
    answers = {}
    for name, place in (("the reference", source), ("the bundle", folder)):
        needed = int(ROOM * loaded_bytes(place, tower))
        answers[name] = needed <= allowed
        if not answers[name]:
            report(Event("check", message=(
                f"{name} would take about {needed / 1e9:.1f} GB to answer by itself, {allowed / 1e9:.1f} GB are allowed: "
                "it is compared along given answers only, layer by layer (--memory allows more)"
            )))  # fmt: skip
    own = {MANIFEST: file_hash(folder / MANIFEST)}
    if tower is not None:
        own["vision"] = file_hash(tower / MANIFEST)
    answering = answers["the reference"] and options.reference_predictions is None
    return (
        Side(source, "torch", manifest.source.files, answering),
        Side(folder, vision, own, answers["the bundle"]),
    )


def loaded_bytes(place: Path, tower: Path | None) -> int:
    """Size of a model's weight files, of exported vision towers only the one that runs."""
    idle = {place / name for name in FOLDERS.values()} - {tower}
    weights = [path for path in place.glob("**/*") if path.suffix in (".safetensors", ".data", ".bin")]
    return sum(path.stat().st_size for path in weights if path.parent not in idle and not is_partial(path.relative_to(place)))


def examine(
    sides: tuple[Side, Side], sets: Sequence[CheckSet], manifest: Manifest, work: Path, *, options: CheckOptions, report: Report
) -> tuple[Findings, tuple[HiddenStates, HiddenStates]]:
    """Show the sets to the reference, then to the bundle; returns what both said, and their embedded prompts in `work`."""
    findings, total = Findings(), sum(map(len, sets))
    examination = Examination(sets, Generation(max_new_tokens=options.max_new_tokens), options.device, findings)
    calibrated = frozenset(manifest.calibration.pictures) if manifest.calibration else frozenset()
    places = [work / "reference", work / "bundle"]
    for place in places:
        place.mkdir()
    first = examination.of_reference(
        sides[0], places[0], calibrated=calibrated, step=counting(report, "reference", total)
    )
    if options.reference_predictions is not None:
        findings.reference = imported(Path(options.reference_predictions), findings, sides[0].folder)
    second = examination.of_bundle(
        sides[1], places[1], reference=sides[0].folder, step=counting(report, "bundle", total)
    )
    return findings, (first, second)


def counting(report: Report, stage: str, total: int):
    """What turns finished questions into progress events."""
    done = 0

    def step(questions: int) -> None:
        nonlocal done
        done += questions
        report(Event(stage, done, total))

    return step


def imported(path: Path, findings: Findings, reference: Path) -> list[KeptAnswer]:
    """The reference's answers from a file, as the reference would have written them."""
    said = read_predictions(path, {each.question.index: each.question.text for each in findings.asked})
    ids = encoded_answers([said[each.question.index] for each in findings.asked], findings, reference)
    return [KeptAnswer(tuple(own), said[each.question.index], False) for each, own in zip(findings.asked, ids, strict=True)]


def conclude(
    manifest: Manifest, sides: tuple[Side, Side], sets: Sequence[CheckSet], findings: Findings, measured: Measured, *,
    options: CheckOptions,
) -> CheckResult:  # fmt: skip
    """The verdict, with everything it rests on."""
    pairs = pairs_of(findings)
    verdict = verdict_of(manifest, findings, measured, options)
    generated = generated_result(pairs)
    if generated is None and verdict.outcome == INCONCLUSIVE:
        verdict = replace(verdict, reason=NOT_SCORED, pictures_needed=None)
    repeated = findings.repeated
    return CheckResult(
        format_version=FORMAT_VERSION,
        bundle=manifest.name,
        bundle_sha256=sides[1].files[MANIFEST],
        reference=manifest.source.name,
        reference_sha256=hashlib.sha256(json.dumps(dict(manifest.source.files), sort_keys=True).encode()).hexdigest(),
        vision="torch (vision not checked)" if sides[1].vision == "torch" else f"onnx {sides[1].vision}",
        sets=tuple(asked_set(each, findings.asked) for each in sets),
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        predictions_sha256=None if options.reference_predictions is None else file_hash(Path(options.reference_predictions)),
        forced_text=measured.forced_text,
        verdict=verdict,
        distribution=summarize_tokens(measured.compared.values()),
        histogram=histogram(measured.compared.values()),
        generated=generated,
        kinds=kind_results(findings.asked, pairs, verdict.kinds, measured.compared),
        noise_floor=None if repeated is None else NoiseFloor(*repeated),
        blame=measured.blame,
        layers=layer_errors(manifest),
        disagreements=tuple(each for _, each in disagreements(pairs)),
        recipe=manifest.recipe,
        libraries=library_versions(),
    )


def verdict_of(manifest: Manifest, findings: Findings, measured: Measured, options: CheckOptions) -> Verdict:
    """What structure, distributions, parts and scores come to."""
    pairs, bits = pairs_of(findings), manifest.recipe.get("average_bits") or manifest.recipe["bits"]
    margin = (MARGINS[manifest.recipe["bits"]] if options.max_drop is None else options.max_drop) / 100
    tokens = answer_tokens(findings.asked, measured.compared)
    return reach_verdict(
        differences(pairs), margin, kinds=kind_scores(pairs), structure=findings.structure,
        distribution=judge_distribution(tokens, bits) if tokens else None, parts=measured.parts,
    )  # fmt: skip


NOT_SCORED = (
    "no answers of both models were scored: the distributions alone show no loss, and prove none absent; "
    "give --memory for both to answer, or --reference-predictions made elsewhere"
)


def asked_set(questions: CheckSet, asked: Sequence[Asked]) -> AskedSet:
    """What was asked of a set."""
    own = [each.question for each in asked if each.set == questions.name]
    metrics = dict.fromkeys(each.metric for each in own if each.metric)
    return AskedSet(questions.name, questions.sha256, len({each.picture for each in own}), len(own), tuple(metrics))
