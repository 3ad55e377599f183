"""Pixel values to visual tokens, through ONNX Runtime or through torch.

Knows the `vision/` folder and the vision half of a model; knows nothing of pictures, text or the decoder.
"""

import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlquant.errors import BrokenCheckpoint, InvalidRequest, MissingDependency, UnsupportedCheckpoint
from vlquant.model import Model
from vlquant.vision import vision_features
from vlquant.vision_manifest import (
    FOLDERS,
    GRAPH_FILE,
    damaged_export,
    export_command,
    exported_towers,
    intact_name,
    read_vision_manifest,
)

VISIONS = ("onnx", *FOLDERS, "torch")
"""What can be asked for; "onnx": of the exported ones, that which suits the device best."""
PREFERRED = {"cpu": ("int8", "fp32", "fp16"), "cuda": ("fp16", "fp32")}
"""By device, the best first. A CPU computes float16 as float32, between conversions; CUDA has no kernels for this int8."""

# One tile of 448 pixels or several smaller ones at a time keep the memory constant at no cost in speed: InternViT-300M
# on two CPU cores took 3.9 s a tile and 1.5 GB at 1, 4.4 s and 1.8 GB at 4, 4.2 s and 2.3 GB at 8.
PIXELS_PER_RUN = 448 * 448

ARENA_BEYOND_WEIGHTS = 2 * 2**30
"""Bytes of a GPU that a run may take for activations: several times what one takes on a CPU (0.3 GB)."""


class OnnxVision:
    """The exported vision tower; a call turns pixel values into visual tokens."""

    def __init__(self, folder: str | Path, device: str = "cpu", *, threads: int | None = None) -> None:
        """Open `folder` (the one that holds model.onnx) on "cpu", "cuda" or "cuda:N".

        threads: of one operator, on the CPU; None: as many as torch uses.
        Raises InvalidRequest, BrokenCheckpoint or MissingDependency, as `read_vision_manifest` and `open_session` do, the
        latter on a CPU when the first picture comes.
        """
        self.manifest = read_vision_manifest(Path(folder))
        self.device = torch.device(device)
        self.name = f"onnx {self.manifest.name}"
        """What is being run, in words."""
        self._graph, self._threads = Path(folder) / GRAPH_FILE, threads
        import_onnxruntime()
        if self.device.type != "cpu":
            _ = self._session  # Whether a GPU can do it, and has room, is better known at once.
        self._feature_shape = (self.manifest.tokens_per_tile, self.manifest.feature_size)

    @cached_property
    def _session(self):
        """Opened on a CPU by the first picture: a text needs neither its seconds nor its memory."""
        return open_session(self._graph, self.device, threads=self._threads)

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Features float32 [tiles, tokens, feature_size] of `pixel_values` [tiles, 3, side, side], on its device."""
        pixels = pixel_values.float().contiguous()
        features = torch.empty((len(pixels), *self._feature_shape), device=pixels.device)
        if pixels.is_cuda:  # ONNX Runtime reads on a stream of its own.
            torch.cuda.current_stream(pixels.device).synchronize()
        count = tiles_per_run(self.manifest.tile_size)
        for some_pixels, some_features in zip(pixels.split(count), features.split(count), strict=True):
            self._run(some_pixels, some_features)
        return features

    def _run(self, pixels: Tensor, features: Tensor) -> None:
        """Let ONNX Runtime read from and write into the memory of the two tensors."""
        binding = self._session.io_binding()
        bind(binding, pixels, features)
        self._session.run_with_iobinding(binding)


def bind(binding, pixels: Tensor, features: Tensor) -> None:
    """Hand two contiguous float32 tensors to an ONNX Runtime binding by address, wherever they are."""
    for name, tensor, accept in (("pixel_values", pixels, binding.bind_input), ("features", features, binding.bind_output)):
        accept(name, tensor.device.type, tensor.device.index or 0, np.float32, tuple(tensor.shape), tensor.data_ptr())


class MissingVision:
    """Stands for the tower of a bundle that has none exported yet: text needs none, pictures raise InvalidRequest."""

    name = "none"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, pixel_values: Tensor) -> Tensor:
        raise InvalidRequest(
            f"{self._folder} has no vision tower in ONNX; run `vlquant export-vision {self._folder}`, or take the torch "
            "tower (--vision torch, vision='torch')"
        )


class TorchVision:
    """The vision tower of a checkpoint or bundle in torch, float32; called like OnnxVision."""

    name = "torch fp32"

    def __init__(self, model: Model, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._config = model.config.vision
        tensors = model.vision_tensors()
        # One tensor at a time, so that only one exists in both precisions.
        self._weights = {name: tensors.pop(name).to(self.device, torch.float32) for name in list(tensors)}

    @torch.inference_mode()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Features float32 [tiles, tokens, feature_size] of `pixel_values` [tiles, 3, side, side], on its device."""
        batches = pixel_values.float().split(tiles_per_run(self._config.image_size))
        features = [vision_features(each.to(self.device), self._weights, self._config) for each in batches]
        return torch.cat(features).to(pixel_values.device)


