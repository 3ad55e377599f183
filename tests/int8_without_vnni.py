"""What the int8 vision tower of the demo model gives on an x86 processor without VNNI and AVX-512, under emulation.

    PYTHONPATH=. python tests/int8_without_vnni.py make FOLDER
    python tests/int8_without_vnni.py run FOLDER
    qemu-x86_64 -cpu Haswell PYTHON tests/int8_without_vnni.py run FOLDER

`make` writes two towers: as exported, and with weights of 8 full bits. `run` needs numpy and onnxruntime only (qemu does not
read a virtual environment's pyvenv.cfg through links: PYTHON is the interpreter itself, with PYTHONPATH to site-packages).
tests/RESULTS.md has what it printed.
"""

import sys
from pathlib import Path

import numpy as np


def make(folder: Path) -> None:
    from vlquant.calib_data import demo_model
    from vlquant.export import precisions
    from vlquant.export.verify import real_tiles
    from vlquant.export.vision import export_vision
    from vlquant.model import open_model
    from vlquant.runtime.vision_session import TorchVision

    model = open_model(Path(demo_model()))
    tiles = real_tiles(model.config, 4)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "tiles.npz", tiles=tiles.numpy(), features=TorchVision(model)(tiles).numpy())
    for codes in (precisions.LARGEST_CODE, 127):
        precisions.LARGEST_CODE = codes
        export_vision(demo_model(), output=folder / f"codes-{codes}", precision="int8", overwrite=True)


def run(folder: Path) -> None:
    import onnxruntime

    given = np.load(folder / "tiles.npz")
    expected = given["features"].reshape(len(given["tiles"]), -1).astype(np.float64)
    for tower in sorted(folder.glob("codes-*")):
        session = onnxruntime.InferenceSession(tower / "model.onnx", providers=["CPUExecutionProvider"])
        found = session.run(None, {"pixel_values": given["tiles"]})[0].reshape(expected.shape).astype(np.float64)
        cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        print(tower.name, f"cosine of the worst tile {cosines.min():.6f}, largest difference {np.abs(found - expected).max():.6f}")


if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](Path(sys.argv[2]))
