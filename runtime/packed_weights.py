"""A bundle's linears and head as the CPU kernels read them, kept in the bundle's runtime/ folder from the first load on.

The file is derived: it names the bundle it was made from, other readers ignore it, and it is made again when it is
missing or does not fit. Mapped, so that a second process loads it in no time.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlquant.bundle import MANIFEST, Manifest, read_manifest
from vlquant.decoder import LINEARS
from vlquant.kept_answers import cache_folder
from vlquant.layout import HEAD, layer_prefix, layer_shapes
from vlquant.model import Model
from vlquant.publishing import replacing
from vlquant.recipe import Recipe
from vlquant.runtime.native import PackedMatrix, pack_linear, round_rows
from vlquant.shards import stored_hash, tensors_hash, write_safetensors

FORMAT = "2"
"""Changes with the order of the codes and with what is kept beside them."""
DERIVED = "runtime"
FILE = f"{DERIVED}/cpu.safetensors"
HEAD_NAME = "head"
CACHE_LINE = 64


def packed_matrices(model: Model) -> dict[str, PackedMatrix] | None:
    """Every linear ("0.self_attn.q_proj" ...) and, in 8 bits, the "head"; None if the kernels cannot compute one of them.

    A bundle's own file is read first, then the one in the user's cache: a bundle that can be written to again gets its own
    only when that one is gone or does not fit. Where neither can be written, every process packs for itself (`not_kept`).
    """
    source = source_of(model.folder)
    if source is not None:
        needed = needed_tensors(model)
        for path in places(model.folder):
            tensors = read_packed(path, source)
            if tensors is not None and needed <= tensors.keys():
                return joined(tensors, model)
    matrices = pack_model(model)
    if matrices is not None and source is not None:
        tensors = {f"{name}.{kind}": each for name, matrix in matrices.items() for kind, each in parts(matrix).items()}
        for path in places(model.folder):
            with contextlib.suppress(OSError):  # Read-only or full: the next place, or every process packs for itself.
                keep_packed(path, tensors, source)
                return joined(read_packed(path, source) or tensors, model)
    return matrices


def head_bits(model: Model) -> int:
    """How a quantized model's head is to be computed, 8 or 16: as its recipe says, if it has one."""
    return bits_of_head(read_manifest(model.folder)) if (model.folder / MANIFEST).is_file() else Recipe.head_bits


def bits_of_head(manifest: Manifest) -> int:
    """What the recipe says; bundles made before there was a choice have the default."""
    return manifest.recipe.get("head_bits", Recipe.head_bits)


def pack_model(model: Model) -> dict[str, PackedMatrix] | None:
    """What `packed_matrices` returns, made from the checkpoint's own tensors."""
    matrices = {}
    for index in range(model.config.decoder.layers):
        tensors = model.decoder_layer(index)
        for name in LINEARS:
            matrix = pack_linear(own_tensors(tensors, name), model.gptq_version)
            if matrix is None:
                return None
            matrices[f"{index}.{name}"] = matrix
    if head_bits(model) == 8:
        head = round_rows(model.tensor(HEAD))
        if head is None:
            return None
        matrices[HEAD_NAME] = head
    return matrices


