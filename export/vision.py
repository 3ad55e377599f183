"""InternViT + pixel shuffle + projector of a checkpoint or bundle, written as an ONNX folder.

Knows models, folders and manifests; the nodes are in `graph`, the acceptance test in `verify`.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy
import onnx
import torch
from torch import Tensor

import vlquant
from vlquant.bundle import MANIFEST, changed_files, write_manifest
from vlquant.config import ModelConfig
from vlquant.errors import BrokenCheckpoint, InvalidRequest, OutputRefused
from vlquant.events import Event, Report, silent
from vlquant.export.graph import OPSET, vision_model
from vlquant.export.nodes import DATA_FILE, Graph, WeightFile
from vlquant.export.precisions import HalfGraph, Int8Graph
from vlquant.export.float16 import largest_values, too_large
from vlquant.export.verify import real_tiles, verify
from vlquant.layout import projector_shapes, vision_shapes
from vlquant.model import Model, open_model, resolve_model
from vlquant.publishing import publishing, require_space, sweep
from vlquant.runtime.vision_session import import_onnxruntime
from vlquant.shards import file_hash
from vlquant.vision_manifest import FOLDERS, GRAPH_FILE, NAMES, ParityRecord, VisionManifest, read_vision_manifest

FILES = (DATA_FILE, GRAPH_FILE)
STAGE = "vision layers"
PRECISIONS = {name: stored for stored, name in NAMES.items()}
BYTES = {"fp32": 4.1, "fp16": 4, "int8": 1.1}
"""Of a weight at most."""
SCANNED_TILES = 8
"""Of the calibration pictures, for the range of float16."""


def export_vision(
    source: str | Path,
    *,
    output: str | Path | None = None,
    precision: str = "fp32",
    overwrite: bool = False,
    report: Report = silent,
) -> Path:
    """Write the vision tower of `source` as model.onnx + model.data + vlquant.json and return the folder.

    source: an internvl_chat checkpoint, a bundle, or a model name. output: the folder to write; None: inside a bundle
    `vision` (vision-fp16, vision-int8), for a checkpoint NAME-vision in the current folder. precision: "fp32", "fp16" (but
    for what float16 cannot hold on calibration pictures), or "int8" (products with constant matrices). The folder appears
    only after ONNX Runtime and torch in float32 agree on real tiles, as far as `verify` asks; a complete one of the same
    weights and precision is kept.
    Raises OutputRefused if the folder holds something else or cannot be written, VlquantError if they disagree.
    """
    if precision not in PRECISIONS:
        raise InvalidRequest(f"precision {precision!r} is unknown; use {', '.join(PRECISIONS)}")
    import_onnxruntime()  # The last step needs it; say so before the first.
    folder = resolve_model(source)
    model = open_model(folder)
    output = Path(output) if output else _default_output(folder, precision)
    weights = VisionWeights(model)
    for place in (output, *(folder / name for name in FOLDERS.values())):
        sweep(place)  # Gigabytes that a killed export left would lie in the bundle until the same precision is written again.
    source_hash = weights.sha256()
    if _is_kept(output, source_hash, precision, overwrite=overwrite):
        report(Event(STAGE, message=f"{output}: already exported from the same weights"))
        return output
    require_space(output, int(BYTES[precision] * weights.elements()))
    largest = scan(weights, model.config, report=report) if precision == "fp16" else {}
    with publishing(output) as partial:
        write_graph(partial, weights, model.config, precision=precision, islands=too_large(largest), report=report)
        parity = verify(partial, weights, model.config, precision=precision, islands=too_large(largest), report=report)
        record = _manifest(model.config, precision, source_hash, parity=ParityRecord(**asdict(parity)), folder=partial)
        write_manifest(partial, record.model_copy(update=range_record(largest)))
    report(Event(STAGE, message=f"{output}: {parity}"))
    return output


def scan(weights: Mapping[str, Tensor], config: ModelConfig, *, report: Report = silent) -> dict[str, float]:
    """The largest value in each branch on calibration pictures; says which of them float16 cannot hold."""
    largest = largest_values(real_tiles(config, SCANNED_TILES), weights, config.vision, report=report)
    for branch in too_large(largest):
        report(Event("range scan", message=f"{branch}* reaches {largest[branch]:.3g} and stays float32"))
    return largest


def range_record(largest: Mapping[str, float]) -> dict:
    """What a manifest says of a range scan; nothing without one."""
    islands = too_large(largest)
    inside = [value for branch, value in largest.items() if branch not in islands]
    return {"islands": islands, "largest_value": float(f"{max(inside):.6g}")} if inside else {"islands": islands}


class VisionWeights(Mapping):
    """Vision tower and projector of a model as float32, named without "model."; each is read when asked for."""

    def __init__(self, model: Model) -> None:
        self._model = model
        shapes = vision_shapes(model.config.vision) | projector_shapes(model.config)
        self._shapes = {name.removeprefix("model."): shape for name, shape in shapes.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        return self._model.tensor("model." + name).float().contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def elements(self) -> int:
        """How many numbers they are."""
        return sum(map(math.prod, self._shapes.values()))

    def sha256(self) -> str:
        """Identity of the tower: its shape and all values, whatever precision they are stored in. Reads everything."""
        digest = hashlib.sha256(json.dumps(asdict(self._model.config.vision), sort_keys=True).encode())
        for name in sorted(self):
            digest.update(name.encode())
            digest.update(self[name].numpy())
        return digest.hexdigest()


def write_graph(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    precision: str = "fp32",
    islands: Collection[str] = (),
    report: Report = silent,
) -> None:
    """Write model.data tensor by tensor, then model.onnx. Raises BrokenCheckpoint if onnx's checker objects.

    islands: branches that are float32 in a float16 graph.
    """
    layers = config.vision.layers_to_run
    with open(folder / DATA_FILE, "wb") as file:
        graph = empty_graph(WeightFile(file), precision, islands)
        model = vision_model(weights, config.vision, graph=graph, written=lambda layer: report(Event(STAGE, layer, layers)))
    (folder / GRAPH_FILE).write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(folder / GRAPH_FILE))
    except onnx.checker.ValidationError as error:
        raise BrokenCheckpoint(f"the vision tower of this checkpoint makes no valid ONNX graph ({error})") from error


def empty_graph(weight_file: WeightFile, precision: str, islands: Collection[str]) -> Graph:
    """A graph that stores and multiplies constant matrices in `precision`."""
    if precision == "fp16":
        return HalfGraph(weight_file, islands=islands)
    return Int8Graph(weight_file) if precision == "int8" else Graph(weight_file)


def _manifest(config: ModelConfig, precision: str, source_hash: str, *, parity: ParityRecord, folder: Path) -> VisionManifest:
    modules = numpy, onnx, import_onnxruntime(), torch, vlquant
    return VisionManifest(
        precision=PRECISIONS[precision],
        opset=OPSET,
        tile_size=config.vision.image_size,
        tokens_per_tile=config.vision.tokens_per_tile,
        feature_size=config.decoder.hidden_size,
        parity=parity,
        source_sha256=source_hash,
        libraries={module.__name__: str(module.__version__) for module in modules},
        files={name: file_hash(folder / name) for name in FILES},
        sizes={name: (folder / name).stat().st_size for name in FILES},
    )


def _default_output(folder: Path, precision: str) -> Path:
    is_bundle = (folder / MANIFEST).is_file()
    return folder / FOLDERS[precision] if is_bundle else Path(f"{folder.resolve().name}-{FOLDERS[precision]}")


def _is_kept(output: Path, source_hash: str, precision: str, *, overwrite: bool) -> bool:
    """True if `output` is a complete export of the same weights and precision, False if it may be written.

    Raises OutputRefused if it is something else, UnsupportedCheckpoint if a newer vlquant wrote it.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    names = {each.name for each in output.iterdir()} if output.is_dir() else set()
    if MANIFEST not in names or not names <= {MANIFEST, *FILES}:
        raise OutputRefused(f"{output} holds something other than a vision export; choose another folder with -o")
    try:
        manifest = read_vision_manifest(output)
        damaged = changed_files(output, manifest)
    except (InvalidRequest, BrokenCheckpoint):
        damaged = [MANIFEST]
    if damaged:
        return False  # A damaged export of ours: nothing is lost by writing it again.
    same = (manifest.source_sha256, manifest.name) == (source_hash, precision)
    if not same and not overwrite:
        other = f"in {manifest.name}" if manifest.source_sha256 == source_hash else "from other weights"
        raise OutputRefused(f"{output} was exported {other}; add --overwrite, or choose another folder with -o")
    return same
