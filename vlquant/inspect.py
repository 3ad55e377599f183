"""`vlquant inspect`: what a bundle is, what was done to it and what that cost, readably; with `verify`, whether it is intact."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlquant.bundle import MANIFEST, Manifest, changed_files, find_bundle, missing_files, read_manifest
from vlquant.check_result import read_result
from vlquant.errors import BrokenCheckpoint, InvalidRequest
from vlquant.runtime.packed_weights import changed_packed
from vlquant.vision_manifest import FOLDERS, GRAPH_FILE, VisionManifest, export_command, read_vision_manifest

WORST_MODULES = 5


def inspect(bundle: str | Path | None = None, *, verify: bool = False, console: Console | None = None) -> Path:
    """Print the manifests of a bundle and return its folder.

    bundle: None means as `find_bundle`. verify: hash every file.
    Raises BrokenCheckpoint if there is no bundle, or if it is damaged; InvalidRequest for a part of one.
    """
    folder = Path(bundle) if bundle is not None else find_bundle()
    if folder is None:
        raise BrokenCheckpoint("there is no bundle here; name one, or make one with vlquant quantize")
    if (folder.parent / MANIFEST).is_file() and not (folder / "config.json").exists():
        raise InvalidRequest(f"{folder} is a part of a bundle; inspect the whole: vlquant inspect {folder.parent}")
    manifest = read_manifest(folder)
    console = console or Console()
    console.print(summary_table(folder, manifest))
    console.print(modules_table(manifest))
    exported = [name for name in FOLDERS.values() if any((folder / name / part).exists() for part in (MANIFEST, GRAPH_FILE))]
    towers = {name: read_vision_manifest(folder / name) for name in exported}
    for name, tower in towers.items():
        console.print(vision_table(name, tower))
    if not towers:
        console.print("no exported vision tower: vlquant export-vision writes one")
    checks = sorted(folder.glob("checks/*/report.json"))
    for path in checks:
        console.print(check_line(path), markup=False, highlight=False, soft_wrap=True)
    if not checks:
        console.print("never checked: vlquant check measures what it cost")
    require_intact(folder, manifest, towers, verify=verify)
    if verify:
        console.print("every file is as it was written")
    return folder


def summary_table(folder: Path, manifest: Manifest) -> Table:
    """One row per fact about the whole bundle."""
    table = _facts(manifest.name)
    table.add_row("folder", str(folder))
    table.add_row("source", manifest.source.name)
    table.add_row("recipe", ", ".join(f"{key} {value}" for key, value in manifest.recipe.items()))
    if manifest.calibration:
        calibration = manifest.calibration
        written = f", {calibration.generated} answers by the reference itself" if calibration.generated else ""
        about = f"{calibration.samples} conversations, {calibration.tokens} tokens{written}"
        table.add_row("calibration", f"{calibration.set}: {about}")
    table.add_row("size", f"{sum(manifest.sizes.values()) / 1e6:.1f} MB in {len(manifest.sizes)} files")
    table.add_row("made with", ", ".join(f"{name} {version}" for name, version in manifest.libraries.items()))
    return table


def modules_table(manifest: Manifest) -> Table:
    """The linears that lost most."""
    calibrated = manifest.calibration is not None
    table = Table(title=f"{len(manifest.modules)} quantized linears, those that lost most", title_justify="left")
    table.add_column("linear")
    table.add_column("output error" if calibrated else "weight error", justify="right")
    if calibrated:
        table.add_column("rounded only", justify="right")
    for module in sorted(manifest.modules, key=lambda each: -math.inf if each.error is None else -each.error)[:WORST_MODULES]:
        errors = (module.error, module.nearest_error) if calibrated else (module.error,)
        table.add_row(module.name.removeprefix("model.language_model."), *map(percent, errors))
    fallbacks = len(manifest.fallbacks)
    plain = sum(module.method == "rounding" for module in manifest.modules) - fallbacks
    notes = [f"{fallbacks} rounded to the nearest because GPTQ failed"] if fallbacks else []
    notes += [f"{plain} rounded to the nearest because inputs that GPTQ had not seen suffered less"] if plain else []
    table.caption = "; ".join(notes) or None
    return table


def percent(error: float | None) -> str:
    """A relative error as a percentage."""
    return "unknown" if error is None else f"{100 * error:.2f} %"


def vision_table(name: str, vision: VisionManifest) -> Table:
    """The facts about an exported vision tower that are single values."""
    table = _facts("vision tower" if name == FOLDERS["fp32"] else f"vision tower ({name})")
    for name, value in {**vision.model_dump(), **vision.parity.model_dump()}.items():
        if isinstance(value, str | int | float):
            table.add_row(name.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else str(value))
    return table


def check_line(path: Path) -> str:
    """What one check found; raises BrokenCheckpoint if its file is no result."""
    found = read_result(path)
    mean, low, high = (100 * getattr(found.verdict.difference, name) for name in ("mean", "low", "high"))
    asked = f"{found.questions} questions about {found.pictures} pictures of {', '.join(each.name for each in found.sets)}"
    difference = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] points at a margin of {100 * found.verdict.margin:g}"
    scored = difference if found.generated else "no answers scored"
    return f"checked: {found.verdict.outcome}, {scored}; {asked}, seed {found.seed}; vision {found.vision} ({path.parent.name})"


def require_intact(folder: Path, manifest: Manifest, towers: Mapping[str, VisionManifest], *, verify: bool) -> None:
    """Raise BrokenCheckpoint naming files that are missing or, with `verify`, whose contents have changed."""
    damaged = changed_files(folder, manifest) if verify else missing_files(folder, manifest)
    for place, tower in towers.items() if verify else ():
        damaged += [f"{place}/{name}" for name in changed_files(folder / place, tower)]
    derived = changed_packed(folder) if verify else []
    if names := damaged + derived:
        raise BrokenCheckpoint(
            f"{folder} is not as it was written: {', '.join(names)} {'has' if len(names) == 1 else 'have'} changed "
            f"or gone; {' and '.join(repairs(damaged, derived))}"
        )


def repairs(damaged: list[str], derived: list[str]) -> Iterator[str]:
    """What writes damaged files again; derived: those that a load makes again once they are gone."""
    if derived:
        yield f"delete {' and '.join(derived)} (made again when the model is next loaded)"
    places = dict.fromkeys(name.partition("/")[0] for name in damaged)
    if places.keys() - set(FOLDERS.values()):
        yield "quantize the model again"
    elif places:
        yield f"run {' and '.join(map(export_command, places))} again"


def _facts(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    return table
