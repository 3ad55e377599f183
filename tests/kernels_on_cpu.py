"""The CUDA kernels' own source, compiled by the system's C++ compiler and run on the CPU, thread by thread."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from vlquant.runtime.cuda_driver import Card, kernel_parameters, kernel_source

SHIM = Path(__file__).parent / "kernels_on_cpu.h"
COMPILER = shutil.which("g++") or shutil.which("clang++")

CARD = Card(capability=(6, 1), processors=28)
"""Choices are made as for a GTX 1080 Ti."""

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++ or clang++")


class CpuKernels:
    """A module of kernels as `DriverKernels`, on tensors in the memory of the CPU."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.launched: list[str] = []

    def launch(self, name, grid, block, *arguments):
        assert block[0] * block[1] * block[2] <= 1024 and all(1 <= each <= 65535 for each in grid[1:]) and grid[0] >= 1
        parameters, values = kernel_parameters(arguments)
        shapes = (ctypes.c_int * 3)(*grid), (ctypes.c_int * 3)(*block)
        kernel = getattr(self.library, f"run_{name}")
        assert len(values) == PARAMETERS[name], f"{name} takes {PARAMETERS[name]} arguments"
        self.launched.append(name)
        assert kernel(*shapes, parameters) == 0, f"{name}: threads wait for one another in vain"


PARAMETERS: dict[str, int] = {}
"""How many arguments each kernel takes; what a GPU's driver would not notice either."""


def kernel_names(source: str) -> list[str]:
    """Every kernel of a module, in order."""
    return [name for name in re.findall(r"^[A-Z_0-9]+\((\w+), \w+, \w+\)$|__global__ void (\w+)\(", source, re.M) for name in name if name and name != "NAME"]


def parameter_counts(source: str) -> dict[str, int]:
    """The number of parameters of every kernel."""
    counts, macros = {}, {}
    for macro, parameters in re.findall(r"#define (\w+)\(NAME.*?__global__ void NAME\((.*?)\)", source, re.S):
        macros[macro] = parameters.count(",") + 1
    for macro, name in re.findall(r"^([A-Z_0-9]+)\((\w+), \w+, \w+\)$", source, re.M):
        counts[name] = macros[macro]
    for name, parameters in re.findall(r"__global__ void ([a-z]\w+)\((.*?)\)\s*\{", source, re.S):
        counts[name] = parameters.count(",") + 1
    return counts


@functools.cache
def cpu_kernels(files: tuple[str, ...], defines: tuple[str, ...] = (), *, backwards: bool = False) -> CpuKernels:
    """Compile files of `cuda_kernels`; backwards: the threads of a block take their turns from the last to the first."""
    source = kernel_source(files)
    PARAMETERS.update(parameter_counts(source))
    wrappers = "\n".join(f"ON_CPU({name})" for name in kernel_names(source))
    folder = Path(tempfile.mkdtemp(prefix="vlquant-kernels-"))
    (folder / "kernels.cpp").write_text(f'#include "{SHIM}"\n{source}\n{wrappers}\n')
    macros = [f"-D{each}" for each in (*defines, *(("BACKWARDS",) if backwards else ()))]
    options = ["-O1", "-std=c++14", "-shared", "-fPIC", "-w", "-ffp-contract=off", *macros]
    command = [COMPILER, *options, "-o", folder / "kernels.so", folder / "kernels.cpp"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    shutil.rmtree(folder)
    return CpuKernels(library)
