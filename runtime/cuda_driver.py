"""Kernels on a GPU, through the driver's own library: load machine code, launch. Knows tensors, no models.

Torch starts the device and owns its memory and streams; nothing here allocates.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vlquant.errors import MissingDependency
from vlquant.gpu_support import has_code
from vlquant.runtime.nvrtc import compile_cubin

KERNEL_FOLDER = Path(__file__).parent / "cuda_kernels"

WARP, MAX_WARPS = 32, 4
"""Lanes of a warp, and most warps of a block, as in numbers.cu."""

Shape = tuple[int, int, int]


class Kernels(Protocol):
    """Compiled kernels, wherever they run."""

    def launch(self, name: str, grid: Shape, block: Shape, *arguments: Tensor | int | float | None) -> None:
        """Start one kernel. Tensors are handed over by address, None as a null pointer."""


class DriverKernels:
    """Kernels in the machine code of one GPU, launched on torch's current stream there."""

    def __init__(self, cubin: bytes, device: torch.device) -> None:
        self._driver, self._module, self._device = _driver(), ctypes.c_void_p(), device
        self._functions: dict[str, ctypes.c_void_p] = {}
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # Torch makes its context current, which the module then belongs to.
            _must(self._driver.cuModuleLoadData(ctypes.byref(self._module), cubin))

    def launch(self, name: str, grid: Shape, block: Shape, *arguments: Tensor | int | float | None) -> None:
        parameters, _values = kernel_parameters(arguments)  # The values have to live until the launch has read them.
        with torch.cuda.device(self._device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            _must(self._driver.cuLaunchKernel(self._function(name), *grid, *block, 0, stream, parameters, None))

    def _function(self, name: str) -> ctypes.c_void_p:
        if name not in self._functions:
            function = ctypes.c_void_p()
            _must(self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()))
            self._functions[name] = function
        return self._functions[name]


@dataclass(frozen=True)
class Card:
    """What choices depend on."""

    capability: tuple[int, int]
    """Compute capability: (6, 1) is a GTX 1080 Ti."""
    processors: int
    """Streaming multiprocessors."""


@functools.cache
def card_of(device: torch.device) -> Card:
    """The GPU of a torch device."""
    properties = torch.cuda.get_device_properties(device)
    return Card((properties.major, properties.minor), properties.multi_processor_count)


@functools.cache
def kernels_of(device: torch.device, files: tuple[str, ...], defines: tuple[str, ...] = ()) -> Kernels:
    """Files of `cuda_kernels` as one module on a GPU, compiled for it if need be. Raises MissingDependency."""
    source, capability = kernel_source(files), card_of(device).capability
    try:
        return DriverKernels(compile_cubin(source, capability, defines=defines), device)
    except RuntimeError:  # What was kept may be damaged; what is compiled now is not.
        return DriverKernels(compile_cubin(source, capability, defines=defines, anew=True), device)


def kernel_source(files: Sequence[str]) -> str:
    """Files of `cuda_kernels` joined to the text of one module."""
    return "\n".join((KERNEL_FOLDER / f"{name}.cu").read_text(encoding="utf-8") for name in files)


def kernel_parameters(arguments: Sequence[Tensor | int | float | None]) -> tuple[ctypes.Array, list]:
    """The array of addresses that a launch takes, and the values that these point at.

    Raises ValueError for a tensor that is not contiguous, which a kernel would read wrongly.
    """
    values = [_parameter(each) for each in arguments]
    return (ctypes.c_void_p * len(values))(*(ctypes.addressof(each) for each in values)), values


def _parameter(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_float:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        if not argument.is_contiguous():
            raise ValueError(f"a kernel was given a tensor with strides {argument.stride()}")
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)


def require_code_for(device: torch.device) -> None:
    """Raise MissingDependency if the installed torch cannot start a GPU or has no code for it."""
    try:
        capability, built_for = card_of(device).capability, torch.cuda.get_arch_list()
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise MissingDependency(f"{device} does not start ({reason}); check the driver, or choose --device cpu") from error
    if not has_code(built_for, capability):
        raise MissingDependency(
            f"{device} has compute capability {capability[0]}.{capability[1]}, and the installed torch {torch.__version__} has "
            f"code for {', '.join(built_for)} only; install the versions of vlquant/pins/pascal.txt, or choose --device cpu"
        )


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise MissingDependency("--device cuda needs the NVIDIA driver's libcuda.so.1; install it, or choose --device cpu") from error
    driver.cuLaunchKernel.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    return driver


def _must(status: int) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"CUDA driver: {(name.value or b'error').decode()} ({status})")
