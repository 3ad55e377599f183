"""How tests/golden was made: `python tests/pack_golden.py FOLDER` packs a folder of recordings (see golden/README.md) into it.

Weights, texts and ids are kept to the bit. What is compared within 1e-4 is rounded to steps of 2**-15 (an error of at most
1.6e-5), and of visual tokens and prompt positions only every so many are kept: all in order to stay below 12 MB.
"""

import io
import json
import lzma
import shutil
import sys
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load, save

GOLDEN = Path(__file__).parent / "golden"
STEP = 2.0**-15
ROUNDED = ("features/", "features_variant/", "vision_last_hidden_state/", "/prefill_logits", "/step_")
FEATURE_TOKENS = 16
"""Visual tokens kept of each tile."""
LOGIT_POSITIONS = 2
"""Prompt positions whose logits are kept of each call: one inside it and the last."""
FLOATS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 2, "pb": 2}]
"""Told that bytes come in fours, LZMA finds what little there is to save in random float32."""


def main(source: Path) -> None:
    shutil.rmtree(GOLDEN / "images", ignore_errors=True)
    shutil.copytree(source / "images", GOLDEN / "images", copy_function=shutil.copyfile)
    shutil.copyfile(source / "templates.json", GOLDEN / "templates.json")
    for header in sorted(source.glob("*/golden.json")):
        archive = GOLDEN / f"{header.parent.name}.tar.xz"
        files = {path.name: path.read_bytes() for path in sorted(header.parent.iterdir())}
        archive.write_bytes(lzma.compress(as_tar(archive.name.removesuffix(".tar.xz"), thinned(files)), filters=FLOATS))
        print(archive.name, archive.stat().st_size)
    print("together", sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()))


def as_tar(folder: str, files: dict[str, bytes]) -> bytes:
    """The files as an archive without owners and times, so that the same files give the same bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, contents in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(contents)
            tar.addfile(entry, io.BytesIO(contents))
    return out.getvalue()


def thinned(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a case with fewer and rounder numbers in golden.safetensors, and golden.json saying which."""
    header, tensors = json.loads(files["golden.json"]), load(files["golden.safetensors"])
    if "num_image_token" in header:
        header["feature_token_step"] = max(1, header["num_image_token"] // FEATURE_TOKENS)
    for conversation in header.get("conversations", []):
        positions = conversation["logit_positions"]
        kept = sorted({round(index) for index in torch.linspace(1, len(positions) - 1, LOGIT_POSITIONS).tolist()})
        conversation["logit_positions"] = [positions[index] for index in kept]
        key = conversation["key"] + "/prefill_logits"
        tensors[key] = tensors[key][:, kept]
    for name, tensor in tensors.items():
        if name.startswith(("features/", "features_variant/")):
            tensor = tensor[:, :: header["feature_token_step"]]
        if any(part in name for part in ROUNDED):
            tensor = (tensor.double() / STEP).round().mul(STEP).float()
        tensors[name] = tensor.contiguous()
    packed = save(dict(sorted(tensors.items())))
    return files | {
        "golden.json": json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(),
        "golden.safetensors": packed,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
