"""InternViT + pixel shuffle + projector of a checkpoint or bundle, written as an ONNX folder.

Knows models, folders and manifests; the nodes are in `graph`, the acceptance test in `verify`.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
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
from vlquant.export.graph import DATA_FILE, GRAPH_FILE, OPSET, WeightFile, vision_model
from vlquant.export.verify import verify
from vlquant.layout import projector_shapes, vision_shapes
from vlquant.model import Model, open_model, resolve_model
from vlquant.publishing import publishing, require_space
from vlquant.runtime.vision_session import import_onnxruntime
from vlquant.shards import file_hash
from vlquant.vision_manifest import ParityRecord, VisionManifest, read_vision_manifest

FILES = (DATA_FILE, GRAPH_FILE)
STAGE = "vision layers"


def export_vision(
    source: str | Path, *, output: str | Path | None = None, overwrite: bool = False, report: Report = silent
) -> Path:
    """Write the vision tower of `source` as model.onnx + model.data + vlquant.json and return the folder.

    source: an internvl_chat checkpoint, a bundle, or a model name. output: the folder to write; None: `vision` inside
    a bundle, NAME-vision in the current folder for a checkpoint. The folder appears only after ONNX Runtime and torch
    agree on real tiles; a complete one of the same weights is kept.
    Raises OutputRefused if the folder holds something else or cannot be written, VlquantError if they disagree.
    """
    import_onnxruntime()  # The last step needs it; say so before the first.
    folder = resolve_model(source)
    model = open_model(folder)
    output = Path(output) if output else _default_output(folder)
    weights = VisionWeights(model)
    source_hash = weights.sha256()
    if _is_kept(output, source_hash, overwrite=overwrite):
        report(Event(STAGE, message=f"{output}: already exported from the same weights"))
        return output
    require_space(output, weights.float32_bytes())
    with publishing(output) as partial:
        write_graph(partial, weights, model.config, report=report)
        parity = verify(partial, weights, model.config, report=report)
        manifest = _manifest(model.config, source_hash, parity=ParityRecord(**asdict(parity)), folder=partial)
        write_manifest(partial, manifest)
    report(Event(STAGE, message=f"{output}: {parity}"))
    return output


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

    def float32_bytes(self) -> int:
        """What all of them together take."""
        return 4 * sum(map(math.prod, self._shapes.values()))

    def sha256(self) -> str:
        """Identity of the tower: its shape and all values, whatever precision they are stored in. Reads everything."""
        digest = hashlib.sha256(json.dumps(asdict(self._model.config.vision), sort_keys=True).encode())
        for name in sorted(self):
            digest.update(name.encode())
            digest.update(self[name].numpy())
        return digest.hexdigest()


def write_graph(folder: Path, weights: Mapping[str, Tensor], config: ModelConfig, *, report: Report = silent) -> None:
    """Write model.data tensor by tensor, then model.onnx. Raises BrokenCheckpoint if onnx's checker objects."""
    layers = config.vision.layers_to_run
    with open(folder / DATA_FILE, "wb") as file:
        weight_file = WeightFile(file)
        model = vision_model(
            weights, config.vision, weight_file=weight_file, written=lambda layer: report(Event(STAGE, layer, layers))
        )
    (folder / GRAPH_FILE).write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(folder / GRAPH_FILE))
    except onnx.checker.ValidationError as error:
        raise BrokenCheckpoint(f"the vision tower of this checkpoint makes no valid ONNX graph ({error})") from error


def _manifest(config: ModelConfig, source_hash: str, *, parity: ParityRecord, folder: Path) -> VisionManifest:
    modules = numpy, onnx, import_onnxruntime(), torch, vlquant
    return VisionManifest(
        precision="float32",
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


def _default_output(folder: Path) -> Path:
    is_bundle = (folder / MANIFEST).is_file()
    return folder / "vision" if is_bundle else Path(f"{folder.resolve().name}-vision")


def _is_kept(output: Path, source_hash: str, *, overwrite: bool) -> bool:
    """True if `output` is a complete export of the same weights, False if it may be written.

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
    if damaged or overwrite and manifest.source_sha256 != source_hash:
        return False  # A damaged export of ours: nothing is lost by writing it again.
    if manifest.source_sha256 != source_hash:
        raise OutputRefused(
            f"{output} was exported from other weights; add --overwrite, or choose another folder with -o"
        )
    return True
