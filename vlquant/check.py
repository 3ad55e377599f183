"""`vlquant check`: what quantizing and exporting cost, measured against the original on the same questions."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean

from vlquant.bundle import Manifest, find_bundle, read_manifest
from vlquant.calib_data import demo_model
from vlquant.calib_data.check_sets import SCENES
from vlquant.calib_data.conversations import picture_name
from vlquant.calib_data.samples import KINDS, Sample, samples, set_hash
from vlquant.errors import InvalidRequest, OutputRefused, VlquantError
from vlquant.events import Event, Report, silent
from vlquant.intervals import Interval, paired_interval, pictures_needed
from vlquant.judge import Judged, judge
from vlquant.model import resolve_model
from vlquant.publishing import write_whole
from vlquant.runtime.pipeline import load
from vlquant.shards import file_hash
from vlquant.verdict import FAIL, INCONCLUSIVE, PASS, decide

MARGINS = {3: 3.0, 4: 1.5, 8: 1.0}
"""Default of the largest acceptable drop in points, by bits per weight."""
EXIT_CODES = {PASS: 0, FAIL: 3, INCONCLUSIVE: 4}
HASHED_BYTES = 1 << 28
"""Files of a reference up to this size are compared by hash, larger ones only by name."""


@dataclass(frozen=True)
class KindResult:
    """Scores of one kind of question, as fractions of 1."""

    kind: str
    questions: int
    reference: float
    quantized: float
    lost: int
    """Answers right in the reference, wrong in the bundle."""
    won: int
    """The other way round."""
    changed: int
    """Answers with another text."""


@dataclass(frozen=True)
class CheckResult:
    """Everything a check found; scores are means over pictures."""

    bundle: str
    reference: str
    vision: str
    """"onnx", or "torch (vision not checked)"."""
    set: dict
    """Name, seed, number of scenes and sha256 of what was asked."""
    pictures: int
    questions: int
    reference_score: float
    quantized_score: float
    difference: Interval
    margin: float
    """Points."""
    verdict: str
    pictures_needed: int | None
    """About how many pictures would decide; only when INCONCLUSIVE."""
    divergence: float
    """Mean KL over the answer tokens in nats."""
    top_agreement: float
    """Share of answer tokens with the same likeliest token."""
    kinds: tuple[KindResult, ...]

    @property
    def exit_code(self) -> int:
        """0 passed, 3 failed, 4 inconclusive."""
        return EXIT_CODES[self.verdict]


def check(
    bundle: str | Path | None = None,
    *,
    reference: str | Path | None = None,
    max_drop: float | None = None,
    scenes: int = SCENES,
    seed: int = 0,
    report: Report = silent,
) -> CheckResult:
    """Compare a bundle with the checkpoint it was made from and write checks/ID.json into it.

    reference: None finds the source by the name in the manifest; max_drop: points, None by the bundle's bits;
    scenes: of the built-in check set. The reference runs float weights and the torch vision tower.
    Raises VlquantError if either cannot be loaded, the reference is not the source, or a picture was calibrated on.
    """
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise InvalidRequest(f"a drop of {max_drop} points is no margin; give --max-drop 0 to 100")
    if scenes < 1:
        raise InvalidRequest(f"{scenes} scenes are too few to check anything; give --scenes 1 or more")
    folder = find_bundle(bundle)
    if folder is None:
        raise InvalidRequest("there is no bundle here; name one, or make one with vlquant quantize")
    manifest = read_manifest(folder)
    source = find_reference(manifest, reference, beside=folder)
    report(Event("check", message=f"reference {source}"))
    margin = MARGINS[manifest.recipe["bits"]] if max_drop is None else max_drop
    exported = (folder / "vision" / "model.onnx").is_file()
    if not exported:
        report(Event("check", message=f"{folder.name} has no vision/: the vision tower runs in torch and is not checked"))
    asked = unseen(samples("check", scenes, seed=seed), manifest)
    original = load(source, vision="torch")
    quantized = load(folder, vision="onnx" if exported else "torch")
    judged = judge(original, {"bundle": quantized}, asked, step=count_questions(report, asked))["bundle"]
    result = summarize(
        judged,
        margin=margin,
        about={
            "bundle": manifest.name,
            "reference": manifest.source.name,
            "vision": "onnx" if exported else "torch (vision not checked)",
            "set": {"name": "builtin", "seed": seed, "scenes": scenes, "sha256": set_hash("check", scenes, seed=seed)},
        },
    )
    store_result(folder, result, report)
    return result


def unseen(drawn: Iterable[Sample], manifest: Manifest) -> list[Sample]:
    """The scenes to ask about; raises InvalidRequest if the bundle was calibrated on one: it would do too well there."""
    asked = list(drawn)
    known = set(manifest.calibration.pictures) if manifest.calibration else set()
    seen = [sample.key for sample in asked if known and known & set(map(picture_name, sample.images))]
    if seen:
        raise InvalidRequest(
            f"{manifest.name} was calibrated on pictures of this check set ({len(seen)} scenes, the first is {seen[0]}); "
            "quantize with other pictures, or check with another --seed"
        )
    return asked


def find_reference(manifest: Manifest, named: str | Path | None, *, beside: Path) -> Path:
    """The folder of the checkpoint that the bundle in `beside` was made from.

    Raises InvalidRequest if `named` is another one, or if there is none of its name here, beside the bundle or among
    earlier downloads: nothing is fetched that was not asked for.
    """
    folder = resolve_model(named) if named is not None else find_source(manifest.source.name, beside)
    for name, expected in manifest.source.files.items():
        path = folder / name
        if not path.is_file() or (path.stat().st_size <= HASHED_BYTES and file_hash(path) != expected):
            raise InvalidRequest(
                f"{folder} is not the checkpoint {manifest.name} was made from, for its {name} differs; "
                "name the right one with --reference, or quantize again"
            )
    return folder


def find_source(name: str, beside: Path) -> Path:
    """The folder of the model `name` if it is on this machine; raises InvalidRequest if it is not."""
    demo = demo_model()
    if name == demo.name:
        return demo
    sibling = beside.resolve().parent / name
    try:
        return sibling if sibling.is_dir() else resolve_model(name, network=False)
    except VlquantError:
        raise InvalidRequest(f"{name}, which the bundle was made from, is not here; name its folder with --reference") from None


def store_result(folder: Path, result: CheckResult, report: Report) -> None:
    """Write the result into the bundle; minutes of work are not thrown away because that is impossible."""
    try:
        write_result(folder, result)
    except OutputRefused as error:
        report(Event("check", message=f"warning: this result is not stored: {error}"))


def count_questions(report: Report, asked: Sequence[Sample]) -> Callable[[int], None]:
    """What turns finished questions into progress events."""
    done, total = 0, sum(len(sample.questions) for sample in asked)

    def step(questions: int) -> None:
        nonlocal done
        done += questions
        report(Event("check", done, total))

    return step


def summarize(judged: Sequence[Judged], *, margin: float, about: dict) -> CheckResult:
    """Scores, interval and verdict of judged questions; `margin` in points."""
    by_picture = [list(group) for _, group in groupby(judged, key=lambda each: each.picture)]
    reference = [fmean(each.reference_score for each in group) for group in by_picture]
    quantized = [fmean(each.quantized_score for each in group) for group in by_picture]
    differences = [after - before for before, after in zip(reference, quantized, strict=True)]
    interval = paired_interval(differences)
    verdict = decide(interval, margin / 100)
    tokens = sum(each.tokens for each in judged)
    return CheckResult(
        **about,
        pictures=len(by_picture),
        questions=len(judged),
        reference_score=fmean(reference),
        quantized_score=fmean(quantized),
        difference=interval,
        margin=margin,
        verdict=verdict,
        pictures_needed=pictures_needed(differences, margin / 100) if verdict == INCONCLUSIVE else None,
        divergence=sum(each.divergence * each.tokens for each in judged) / tokens,
        top_agreement=sum(each.same_top for each in judged) / tokens,
        kinds=tuple(summarize_kind(kind, judged) for kind in KINDS if any(each.kind == kind for each in judged)),
    )


def summarize_kind(kind: str, judged: Sequence[Judged]) -> KindResult:
    """Scores and flips of one kind of question."""
    mine = [each for each in judged if each.kind == kind]
    return KindResult(
        kind=kind,
        questions=len(mine),
        reference=fmean(each.reference_score for each in mine),
        quantized=fmean(each.quantized_score for each in mine),
        lost=sum(each.reference_score > each.quantized_score for each in mine),
        won=sum(each.reference_score < each.quantized_score for each in mine),
        changed=sum(each.reference != each.quantized for each in mine),
    )


def write_result(folder: Path, result: CheckResult) -> Path:
    """Write checks/ID.json, where ID tells what was asked: equal checks have equal names."""
    fields = asdict(result)
    identity = json.dumps({key: fields[key] for key in ("reference", "vision", "set", "margin")}, sort_keys=True)
    path = folder / "checks" / f"{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"
    write_whole(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
    return path