def own_tensors(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The tensors of one module, by kind ("weight", "qweight" ...)."""
    prefix = module + "."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def needed_tensors(model: Model) -> set[str]:
    """Names of what the file of a model has to hold; a factor may come to each matrix."""
    names = {HEAD_NAME} if head_bits(model) == 8 else set()
    shapes = layer_shapes(model.config.decoder, 0)
    biases = {name for name in LINEARS if f"{layer_prefix(0)}{name}.bias" in shapes}
    layers = range(model.config.decoder.layers)
    names |= {f"{index}.{name}" for index in layers for name in LINEARS}
    needed = {f"{name}.{kind}" for name in names for kind in ("codes", "scales")}
    return needed | {f"{index}.{name}.bias" for index in layers for name in biases}


def source_of(folder: Path) -> str | None:
    """Hash of what a bundle's matrices are made from; None for what is no bundle, whose files nobody has hashed."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    facts = [FORMAT, dict(sorted(manifest.files.items())), bits_of_head(manifest)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def places(bundle: Path) -> tuple[Path, Path]:
    """Where the file may lie: in the bundle, or in the user's cache if that cannot be written to."""
    place = hashlib.sha256(os.fsencode(bundle.resolve())).hexdigest()[:32]  # That of another bundle here before it is replaced.
    return bundle / FILE, cache_folder() / "packed" / f"{place}.safetensors"


def parts(matrix: PackedMatrix) -> dict[str, Tensor]:
    """The tensors of a matrix by kind."""
    factor = None if matrix.factor == 1 else torch.tensor(matrix.factor)
    found = {"codes": matrix.codes, "scales": matrix.scales, "bias": matrix.bias, "factor": factor}
    return {kind: tensor for kind, tensor in found.items() if tensor is not None}


def read_packed(path: Path, source: str) -> dict[str, Tensor] | None:
    """The tensors of such a file, mapped; None if it is missing, damaged or of another source."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("source") != source:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        return None


def keep_packed(path: Path, tensors: dict[str, Tensor], source: str) -> None:
    """Write the file, complete or not at all; folders made for it go again if that fails, and OSError says why."""
    absent = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            metadata = {"source": source, "sha256": tensors_hash(tensors)}
            write_safetensors(partial, tensors, metadata=metadata, alignment=CACHE_LINE)
    except BaseException:
        for folder in absent:
            with contextlib.suppress(OSError):  # It was never made, or somebody else has written into it.
                folder.rmdir()
        raise


def not_kept(bundle: Path) -> str | None:
    """A sentence for who has just loaded a bundle whose file could be written nowhere; None: the next load finds it."""
    source, found = source_of(bundle), places(bundle)
    if source is None or any(metadata_of(path).get("source") == source for path in found):
        return None
    own, cached = (path.parent for path in found)
    return (
        f"the repacked weights could be kept neither in {own} nor in {cached}, so every load packs them again; "
        "make one of these writable, or make room there"
    )


def changed_packed(bundle: Path) -> list[str]:
    """Those files a load may read, in the bundle and in the user's cache, whose tensors are not what was written. Reads everything.

    Named as the user finds them: the bundle's own from there, the other by its whole path.
    """
    own, cached = places(bundle)
    return [name for name, path in ((FILE, own), (str(cached), cached)) if is_changed(path)]


def is_changed(path: Path) -> bool:
    """Whether there is such a file and it does not hold what was written."""
    try:
        if not path.exists():
            return False
    except OSError:  # In a folder that may not be entered: no load reads it either.
        return False
    if not (metadata := metadata_of(path)):
        return True
    # Older versions noted no hash: their files are made again when they are next loaded.
    return "sha256" in metadata and stored_hash(path) != metadata["sha256"]


def metadata_of(path: Path) -> dict[str, str]:
    """What such a file says of itself; nothing if it is missing or damaged."""
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def joined(tensors: Mapping[str, Tensor], model: Model) -> dict[str, PackedMatrix]:
    """Matrices of the tensors that `parts` made of them."""
    config = model.config.decoder
    shapes = layer_shapes(config, 0).items()
    rows = {name.removeprefix(layer_prefix(0)).removesuffix(".weight"): shape[0] for name, shape in shapes}
    rows[HEAD_NAME] = config.vocab_size
    names = [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]
    return {
        name: PackedMatrix(
            tensors[f"{name}.codes"], tensors[f"{name}.scales"], tensors.get(f"{name}.bias"), rows[name.lstrip("0123456789.")],
            float(tensors.get(f"{name}.factor", 1)),
        )
        for name in names
    }  # fmt: skip
