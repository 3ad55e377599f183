"""The manifest of an exported vision tower (vision/vlquant.json). Knows no graph and runs nothing."""

import json
from pathlib import Path

from vlquant.bundle import MANIFEST, Record, missing_files
from vlquant.errors import BrokenCheckpoint, InvalidRequest, UnsupportedCheckpoint

FORMAT_VERSION = 1


class ParityRecord(Record):
    """How far the exported graph was from torch when it was accepted."""

    largest_difference: float
    feature_scale: float
    """Largest absolute feature."""
    tiles: int
    tolerance: float
    """Share of feature_scale that was accepted."""


class VisionManifest(Record):
    """vision/vlquant.json: what was exported, and how exactly. No times, no paths."""

    format_version: int = FORMAT_VERSION
    precision: str
    opset: int
    tile_size: int
    tokens_per_tile: int
    feature_size: int
    """Length of one visual token: the language model's hidden size."""
    parity: ParityRecord
    source_sha256: str
    """Of the vision tensors the graph was made from."""
    libraries: dict[str, str]
    files: dict[str, str]
    """sha256 by name."""
    sizes: dict[str, int]
    """Bytes."""


def read_vision_manifest(folder: Path) -> VisionManifest:
    """The manifest of an exported vision tower, after checking that its files are there in full.

    Raises InvalidRequest if there is no export, BrokenCheckpoint if it is damaged, UnsupportedCheckpoint if a newer
    vlquant wrote it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InvalidRequest(
            f"{folder} holds no exported vision tower; run `vlquant export-vision` first, or use the torch vision tower"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UnsupportedCheckpoint(
                f"{folder} has vision format {version}, and this vlquant reads up to {FORMAT_VERSION}; upgrade vlquant"
            )
        manifest = VisionManifest.model_validate(fields)
    except (ValueError, KeyError, TypeError) as error:  # pydantic's and json's errors are ValueErrors.
        raise damaged_export(path, "is not the manifest of a vision export") from error
    for name in missing_files(folder, manifest):
        raise damaged_export(folder / name, "is missing or has the wrong size")
    return manifest


def damaged_export(file: Path, what: str) -> BrokenCheckpoint:
    """The error that says what is wrong with a file of an exported vision tower."""
    return BrokenCheckpoint(f"{file} {what}; remove {file.parent} and run `vlquant export-vision` again")
