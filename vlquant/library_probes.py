"""Does a library really load, and compute? Each is asked in a process of its own, because a broken one may take it along.

`python -m vlquant.library_probes NAME` is that process: one line of JSON, or one line on standard error.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from vlquant.ending import end_in_order

SIDE = 8
"""Of the matrices that are multiplied."""


def torch_build() -> dict:
    """What torch was built for. Asked even where it sees no GPU."""
    import torch

    # The public function answers with an empty list where there is no working driver.
    flags = torch._C._cuda_getArchFlags() if torch.version.cuda else None
    return {"cuda": torch.version.cuda, "architectures": (flags or "").split(), "cudnn": torch.backends.cudnn.version()}


def torch_on_cuda() -> dict:
    """Multiply on every card; an error of CUDA is raised by torch."""
    import torch

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise RuntimeError("torch sees no CUDA device" + (f", CUDA_VISIBLE_DEVICES being {hidden!r}" if hidden is not None else ""))
    for index in range(torch.cuda.device_count()):
        ones = torch.ones(SIDE, SIDE, device=f"cuda:{index}")
        require_close((ones @ ones).flatten().tolist(), SIDE)
    return {"devices": torch.cuda.device_count()}


def onnxruntime_providers() -> dict:
    """Which providers ONNX Runtime was built with."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # As in runtime/vision_session.py.
    import onnxruntime

    return {"providers": onnxruntime.get_available_providers()}


def onnxruntime_on(device: str) -> dict:
    """Run a small graph exactly where the runtime would run the vision tower."""
    import numpy as np
    import onnx
    import torch
    from onnx import TensorProto, helper

    from vlquant.errors import BrokenCheckpoint
    from vlquant.export.graph import IR_VERSION, OPSET
    from vlquant.runtime.vision_session import open_session

    shape = [SIDE, SIDE]
    nodes = [helper.make_node("MatMul", ["x", "x"], ["product"]), helper.make_node("Add", ["product", "x"], ["y"])]
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in "xy")
    graph = helper.make_graph(nodes, "probe", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        onnx.save(model, path)
        try:
            session = open_session(path, torch.device(device))
        except BrokenCheckpoint as error:  # Which advises to export a tower again.
            raise error.__cause__ from None
        [result] = session.run(None, {"x": np.ones(shape, np.float32)})
    require_close(result.flatten().tolist(), SIDE + 1)
    return {"provider": session.get_providers()[0]}


def bitsandbytes_on(device: str) -> dict:
    """Quantize to NF4 as `vlquant quantize --method bnb` does, there and back; names the library that was picked."""
    import torch
    from bitsandbytes import cextension

    from vlquant.bnb import dequantize_nf4, quantize_nf4

    if message := getattr(cextension.lib, "error_msg", ""):
        if device != "cpu":  # On a CPU it does without a library of its own.
            raise RuntimeError(" ".join(message.split())[:200])
    tensors = quantize_nf4(torch.ones(64, 64, device=device))
    require_close(dequantize_nf4(tensors).flatten().tolist(), 1)
    library = getattr(cextension.lib, "_lib", None)
    return {"library": Path(library._name).name if library is not None else None}


def nvrtc() -> list[dict]:
    """The libraries that compile our CUDA kernels, in the order in which they are tried: name, version, architectures."""
    from vlquant.runtime.nvrtc import known_architectures, libraries, nvrtc_version

    found = []
    for library in libraries():
        version = "{}.{}".format(*nvrtc_version(library))
        each = {"library": Path(library._name).name, "version": version, "architectures": known_architectures(library)}
        found += [] if each in found else [each]  # Which the system may find by another path.
    return found


def cpu_kernels() -> dict | None:
    """The compiled CPU kernels and which of them run here, if they are those of these Python files; None: there are none."""
    from vlquant.runtime.kernel_library import CHOICES, library_path, open_library

    path = library_path()
    if path is None:
        return None
    library = open_library(path)
    found = library.vlquant_instructions()
    return {"file": Path(library._name).name, "choices": [name for name, level in CHOICES.items() if level <= found]}


def require_close(values: list[float], expected: float) -> None:
    """Raise RuntimeError unless every value is the expected one."""
    wrong = [value for value in values if not abs(value - expected) < 1e-3]  # NaN is wrong too
    if wrong:
        raise RuntimeError(f"it computes {wrong[0]} where {expected} is right")


PROBES = {
    "torch": torch_build,
    "torch on cuda": torch_on_cuda,
    "onnxruntime": onnxruntime_providers,
    "onnxruntime on cpu": lambda: onnxruntime_on("cpu"),
    "onnxruntime on cuda": lambda: onnxruntime_on("cuda"),
    "bitsandbytes": lambda: bitsandbytes_on("cpu"),
    "bitsandbytes on cuda": lambda: bitsandbytes_on("cuda"),
    "nvrtc": nvrtc,
    "cpu kernels": cpu_kernels,
}


def first_line(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """An error as one line: what libraries add below it is advice for their own developers."""
    print(f"{kind.__name__}: {(str(error).strip().splitlines() or [''])[0]}", file=sys.stderr)


if __name__ == "__main__":
    sys.excepthook = first_line
    end_in_order()  # Its temporary files are removed again.
    print(json.dumps(PROBES[sys.argv[1]]()))
