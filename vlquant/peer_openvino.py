"""OpenVINO with a bundle's exported vision towers in `vlquant bench`."""

import time

import numpy as np
import openvino


def open_contestant(settings: dict) -> "Contestant":
    """OpenVINO; towers are compiled when they are asked for."""
    return Contestant(settings)


class Contestant:
    """Times are in seconds."""

    def __init__(self, settings: dict):
        self.core, self.threads = openvino.Core(), settings["threads"]
        self.side = settings["tile"]
        self._compiled: tuple | None = None

    def facts(self) -> dict:
        """What runs."""
        return {"precision": "as the ONNX file, float32 where it says so", "threads": self.threads}

    def vision(self, folder: str) -> float:
        """One tile; the number of tiles is fixed to one before the model is compiled."""
        if self._compiled is None or self._compiled[0] != folder:
            model = self.core.read_model(f"{folder}/model.onnx")
            model.reshape([1, 3, self.side, self.side])
            # Otherwise it computes in bfloat16 where the processor can, and would be compared with another precision.
            options = {"INFERENCE_NUM_THREADS": self.threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
            self._compiled = (folder, self.core.compile_model(model, "CPU", options).create_infer_request())
        pixels = np.random.default_rng(0).standard_normal((1, 3, self.side, self.side), dtype=np.float32)
        started = time.perf_counter()
        self._compiled[1].infer([pixels])
        return time.perf_counter() - started
