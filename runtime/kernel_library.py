"""The compiled library of the CPU kernels: found, and opened only if it is that of the Python files beside it. Needs no torch."""

import ctypes
import importlib.util

from vlquant.errors import VlquantError

LAYOUT = 4
"""LAYOUT of runtime/native/model.h, to be raised there and here with every change of what Python hands over."""
CHOICES = {"avx2": 1, "vnni": 2}
"""What VLQUANT_KERNELS may ask for, beside torch: the sets of instructions as the library counts them."""


def library_path() -> str | None:
    """The file of the kernels; None if this installation has none."""
    found = importlib.util.find_spec("vlquant.runtime._kernels")
    return found.origin if found else None


def open_library(path: str) -> ctypes.CDLL:
    """The library in a file. Raises VlquantError if it was built from other sources, whose structures may be others."""
    library = ctypes.CDLL(path)
    layout = getattr(library, "vlquant_layout", None)
    if layout is None or layout() != LAYOUT:
        raise VlquantError(
            f"{path} was built from other sources than the Python files beside it, and would read their memory wrongly; "
            "run pip install -e . again where these lie, or set VLQUANT_KERNELS=torch to do without it"
        )
    return library