def require_vision(name: str) -> None:
    """Raise InvalidRequest unless `name` is one of VISIONS."""
    if name not in VISIONS:
        raise InvalidRequest(f"vision {name!r} is unknown; use {', '.join(VISIONS)}")


def pick_tower(bundle: Path, vision: str, device: str) -> Path | None:
    """Folder of the exported tower that `vision`, a name of VISIONS, means on a device; None: torch, or none is exported.

    Raises InvalidRequest if that precision was not exported or does not run there, and as `read_vision_manifest`.
    """
    require_vision(vision)
    if vision == "torch":
        return None
    usable, towers = PREFERRED["cuda" if device.startswith("cuda") else "cpu"], exported_towers(bundle)
    if vision == "onnx" and not towers:
        return None
    chosen = next((name for name in usable if name in towers), None) if vision == "onnx" else vision
    if chosen is None or chosen not in usable:
        raise InvalidRequest(
            f"a vision tower in int8 is for CPUs; run `vlquant export-vision {bundle} --precision fp16` for {device}, "
            "or take the torch tower (--vision torch)"
        )
    others = [name for name in usable if name != chosen and name in towers and intact_name(towers[name])]
    ways_out = f"or choose --vision {' or '.join((*others, 'torch'))}"
    if chosen not in towers:
        command = export_command(FOLDERS[chosen])
        raise InvalidRequest(f"{bundle} has no vision tower in {chosen}; run `{command} {bundle}`, {ways_out}")
    try:
        read_vision_manifest(towers[chosen])
    except (BrokenCheckpoint, UnsupportedCheckpoint) as error:
        raise type(error)(f"{error}, {ways_out}") from error
    return towers[chosen]


def tiles_per_run(tile_size: int) -> int:
    """How many tiles of that side the vision tower takes at a time."""
    return max(1, PIXELS_PER_RUN // tile_size**2)


def open_session(path: Path, device: torch.device, *, threads: int | None = None, repack: bool = True):
    """An ONNX Runtime session on exactly the device asked for.

    threads: on a CPU; None: as many as torch uses, so that OMP_NUM_THREADS and the cores a process may use count for both.
    repack: copy the weights into the order its kernels like best (5 % faster); without it they stay in the mapped
    file, from where the system can drop them again, so that even a tower larger than the memory runs.
    Raises MissingDependency if that needs a package that is not installed or does not work here, never
    falling back to the CPU; BrokenCheckpoint if ONNX Runtime cannot read the files.
    """
    onnxruntime = import_onnxruntime()
    provider, provider_options = _provider(onnxruntime, device, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or (torch.get_num_threads() if device.type == "cpu" else 0)
    options.log_severity_level = 3
    # Threads that spin while they wait take the cores from those that still compute, here and in the language model.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Attention and elementwise work in small shares of what is left, not one for each thread: a core that others use takes fewer.
    options.add_session_config_entry("session.dynamic_block_base", "4")
    options.add_session_config_entry("session.disable_prepacking", "0" if repack else "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, provider_options)])
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own.
        raise damaged_export(path, f"cannot be loaded by ONNX Runtime ({_first_line(error)})") from error
    if session.get_providers()[0] != provider:
        raise MissingDependency(
            f"{device}: onnxruntime-gpu is installed but its {provider} did not start; check the driver, CUDA and"
            " cuDNN versions against vlquant/pins, or choose --device cpu"
        )
    return session


def import_onnxruntime():
    """The onnxruntime module; an extra, because two packages provide it. Raises MissingDependency."""
    try:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # Newer ones (1.31 does) tell their maker of every session otherwise.
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "onnxruntime is not installed; run pip install 'vlquant[cpu]' (or 'vlquant[gpu]'),"
            " or use the torch vision tower"
        ) from error
    return onnxruntime


def _provider(onnxruntime, device: torch.device, path: Path) -> tuple[str, dict]:
    if device.type == "cpu":
        return "CPUExecutionProvider", {}
    if device.type != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise MissingDependency(
            f"{device}: the installed onnxruntime cannot run there; replace it by onnxruntime-gpu"
            " (pip install 'vlquant[gpu]') for cuda, or choose --device cpu"
        )
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA and cuDNN from the wheels that torch brought
    weights = sum(each.stat().st_size for each in path.parent.glob("model.*"))
    return "CUDAExecutionProvider", cuda_options(device, weights)


def cuda_options(device: torch.device, weight_bytes: int) -> dict[str, int | str]:
    """How ONNX Runtime uses a GPU for a tower of so many bytes: exactly, and within bounds."""
    return {
        "device_id": device.index or 0,
        "use_tf32": 0,  # would cost three digits
        "arena_extend_strategy": "kSameAsRequested",  # otherwise it doubles, which a small card does not have room for
        "gpu_mem_limit": weight_bytes + ARENA_BEYOND_WEIGHTS,
        "cudnn_conv_algo_search": "HEURISTIC",  # trying all of them takes gigabytes of workspace
    }


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
