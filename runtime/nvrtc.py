"""CUDA C to machine code by NVRTC, which a wheel brings: no toolkit, no nvcc, no GPU. Knows source text, no kernels.

What was compiled once is kept in the user's cache.
"""

import ctypes
import functools
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vlquant.errors import MissingDependency

FOLDERS = ("nvidia.cuda_nvrtc", "nvidia.cu13", "nvidia.cu14")
"""Packages whose lib/ holds NVRTC: its own wheel for CUDA 12, that of everything since."""


class Program(NamedTuple):
    """What NVRTC makes of a source."""

    cubin: bytes
    """Machine code of one compute capability, an ELF file."""
    ptx: str
    """The step before it, readable."""
    log: str
    """The compiler's remarks."""


def compile_cubin(source: str, capability: tuple[int, int], *, defines: Sequence[str] = (), anew: bool = False) -> bytes:
    """Machine code of `source` for exactly one compute capability, from the cache if it was compiled before.

    defines: as in "HEAD_DIM=128"; anew: whatever the cache holds is not to be trusted. Raises MissingDependency without an NVRTC that knows the card.
    """
    # Not above: `vlquant doctor` asks this module of machines where torch, which these import, does not load.
    from vlquant.kept_answers import cache_folder
    from vlquant.publishing import replace_bytes

    library = load_nvrtc(capability)
    options = ["--gpu-architecture=sm_{}{}".format(*capability), "--std=c++14", *(f"--define-macro={each}" for each in defines)]
    known = "\0".join((source, *options, *map(str, nvrtc_version(library))))
    kept = cache_folder() / "kernels" / f"{hashlib.sha256(known.encode()).hexdigest()[:32]}.cubin"
    if kept.is_file() and not anew:
        return kept.read_bytes()
    cubin = compile_program(library, source, options).cubin
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(kept, cubin)
    except OSError:
        pass  # A cache that cannot be written costs the next start a second.
    return cubin


def compile_program(library: ctypes.CDLL, source: str, options: Sequence[str]) -> Program:
    """Compile one module. A source that does not compile is our mistake: RuntimeError."""
    program = ctypes.c_void_p()
    _must(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"vlquant.cu", 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*(each.encode() for each in options))
        status = library.nvrtcCompileProgram(program, len(options), given)
        log = _product(library, program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise RuntimeError(f"NVRTC: {log}")
        ptx = _product(library, program, "PTX").rstrip(b"\0").decode()
        return Program(_product(library, program, "CUBIN"), ptx, log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def load_nvrtc(capability: tuple[int, int]) -> ctypes.CDLL:
    """The newest NVRTC here that compiles for a card. Raises MissingDependency."""
    for library in libraries():
        if 10 * capability[0] + capability[1] in known_architectures(library):
            return library
    raise MissingDependency(
        "--device cuda compiles its kernels with NVRTC, and none is here that knows compute capability {}.{}; run pip install "
        "nvidia-cuda-nvrtc-cu12 (CUDA 13 dropped everything before 7.5), or choose --device cpu".format(*capability)
    )


def libraries() -> Iterator[ctypes.CDLL]:
    """Every NVRTC here that opens, in the order in which they are tried, each opened when it is its turn."""
    return (library for library in map(_open, nvrtc_paths()) if library is not None)


def known_architectures(library: ctypes.CDLL) -> list[int]:
    """What an NVRTC compiles for: 61 is compute capability 6.1."""
    count = ctypes.c_int()
    _must(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    architectures = (ctypes.c_int * count.value)()
    _must(library, library.nvrtcGetSupportedArchs(architectures))
    return list(architectures)


def nvrtc_paths() -> list[str]:
    """Where NVRTC may be, the newest first: wheels, then wherever the system looks."""
    found = []
    for package in FOLDERS:
        parent = package.partition(".")[0]
        spec = importlib.util.find_spec(package) if importlib.util.find_spec(parent) else None
        for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
            found += [path for path in Path(folder, "lib").glob("libnvrtc.so.*") if "alt" not in path.name]
    return [*map(str, sorted(found, key=lambda path: path.name, reverse=True)), "libnvrtc.so.13", "libnvrtc.so.12"]


def nvrtc_version(library: ctypes.CDLL) -> tuple[int, int]:
    """Major and minor CUDA version of an NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _must(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def _open(path: str) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return None
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _product(library: ctypes.CDLL, program: ctypes.c_void_p, name: str) -> bytes:
    size = ctypes.c_size_t()
    _must(library, getattr(library, f"nvrtcGet{name}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _must(library, getattr(library, f"nvrtcGet{name}")(program, buffer))
    return buffer.raw


def _must(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")
