"""The manifest of an exported vision tower (vision/vlquant.json), and which towers lie in a bundle.

Knows no graph and runs nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlquant.bundle import MANIFEST, Record, missing_files
from vlquant.errors import BrokenCheckpoint, InvalidRequest, UnsupportedCheckpoint, VlquantError

FORMAT_VERSION = 2
"""1 knew float32 only."""
GRAPH_FILE = "model.onnx"
FOLDERS = {"fp32": "vision", "fp16": "vision-fp16", "int8": "vision-int8"}
"""Where a bundle keeps its towers, by precision; each folder is an export of its own."""
NAMES = {"float32": "fp32", "float16": "fp16", "int8": "int8"}
"""What precisions are called, by what manifests call them."""


@dataclass(frozen=True)
class Accepted:
    """How far a graph may be from torch in float32."""

    difference: float
    """Of any feature, as a share of the largest."""
    cosine: float
    """Least between the features of a tile, all tokens together."""


ACCEPTED = {
    # Float32 through 24 to 45 layers in another order of additions differs by 1e-6 to 1e-5 of the largest feature;
    # the smallest mistake we could make, GELU by tanh, by 1e-4 and more.
    "fp32": Accepted(1e-4, 0.999999),
    # Weights and activations rounded at 5e-4; what is wrong rather than rounded is further away.
    "fp16": Accepted(1e-2, 0.9999),
    "int8": Accepted(0.25, 0.99),
}


class ParityRecord(Record):
    """How far the exported graph was from torch when it was accepted."""

    largest_difference: float
    feature_scale: float
    """Largest absolute feature."""
    tiles: int
    tolerance: float
    """Share of feature_scale that was accepted."""
    cosine: float | None = None
    """Between both features of the worst tile; None: not recorded in format 1."""
    least_cosine: float | None = None
    """The least that was accepted."""


class VisionManifest(Record):
    """vision/vlquant.json: what was exported, and how exactly. No times, no paths."""

    format_version: int = FORMAT_VERSION
    precision: Literal["float32", "float16", "int8"]
    islands: tuple[str, ...] = ()
    """Of float16: what stays float32 because its numbers do not fit, by what the names of its weights start with."""
    largest_value: float | None = None
    """Of float16: the largest number that the range scan saw outside of islands."""
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

    @property
    def name(self) -> str:
        """"fp32", "fp16" or "int8"."""
        return NAMES[self.precision]


def exported_towers(bundle: Path) -> dict[str, Path]:
    """Folders of the vision towers exported into a bundle or checkpoint, by precision.

    One that cannot be read counts as what its folder is for: whoever asks for it is told what is wrong, nobody else.
    """
    folders = {name: bundle / place for name, place in FOLDERS.items() if (bundle / place / GRAPH_FILE).is_file()}
    names = {folder: intact_name(folder) for folder in folders.values()}
    damaged = {name: folder for name, folder in folders.items() if names[folder] is None}
    return damaged | {name: folder for folder, name in names.items() if name is not None}


def intact_name(folder: Path) -> str | None:
    """Precision of the exported tower in a folder; None if it is none that can run."""
    try:
        return read_vision_manifest(folder).name
    except VlquantError:
        return None


def has_exported_tower(bundle: Path) -> bool:
    """Whether a vision tower was exported into a bundle or checkpoint. Reads nothing."""
    return any((bundle / name / GRAPH_FILE).is_file() for name in FOLDERS.values())


def read_vision_manifest(folder: Path) -> VisionManifest:
    """The manifest of an exported vision tower, after checking that its files are there in full.

    Raises InvalidRequest if there is no export, BrokenCheckpoint if it is damaged, UnsupportedCheckpoint if a newer
    vlquant wrote it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / GRAPH_FILE).exists():
            raise damaged_export(path, "is missing")
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
    except (OSError, ValueError, KeyError, TypeError) as error:  # pydantic's and json's errors are ValueErrors.
        raise damaged_export(path, "is not the manifest of a vision export") from error
    for name in missing_files(folder, manifest):
        raise damaged_export(folder / name, "is missing or has the wrong size")
    return manifest


def damaged_export(file: Path, what: str) -> BrokenCheckpoint:
    """The error that says what is wrong with a file of an exported vision tower."""
    return BrokenCheckpoint(f"{file} {what}; remove {file.parent} and run `{export_command(file.parent.name)}` again")


def export_command(folder_name: str) -> str:
    """The command that writes the tower in a folder of that name."""
    option = next((f" --precision {name}" for name, place in FOLDERS.items() if place == folder_name and name != "fp32"), "")
    return f"vlquant export-vision{option}"
