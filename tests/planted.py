"""Bundles with a fault planted in them, and a bundle that lost nothing."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy
import onnx
from safetensors.torch import load_file, save_file

from vlquant import gptq
from vlquant.bundle import MANIFEST
from vlquant.decoder import LINEARS
from vlquant.layout import layer_prefix
from vlquant.model import open_model
from vlquant.packing import pack_gptq
from vlquant.runtime.reader import Reader
from vlquant.shards import file_hash


def copied(bundle: Path, folder: Path) -> Path:
    """The bundle without its checks."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("checks"))
    return folder


def change_tensors(bundle: Path, change) -> None:
    """Let `change` have the tensors of each file; sizes in the manifest follow."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    for path in bundle.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file({name: each.contiguous() for name, each in tensors.items()}, path, metadata={"format": "pt"})
        manifest["sizes"][path.name] = path.stat().st_size
        manifest["files"][path.name] = file_hash(path)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def scale_layer(bundle: Path, layer: int, factor: float = 1.1) -> None:
    """Multiply all scales of one GPTQ layer."""

    def change(tensors):
        for name in tensors:
            if name.startswith(layer_prefix(layer)) and name.endswith(".scales"):
                tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

    change_tensors(bundle, change)


def two_bit_layer(bundle: Path, source: Path, layer: int) -> None:
    """Round one layer of the source to 2 bits, stored as codes of 4."""
    original = open_model(source).decoder_layer(layer)

    def change(tensors):
        for name in LINEARS:
            key = layer_prefix(layer) + name
            if f"{key}.qweight" in tensors:
                weight = original[f"{name}.weight"].float()
                group_size = weight.shape[1] // len(tensors[f"{key}.scales"])
                rounding = gptq.round_weight(weight, bits=2, group_size=group_size)
                packed = pack_gptq(rounding.codes + 6, rounding.scales, bits=4, group_size=group_size)
                tensors |= {f"{key}.{kind}": each for kind, each in packed.items()}

    change_tensors(bundle, change)


def zero_head(bundle: Path, block: int, head: int) -> None:
    """Zero what one attention head of the exported tower contributes."""
    model = onnx.load(bundle / "vision" / "model.onnx", load_external_data=False)
    weights = [each for each in model.graph.initializer if each.name.endswith("attention.projection_layer.weight")]
    heads = next(each.i for node in model.graph.node if node.op_type == "MultiHeadAttention" for each in node.attribute)
    place, (rows, columns) = weights[block], weights[block].dims
    offset = next(int(each.value) for each in place.external_data if each.key == "offset")
    data = numpy.memmap(bundle / "vision" / "model.data", dtype="<f4", mode="r+", offset=offset, shape=(rows, columns))
    width = rows // heads
    data[head * width : (head + 1) * width] = 0
    data.flush()
    manifest = json.loads((bundle / "vision" / MANIFEST).read_text())
    manifest["files"]["model.data"] = file_hash(bundle / "vision" / "model.data")
    (bundle / "vision" / MANIFEST).write_text(json.dumps(manifest))


def set_system_message(bundle: Path, message: str) -> None:
    """Make the bundle greet its users otherwise than its reference does."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["source_config"]["system_message"] = message
    (bundle / MANIFEST).write_text(json.dumps(manifest))


@contextmanager
def tiles_turned(bundle: Path, by: int):
    """Tiles of whatever the bundle reads come in another order."""
    encode = Reader.encode

    def turned(reader, prompt):
        encoded = encode(reader, prompt)
        if reader.model.folder == bundle and len(encoded.tiles) > 1:
            by_now = by % len(encoded.tiles) or 1
            encoded.tiles[:] = encoded.tiles[by_now:] + encoded.tiles[:by_now]
        return encoded

    with mock.patch.object(Reader, "encode", turned):
        yield


def float_bundle(bundle: Path, source: Path, folder: Path) -> Path:
    """The bundle with the weights of its source."""
    copied(bundle, folder)
    original, config = open_model(source), json.loads((folder / "config.json").read_text())
    layers = original.config.decoder.layers

    def change(tensors):
        for index in range(layers):
            for name, tensor in original.decoder_layer(index).items():
                module = layer_prefix(index) + name.rpartition(".")[0]
                if name.rpartition(".")[0] in LINEARS and f"{module}.qweight" in tensors:
                    for kind in ("qweight", "qzeros", "scales", "g_idx"):
                        del tensors[f"{module}.{kind}"]
                    tensors[layer_prefix(index) + name] = tensor

    change_tensors(folder, change)
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink(missing_ok=True)
    manifest = json.loads((folder / MANIFEST).read_text())
    there = [name for name in manifest["sizes"] if (folder / name).exists()]
    manifest["sizes"] = {name: (folder / name).stat().st_size for name in there}
    manifest["files"] = {name: file_hash(folder / name) for name in there}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder
