"""What the system tells of the machine, its memory and installed libraries. Loads no library."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION_SETS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm",
)  # fmt: skip
"""Those that make matmuls fast, as /proc/cpuinfo calls them."""
LIBRARIES = (
    "torch", "numpy", "onnxruntime", "transformers", "llama_cpp_python", "gguf", "onnxruntime-genai", "openvino",
)  # fmt: skip

BUSY = 0.5
"""Load average of one core from which on a machine is not quiet."""


@dataclass(frozen=True)
class Machine:
    """Where and with what."""

    processor: str
    cores: int
    """That this process may use."""
    threads: int
    """That every contestant is given."""
    instructions: tuple[str, ...]
    """Of the processor."""
    system: str
    load_average: float | None
    """Of the last minute before anything was made or measured."""
    libraries: dict[str, str]
    """Those that are installed; vlquant and Python among them."""

    @property
    def is_busy(self) -> bool:
        """Whether somebody else was computing: what is measured then is worth little."""
        return self.load_average is not None and self.load_average > BUSY * self.cores


def this_machine(threads: int) -> Machine:
    """The machine this process runs on."""
    processor, flags = processor_and_flags()
    return Machine(
        processor=processor,
        cores=usable_cores(),
        threads=threads,
        instructions=tuple(each for each in INSTRUCTION_SETS if each in flags),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        libraries=library_versions(),
    )


def usable_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_and_flags() -> tuple[str, set[str]]:
    """The processor's name and its instruction sets; without /proc the name alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown", set()
    fields = dict([part.strip() for part in line.split(":", 1)] for line in reversed(lines) if ":" in line)
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.processor() or "unknown", set(flags.split())


def library_versions() -> dict[str, str]:
    """Versions of what is installed."""
    from vlquant import __version__

    versions = {"vlquant": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def physical_memory() -> int | None:
    """Bytes of memory there are; None where the system does not tell."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def available_memory() -> int | None:
    """Bytes that a program can take without driving others out of memory; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def peak_memory() -> int | None:
    """The most memory this process has held in bytes, file pages included (VmHWM); None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
