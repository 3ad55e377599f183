"""The bundle's manifest (vlquant.json), and how a bundle is found. Knows nothing of weights.

`vlquant.hf_layout` writes the files other programs read, `vlquant.publishing` puts the folder in its place.
"""

import importlib.metadata
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

import vlquant
from vlquant.errors import BrokenCheckpoint
from vlquant.recipe import Recipe
from vlquant.shards import file_hash

MANIFEST = "vlquant.json"
FORMAT_VERSION = 1
LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers", "bitsandbytes")


class Record(BaseModel):
    """Part of a manifest: immutable, and without fields we would silently lose."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Record):
    """The checkpoint a bundle was made from."""

    name: str
    """Folder name of the checkpoint, which is also the model's name: no path."""
    files: dict[str, str]
    """sha256 by file name."""


class Calibration(Record):
    """What a GPTQ bundle was calibrated on."""

    set: str
    """Names of the sets, without their folders."""
    sha256: str
    """Of pixels and texts, as they were given."""
    samples: int
    tokens: int
    generated: int = 0
    """How many of the answers the reference wrote itself, because the data had none."""
    pictures: tuple[str, ...] = ()
    """Short hashes of all pictures, by which `vlquant check` knows them again."""


class ModuleRecord(Record):
    """What quantizing did to one linear. Errors are of its outputs, relative to the float model's: those before it count."""

    name: str
    method: str
    """"gptq"; "rounding" where that was better for inputs GPTQ had not seen, or GPTQ failed; "rtn" or "bnb"."""
    error: float | None
    """None if the calibration inputs were not finite."""
    nearest_error: float | None
    """What rounding to the nearest code would have cost."""
    class_errors: dict[str, float | None] = {}
    """The error by class of token: "vision", "prompt" and "answer", those there were. Only GPTQ looks at inputs."""
    compensation: float | None = None
    """Share of the earlier layers' error that the weight was changed to make up for, as far as unseen inputs gain by it."""
    damping: float | None
    fallback: bool
    """True if GPTQ failed and the weight was rounded to the nearest code."""


class StageNoise(Record):
    """What rounding the linears that share an input would add to the hidden states, and the bits they got for it."""

    layer: int
    linears: tuple[str, ...]
    weights: int
    noise: dict[int, dict[str, float]]
    """Squared, relative to the hidden states, by bits and class of token."""
    bits: int


FLOAT16_ROOM = 20_000.0
"""Largest activation that leaves float16, which ends at 65504, room for inputs nobody looked at."""


class LayerRange(Record):
    """The largest absolute value that calibration saw in a layer: float16 ends at 65504."""

    largest: float | None
    """None: not finite even in float32."""
    where: str
    """"hidden state", or input or output of a linear."""


class Manifest(Record):
    """vlquant.json: what was done to which model, and the hashes of every file written. No times, no paths."""

    format_version: int = FORMAT_VERSION
    name: str
    source: Source
    source_config: dict
    recipe: dict
    calibration: Calibration | None
    modules: list[ModuleRecord] = []
    bit_choice: list[StageNoise] = []
    """Of every stage of every layer, when the recipe names an average of bits."""
    ranges: list[LayerRange] = []
    """Of every layer, when calibration looked at activations."""
    float16_safe: bool | None = None
    """Whether the language model can be computed in float16, with room to spare; None: nobody looked."""
    libraries: dict[str, str]
    files: dict[str, str] = {}
    """sha256 by name, of every file this was written with; other verbs add folders of their own."""
    sizes: dict[str, int] = {}
    """Bytes of the same files."""

    @property
    def fallbacks(self) -> list[str]:
        """Names of linears that were rounded because GPTQ failed."""
        return [module.name for module in self.modules if module.fallback]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle; raises BrokenCheckpoint if there is none that this version understands."""
    path = Path(folder) / MANIFEST
    if not path.parent.is_dir():
        raise BrokenCheckpoint(f"there is no folder {folder}; name a bundle, or make one with vlquant quantize")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenCheckpoint(f"{folder} is not a bundle, for it holds no {MANIFEST}; make one with vlquant quantize") from None
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{path} cannot be read ({error}); quantize the model again") from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BrokenCheckpoint(
            f"{folder} has bundle format {version}, and this vlquant reads up to {FORMAT_VERSION}; upgrade vlquant"
        )
    try:
        manifest = Manifest.model_validate(fields)
        Recipe.from_dict(manifest.recipe)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise BrokenCheckpoint(f"{path} is damaged at {where} ({first['msg']}); quantize the model again") from error
    return manifest


def missing_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of the manifest's files that are absent or have another size. Reads no contents."""
    paths = {name: Path(folder) / name for name in manifest.files}
    return [name for name, path in paths.items() if not path.is_file() or path.stat().st_size != manifest.sizes.get(name)]


def changed_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of the manifest's files that are absent or whose contents have another hash. Reads everything."""
    absent = missing_files(folder, manifest)
    return absent + [
        name
        for name, expected in manifest.files.items()
        if name not in absent and file_hash(Path(folder) / name) != expected
    ]


def find_bundle(path: str | Path | None = None) -> Path | None:
    """The bundle at `path`; without one, the current directory, else the newest complete bundle directly below it, else None.

    Raises BrokenCheckpoint if `path` is no bundle, or an incomplete one.
    """
    here = Path(path) if path is not None else Path()
    if path is not None or (here / MANIFEST).is_file():
        damaged = missing_files(here, read_manifest(here))
        if damaged:
            raise BrokenCheckpoint(
                f"{here} is incomplete: {damaged[0]} is missing or has the wrong size; quantize the model again"
            )
        return here
    candidates = [found for found in here.glob(f"*/{MANIFEST}") if not found.parent.name.startswith(".")]
    candidates.sort(key=lambda found: (found.stat().st_mtime_ns, found), reverse=True)
    return next((found.parent for found in candidates if _is_complete(found.parent)), None)


def _is_complete(folder: Path) -> bool:
    try:
        return not missing_files(folder, read_manifest(folder))
    except BrokenCheckpoint:
        return False


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write vlquant.json: equal manifests give equal bytes."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def library_versions() -> dict[str, str]:
    """Versions of what computed the weights."""
    return {"vlquant": vlquant.__version__, **{name: importlib.metadata.version(name) for name in LIBRARIES}}
